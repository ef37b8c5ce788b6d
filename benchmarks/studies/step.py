"""`python -m benchmarks.step`: a training step of each recipe, most worth first, each row on disk once it is timed.

`pytest benchmarks/test_step.py` times all recipes of a network in turn. This takes one at a time, in the order in which
an answer is wanted if time is short: on a GPU XL/2 and B/2 at batch 256, ours, ours as a CUDA graph and the authors'
recipe compiled; then the other recipes; then small batches, which compare hosts. A network on which ours does not fit
is taken at half the batch. A recipe is checked on the first blocks of the network and built once. Whatever ends the
run, the record holds what was timed and names what is missing.
"""

import time
from collections.abc import Iterator, Sequence

import torch

from benchmarks.harness import command
from benchmarks.harness.cases import Case, cases, small_batches
from benchmarks.harness.contestants import CONTESTANTS, FIRST, HEADLINE
from benchmarks.harness.race import Race, figures
from benchmarks.harness.recipes import OURS, Recipe
from benchmarks.report import record

LEAST_ROUNDS, MOST_ROUNDS = 5, 100


def races(recipes: Sequence[Recipe], only: str = "") -> list[Race]:
    """The networks and batches of this machine, most worth first. only: those whose description has the word in it."""
    found = cases() + (small_batches() if torch.cuda.is_available() else [])
    return [Race(case, recipes) for case in found if only in case.describe()]


def turns(all_races: list[Race]) -> Iterator[tuple[int, str]]:
    """(place of the race, name of the recipe), most worth first: the FIRST recipes of the races at the largest batch,
    their other recipes, then the races at smaller batches."""
    sizes = [race.case.config.batch_size for race in all_races]
    large = [k for k, size in enumerate(sizes) if size == max(sizes)]
    first = {recipe.name for recipe in FIRST}
    names = list(all_races[0].recipes)
    yield from ((k, name) for k in large for name in names if name in first)
    yield from ((k, name) for k in large for name in names if name not in first)
    yield from ((k, name) for k in range(len(all_races)) if k not in large for name in names)


def smaller(case: Case) -> Case | None:
    """The same network at half the batch, None: the batch is small already."""
    batch = case.config.batch_size
    return case.at(batch // 2) if batch >= 64 else None


def timed(race: Race, name: str, seconds: float) -> dict:
    """One recipe's turn: its row."""
    try:
        if race.enter(name):
            rounds = race.timer.rounds_within(seconds, least=LEAST_ROUNDS, most=MOST_ROUNDS)
            for _ in range(rounds):
                race.timer.round()
    except Exception as error:
        race.failed(name, error)
    finally:
        race.leave()
    return race.rows[name].as_dict()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 1 if a recipe failed."""
    parser = command.Parser(prog="python -m benchmarks.step", description=__doc__)
    about = "about how long to time each recipe, at least 5 rounds (15)"
    parser.add_argument("--seconds", type=command.seconds, default=15.0, help=about)
    about = "begin no recipe after so many seconds; record those that there are"
    parser.add_argument("--within", type=command.seconds, help=about)
    parser.add_argument("--every", action="store_true", help="every recipe, not only those of contestants.HEADLINE")
    parser.add_argument("--only", default="", metavar="WORD", help="networks whose description has it, such as XL/2")
    arguments = parser.parse(argv)
    kept, began = record.Growing("step", argv), time.monotonic()
    found = races(CONTESTANTS if arguments.every else HEADLINE, arguments.only)
    if not found:
        raise command.UserError(f"--only {arguments.only}: no network here is called so")
    given_up: list[dict] = []

    def rows() -> list[dict]:
        return [row for race in found for row in race.results()] + given_up

    def missing() -> list[str]:
        return [name for race in found for name in race.missing()]

    for k, name in turns(found):
        if rows() and arguments.within is not None and time.monotonic() - began > arguments.within:
            print(f"time is up: {len(missing())} are left out", flush=True)
            break
        row = timed(found[k], name, arguments.seconds)
        while name == OURS.name and row["skipped"] and not row["failed"] and (case := smaller(found[k].case)):
            say(row)
            given_up.append(row)
            found[k] = Race(case, list(found[k].recipes.values()))
            row = timed(found[k], name, arguments.seconds)
        say(row)
        kept.keep(rows(), missing())
    kept.finish(rows(), missing())
    return int(any(row["failed"] for row in rows()))


def say(row: dict) -> None:
    """Print what came of one turn."""
    figure = row["skipped"] and f"not timed: {row['skipped']}"
    if not figure:
        f = figures(row)
        figure = f"{f['median_ms']:.2f} ms ({f['low_ms']:.2f} to {f['high_ms']:.2f}), {f['images_per_s']:.1f} images/s"
    print(f"{row['case']}: {row['recipe']}: {figure}", flush=True)

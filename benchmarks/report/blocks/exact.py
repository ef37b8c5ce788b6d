"""Blocks of problems whose solution is known."""

from collections.abc import Callable

from benchmarks.report import mixture_tables
from benchmarks.report.blocks.layout import measured
from benchmarks.report.discrete_tables import discrete_table, pixel_table
from benchmarks.report.figures import picture
from benchmarks.report.tables import (
    number,
)
from benchmarks.report.tokens_tables import tokens_table


def tokens(run: dict) -> str:
    """A record of benchmarks.tokens as Markdown: more tokens at equal work."""
    runs = [row for row in run["rows"] if row["kind"] == "run"]
    work = runs[0]["step_flops"] * runs[0]["steps"]
    seeds = len({row["seed"] for row in runs})
    rates = len({row["lr"] for row in run["rows"] if row["kind"] == "rate"})
    note = (
        f"{number(work / 1e12)} TFLOP of training each, {seeds} seed{'s' * (seeds != 1)}, the better of {rates} "
        "learning rates on another seed. Errors relative to the exact velocity and to the exact f(x_1, 1, 0), "
        f"the latter by band of frequencies in half waves per image, too. `{run['command']}`."
    )
    shown = picture("tokens", "Error of one-step samples over FLOPs of training, and at their end by frequency.")
    return f"{tokens_table(run['rows'])}\n\n{shown}\n\n{measured(run, note)}"


def discrete(run: dict) -> str:
    """A record of benchmarks.discrete as Markdown: discrete values by continuous relaxation."""
    known = next(row for row in run["rows"] if row["kind"] == "reference")
    trained = [row for row in run["rows"] if row["kind"] == "digits"]
    seeds = len({row["seed"] for row in trained})
    note = (
        f"{trained[0]['steps']} steps each, {seeds} seed{'s' * (seeds != 1)}: mean (lowest to highest), where there is "
        "one figure the first seed alone. Half the distance between the values of a channel is its scale, 1 where none "
        f"is named. The data at 16 levels have a Frechet distance of {known['frechet']:.1f} to the data as they are; "
        f"the levels of one half of them vary by {known['variation of halves']:.3f} from the other's. "
        f"`{run['command']}`."
    )
    return f"{discrete_table(run['rows'])}\n\n{measured(run, note)}"


def discrete_pixel(run: dict) -> str:
    """The part of one pixel of a record of benchmarks.discrete, as Markdown."""
    trained = [row for row in run["rows"] if row["kind"] == "pixel"]
    noise = [row["exact_is_largest_noise"] for row in trained if "exact_is_largest_noise" in row]
    note = (
        f"{trained[0]['steps']} steps of 256 pixels each. One-hot, the exact solution goes to the largest channel of "
        f"the noise in {noise[0]:.3f} of the cases. `{run['command']}`."
    )
    shown = picture("discrete", "One grey pixel's exact and learned solution; the largest channel of one-hot samples.")
    return f"{pixel_table(run['rows'])}\n\n{shown}\n\n{measured(run, note)}"


def mixtures(name: str, run: dict) -> str:
    """One table of a record of benchmarks.mixtures, as Markdown."""
    rows = run["rows"]
    note = f"{mixture_tables.NOTES[name](rows)} `{run['command']}`."
    return f"{mixture_tables.TABLES[name](rows)}\n\n{measured(run, note)}"


def of_book(draw: Callable[[list[dict]], str], run: dict) -> str:
    """A table of the record behind the first chapters."""
    note = f"`{run['command']}`."
    return f"{draw(run['rows'])}\n\n{measured(run, note)}"

"""The study on mixtures as a whole: its jobs, a few steps of each part on the page, the command."""

import itertools
import math
import re
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from benchmarks import mixtures as typed
from benchmarks import mixtures_central as typed_central
from benchmarks.harness import command
from benchmarks.report import mixture_tables, pages, record
from benchmarks.studies import mixtures, mixtures_central
from benchmarks.studies.mixtures import minimisers, problems, trainings
from benchmarks.studies.mixtures.settings import SETTINGS
from benchmarks.studies.mixtures.slopes import slopes
from soflow_fast.errors import UserError

BASE = "base: p = 0, r from 0.1 to 0.01"


def test_the_jobs_are_those_of_each_seed():
    """Long trainings, of four times the steps, with the first two seeds alone; all else with every seed."""
    made = mixtures.jobs([5, 6, 7], 100)
    long = [job.arguments for job in made if job.call is trainings.long]
    assert {(seed, steps, every) for _, _, seed, steps, every in long} == {(5, 400, 25), (6, 400, 25)}
    assert len(long) == 2 * 2 * len(mixtures.LONG_R)
    judged = [job.arguments for job in made if job.call is trainings.judged]
    assert sorted(judged) == sorted(
        (name, problem, seed, 100) for name, one in SETTINGS.items() for problem in one.problems for seed in (5, 6, 7)
    )


def test_everything_measured_is_on_the_page(one_thread, monkeypatch, tmp_path):
    for module in (trainings, minimisers):
        monkeypatch.setattr(module, "held", lambda name: problems.held(name, 40, 400))
    rows = minimisers.biases("ring", points=20, rates=(0.2, 0.1))
    rows += minimisers.weighted(points=10, pairs=20, sizes=(2, 4))
    rows += [{"kind": "floor", "problem": "ring", "distance": 0.01}]
    rows += slopes("ring", 3, batches=1)
    for name in (BASE, "flow matching: p = 1", "difference: central, r = 0.1"):
        rows += trainings.judged(name, "ring", 0, 3)
    rows += trainings.long("ring", 0.1, 0, 4, 2)
    central = trainings.long("ring", 0.1, 0, 4, 2, central=True)
    assert central[0]["bias"] == rows[-1]["bias"]
    for point, other in zip(central[0]["points"], rows[-1]["points"], strict=True):  # whose times differ in any case
        assert point["step"] == other["step"] and point["one_step"] != other["one_step"]
    record.write(central, "python -m benchmarks.mixtures_central", tmp_path, "mixtures-central")
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    found = {(row["r"], row["way"]): row["error"] for row in rows if row.get("precision") == "fp64"}
    assert all(found[r, "central"] < found[r, "ahead"] for r in (0.3, 0.1, 0.03))
    for way, order in (("ahead", 1), ("central", 2)):  # both tend to the derivative, and as fast as they should
        assert found[0.01, way] / found[0.1, way] == pytest.approx(0.1**order, rel=0.3)
    record.write(rows, "python -m benchmarks.mixtures", tmp_path, "mixtures")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "open-questions.md"
    names = ["mixtures-central", *(f"mixtures-{name}" for name in mixture_tables.TABLES)]
    page.write_text("".join(f"<!-- benchmark:{name} -->\n<!-- /benchmark:{name} -->\n" for name in names))
    pages.main([], tmp_path, tmp_path)
    text = page.read_text()
    assert "| ring, 2-D | 0.1 |" in text and "| ring, 2-D | base: p = 0, r from 0.1 to 0.01 |" in text
    assert "flow matching: p = 1 |  |  |" in text and "|  |  | euler | 10 |" in text


PAGE = (record.ROOT / "docs" / "open-questions.md").read_text(encoding="utf-8")
PROSE = " ".join(re.sub(r"<!-- benchmark:(\S+) -->.*?<!-- /benchmark:\1 -->", "", PAGE, flags=re.DOTALL).split())
FROM_TABLES = {
    "0.00043": "0.0523 beside it: the marginal velocity at r = 0.002, to two digits",
    "0.314": "its formula stands before it",
    "0.807": "its formula stands before it",
    "0.994": "(1 + 1500) / (10 + 1500)",
}
"""Figures of the prose that no table has, and where they come from."""


def test_every_figure_of_the_prose_is_in_a_table():
    """Those of three places and more, as no other text has so many."""
    tables = "\n".join(line for line in PAGE.splitlines() if line.startswith("|"))
    known = {*re.findall(r"\d+\.\d+", tables), *FROM_TABLES}
    found = re.findall(r"(?<![\d./])\d\.\d{3,}", PROSE)
    assert len(found) > 80
    assert [figure for figure in found if figure not in known] == []
    assert [figure for figure in FROM_TABLES if figure not in found] == []
    assert f"{1501 / 1510:.3f}" in FROM_TABLES
    for formula, value in re.findall(r"\\sqrt{(\S+ \+ \S+)} = ([\d.]+)", PROSE):
        a, b = (float(part.removesuffix("^2")) for part in formula.split(" + "))
        assert f"{math.hypot(a, b):.3f}" == value


def test_what_the_page_concludes_is_so():
    run, central = (record.newest(record.HOME, name) for name in ("mixtures", "mixtures-central"))
    assert run is not None and central is not None and "unfinished" not in {**run, **central}
    rows = run["rows"]
    bias = {(row["problem"], row["r"]): row for row in rows if row["kind"] == "bias"}
    for problem, times, power in (
        ("ring", "{:.0f} times what Euler's", 0.38),
        ("scattered", "about {:.0f} times", 0.29),
    ):
        row = bias[problem, 0.002]
        assert times.format(row["pair"] / row["marginal"]) in PROSE
        slope = math.log(bias[problem, 0.1]["pair"] / row["pair"]) / math.log(50)
        assert slope == pytest.approx(power, abs=5e-3) and f"about as $r^{{{power}}}$" in PROSE
    every_r = sorted(r for problem, r in bias if problem == "ring")
    of_euler = [bias["ring", r]["marginal"] / r for r in every_r if r <= 0.1]
    assert max(of_euler) < 1.1 * min(of_euler)

    long = [row for row in rows if row["kind"] == "long"]
    for row in long:
        errors = [point["one_step"] for point in row["points"]]
        half = len(errors) // 2
        steps = [abs(a - b) for a, b in itertools.pairwise(errors[half:])]
        assert errors[-1] - errors[half - 1] < 2 * max(steps), "grows"
        if row["r"] == 0.1:
            last = row["points"][-1]
            assert abs(last["one_step"] - row["bias"]) < 0.02
            others = [found for found in central["rows"] if found["problem"] == row["problem"]]
            assert all(found["points"][-1]["from_fixed_point"] > 2 * last["from_fixed_point"] for found in others)
    for problem, closer in (("ring", 4.5), ("scattered", 3.6)):
        last = [row["points"][-1] for row in long if (row["problem"], row["r"]) == (problem, 0.1)]
        ratio = sum(point["one_step"] for point in last) / sum(point["from_fixed_point"] for point in last)
        assert ratio == pytest.approx(closer, abs=0.06)

    undecided = {row["dimensions"]: row for row in rows if row["kind"] == "weighted" and row["p"] == 1}
    assert f"from {100 * undecided[16]['undecided']:.0f} to {100 * undecided[64]['undecided']:.0f} %" in PROSE

    trained = {
        (row["problem"], f"{row['factor']}: {row['setting']}", row["seed"]): row["one_step"]
        for row in rows
        if row["kind"] == "training"
    }

    def over_base(problem: str, setting: str) -> list[float]:
        return [trained[problem, setting, seed] / trained[problem, BASE, seed] for seed in (0, 1, 2)]

    for problem, setting in (
        ("ring", "difference: ahead, r = 0.1"),
        ("scattered", "difference: ahead, r = 0.1"),
        ("scattered", "r: r from 0.1 to 0.002"),
        ("scattered", "r: r from 0.1 to 0.0003"),
        ("ring", "r: r from 0.1 to 0.01, cosine"),
        ("ring", "r: r from 0.1 to 0.01, linear"),
        ("ring", "difference: central, r from 0.1 to 0.01"),
        ("scattered", "difference: central, r from 0.1 to 0.01"),
        ("scattered", "p: p = 1"),
    ):
        assert min(over_base(problem, setting)) > 1, (problem, setting)
    assert max(over_base("ring", "p: p = 0.5")) < 1
    mean = {key[1]: sum(trained["ring", key[1], seed] for seed in (0, 1, 2)) for key in trained if key[0] == "ring"}
    assert min((name for name in mean if "flow matching" not in name), key=mean.__getitem__) == "p: p = 0.5"


def test_the_command_keeps_what_it_has_and_names_what_is_missing(monkeypatch, tmp_path, committed):
    monkeypatch.setattr(record, "RECORDS", tmp_path)
    monkeypatch.setattr(command, "workers", ThreadPoolExecutor)
    made = [mixtures.Job(name, lambda k: [{"kind": "x", "value": k}], (k,)) for k, name in enumerate("abb")]
    monkeypatch.setattr(mixtures, "jobs", lambda seeds, steps: [*made])
    kept, keep = [], record.Growing.keep
    monkeypatch.setattr(record.Growing, "keep", lambda self, *given: (kept.append(given[1]), keep(self, *given)))
    mixtures.main(["--workers", "1", "--seeds", "1"])
    assert kept == [["2 b"], ["b"], []]
    (path,) = tmp_path.iterdir()
    run = record.read(path)
    assert sorted(row["value"] for row in run["rows"]) == [0, 1, 2] and "unfinished" not in run
    assert run["command"] == "python -m benchmarks.mixtures --workers 1 --seeds 1"
    path.unlink()
    mixtures.main(["--workers", "1", "--within", "0"])
    (path,) = tmp_path.iterdir()
    run = record.read(path)
    assert run["missing"] == ["2 b"] and [row["value"] for row in run["rows"]] == [0]


def test_what_is_still_running_is_missing(monkeypatch, tmp_path, committed):
    kept, first = [], Event()

    def keep(self, rows, missing=()):
        kept.append([*missing])
        first.set()

    def second() -> list[dict]:
        assert first.wait(60)
        return [{"kind": "x"}]

    monkeypatch.setattr(record, "RECORDS", tmp_path)
    monkeypatch.setattr(record.Growing, "keep", keep)
    monkeypatch.setattr(command, "workers", ThreadPoolExecutor)
    monkeypatch.setattr(command.os, "cpu_count", lambda: 2)
    made = [mixtures.Job("b", second, ()), mixtures.Job("a", lambda: [{"kind": "x"}], ())]
    monkeypatch.setattr(mixtures, "jobs", lambda seeds, steps: [*made])
    mixtures.main(["--workers", "2"])
    assert kept == [["b"], []]


def test_long_trainings_by_a_central_difference_are_a_record_of_their_own(monkeypatch, tmp_path, committed):
    def long(problem: str, r: float, seed: int, steps: int, every: int, central: bool) -> list[dict]:
        point = {"step": steps, "cpu_seconds": 1.0, "one_step": 0.5, "from_fixed_point": 0.1}
        return [{"kind": "long", "problem": problem, "r": r, "seed": seed, "steps": every, "points": [point]}]

    monkeypatch.setattr(record, "RECORDS", tmp_path)
    monkeypatch.setattr(command, "workers", ThreadPoolExecutor)
    monkeypatch.setattr(mixtures_central, "long", long)
    mixtures_central.main(["--workers", "1", "--steps", "32"])
    (path,) = tmp_path.iterdir()
    run = record.read(path)
    made = [(row["problem"], row["seed"], row["steps"]) for row in run["rows"]]
    assert made == [("ring", 0, 2), ("scattered", 0, 2), ("ring", 1, 2), ("scattered", 1, 2)]
    assert run["command"] == "python -m benchmarks.mixtures_central --workers 1 --steps 32" and "unfinished" not in run


@pytest.mark.parametrize("words", ["--seeds 0 0", "--steps 0", "--workers 0", "--within -1"])
def test_mistakes_are_one_line_that_names_the_flag(words, monkeypatch):
    monkeypatch.setattr(record, "begin", None)  # whoever calls it fails
    with pytest.raises(UserError) as error:
        mixtures.main(words.split())
    assert words.split()[0] in str(error.value) and "\n" not in str(error.value)


def test_the_command_keeps_its_name():
    assert typed_central.main is mixtures_central.main
    assert typed.main is mixtures.main and "python -m benchmarks.mixtures" in str(mixtures.__doc__)
    made = mixtures.jobs([0, 1], 100)
    assert mixtures.missing(made)[-1].endswith("trainings of seed 1")

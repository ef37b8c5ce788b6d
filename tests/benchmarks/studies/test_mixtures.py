"""The study on mixtures as a whole: its jobs, a few steps of each part on the page, the command."""

import math
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


def test_the_page_says_what_the_records_say():
    run, central = (record.newest(record.HOME, name) for name in ("mixtures", "mixtures-central"))
    assert run is not None and central is not None
    text = " ".join((record.ROOT / "docs" / "open-questions.md").read_text(encoding="utf-8").split())
    bias = {(row["problem"], row["r"]): row for row in run["rows"] if row["kind"] == "bias"}
    for problem, times in (("ring", "costs {:.0f} times"), ("scattered", "on these 300 noises {:.0f} times in 16")):
        row = bias[problem, 0.002]
        assert times.format(row["pair"] / row["marginal"]) in text and f"{row['pair']:.4f} beside" in text
    long = {(row["problem"], row["r"]): row for row in run["rows"] if row["kind"] == "long"}
    for problem in ("ring", "scattered"):
        row, last = long[problem, 0.1], long[problem, 0.1]["points"][-1]
        assert f"at {last['one_step']:.3f} " in text and f"{row['bias']:.3f}" in text
        assert abs(last["one_step"] - row["bias"]) < 0.03 and last["from_fixed_point"] < 0.4 * row["bias"]
        other = next(found for found in central["rows"] if found["problem"] == problem)["points"][-1]
        assert f"{other['one_step']:.3f}" in text and other["from_fixed_point"] > 2 * last["from_fixed_point"]
    rows = [row for row in run["rows"] if row["kind"] == "training"]

    def mean(problem: str, setting: str, what: str) -> str:
        each = [
            row[what] for row in rows if (row["problem"], f"{row['factor']}: {row['setting']}") == (problem, setting)
        ]
        return f"{sum(each) / len(each):.3f}"

    p = [mean("ring", f"flow matching: p = {p}", "velocity") for p in ("0", "0.5", "1")]
    assert f"{p[0]}, {p[1]} and {p[2]} off on the ring" in text
    one, base = mean("scattered", "p: p = 1", "one_step"), mean("scattered", BASE, "one_step")
    assert f"{one} against {base} of the base" in text
    ways = [mean("ring", f"precision: {way}, r to 0.0003", "one_step") for way in ("bf16 pair", "fp16 pair")]
    assert f"the errors are {ways[0]} (bf16 pair), {ways[1]} (fp16 pair)" in text


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

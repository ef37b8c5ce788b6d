"""The study of equal work, a few steps of each method: what is counted, what is recorded, what the page shows."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from benchmarks.harness import command
from benchmarks.report import pages, record
from benchmarks.studies import equal_work, equal_work_problems
from soflow_fast.errors import Diverged, UserError

BLOCKS = ("digits", "photographs", "calls", "costs", "rates")


def test_the_counted_work_is_that_of_the_passes(one_thread, photographs):
    """In forwards of the whole batch: guidance 1 (w > 1), student 1, its backward 2, and what each method adds: SoFlow
    half of a forward on the digits, a quarter on the photographs, MeanFlow a quarter, and as published two more: the
    tangents of values and of weights. Input layers and the products of the weights' first backward make it less."""
    adds = {
        ("digits", "SoFlow"): 4.5,
        ("digits", "MeanFlow"): 4.25,
        ("digits", "MeanFlow as published"): 6,
        ("digits", "flow matching"): 4,
        ("photographs", "SoFlow"): 3.25,
        ("photographs", "MeanFlow"): 3.25,
        ("photographs", "flow matching"): 3,
    }
    for (name, method), forwards in adds.items():
        cost = equal_work.costs(name, method, photographs)
        found = cost["flops_per_step"] / (cost["batch"] * cost["flops_per_call"])
        assert found == pytest.approx(forwards, rel=0.02), (name, method)


def test_equal_work_is_as_many_steps_as_it_takes():
    cost = {("digits", "SoFlow"): {"flops_per_step": 9}, ("digits", "MeanFlow"): {"flops_per_step": 12}}
    assert equal_work.steps_of(cost, "digits", "MeanFlow", 100) == 75
    assert equal_work.steps_of(cost, "digits", "SoFlow", 100) == 100
    assert equal_work.steps_of(cost, "digits", "MeanFlow", 1) == 1


def test_the_best_rate_is_that_of_the_nearest_samples():
    tried = {2e-3: 50.0, 4e-3: 40.0, 8e-3: 45.0}
    rows = [
        {"kind": "rate", "problem": "digits", "method": "SoFlow", "lr": lr, "points": [{"frechet": frechet}]}
        for lr, frechet in tried.items()
    ]
    rows += [{**rows[0], "kind": "work", "points": [{"frechet": 1.0}]}]  # not of the search
    rows += [{**rows[0], "lr": 1e-2, "points": [], "diverged": True}]
    assert equal_work.best_rates(rows) == {("digits", "SoFlow"): 4e-3}


def test_methods_begin_alike(photographs):
    for name, path in {"digits": "", "photographs": photographs}.items():
        config = equal_work.PROBLEMS[name].configure(0, 10, 1e-3, path)
        states = [equal_work.METHODS[method].build(config) for method in equal_work.of_problem(name)]
        assert len(states) == {"digits": 4, "photographs": 3}[name]
        for state in states[1:]:
            assert state.config.optim == states[0].config.optim and state.config.model == states[0].config.model
            for p, q in zip(state.flow.parameters(), states[0].flow.parameters(), strict=True):
                assert torch.equal(p, q)


def test_a_training_that_diverges_is_a_row_that_says_so(one_thread, monkeypatch):
    def diverges(flow, nfe, path):
        raise Diverged("not finite")

    problem = equal_work_problems.DIGITS._replace(judge=diverges)
    monkeypatch.setitem(equal_work.PROBLEMS, "digits", problem)
    row = equal_work.train("digits", "SoFlow", 0, 1, 1e-3, "", "work")
    assert row["diverged"] and row["points"] == [] and row["samples"] == {}
    assert equal_work.said(row).endswith("diverged")


def test_trainings_are_judged_three_times_and_those_of_the_search_once(one_thread, monkeypatch):
    stops = []

    def trained(recipe, state, source, given, clock):
        stops.append(given)
        yield from (1.0 for _ in given)

    judged = []
    problem = equal_work_problems.DIGITS._replace(
        judge=lambda flow, nfe, path: judged.append((flow, nfe)) or {"n": nfe}
    )
    monkeypatch.setitem(equal_work.PROBLEMS, "digits", problem)
    monkeypatch.setattr(equal_work.quality_for_time, "trained", trained)
    row = equal_work.train("digits", "flow matching", 0, 10, 1e-3, "", "work")
    assert [point["n"] for point in row["points"]] == [10] * 3
    assert {nfe: found["n"] for nfe, found in row["samples"].items()} == {str(n): n for n in equal_work.EULER}
    assert len(judged) == 3 + len(equal_work.EULER) - 1, "the usual number of calls is judged once at the end"
    for kind in ("rate", "steps"):
        assert equal_work.train("digits", "SoFlow", 0, 10, 1e-3, "", kind)["samples"] == {}
    assert equal_work.train("digits", "SoFlow", 0, 2, 1e-3, "", "work")["lr"] == 1e-3
    assert stops == [[3, 6, 10], [10], [10], [1, 2]]


@pytest.mark.slow
def test_the_record_and_its_page(one_thread, photographs, tmp_path, monkeypatch, committed, capsys):
    monkeypatch.setattr(equal_work_problems, "DIGIT_SAMPLES", 40)
    monkeypatch.setattr(equal_work, "EULER", (1, 10))
    monkeypatch.setattr(command, "workers", lambda number: ThreadPoolExecutor(1))
    monkeypatch.setattr(record, "RECORDS", tmp_path / "records")
    arguments = ["--seeds", "0", "1", "--photograph-seeds", "0", "--steps", "4", "--photograph-steps", "4"]
    equal_work.main([*arguments, "--data", photographs, "--workers", "1"])
    (path,) = (tmp_path / "records").glob("*-equal-work-*.json")
    rows = record.read(path)["rows"]
    costs = {(row["problem"], row["method"]): row["flops_per_step"] for row in rows if row["kind"] == "cost"}
    compared = [row for row in rows if row["kind"] == "work"]
    assert len(compared) == 2 * 4 + 3
    for row in compared:
        step = costs[row["problem"], row["method"]]
        assert abs(row["steps"] * step - 4 * costs[row["problem"], "SoFlow"]) <= step / 2
        assert [point["step"] for point in row["points"]][-1] == row["steps"]
        assert row["points"][-1]["cpu_seconds"] > 0
        assert set(row["samples"]) == ({"1", "10"} if row["method"] == "flow matching" else {"1", "2"})
    after = [row for row in rows if row["kind"] == "steps"]
    assert after and all(row["steps"] == 4 for row in after)
    searched = [row for row in rows if row["kind"] == "rate"]
    assert len(searched) == 3 * (4 + 3) and {row["seed"] for row in searched} == {equal_work.TUNING_SEED}
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "equal-work.md"
    page.write_text(
        "".join(f"<!-- benchmark:equal-work-{name} -->\n<!-- /benchmark:equal-work-{name} -->\n" for name in BLOCKS)
    )
    assert pages.main([], tmp_path, tmp_path / "records") == 0
    text = page.read_text()
    assert text.count("| MeanFlow as published |") == 5 and "| other real images |" in text
    assert "| SoFlow | 1 | 0.00" in text and "Mean (lowest to highest) over the seeds" in text
    assert pages.main(["--check"], tmp_path, tmp_path / "records") == 0


@pytest.mark.parametrize("done", [0, 2, 14])
def test_an_interrupted_study_names_all_that_is_missing(done, one_thread, tmp_path, monkeypatch, committed):
    """In the search for rates, of 12 trainings, the compared ones too, which have not begun; it keeps what was done."""
    rows = iter(range(100))

    def train(name, method, seed, steps, rate, path, kind):
        if next(rows) >= done:
            raise KeyboardInterrupt
        about = {"kind": kind, "problem": name, "method": method, "seed": seed, "lr": rate, "steps": steps}
        return about | {"points": [{"frechet": 1.0, "cpu_seconds": 1.0}]}

    found = {"SoFlow": 4, "MeanFlow": 4, "MeanFlow as published": 5, "flow matching": 4}
    monkeypatch.setattr(equal_work, "train", train)
    monkeypatch.setattr(equal_work, "costs", lambda name, method, path: {"flops_per_step": found[method]})
    monkeypatch.setattr(command, "workers", lambda number: ThreadPoolExecutor(1))
    monkeypatch.setattr(record, "RECORDS", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        equal_work.main(["--seeds", "0", "1", "--steps", "8"])
    (path,) = tmp_path.glob("*-equal-work-*.json")
    run = record.read(path)
    searched = [f"rate digits {method} 1000, lr {rate:g}" for method in found for rate in equal_work_problems.RATES]
    compared = [f"work digits {method} {seed}" for seed in (0, 1) for method in found]
    compared += [f"steps digits MeanFlow as published {seed}" for seed in (0, 1)]
    kept = [
        equal_work.called(row["problem"], row["method"], row["seed"], row["steps"], row["lr"], "", row["kind"])
        for row in run["rows"]
        if row["kind"] != "cost"
    ]
    assert len(kept) <= done and len(run["rows"]) == len(found) + len(kept)
    third = {"SoFlow": 3, "MeanFlow": 3, "MeanFlow as published": 2, "flow matching": 3}  # of 8 steps, of 4 FLOPs each
    assert all(row["steps"] == third[row["method"]] for row in run["rows"] if row["kind"] == "rate")
    assert run["unfinished"] and sorted([*kept, *run["missing"]]) == sorted([*searched, *compared])


MISTAKES = {
    "--seeds 0 0": "--seeds: 0 is given twice",
    "--seeds 0 --photograph-seeds 1 1": "--photograph-seeds: 1 is given twice",
    f"--seeds {equal_work.TUNING_SEED}": "--seeds: 1000 is the seed on which learning rates are chosen",
    "--steps 0": "--steps",
    "--photograph-steps x": "--photograph-steps",
    "--dat here": "did you mean --data",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_are_one_line_that_names_the_flag(arguments):
    with pytest.raises(UserError) as caught:
        equal_work.main(arguments.split())
    assert MISTAKES[arguments] in str(caught.value) and "\n" not in str(caught.value)


def test_photographs_that_are_not_there(tmp_path, monkeypatch, committed):
    monkeypatch.setattr(record, "RECORDS", tmp_path / "records")
    with pytest.raises(UserError, match="--data nowhere"):
        equal_work.main(["--data", "nowhere", "--steps", "1"])


def test_photographs_are_asked_for_with_data_alone():
    for flags in (["--photograph-steps", "5"], ["--photograph-seeds", "1"]):
        with pytest.raises(UserError, match="no photographs without --data"):
            equal_work.main(flags)


def test_a_method_that_diverges_at_every_rate_is_left_out():
    cost = {("digits", method): {"flops_per_step": 1} for method in equal_work.of_problem("digits")}
    rates = {("digits", method): 1e-3 for method in equal_work.of_problem("digits")[1:]}
    jobs = list(equal_work.compared(cost, {"digits": 5}, {"digits": [0]}, rates, ""))
    assert [job[1] for job in jobs] == equal_work.of_problem("digits")[1:]


def test_the_answer_says_what_the_record_says():
    run = record.newest(record.HOME, "equal-work")
    assert run is not None
    page = (record.ROOT / "docs" / "equal-work.md").read_text(encoding="utf-8")
    answer = " ".join(page.partition("## The answer")[2].partition("\n## ")[0].split())

    def figures(method: str, figure: str, nfe: int, kind: str = "work", problem: str = "digits") -> list[float]:
        rows = [
            row for row in run["rows"] if (row["kind"], row["problem"], row.get("method")) == (kind, problem, method)
        ]
        return [row["samples"][str(nfe)][figure] if kind == "work" else row["points"][-1][figure] for row in rows]

    def said(values: list[float], places: int) -> str:
        mean, least, most = (f"{value:.{places}f}" for value in (sum(values) / len(values), min(values), max(values)))
        return f"{mean} ({least} to {most})"

    def mean(values: list[float], places: int) -> str:
        return f"{sum(values) / len(values):.{places}f}"

    soflow, meanflow = (figures(method, "frechet", 1) for method in ("SoFlow", "MeanFlow"))
    twice = [figures(method, "frechet", 2) for method in ("MeanFlow", "SoFlow")]
    assert f"{said(soflow, 1)} against {said(meanflow, 1)}" in answer
    assert f"{said(twice[0], 1)} against {said(twice[1], 1)}" in answer and max(twice[0]) < min(twice[1])
    for method, places in (("SoFlow", 3), ("MeanFlow", 3)):
        assert said(figures(method, "fd_random", 1, problem="photographs"), places) in answer
    published = "MeanFlow as published"
    assert f"ends at {said(figures(published, 'frechet', 1), 1)}." in answer
    assert f"ends at {said(figures(published, 'frechet', 1, 'steps'), 1)}, where" in answer
    assert f"ends at {said(figures('MeanFlow', 'frechet', 1, 'steps'), 1)}." in answer
    flow = {n: mean(figures("flow matching", "frechet", n), 1) for n in (10, 25)}
    coarse = [
        mean(figures(method, "fd_pixels", n, problem="photographs"), 2)
        for method, n in (("flow matching", 10), ("SoFlow", 1), ("MeanFlow", 1))
    ]
    assert flow[10] in answer and f"25 calls comes to {flow[25]}" in answer
    assert f"{coarse[0]} where SoFlow has {coarse[1]} and MeanFlow {coarse[2]}" in answer

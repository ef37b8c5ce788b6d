"""The step's command: most worth first, one build a recipe, every row on disk as soon as it is there."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter

import pytest
import torch

from benchmarks.baselines import fused
from benchmarks.baselines.authors import AUTHORS
from benchmarks.harness import recipes, timing
from benchmarks.harness.cases import Case, gpu_cases, small_batches
from benchmarks.harness.contestants import COMPILED, FIRST, HEADLINE, QUARTER
from benchmarks.harness.race import Race
from benchmarks.harness.recipes import AS_TRAINED, OURS
from benchmarks.report import record
from benchmarks.report.blocks import steps
from benchmarks.studies import step
from soflow_fast.config.schema import override
from soflow_fast.training import state
from tests.benchmarks.tiny import CASE, CONFIG

SEEDS = {"one": 91, "two": 92}  # nobody else's, as checks that have passed are remembered
LARGE = [Case(name, override(CONFIG, {"model.depth": 3, "seed": seed})) for name, seed in SEEDS.items()]


def test_what_answers_the_question_comes_first():
    """Of the networks and batches of a GPU, by their configurations alone."""
    cases = gpu_cases() + small_batches()
    on_cpu = [case._replace(config=override(case.config, {"run.device": "cpu"})) for case in cases]
    races = [Race(case, HEADLINE) for case in on_cpu]
    names = [(races[k].case.describe().split(":")[0], races[k].case.config.batch_size, n) for k, n in step.turns(races)]
    first = [("DiT-XL/2", 256), ("DiT-B/2", 256)]
    assert names[:6] == [(*at, recipe.name) for at in first for recipe in FIRST]
    assert [recipe.name for recipe in FIRST] == [OURS.name, AS_TRAINED.name, COMPILED[0].name]
    rest = names[6 : 2 * len(HEADLINE)]
    assert {at for *at, _ in map(list, rest) for at in [tuple(at)]} == set(first)
    assert {batch for _, batch, _ in names[2 * len(HEADLINE) :]} == {32} and len(set(names)) == 4 * len(HEADLINE)


@pytest.fixture
def counted(monkeypatch, tmp_path, committed):
    """The command on two tiny networks with recipes that are counted and times that cost nothing."""
    monkeypatch.setattr(record, "RECORDS", tmp_path)
    monkeypatch.setattr(step, "cases", lambda: LARGE)
    monkeypatch.setattr(timing.Stopwatch, "seconds", lambda self, call: 0.25)
    built: Counter = Counter()
    plain = state.TrainState.build.__func__

    def build(cls, config, **named):
        built[config.seed, config.model.depth] += 1
        return plain(cls, config, **named)

    monkeypatch.setattr(state.TrainState, "build", classmethod(build))
    made: list[int] = []
    drawn = state.initial_weights
    monkeypatch.setattr(state, "initial_weights", lambda config: made.append(config.model.depth) or drawn(config))
    recipes.initial_weights.cache_clear()
    yield built, made
    recipes.initial_weights.cache_clear()


def test_every_recipe_is_built_once_and_weights_are_made_once(counted, monkeypatch, tmp_path, capsys):
    built, made = counted
    monkeypatch.setattr(step, "HEADLINE", [OURS, AS_TRAINED, QUARTER, AUTHORS])
    assert step.main(["--seconds", "0"]) == 0
    run = record.newest(tmp_path)
    assert run is not None and "unfinished" not in run and "missing" not in run
    timed = [(row["case"].split(":")[0], row["recipe"]) for row in run["rows"] if row["seconds"]]
    assert timed == [(n, r) for n in ("one", "two") for r in (OURS.name, QUARTER.name, AUTHORS.name)]
    assert all(row["seconds"] == [0.25] * 5 for row in run["rows"] if row["seconds"])
    assert built[91, 3] == built[92, 3] == 3, "once each, at full depth"
    assert 0 < built[91, 2] <= 8 and 0 < built[92, 2] <= 8, "of the checks, on two blocks"
    assert sorted(made) == [2, 2, 3, 3], "once for a network, once for its checks"
    assert "CUDA graphs need a GPU" in steps.table(run)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in said[:4]] == ["one", "one", "two", "two"], "the first recipes of both first"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch's own, while it traces
def test_graphs_that_are_compiled(counted, monkeypatch):
    """For a compiled recipe on a CPU one set, of the timed precision: its check runs what is timed. (The stride of a
    modulation tells the depth of a network, so that on a GPU the check on two blocks has a set of its own.)"""
    graphs: list[tuple[int, torch.dtype, int]] = []

    def backend(module, inputs):
        x = next(x for x in inputs if isinstance(x, torch.Tensor) and x.dim() == 3)
        stride = next(x for x in inputs if isinstance(x, torch.Tensor) and x.dim() == 2 and not x.is_contiguous())
        graphs.append((len(x), x.dtype, stride.stride(0) // x.shape[2]))
        return module.forward

    monkeypatch.setattr(fused, "_inductor", lambda mix_order: backend)
    changes = {"precision": "bf16", "batch_size": 16, "model.hidden_size": 64}
    case = LARGE[0]._replace(config=override(LARGE[0].config, changes))
    race = Race(case, [COMPILED[0]])
    assert race.enter(COMPILED[0].name), race.rows[COMPILED[0].name].skipped
    # A first block and the others, with and without gradient, for each part of the batch.
    wanted = {(batch, torch.bfloat16, 6 * 3 + 2): 4 for batch in (4, 12)}
    assert Counter(graphs) == wanted


def test_a_network_on_which_ours_does_not_fit_is_taken_at_half_the_batch(counted, monkeypatch, tmp_path):
    monkeypatch.setattr(step, "cases", lambda: [CASE.at(256)])
    monkeypatch.setattr(step, "HEADLINE", [OURS, QUARTER])
    plain = Case.batch

    def batch(case, device):
        if case.config.batch_size > 64:
            raise torch.OutOfMemoryError("no more")
        return plain(case, device)

    monkeypatch.setattr(Case, "batch", batch)
    assert step.main(["--seconds", "0"]) == 0
    run = record.newest(tmp_path)
    assert run is not None
    assert [(row["case"].split("batch ")[1], row["recipe"], row["skipped"]) for row in run["rows"]] == [
        ("64", OURS.name, None),
        ("64", QUARTER.name, None),
        ("256", OURS.name, "out of memory"),
        ("128", OURS.name, "out of memory"),
    ]


def test_what_fails_is_named_and_stops_nothing(counted, monkeypatch, tmp_path):
    def broken(*given, **told):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(step, "HEADLINE", [OURS, QUARTER._replace(name="broken", step=broken), QUARTER])
    assert step.main(["--seconds", "0", "--only", "one"]) == 1
    run = record.newest(tmp_path)
    assert run is not None
    assert [row["skipped"] for row in run["rows"]] == [None, "RuntimeError: no kernel image", None]


def test_when_time_is_up_the_record_names_what_is_missing(counted, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(step, "HEADLINE", [OURS, QUARTER])
    assert step.main(["--seconds", "0", "--within", "0"]) == 0
    run = record.newest(tmp_path)
    assert run is not None and run["unfinished"] and [row["recipe"] for row in run["rows"]] == [OURS.name]
    assert run["missing"] == [f"{LARGE[0].describe()}: {QUARTER.name}"] + [
        f"{LARGE[1].describe()}: {name}" for name in (OURS.name, QUARTER.name)
    ]
    assert "time is up: 3 are left out" in capsys.readouterr().out
    assert f"Missing: {'; '.join(run['missing'])}." in steps.table(run)


STOPPED = """
import os, sys
from benchmarks.harness import command
from benchmarks.studies import step
from tests.benchmarks.studies.test_benchmark_step import LARGE, OURS, QUARTER
plain, calls = step.timed, []
def timed(*given):
    calls.append(given)
    if len(calls) == 3:
        os.kill(os.getpid(), int(sys.argv[1]))
    return plain(*given)
step.timed, step.cases, step.HEADLINE = timed, lambda: LARGE, [OURS, QUARTER]
command.run(lambda: step.main(["--seconds", "0"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_stopped_run_leaves_the_rows_that_were_timed(signum, code, environment, tmp_path):
    names = environment | {"SOFLOW_RECORDS": str(tmp_path)}
    command = [sys.executable, "-c", STOPPED, str(int(signum))]
    found = subprocess.run(command, env=names, cwd=record.ROOT, capture_output=True, text=True)
    assert found.returncode == code, found.stderr
    (path,) = tmp_path.iterdir()
    run = json.loads(path.read_text())
    assert run["unfinished"] and [len(row["seconds"]) for row in run["rows"]] == [5, 5]
    assert run["missing"] == [f"{case.describe()}: {QUARTER.name}" for case in LARGE]
    assert os.path.basename(path).endswith("-unfinished.json") and record.read(path)

"""What the race counts beside the time, who may stay away from it, and what a report makes of both."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import account, ceilings, conftest, quality_for_time, record, report
from benchmarks import race as race_module
from benchmarks.baselines import authors
from benchmarks.baselines.authors import AUTHORS
from benchmarks.cases import Case
from benchmarks.contestants import CONTESTANTS, DIFFERENCE, HEADLINE, MEANFLOW, QUARTER
from benchmarks.gates import CHANGES, RedGate, check, random_batch
from benchmarks.race import Race, Row, entry, largest, largest_that, speed_ups
from benchmarks.recipes import OURS, build, ours
from soflow_fast.config.schema import Config, DataConfig, DiTConfig, RunConfig, override

CONFIG = Config(
    model=DiTConfig(input_size=4, patch_size=2, in_channels=2, hidden_size=16, depth=2, num_heads=2, num_classes=3),
    data=DataConfig(kind="latents"),
    run=RunConfig(device="cpu"),
    batch_size=8,
)
CASE = Case("tiny", CONFIG)


@pytest.fixture(scope="module", autouse=True)
def small_ceilings():
    """Ceilings of a moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ceilings.SIDE, "cpu", 64)
        patch.setitem(ceilings.BYTES, "cpu", 2**16)
        ceilings.product_ceiling.cache_clear()
        ceilings.copy_ceiling.cache_clear()
        yield
    ceilings.product_ceiling.cache_clear()
    ceilings.copy_ceiling.cache_clear()


@pytest.fixture(scope="module")
def rows():
    absent = AUTHORS._replace(name="absent", why_not=lambda config: "is elsewhere")
    race = Race(CASE, [AUTHORS, MEANFLOW, QUARTER, DIFFERENCE, absent])
    (names,) = race.heats()
    race.warm_up(names)
    for _ in range(race.rounds(0.0)):
        race.run_baselines()
        race.steps[OURS.name]()
    return race.results(names) + race.absent()


def test_counted_forwards(rows):
    """In units of one forward.

    All but MeanFlow as published: guidance 1.25 (the quarter takes a labelled call as well), the student's forward and
    backward 3, and a quarter once more: the look-ahead, the other end of a difference, or the tangents. The first
    layers have no gradient to their input, which weighs up to 0.3 on so small a network. Tangents take the values of
    the student's forward, but for conditioning and patches, and five products for attention where a forward has two.
    As published: guidance 2, and torch.func.jvp over the whole batch with its backward 5: values 1, tangents 1, the
    input with the weights' zero tangents 1, the backward of the values 2, none of the tangents.
    """
    found = {row["recipe"]: row["forwards_per_image"] for row in rows if not row["skipped"]}
    assert found[OURS.name] == found[AUTHORS.name] == found[DIFFERENCE.name] == pytest.approx(4.5, abs=0.3)
    tokens, hidden = 4, 16
    conditioning, patches = 2 * 2 * (256 * hidden + hidden * hidden), 2 * tokens * 8 * hidden
    attention = CONFIG.model.depth * 3 * 2 * tokens * tokens * hidden
    one = rows[0]["flops_per_image"] / rows[0]["forwards_per_image"]
    more = (conditioning + patches + attention) / one
    assert found[QUARTER.name] - found[DIFFERENCE.name] == pytest.approx(0.25 * more, rel=1e-6)
    assert found[MEANFLOW.name] == pytest.approx(2 + 5, abs=0.4)


def test_rows_have_bytes_memory_and_ceilings(rows):
    found = {row["recipe"]: row for row in rows if not row["skipped"]}
    assert all(row["bytes_per_image"] > 0 and row["kept_for_backward"] > 0 for row in found.values())
    # The tangents of the whole batch are kept as well.
    assert found[MEANFLOW.name]["kept_for_backward"] > 1.5 * found[QUARTER.name]["kept_for_backward"]
    assert all(row["product_ceiling"] > 0 and row["copy_ceiling"] > 0 for row in found.values())
    assert set(speed_ups(rows)) == {AUTHORS.name, MEANFLOW.name, QUARTER.name, DIFFERENCE.name}


def test_an_absent_recipe_keeps_its_reason(rows):
    last = rows[-1]
    assert last["recipe"] == "absent" and last["skipped"] == "is elsewhere" and last["seconds"] == []
    run = {
        "rows": rows,
        "command": "x",
        "versions": {},
        "threads": 1,
        "commit": None,
        "date": "2026-11-21",
        "device": "d",
    }
    text = report.table(run | {"file": "f"})
    assert "Not run: absent: is elsewhere." in text and "| absent |" not in text and "kept for the backward" in text
    elsewhere = [row | {"case": "another"} for row in rows[:-1]]
    assert f"absent ({rows[0]['case']}): is elsewhere." in report.table(run | {"rows": rows + elsewhere, "file": "f"})
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def falling(error, name="falling", where="gate"):
    """A recipe that raises an error in its gate, or once it is built."""

    def fall(*arguments):
        raise error

    if where == "gate":
        return AUTHORS._replace(name=name, gate=fall)
    return AUTHORS._replace(name=name, gate=lambda config, recipe: {}, build=fall)


def test_only_ours_may_not_fall(monkeypatch):
    """The others keep a row that says why, and whether that is a fault; the race goes on."""
    errors = {
        "memory": (falling(torch.OutOfMemoryError("CUDA"), "memory", "build"), "out of memory", False),
        "gate's memory": (falling(torch.OutOfMemoryError("CUDA"), "gate's memory"), "out of memory in its gate", False),
        "update's memory": (falling(MemoryError("x"), "update's memory", "build"), "out of memory", False),
        "red": (falling(RedGate("du/dt:\n1"), "red"), "its gate is red: du/dt: 1", True),
        "broken": (falling(RuntimeError("no kernel"), "broken", "build"), "RuntimeError: no kernel", True),
    }
    race = Race(CASE, [recipe for recipe, _, _ in errors.values()] + [QUARTER])
    assert race.heats() == [[QUARTER.name]]
    race.warm_up([QUARTER.name])
    assert list(race.steps) == [OURS.name, QUARTER.name]
    assert {row["recipe"]: (row["skipped"], row["failed"]) for row in race.absent()} == {
        name: wanted for name, (_, *wanted) in errors.items() for wanted in [tuple(wanted)]
    }
    for error in (torch.OutOfMemoryError("no more"), RedGate("no"), RuntimeError("no")):
        monkeypatch.setattr(race_module, "entry", lambda case, recipe, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            Race(CASE, [])


def test_each_is_measured_alone_in_memory(monkeypatch):
    """No state of a timed step is there while the peak of another recipe is taken."""
    came = []
    for name in ("entry", "timed_step"):
        plain = getattr(race_module, name)
        monkeypatch.setattr(race_module, name, lambda *a, name=name, plain=plain: came.append(name) or plain(*a))
    race = Race(CASE, [AUTHORS, QUARTER])
    race.warm_up([AUTHORS.name, QUARTER.name])
    assert came == ["entry"] * 3 + ["timed_step"] * 3


def test_memory_that_runs_out_beside_the_others(monkeypatch):
    plain = race_module.timed_step

    def full(case, recipe, seconds):
        if recipe is AUTHORS:
            raise torch.OutOfMemoryError("no more")
        return plain(case, recipe, seconds)

    monkeypatch.setattr(race_module, "timed_step", full)
    race = Race(CASE, [AUTHORS, QUARTER])
    race.warm_up([AUTHORS.name, QUARTER.name])
    assert race.rows[AUTHORS.name].skipped == "out of memory"
    assert list(race.steps) == [OURS.name, QUARTER.name]


def test_nobody_always_comes_after_the_same():
    race = Race(CASE, [])
    came = []
    race.steps = {name: partial(came.append, name) for name in (OURS.name, "a", "b", "c")}
    for _ in range(3):
        race.run_baselines()
    assert "".join(came) == "abcbcacab"


def test_states_of_a_race_begin_with_the_same_weights():
    first, second = build(OURS, CONFIG), build(MEANFLOW, CONFIG)
    with torch.no_grad():
        first.flow.network.final_layer.linear.weight.add_(1)
    for state in (second, build(AUTHORS, CONFIG)):
        for average, p, q in zip(
            state.ema.parameters(), state.flow.parameters(), build(OURS, CONFIG).flow.parameters(), strict=True
        ):
            assert torch.equal(p, q) and torch.equal(p, average) and float(p.detach().std()) > 0.01
    other = build(OURS, override(CONFIG, {"seed": 1})).flow
    assert not any(map(torch.equal, other.parameters(), second.flow.parameters()))


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 100, 767, 768, 2047, 2048, 5000])
def test_largest_that_fits(limit):
    tried = []
    found = largest_that(lambda batch: tried.append(batch) or batch <= limit, 2048)
    assert found <= min(limit, 2048) < found * 1.125 + 1 and len(set(tried)) == len(tried)
    assert not found or max(batch for batch in tried if batch <= limit) == found


def test_largest_batch(monkeypatch):
    """Beyond 12 images memory runs out; what is counted is counted at the batch of the case."""
    plain, counted = Case.batch, []

    def batch(case, device):
        if case.config.batch_size > 12:
            raise torch.OutOfMemoryError("no more")
        return plain(case, device)

    monkeypatch.setattr(Case, "batch", batch)
    monkeypatch.setattr(race_module, "LARGEST", 64)
    monkeypatch.setattr(account, "flops", lambda work, flops=account.flops: counted.append(1) or flops(work))
    row = largest(CASE, AUTHORS, rounds=2)
    assert row.batch == 12 and len(row.seconds) == 2 and row.case.endswith("largest batch that fits")
    assert len(counted) == 2  # a forward and a step, once
    assert row.flops_per_image == entry(CASE, AUTHORS).flops_per_image
    assert largest(CASE, falling(RedGate("no"))).failed
    assert largest(CASE, AUTHORS._replace(why_not=lambda config: "elsewhere")).skipped == "elsewhere"
    monkeypatch.setattr(race_module, "timed_step", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("no more")))
    assert largest(CASE, AUTHORS).skipped == "out of memory"


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"seconds": -1.0}, {"kernel_seconds": float("nan")}], ids=str)
def test_options_of_the_benchmarks(wrong, monkeypatch):
    monkeypatch.setattr(conftest.signal, "signal", lambda *_: None)
    options = {"batch": 32, "seconds": 1.0, "kernel_seconds": 1.0, "record": False}
    conftest.pytest_configure(SimpleNamespace(option=SimpleNamespace(**options), stash={}))
    with pytest.raises(pytest.UsageError, match="--" + next(iter(wrong)).replace("_", "-")):
        conftest.pytest_configure(SimpleNamespace(option=SimpleNamespace(**options | wrong), stash={}))


def test_what_was_measured_is_on_record_however_the_run_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RECORDS", tmp_path)
    row = Row(case="c", recipe="r", seconds=[1.0]).as_dict()
    for code, said in ((0, ".json"), (1, "not everything passed or was reached"), (2, "passed or was reached")):
        lines: list[str] = []
        config = SimpleNamespace(
            stash={conftest.ROWS: [row, row], conftest.KERNEL_ROWS: [], conftest.BEGUN: None},
            option=SimpleNamespace(batch=None),
            rootpath=tmp_path,
            getoption=lambda name: True,
            invocation_params=SimpleNamespace(args=["benchmarks/"]),
        )
        conftest.pytest_terminal_summary(SimpleNamespace(line=lines.append, section=lines.append), code, config)
        assert lines[-1].startswith("recorded: ") and lines[-1].endswith(said)
        run = record.newest(tmp_path)
        assert run is not None and run["rows"] == [row, row]
        (tmp_path / run["file"]).unlink()


def test_another_batch():
    case = CASE.at(3)
    assert len(case.batch(torch.device("cpu"))[0]) == 3 and case.config.model == CONFIG.model


def test_every_recipe_runs_or_says_why_not():
    names = [recipe.name for recipe in CONTESTANTS]
    assert len(set(names)) == len(names) and CONTESTANTS[0] is OURS
    reasons = {recipe.name: recipe.why_not(CONFIG) for recipe in CONTESTANTS}
    for name in (OURS.name, AUTHORS.name, MEANFLOW.name, QUARTER.name, DIFFERENCE.name):
        assert reasons[name] is None
    if not torch.cuda.is_available():
        assert "GPU" in str(reasons["soflow-fast, CUDA graph"])
    assert set(HEADLINE) < set(CONTESTANTS) and HEADLINE[0] is OURS


def test_what_a_row_says_without_figures():
    row = Row(case="c", recipe="r", skipped="why").as_dict()
    assert row["seconds"] == [] and row["peak_allocated"] is None


def test_flops_and_bytes_of_a_product():
    a, b = torch.zeros(3, 4), torch.zeros(4, 5)
    assert account.flops(lambda: a @ b) == 2 * 3 * 4 * 5
    assert account.bytes_moved(lambda: a @ b) == 4 * (12 + 20 + 15)
    assert account.bytes_moved(lambda: a.add_(1)) == 4 * (12 + 12)  # read and written
    assert account.bytes_moved(lambda: a.t()[1:].reshape(-1)) == 4 * (9 + 9)  # views are free, a copy is not
    assert account.bytes_moved(lambda: torch.zeros(1, 4).expand(8, 4) + a[:1]) < 4 * 100


def test_what_autograd_keeps():
    """Linear and GELU: the input of each, weights apart; a storage that is kept twice counts once."""
    state = build(OURS, CONFIG)
    x = torch.zeros(4, 16, requires_grad=True)
    layer = nn.Linear(16, 16)
    state.flow.network.extra = layer
    kept = account.kept_for_backward(state, lambda: nn.functional.gelu(layer(x)).sum())
    assert kept == 2 * x.nbytes
    assert account.kept_for_backward(state, lambda: (x * x).sum()) == x.nbytes
    with torch.no_grad():
        assert account.kept_for_backward(state, lambda: nn.functional.gelu(layer(x)).sum()) == 0


def test_ceilings():
    device = torch.device("cpu")
    assert ceilings.product_ceiling(device, "fp32") > 1e6 and ceilings.copy_ceiling(device) > 1e6


def test_fused_update_is_the_loop():
    """The authors' recipe with the fused update, not compiled."""
    eager = partial(authors.fused.build)
    recipe = AUTHORS._replace(build=lambda config: eager(config), step=authors.train_step_fused)
    assert max(check(CONFIG, recipe).values()) < 5e-5
    config = override(CONFIG, CHANGES | {"precision": "bf16"})
    state = build(recipe, config)
    x0, y = random_batch(config, state.device)
    before = [p.clone() for p in state.flow.parameters()]
    assert recipe.step(state, x0, y)["grad_norm"].isfinite()
    assert any(not torch.equal(p, q) for p, q in zip(before, state.flow.parameters(), strict=True))
    layer = state.flow.network.blocks[0].mlp.fc1
    first = recipe.step(state, x0, y)["fm_mse"]
    assert layer.copy.seen is None and first.isfinite()  # the next forward copies the moved weights


def test_a_recording_is_judged_after_several_steps():
    """A recipe that goes wrong from its fourth step on, as one that replays something stale would."""

    def step(state, x0, y):
        if state.step >= 3:
            x0 = x0.roll(1, 0)
        return OURS.step(state, x0, y)

    recipe = ours("stale")._replace(step=step)
    assert check(CONFIG, recipe)
    with pytest.raises(RedGate):
        check(CONFIG, recipe._replace(gate_steps=5))
    assert check(CONFIG, ours("ours again")._replace(gate_steps=5))


def test_entry_counts_another_recipe_in_place_of_one_that_hides_its_products():
    hidden = QUARTER._replace(counted_as=DIFFERENCE)
    assert entry(CASE, hidden).flops_per_image == entry(CASE, DIFFERENCE).flops_per_image


def test_quality_for_time(tmp_path, monkeypatch):
    monkeypatch.setattr(quality_for_time, "SAMPLES", 40)
    threads = torch.get_num_threads()
    try:
        rows = [quality_for_time.run(method, 0, 5, 2) for method in quality_for_time.METHODS]
    finally:
        torch.set_num_threads(threads)
    for row in rows:
        assert [point["step"] for point in row["points"]] == [2, 4, 5]
        assert row["points"][0]["seconds"] < row["points"][-1]["seconds"]
    record.write(rows, "python -m benchmarks.quality_for_time", tmp_path, "quality-for-time")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "performance.md"
    page.write_text("<!-- benchmark:quality-for-time -->\n<!-- /benchmark:quality-for-time -->\n")
    report.main([], tmp_path, tmp_path)
    text = page.read_text()
    assert all(f"| {method} |" in text for method in quality_for_time.METHODS) and "(quality.svg)" in text
    pytest.importorskip("matplotlib")
    assert b"<svg" in (tmp_path / "docs" / "quality.svg").read_bytes()[:500]


def test_quality_compares_like_with_like():
    """The same initial weights, batches and settings; only the step differs."""
    config = quality_for_time.configuration(0, 10)
    states = [recipe.build(config) for recipe in quality_for_time.METHODS.values()]
    for state in states[1:]:
        assert state.config.optim == states[0].config.optim and state.config.objective == states[0].config.objective
        for p, q in zip(state.flow.parameters(), states[0].flow.parameters(), strict=True):
            assert torch.equal(p, q)

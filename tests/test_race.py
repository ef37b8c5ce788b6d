"""What the race counts beside the time, who may stay away from it, and what a report makes of both."""

import contextlib
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
from benchmarks.contestants import CONTESTANTS, DIFFERENCE, MEANFLOW, QUARTER
from benchmarks.gates import CHANGES, RedGate, check, random_batch
from benchmarks.race import Race, Row, entry, heats, speed_ups
from benchmarks.recipes import OURS, build, ours
from soflow_fast.config import Config, DataConfig, DiTConfig, RunConfig, override

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
    for _ in range(race.rounds(0.0)):
        race.run_baselines()
        race.steps[OURS.name]()
    return [row.as_dict() for row in race.rows.values()]


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


def test_out_of_memory_is_a_reason_but_not_for_ours(monkeypatch):
    def full(config):
        raise torch.OutOfMemoryError("no more")

    race = Race(CASE, [AUTHORS._replace(gate=lambda config, recipe: {}, build=full)])
    assert race.rows[AUTHORS.name].skipped == "out of memory" and list(race.steps) == [OURS.name]
    monkeypatch.setattr("benchmarks.race.entry", lambda case, recipe: full(None))
    with pytest.raises(torch.OutOfMemoryError):
        Race(CASE, [])


def test_each_is_measured_alone_in_memory(monkeypatch):
    """No state of a timed step is there while the peak of another recipe is taken."""
    came = []
    for name in ("entry", "timed_step"):
        plain = getattr(race_module, name)
        monkeypatch.setattr(race_module, name, lambda *a, name=name, plain=plain: came.append(name) or plain(*a))
    Race(CASE, [AUTHORS, QUARTER])
    assert came == ["entry"] * 3 + ["timed_step"] * 3


def test_memory_that_runs_out_beside_the_others(monkeypatch):
    plain = race_module.timed_step

    def full(case, recipe, seconds):
        if recipe is AUTHORS:
            raise torch.OutOfMemoryError("no more")
        return plain(case, recipe, seconds)

    monkeypatch.setattr(race_module, "timed_step", full)
    race = Race(CASE, [AUTHORS, QUARTER])
    assert race.rows[AUTHORS.name].skipped == "out of memory beside the others"
    assert list(race.steps) == [OURS.name, QUARTER.name]


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"seconds": -1.0}, {"kernel_seconds": float("nan")}], ids=str)
def test_options_of_the_benchmarks(wrong):
    options = {"batch": 32, "seconds": 1.0, "kernel_seconds": 1.0}
    conftest.pytest_configure(SimpleNamespace(option=SimpleNamespace(**options), stash={}))
    with pytest.raises(pytest.UsageError, match="--" + next(iter(wrong)).replace("_", "-")):
        conftest.pytest_configure(SimpleNamespace(option=SimpleNamespace(**options | wrong), stash={}))


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
    assert heats(CASE, CONTESTANTS[1:]) == [CONTESTANTS[1:]]


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
    readme = tmp_path / "README.md"
    readme.write_text("<!-- benchmark:quality-for-time -->\n<!-- /benchmark:quality-for-time -->\n")
    with contextlib.suppress(ImportError):  # the plot comes last
        assert report.main([], tmp_path, tmp_path) == 0
        assert b"<svg" in (tmp_path / "docs" / "quality.svg").read_bytes()[:500]
    text = readme.read_text()
    assert all(f"| {method} |" in text for method in quality_for_time.METHODS) and "docs/quality.svg" in text


def test_quality_compares_like_with_like():
    """The same initial weights, batches and settings; only the step differs."""
    config = quality_for_time.configuration(0, 10)
    states = [recipe.build(config) for recipe in quality_for_time.METHODS.values()]
    for state in states[1:]:
        assert state.config.optim == states[0].config.optim and state.config.objective == states[0].config.objective
        for p, q in zip(state.flow.parameters(), states[0].flow.parameters(), strict=True):
            assert torch.equal(p, q)

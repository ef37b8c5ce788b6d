"""The benchmarks' own machinery: the gate is green and red when it should be, reports round-trip."""

from dataclasses import replace

import pytest
import torch

from benchmarks import gates, increments, precision, record, report
from benchmarks.baselines import fused
from benchmarks.baselines.authors import AUTHORS, train_step_fused
from benchmarks.cases import Case
from benchmarks.race import Race, speed_ups
from benchmarks.recipes import OURS, VARIANTS, build, ours
from soflow_fast.config.schema import Config, DataConfig, DiTConfig, ObjectiveConfig, RunConfig, override
from soflow_fast.models import paired_forward as walk

CONFIG = Config(
    model=DiTConfig(input_size=4, patch_size=2, in_channels=2, hidden_size=16, depth=2, num_heads=2, num_classes=3),
    data=DataConfig(kind="latents"),
    run=RunConfig(device="cpu"),
    batch_size=8,
)

TAMPERED = {
    "guidance": {"objective.guidance_scale": 2.0},
    "mix": {"objective.mix_ratio": 0.5},
    "guidance decay": {"objective.guidance_decay_time": 0.1},
    "weights": {"objective.eps": 0.1},
    "look-ahead": {"objective.r_init": 0.5},
    "label drop": {"objective.label_drop": 0.9},
    "learning rate": {"optim.lr": 0.9},
    "average": {"optim.ema_decay": 0.9},
}


@pytest.mark.parametrize(
    ("objective", "ours", "theirs"),
    [
        (ObjectiveConfig(), 3, 6),
        (ObjectiveConfig(mix_ratio=1.0), 3, 5),
        (ObjectiveConfig(guidance_scale=1.0), 2, 3),
    ],
    ids=["mixed", "guided", "unguided"],
)
def test_gate_is_green_and_counts_calls(objective, ours, theirs):
    config = replace(CONFIG, objective=objective)
    assert max(gates.check(config, AUTHORS).values()) < 5e-5
    for recipe, wanted in ((OURS, ours), (AUTHORS, theirs)):
        state = recipe.build(config)
        assert gates.count_calls(recipe, state, *gates.random_batch(config, state.device))[0] == wanted


@pytest.mark.parametrize("changes", TAMPERED.values(), ids=TAMPERED.keys())
def test_gate_is_red_for_a_baseline_that_computes_something_else(changes):
    tampered = AUTHORS._replace(build=lambda config: AUTHORS.build(override(config, changes)))
    with pytest.raises(gates.RedGate):
        gates.check(CONFIG, tampered)


def test_gate_is_red_for_a_baseline_that_calls_the_network_once_more():
    def step(state, x0, y):
        with torch.no_grad():
            state.flow.velocity(x0, torch.ones(len(x0)), y)
        return AUTHORS.step(state, x0, y)

    with pytest.raises(gates.RedGate, match="7 times, not 6"):
        gates.check(CONFIG, AUTHORS._replace(step=step))


def test_nothing_is_timed_behind_a_red_gate():
    tampered = AUTHORS._replace(build=lambda config: AUTHORS.build(override(config, {"objective.eps": 0.1})))
    race = Race(Case("tiny", CONFIG), [tampered])
    race.warm_up([tampered.name])
    assert list(race.steps) == [OURS.name] and race.rows[tampered.name].failed
    assert str(race.rows[tampered.name].skipped).startswith("its gate is red")


@pytest.fixture(scope="module")
def rows():
    race = Race(Case("tiny", CONFIG), [AUTHORS])
    race.warm_up([AUTHORS.name])
    for _ in range(race.rounds(0.0)):
        race.run_baselines()
        race.steps[OURS.name]()
    return race.results([AUTHORS.name])


def test_rows_hold_every_round_and_the_counted_cost(rows):
    ours, theirs = rows
    assert len(ours["seconds"]) == len(theirs["seconds"]) == 5
    assert (
        ours["forwards_per_image"]
        == pytest.approx(theirs["forwards_per_image"], rel=1e-6)
        == pytest.approx(4.5, abs=0.3)
    )
    medians = [sorted(row["seconds"])[2] for row in rows]
    assert speed_ups(rows) == {AUTHORS.name: pytest.approx(medians[1] / medians[0])}


BEGIN, END = "<!-- benchmark:step -->", "<!-- /benchmark:step -->"


def test_report_round_trips(rows, tmp_path, capsys):
    page, records = tmp_path / "docs" / "performance.md", tmp_path / "records"
    page.parent.mkdir()
    text = f"before\n{BEGIN}\n{END}\nafter\n"
    page.write_text(text)
    assert report.main([], tmp_path, records) == 2  # no record yet

    path = record.write(rows, "pytest benchmarks/ --record", records)
    newest = record.newest(records)
    assert newest is not None and newest["rows"] == rows and newest["file"] == path.name
    assert report.main(["--check"], tmp_path, records) == 1
    assert page.read_text() == text
    assert report.main([], tmp_path, records) == 0
    assert report.main(["--check"], tmp_path, records) == 0
    rendered = page.read_text()
    assert rendered.startswith(f"before\n{BEGIN}\n| ") and rendered.endswith(f"{END}\nafter\n")
    assert f"{speed_ups(rows)[AUTHORS.name]:.2f}x" in rendered and path.name in rendered
    assert len({line.count("|") for line in rendered.splitlines() if line.startswith("|")}) == 1

    page.write_text("no markers")
    assert report.main([], tmp_path, records) == 2
    assert "docs/performance.md: needs one" in capsys.readouterr().err


def test_digits_table(tmp_path):
    scores = {"accuracy": 0.9912, "frechet": 29.04, "near_copies": 0.0}
    rows = [{"seed": 3, "seconds": 99.6, "samples": 4000, "nfe": {"1": scores, "2": scores}}]
    record.write(rows, "python -m benchmarks.digits --seeds 3", tmp_path, "digits")
    assert record.newest(tmp_path) is None  # no record of a step
    run = record.newest(tmp_path, "digits")
    assert run is not None
    text = report.digits(run)
    assert "| 3 | 1 | 0.9912 | 29.0 | 0.0000 | 100 |" in text and run["file"] in text
    page = tmp_path / "docs" / "performance.md"
    page.parent.mkdir()
    page.write_text("<!-- benchmark:digits -->\n<!-- /benchmark:digits -->\n")
    assert report.main([], tmp_path, tmp_path) == 0 and text in page.read_text()


def test_precision_tables_and_plot(tmp_path):
    scores = [{nfe: {"frechet": f, "accuracy": 0.9, "near_copies": 0.0} for nfe in ("1", "2")} for f in (30.0, 32.0)]
    quality = {"kind": "quality", "r_end": 0.002, "seconds": 1.0}
    last = {"sc_mse": 0.5, "sc_weight": 2.0}
    rows = [{"kind": "error", "r": 0.1, "way": way, "error": 0.5, "cosine": 0.9} for way in ("a pair", "increments")]
    rows += [{**quality, "recipe": "float32", "seed": k, "last": last, "nfe": scores[k]} for k in (0, 1)]
    rows += [{**quality, "recipe": "literal", "seed": 0, "last": {"failed": "nan"}, "nfe": {}}]
    record.write(rows, "python -m benchmarks.precision", tmp_path, "precision")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "precision.md"
    names = ("precision-errors", "precision-quality")
    page.write_text("".join(f"<!-- benchmark:{name} -->\n<!-- /benchmark:{name} -->\n" for name in names))
    report.main([], tmp_path, tmp_path)
    text = page.read_text()
    assert "| 0.1 | 5.0e-01 / 0.90000 | 5.0e-01 / 0.90000 |" in text
    assert "| float32 | 0.002 | 31.0 (30.0 to 32.0) | 31.0 (30.0 to 32.0) | 0.9000 (0.9000 to 0.9000) |" in text
    assert "| literal (1 of 1 not finite, left out) | 0.002 | not finite |" in text
    pytest.importorskip("matplotlib")
    assert b"<svg" in (tmp_path / "docs" / "precision.svg").read_bytes()[:500]
    assert report.main(["--check"], tmp_path, tmp_path) == 0


def test_what_increments_cost(tmp_path):
    rows = increments.measure(Case("tiny", CONFIG), 0.0)
    assert [row["way"] for row in rows] == [*increments.WAYS, "forward", "paired forward"]
    assert len({len(row["seconds"]) for row in rows}) == 1
    record.write(rows, "python -m benchmarks.increments", tmp_path, "increments")
    text = report.increments(record.newest(tmp_path, "increments"))
    assert text.count("x |") == 3 and "| forward |" in text


def test_precision_recipes_train_and_are_judged():
    """Every recipe for a few steps: the step that it asks for is the step that it gets."""
    for name in ("bf16, increments", "float32, literal EMA 0.99", "bf16, fp16 pair"):
        row = precision.quality(name, 0.002, 0, 3)
        assert row["recipe"] == name and set(row["nfe"]) == {1, 2} and row["last"]["sc_mse"] > 0
    state, _ = precision.train(precision.configuration(0, 0.002, 1), precision.WAYS["fp16 pair"])
    assert state.quotient == precision.WAYS["fp16 pair"]


def test_readme_shows_the_newest_records():
    assert report.main(["--check"]) == 0


def test_gate_compares_the_precision_that_is_timed(monkeypatch):
    """bf16 with increments is what a GPU races in: broken increments must not pass."""
    low = replace(CONFIG, precision="bf16")
    assert gates.check_precision(CONFIG) == {}
    assert set(gates.check_precision(low)) == {"fm_mse", "sc_mse", "increments", "direction of the gradient"}
    plain = walk._Walk.product
    monkeypatch.setattr(walk._Walk, "product", lambda self, a, b, operand=None: 0 * plain(self, a, b, operand))
    with pytest.raises(gates.RedGate, match="bf16 against float32"):
        gates.check_precision(low)


FUSED = AUTHORS._replace(name="fused", build=fused.build, step=train_step_fused)
"""The authors' recipe as it is compiled, but for the compiler: in bf16 throughout."""


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("recipe", [FUSED, OURS, VARIANTS[0]], ids=lambda recipe: recipe.name)
def test_a_baseline_is_held_to_the_precision_that_is_timed(recipe, seed):
    errors = gates.check_timed(replace(CONFIG, precision="bf16", seed=seed), recipe)
    assert set(errors) == {"fm_mse in bf16", "sc_mse in bf16", "grad_norm in bf16", "gradient in bf16"}
    assert errors["gradient in bf16"] > 1e-4, "bf16 rounds"
    assert gates.check_timed(CONFIG, recipe) == {}


def test_check_goes_through_the_timed_precision():
    assert "gradient in bf16" in gates.check(replace(CONFIG, precision="bf16"), FUSED)
    assert "gradient in bf16" in gates.check(replace(CONFIG, precision="bf16"), ours("steps")._replace(gate_steps=1))
    several = gates.check(replace(CONFIG, precision="bf16"), ours("steps")._replace(gate_steps=3))
    assert "sc_mse in bf16" in several and "gradient in bf16" not in several


def in_bf16_alone(fault):
    """A step that goes wrong in bf16 and is right in float32."""

    def step(state, x0, y):
        return fault(state, x0, y) if state.precision == "bf16" else FUSED.step(state, x0, y)

    return step


def other_objective(**changes):
    def step(state, x0, y):
        kept = state.objective
        state.objective = type(kept)(replace(kept.config, **changes))
        metrics = FUSED.step(state, x0, y)
        state.objective = kept
        return metrics

    return step


def without_consistency(state, x0, y):
    with pytest.MonkeyPatch.context() as patch:
        term = state.objective.consistency
        patch.setattr(state.objective, "consistency", lambda *given: (t := term(*given))._replace(loss=0 * t.loss))
        return FUSED.step(state, x0, y)


FAULTS = {
    "guidance": other_objective(guidance_scale=2.0),
    "mix": other_objective(mix_ratio=0.5),
    "weights": other_objective(p=0.5),
    "other labels": lambda state, x0, y: FUSED.step(state, x0, y.flip(0)),
    "no consistency loss": without_consistency,
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_gate_is_red_for_what_is_wrong_in_the_timed_precision_alone(fault):
    tampered = FUSED._replace(step=in_bf16_alone(fault))
    config = override(CONFIG, {"model.hidden_size": 64})
    assert gates.check(config, tampered)
    with pytest.raises(gates.RedGate, match="fused in bf16 against float32"):
        gates.check(replace(config, precision="bf16"), tampered)


def test_rounding_that_hides_everything_is_red(monkeypatch):
    monkeypatch.setattr(gates, "ROUNDING_LIMIT", 1e-4)
    with pytest.raises(gates.RedGate, match="gradient is rounding by"):
        gates.check_timed(replace(CONFIG, precision="bf16"), FUSED)


def test_the_yardstick_is_the_engines_own_step():
    """The gate's formulas in float64 around the float32 network: our gradients and mean squares to rounding."""
    config = override(CONFIG, gates.CHANGES)
    state = build(OURS, config)
    x0, y = gates.random_batch(config, state.device)
    exact = gates.whole_step(gates.Rounding(state.flow.network, "fp32"), state, x0, y)
    metrics = OURS.step(state, x0, y)
    assert gates.relative([gates.gradient(p) for p in state.flow.parameters()], exact.gradients) < 1e-5
    for name, found in (("fm_mse", exact.fm), ("sc_mse", exact.sc)):
        assert gates.relative([metrics[name]], [found.square().mean()]) < 1e-5


def test_a_pass_of_increments_counts_as_a_call():
    state = OURS.build(replace(CONFIG, precision="bf16"))
    assert gates.count_calls(OURS, state, *gates.random_batch(CONFIG, state.device))[0] == 3


def test_the_gate_takes_no_notice_of_the_quotient_that_is_asked_for():
    assert gates.check(override(CONFIG, {"quotient": "pair", "quotient_precision": "bf16"}), AUTHORS)


def test_gate_sees_a_single_gradient():
    def step(state, x0, y):
        metrics = AUTHORS.step(state, x0, y)
        state.flow.network.blocks[0].attn.proj.bias.grad.mul_(1.01)
        return metrics

    with pytest.raises(gates.RedGate, match="gradient of"):
        gates.check(CONFIG, AUTHORS._replace(step=step))


def test_the_ways_of_increments_are_three(monkeypatch):
    seen = []
    monkeypatch.setattr(increments, "train_step", lambda state, x, y: seen.append(state.quotient))
    small = Case("tiny", CONFIG)
    steps = increments.contestants(small)
    for name in increments.WAYS:
        steps[name]()
    assert seen == list(increments.WAYS.values()) and len({type(how) for how in seen}) == 2


def test_errors_are_of_each_way():
    threads = torch.get_num_threads()
    try:
        rows = precision.errors(seed=0, steps=3, samples=16)
    finally:
        torch.set_num_threads(threads)
    found = {row["way"]: row["error"] for row in rows if row["r"] == 0.002}
    assert found["float32 increments"] < found["float32 pair"] < found["bf16 pair"]
    assert found["bf16 increments"] < found["bf16 pair"]


def test_every_block_of_the_pages_has_a_record():
    kept = {run.get("benchmark") for run in map(record.read, record.RECORDS.glob("*.json"))}
    assert {block.benchmark for block in report.BLOCKS.values()} <= kept

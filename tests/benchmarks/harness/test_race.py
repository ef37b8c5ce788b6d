"""The race: what is counted beside the time, who may stay away, what happens when memory runs out."""

import pytest
import torch

from benchmarks.baselines import authors
from benchmarks.baselines.authors import AUTHORS, COMPILED
from benchmarks.correctness.comparison import CHANGES, IncorrectResult
from benchmarks.correctness.step import check
from benchmarks.harness import account
from benchmarks.harness import race as race_module
from benchmarks.harness.cases import Case, random_batch
from benchmarks.harness.contestants import CONTESTANTS, DIFFERENCE, FIRST, HEADLINE, MEANFLOW, QUARTER
from benchmarks.harness.race import Race, Row, largest, largest_that, prepared, speed_ups
from benchmarks.harness.recipes import AS_TRAINED, OURS, build, ours
from benchmarks.harness.timing import Stopwatch
from benchmarks.report.blocks import steps
from soflow_fast.config.schema import override
from tests.benchmarks.tiny import CASE, CONFIG


def test_counted_forwards(race_rows):
    """In units of one forward.

    All but MeanFlow as published: guidance 1.25 (the quarter takes a labelled call as well), the student's forward and
    backward 3, and a quarter once more: the look-ahead, the other end of a difference, or the tangents. The first
    layers have no gradient to their input, which weighs up to 0.3 on so small a network. Tangents take the values of
    the student's forward, but for conditioning and patches, and five products for attention where a forward has two.
    As published: guidance 2, and torch.func.jvp over the whole batch with its backward 5: values 1, tangents 1, the
    input with the weights' zero tangents 1, the backward of the values 2, none of the tangents.
    """
    found = {row["recipe"]: row["forwards_per_image"] for row in race_rows if not row["skipped"]}
    assert found[OURS.name] == found[AUTHORS.name] == found[DIFFERENCE.name] == pytest.approx(4.5, abs=0.3)
    tokens, hidden = 4, 16
    conditioning, patches = 2 * 2 * (256 * hidden + hidden * hidden), 2 * tokens * 8 * hidden
    attention = CONFIG.model.depth * 3 * 2 * tokens * tokens * hidden
    one = race_rows[0]["flops_per_image"] / race_rows[0]["forwards_per_image"]
    more = (conditioning + patches + attention) / one
    assert found[QUARTER.name] - found[DIFFERENCE.name] == pytest.approx(0.25 * more, rel=1e-6)
    assert found[MEANFLOW.name] == pytest.approx(2 + 5, abs=0.4)


def test_rows_have_bytes_memory_and_ceilings(race_rows):
    found = {row["recipe"]: row for row in race_rows if not row["skipped"]}
    assert all(row["bytes_per_image"] > 0 and row["kept_for_backward"] > 0 for row in found.values())
    # The tangents of the whole batch are kept as well.
    assert found[MEANFLOW.name]["kept_for_backward"] > 1.5 * found[QUARTER.name]["kept_for_backward"]
    assert all(row["product_ceiling"] > 0 and row["copy_ceiling"] > 0 for row in found.values())
    assert set(speed_ups(race_rows)) == {AUTHORS.name, MEANFLOW.name, QUARTER.name, DIFFERENCE.name}


def test_every_round_is_in_the_rows(race_rows):
    timed = {row["recipe"]: row["seconds"] for row in race_rows if not row["skipped"]}
    assert [len(seconds) for seconds in timed.values()] == [5] * 5
    medians = {name: sorted(seconds)[2] for name, seconds in timed.items()}
    wanted = {name: pytest.approx(median / medians[OURS.name]) for name, median in medians.items() if name != OURS.name}
    assert speed_ups(race_rows) == wanted


def test_an_absent_recipe_keeps_its_reason(race_rows):
    rows = race_rows
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
    text = steps.table(run | {"file": "f"})
    assert "Not run: absent: is elsewhere." in text and "| absent |" not in text and "kept for the backward" in text
    elsewhere = [row | {"case": "another"} for row in rows[:-1]]
    assert f"absent ({rows[0]['case']}): is elsewhere." in steps.table(run | {"rows": rows + elsewhere, "file": "f"})
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def falling(error, name="falling", where="check"):
    """A recipe that raises an error in its check, or once it is built."""

    def fall(*arguments, **named):
        raise error

    if where == "check":
        return AUTHORS._replace(name=name, check=fall)
    return AUTHORS._replace(name=name, check=lambda config, recipe: {}, build=fall)


def test_whoever_drops_out_keeps_a_row_that_says_why(capsys):
    """And whether that is a fault; the race goes on."""
    errors = {
        "memory": (falling(torch.OutOfMemoryError("CUDA"), "memory", "build"), "out of memory", False),
        "check's memory": (
            falling(torch.OutOfMemoryError("CUDA"), "check's memory"),
            "out of memory in its check",
            False,
        ),
        "update's memory": (falling(MemoryError("x"), "update's memory", "build"), "out of memory", False),
        "incorrect": (falling(IncorrectResult("du/dt:\n1"), "incorrect"), "incorrect: du/dt: 1", True),
        "broken": (falling(RuntimeError("no kernel"), "broken", "build"), "RuntimeError: no kernel", True),
    }
    race = Race(CASE, [OURS, *(recipe for recipe, _, _ in errors.values()), QUARTER])
    (names,) = race.groups()
    assert [name for name in names if race.enter(name)] == [OURS.name, QUARTER.name] == list(race.timer.calls)
    said = {row["recipe"]: (row["skipped"], row["failed"]) for row in race.results() if row["skipped"]}
    assert said == {name: wanted for name, (_, *wanted) in errors.items() for wanted in [tuple(wanted)]}
    assert capsys.readouterr().err.count("Traceback") == 1, "of the broken one: the others' rows say all"
    race.leave()
    assert not race.timer.calls


def test_nothing_is_timed_that_computes_something_else():
    def other(config, weights=None):
        return AUTHORS.build(override(config, {"objective.eps": 0.1}), weights)

    tampered = AUTHORS._replace(build=other)
    race = Race(CASE, [OURS, tampered])
    assert not race.enter(tampered.name) and not race.timer.calls and race.rows[tampered.name].failed
    assert str(race.rows[tampered.name].skipped).startswith("incorrect: ")


def test_a_race_builds_nothing_by_itself_and_each_recipe_once():
    """Beside the builds of the checks, which are on the first blocks of the network."""
    deep, built = CASE._replace(config=override(CONFIG, {"model.depth": 3})), []

    def counting(recipe):
        def build(config, weights=None):
            built.append((recipe.name, config.model.depth))
            return recipe.build(config, weights)

        return recipe._replace(build=build)

    theirs = [counting(AUTHORS), counting(QUARTER)]
    race = Race(deep, [OURS, *theirs])
    assert built == [] and race.missing() == [f"{deep.describe()}: {name}" for name in race.recipes]
    for recipe in theirs:
        assert race.enter(recipe.name)
        assert built.count((recipe.name, 3)) == 1 and {depth for _, depth in built} <= {2, 3}
        assert [name for name, _ in built].count(recipe.name) <= 3
    assert race.missing() == [f"{deep.describe()}: {OURS.name}"]
    assert [row["recipe"] for row in race.results()] == [recipe.name for recipe in theirs]


def test_what_a_first_call_measures_is_not_counted():
    """As the choice of an attention is, for every size of batch that comes."""
    recipe, seen = AUTHORS, set()

    def step(state, x0, y, **told):
        if len(x0) not in seen:
            seen.add(len(x0))
            torch.mm(torch.ones(999, 999), torch.ones(999, 999))
        return recipe.step(state, x0, y, **told)

    rows = [prepared(CASE.at(12), one)[0] for one in (recipe, recipe._replace(step=step))]
    assert rows[0].flops_per_image == rows[1].flops_per_image and seen == {8, 12}
    assert rows[0].bytes_per_image == rows[1].bytes_per_image


def test_on_a_gpu_each_is_alone_in_memory():
    race = Race(CASE, [OURS, AUTHORS])
    assert race.groups() == [[OURS.name, AUTHORS.name]]
    race.device = torch.device("cuda")
    assert race.groups() == [[OURS.name], [AUTHORS.name]]


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
    assert len(counted) == 3  # a forward, which may choose an attention, and once more, and a step
    assert row.flops_per_image == prepared(CASE, AUTHORS)[0].flops_per_image
    assert largest(CASE, falling(IncorrectResult("no"))).failed
    assert largest(CASE, AUTHORS._replace(why_not=lambda config: "elsewhere")).skipped == "elsewhere"
    monkeypatch.setattr(Stopwatch, "seconds", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("no more")))
    assert largest(CASE, AUTHORS).skipped == "out of memory"


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
    assert set(HEADLINE) < set(CONTESTANTS) and HEADLINE[: len(FIRST)] == FIRST == [OURS, AS_TRAINED, COMPILED[0]]


def test_what_a_row_says_without_figures():
    row = Row(case="c", recipe="r", skipped="why").as_dict()
    assert row["seconds"] == [] and row["peak_allocated"] is None


def test_fused_update_is_the_loop():
    """The authors' recipe with the fused update, not compiled."""
    recipe = AUTHORS._replace(build=authors.fused.build, step=authors.train_step_fused)
    assert max(check(CONFIG, recipe).values()) < 5e-5
    config = override(CONFIG, CHANGES | {"precision": "bf16"})
    state = build(recipe, config)
    x0, y = random_batch(config, state.device)
    before = [p.clone() for p in state.flow.parameters()]
    assert recipe.step(state, x0, y)["grad_norm"].isfinite()
    assert any(not torch.equal(p, q) for p, q in zip(before, state.flow.parameters(), strict=True))
    weight = state.flow.network.blocks[0].mlp.fc1.weight
    assert torch.equal(weight, state.weights()["network.blocks.0.mlp.fc1.weight"].bfloat16())
    assert recipe.step(state, x0, y)["fm_mse"].isfinite()


def test_a_recording_is_judged_after_several_steps():
    """A recipe that goes wrong from its fourth step on, as one that replays something stale would."""

    def step(state, x0, y, **told):
        if state.step >= 3:
            x0 = x0.roll(1, 0)
        return OURS.step(state, x0, y, **told)

    recipe = ours("stale")._replace(step=step)
    assert check(CONFIG, recipe)
    with pytest.raises(IncorrectResult):
        check(CONFIG, recipe._replace(checked_steps=5))
    assert check(CONFIG, ours("ours again")._replace(checked_steps=5))


def test_entry_counts_another_recipe_in_place_of_one_that_hides_its_products():
    hidden = QUARTER._replace(counted_as=DIFFERENCE)
    wanted, found = (prepared(CASE, recipe)[0] for recipe in (DIFFERENCE, hidden))
    assert found.flops_per_image == wanted.flops_per_image

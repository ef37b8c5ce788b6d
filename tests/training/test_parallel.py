"""The same training on any number of ranks, by DistributedDataParallel and by FSDP2."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from soflow_fast.config.presets import preset
from soflow_fast.config.schema import Config, RunConfig, override
from soflow_fast.data import open_source
from soflow_fast.errors import ConfigError
from soflow_fast.launch import Launch
from soflow_fast.ranks import flow_matching_samples
from soflow_fast.training.nonfinite import PLACES
from soflow_fast.training.parallel import check_shares, join
from soflow_fast.training.state import TrainState
from soflow_fast.training.step import train_step
from tests.forked import on_ranks

CPU = torch.device("cpu")
STEPS = 50
SMALL = {
    "model.hidden_size": 16, "model.depth": 2, "model.num_heads": 2, "batch_size": 8, "steps": 200, "run.device": "cpu",
    "optim.lr": 1e-4,
}  # fmt: skip


def configured(changes: dict[str, Any]) -> Config:
    return override(preset("digits", precision="fp32"), {**SMALL, **changes})


class Trained(tuple[list[dict[str, float]], dict[str, Tensor], int]):
    """Metrics by step, weights and averages, bytes of the state on this rank."""

    metrics = property(lambda self: self[0])
    weights = property(lambda self: self[1])
    size = property(lambda self: self[2])


def whole(value: Any) -> Tensor:
    found = value.full_tensor() if hasattr(value, "full_tensor") else value
    return found.detach().clone()


def held(value: Any) -> int:
    part = value.to_local() if hasattr(value, "to_local") else value
    return part.numel() * part.element_size()


def trained(launch: Launch | None, changes: dict[str, Any], steps: int, alter: Callable | None = None) -> Trained:
    """Some steps on the digits. alter: `alter(x0, state)` changes the samples of a step in place."""
    config = configured(changes)
    parallel = None if launch is None else join(launch, config.run, CPU)
    state = TrainState.build(config, parallel=parallel)
    source = open_source(config)
    source.dealt_first = flow_matching_samples(config.batch_size, config.objective.flow_matching_fraction)
    metrics = []
    for step in range(steps):
        x0, y = source.batch(step, state.rank, state.world)
        if alter is not None:
            alter(x0, state)
        metrics.append({name: float(value) for name, value in train_step(state, x0, y).items()})
    moments = [v for entry in state.optimizer.state.values() for v in entry.values() if v.dim()]
    weights = {name: whole(value) for name, value in state.weights().items()}
    weights |= {f"ema.{name}": whole(value) for name, value in state.ema.state_dict().items()}
    size = sum(held(p) for flow in (state.flow, state.ema) for p in flow.parameters()) + sum(map(held, moments))
    return Trained((metrics, weights, size))


def deviation(found: Trained, wanted: Trained) -> tuple[float, float]:
    """The largest relative difference of a metric, and that of weights, relative to their largest."""
    metrics = max(
        abs(a[name] - b[name]) / max(abs(b[name]), 1e-2)
        for a, b in zip(found.metrics, wanted.metrics, strict=True)
        for name in b
    )
    largest = max(float(w.abs().max()) for w in wanted.weights.values())
    weights = max(float((found.weights[name] - w).abs().max()) for name, w in wanted.weights.items())
    return metrics, weights / largest


@pytest.fixture(scope="module")
def alone() -> Trained:
    return trained(None, {}, STEPS)


def check_alike(world: int, changes: dict[str, Any], alone: Trained) -> None:
    found = on_ranks(world, trained, changes, STEPS)
    for each in found:
        assert set(each.metrics[0]) == set(alone.metrics[0])
        assert max(deviation(each, alone)) < 1e-5
        assert each.metrics == found[0].metrics
        assert all(torch.equal(value, found[0].weights[name]) for name, value in each.weights.items())


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("micro_batch", [0, 2, pytest.param(1, marks=pytest.mark.slow)])
def test_two_ranks_train_as_one(kind: str, micro_batch: int, alone: Trained) -> None:
    check_alike(2, {"run.parallel": kind, "micro_batch": micro_batch}, alone)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [0, 8, 4])
def test_one_rank_trains_alike_in_micro_batches(micro_batch: int) -> None:
    wanted = trained(None, {"batch_size": 16}, STEPS)
    assert max(deviation(trained(None, {"batch_size": 16, "micro_batch": micro_batch}, STEPS), wanted)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "hsdp"])
@pytest.mark.parametrize("micro_batch", [0, 8, 4])
def test_four_ranks_train_as_one(kind: str, micro_batch: int) -> None:
    """A rank has 16 samples: one, two and four micro-batches."""
    changes = {"batch_size": 64, "run.shard_ranks": 2 if kind == "hsdp" else 0}
    wanted = trained(None, changes | {"run.parallel": kind}, STEPS)
    check_alike(4, {**changes, "run.parallel": kind, "micro_batch": micro_batch}, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_digits_train_alike_on_two_ranks(kind: str) -> None:
    """At a learning rate at which float32 rounding does not grow; at its own, by no more than between micro-batches."""
    own = preset("digits")
    sizes = {f"model.{name}": getattr(own.model, name) for name in ("hidden_size", "depth", "num_heads")}
    changes = {**sizes, "batch_size": own.batch_size, "steps": own.steps, "run.parallel": kind}
    check_alike(2, changes, trained(None, changes, STEPS))
    rate = {**changes, "optim.lr": own.optim.lr}
    wanted = trained(None, rate, STEPS)
    cut = trained(None, {**rate, "micro_batch": own.batch_size // 2}, STEPS)
    for found, usual in zip(
        deviation(on_ranks(2, trained, rate, STEPS)[0], wanted), deviation(cut, wanted), strict=True
    ):
        assert found < 10 * usual


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_bf16_on_two_ranks_differs_as_rounding_does(kind: str) -> None:
    bf16 = {"precision": "bf16", "batch_size": 16, "run.parallel": kind}
    wanted, exact = trained(None, bf16, 20), trained(None, {**bf16, "precision": "fp32"}, 20)
    usual = deviation(wanted, exact)
    for micro_batch in (0, 4):
        found = on_ranks(2, trained, {**bf16, "micro_batch": micro_batch}, 20)
        assert all(torch.equal(value, found[1].weights[name]) for name, value in found[0].weights.items())
        for mine, theirs in zip(deviation(found[0], wanted), usual, strict=True):
            assert mine < 2 * theirs


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_may_be_reduced_in_bf16(kind: str) -> None:
    changes = {"run.parallel": kind, "micro_batch": 2}
    exact, rounded = (
        on_ranks(2, trained, {**changes, "run.reduce_dtype": dtype}, 3)[0].metrics[0]["grad_norm"]
        for dtype in ("fp32", "bf16")
    )
    assert exact != rounded and abs(exact - rounded) < 2**-8 * exact


@pytest.mark.parametrize(
    "changes",
    [
        {"objective.teacher": "ema"},
        {"run.optimizer": "torch", "optim.grad_clip": 0.5},
        {"precision": "bf16", "run.recompute": "block"},
        {"precision": "bf16", "run.recompute": "mlp", "micro_batch": 4, "objective.teacher": "ema"},
        {"run.check_quotient_every": 2, "model.num_classes": 0},
        {"objective.fm_fraction": 0.0},
        {"objective.fm_fraction": 1.0},
        {"model.guidance_range": (1.0, 4.0), "objective.mix_ratio": 0.25, "micro_batch": 4},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_other_steps_are_the_same_on_two_ranks(changes: dict[str, Any]) -> None:
    changes = {"batch_size": 16, "optim.lr": 1e-5, **changes}
    wanted = trained(None, changes, 4)
    limit = 2e-2 if changes.get("precision") == "bf16" else 1e-5
    for kind in ("ddp", "fsdp"):
        for found in on_ranks(2, trained, {**changes, "run.parallel": kind}, 4):
            assert [set(m) for m in found.metrics] == [set(m) for m in wanted.metrics]
            for mine, theirs in zip(found.metrics, wanted.metrics, strict=True):
                for name in set(theirs) - {"q_cosine"}:  # of other samples of the batch
                    assert mine[name] == pytest.approx(theirs[name], rel=limit, abs=limit)


def compiled(launch: Launch | None, changes: dict[str, Any]) -> tuple[list[float], bool]:
    """Gradient norms of steps whose blocks dynamo takes apart, and whether the target rides along on the student."""
    config = configured(changes)
    state = TrainState.build(config, parallel=None if launch is None else join(launch, config.run, CPU))
    state.flow.network.compile_blocks("eager")
    source = open_source(config)
    source.dealt_first = flow_matching_samples(config.batch_size, config.objective.flow_matching_fraction)
    norms = [float(train_step(state, *source.batch(k, state.rank, state.world))["grad_norm"]) for k in range(3)]
    return norms, state.rides_along()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_compiled_blocks_and_increments_go_with_two_ranks(kind: str) -> None:
    changes = {"precision": "bf16", "batch_size": 16, "run.parallel": kind}
    wanted, _ = compiled(None, changes)
    for norms, rides in on_ranks(2, compiled, changes):
        assert rides and norms == pytest.approx(wanted, rel=2e-2)


def sizes(world: int, kind: str) -> list[int]:
    return [found.size for found in on_ranks(world, trained, {"run.parallel": kind, "model.hidden_size": 64}, 1)]


def test_each_of_two_shards_holds_half_of_the_state() -> None:
    one = trained(None, {"model.hidden_size": 64}, 1).size
    assert sizes(2, "ddp") == [one, one]
    parts = sizes(2, "fsdp")
    assert sum(parts) == one and max(parts) < 0.501 * one


@pytest.mark.slow
def test_each_of_four_shards_holds_a_quarter_of_the_state() -> None:
    one = trained(None, {"model.hidden_size": 64}, 1).size
    parts = sizes(4, "fsdp")
    assert sum(parts) == one and max(parts) < 0.251 * one


def resident(name: str) -> int:
    """Bytes of this process's memory, now (VmRSS) or at most so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def built(launch: Launch, changes: dict[str, Any]) -> tuple[int, int, dict[str, Tensor]]:
    """Bytes of weights and averages on this rank, by how much memory rose at most while they were made, and the
    weights."""
    config = configured(changes)
    parallel = join(launch, config.run, CPU)
    TrainState.build(configured({**changes, "model.hidden_size": 16}), parallel=parallel)  # which imports the rest
    Path("/proc/self/clear_refs").write_text("5")  # forget the most so far
    before = resident("VmRSS")
    state = TrainState.build(config, parallel=parallel)
    rose = resident("VmHWM") - before
    lasting = sum(held(p) for flow in (state.flow, state.ema) for p in flow.parameters())
    return lasting, rose, {name: whole(value) for name, value in state.weights().items()}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the memory of a process is not told here")
def test_shards_are_made_without_a_whole_copy() -> None:
    """A whole copy alone would be as much again."""
    changes = {"run.parallel": "fsdp", "model.hidden_size": 256, "model.depth": 8}
    wanted = TrainState.build(configured(changes)).weights()
    for lasting, rose, found in on_ranks(2, built, changes):
        assert lasting > 30e6 and rose < 1.5 * lasting
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def stumble(launch: Launch, changes: dict[str, Any], fails: bool) -> list[float]:
    """Gradient norms of steps, one of which was begun once before and ended by an error."""
    config = configured(changes)
    state = TrainState.build(config, parallel=join(launch, config.run, CPU))
    source = open_source(config)
    source.dealt_first = flow_matching_samples(config.batch_size, config.objective.flow_matching_fraction)
    norms = [float(train_step(state, *source.batch(0, state.rank, state.world))["grad_norm"])]

    def fail(name: str, **values: Any) -> None:
        if name == "micro-batch" and values["number"] == 1 and fails:
            raise KeyError

    try:
        train_step(state, *source.batch(1, state.rank, state.world), observe=fail)
    except KeyError:
        train_step(state, *source.batch(1, state.rank, state.world))
    return [*norms, float(train_step(state, *source.batch(2, state.rank, state.world))["grad_norm"])]


def test_a_step_that_failed_leaves_nothing_for_the_next() -> None:
    changes = {"precision": "bf16", "batch_size": 16, "micro_batch": 4}
    failed, plain = (on_ranks(2, stumble, changes, fails) for fails in (True, False))
    assert failed == plain


def rare(launch: Launch | None) -> list[float]:
    """Steps that check the quotient, of a whole batch with one consistency sample."""
    config = configured({"batch_size": 2, "objective.fm_fraction": 0.5, "run.check_quotient_every": 1})
    state = TrainState.build(config, parallel=None if launch is None else join(launch, config.run, CPU))
    source = open_source(config)
    source.dealt_first = 1
    return [float(train_step(state, *source.batch(k, state.rank, state.world))["q_cosine"]) for k in range(2)]


def test_a_quotient_that_one_rank_alone_has_is_checked() -> None:
    wanted = rare(None)
    for found in on_ranks(2, rare):
        assert found == pytest.approx(wanted, abs=1e-4)


def wrong_backward(launch: Launch, kind: str) -> tuple[Any, ...]:
    config = configured({"run.parallel": kind, "run.on_nonfinite": "skip"})
    state = TrainState.build(config, parallel=join(launch, config.run, CPU))
    source = open_source(config)

    def spoil(name: str, **values: Any) -> None:
        if name == "student" and state.rank == 1:
            values["output"].register_hook(lambda gradient: gradient * math.nan)

    train_step(state, *source.batch(0, state.rank, state.world), observe=spoil)
    return tuple(state.guard.read())


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_backward_that_goes_wrong_on_one_rank_names_it(kind: str) -> None:
    for found in on_ranks(2, wrong_backward, kind):
        assert found == (1, 1, 1, "gradient", False, 1)


def poison(x0: Tensor, state: TrainState) -> None:
    if state.step == 2 and state.rank == 1:
        x0[-1] = math.inf


def refused(launch: Launch, changes: dict[str, Any]) -> tuple[Any, ...]:
    config = configured(changes)
    parallel = join(launch, config.run, CPU)
    state = TrainState.build(config, parallel=parallel)
    source = open_source(config)
    before = {}
    for step in range(4):
        x0, y = source.batch(step, state.rank, state.world)
        poison(x0, state)
        if step == 2:
            before = {name: whole(value) for name, value in state.weights().items()}
        train_step(state, x0, y)
        if step == 2:
            after = {name: whole(value) for name, value in state.weights().items()}
            assert all(torch.equal(before[name], value) for name, value in after.items())
    return tuple(state.guard.read())


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_number_that_is_not_finite_on_one_rank_stops_the_update_of_all(kind: str) -> None:
    for found in on_ranks(2, refused, {"run.parallel": kind, "run.on_nonfinite": "skip"}):
        assert found == (1, 0, 3, PLACES[0], False, 1)


def test_shares_that_some_ranks_lack_are_refused_where_that_would_hang() -> None:
    check_shares(configured({"batch_size": 8}), 2)
    with pytest.raises(ConfigError, match="--parallel fsdp: with 1 images in a forward some ranks"):
        check_shares(configured({"batch_size": 4, "run.parallel": "fsdp"}), 4)
    with pytest.raises(ConfigError, match="larger --batch-size or --micro-batch"):
        check_shares(configured({"batch_size": 12, "micro_batch": 2, "run.parallel": "fsdp"}), 4)
    check_shares(configured({"batch_size": 16, "micro_batch": 1, "run.parallel": "fsdp"}), 2)  # all at the same time
    check_shares(configured({"batch_size": 4, "objective.fm_fraction": 0.0}), 4)


def build(launch: Launch, changes: dict[str, Any]) -> str:
    config = configured(changes)
    try:
        TrainState.build(config, parallel=join(launch, config.run, CPU))
    except ConfigError as error:
        return str(error)
    return ""


def build_on_uneven(launch: Launch) -> str:
    return build(launch._replace(local_world=launch.rank + 1), {"run.parallel": "hsdp"})


def test_hsdp_on_nodes_of_unequal_size_is_refused() -> None:
    for found in on_ranks(2, build_on_uneven):
        assert found.startswith("--parallel hsdp: nodes have unequal numbers of ranks (1 on host0, 2 on host1)")


def join_with(launch: Launch, rates: list[float]) -> str:
    try:
        join(launch, RunConfig(), CPU, settings={"seed": 0, "optim.lr": rates[launch.rank]})
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_with_other_settings_are_refused() -> None:
    assert on_ranks(2, join_with, [1e-4, 1e-4]) == ["", ""]
    said = "rank 1 (host1) was started with another optim.lr than rank 0: 0.01, 0.0001"
    assert on_ranks(2, join_with, [1e-4, 1e-2]) == [said, said]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 9}, "batch_size must be a multiple of the 2 ranks, got 9"),
        ({"run.parallel": "hsdp", "run.shard_ranks": 3}, "--parallel hsdp: the state is cut over 3 ranks"),
        ({"run.parallel": "fsdp", "run.optimizer": "apex"}, "--parallel fsdp: apex"),
        ({"run.parallel": "fsdp", "precision": "fp8"}, "--parallel fsdp: float8|fp8"),
    ],
)
def test_what_does_not_go_with_several_ranks_is_refused(changes: dict[str, Any], said: str) -> None:
    import re

    for found in on_ranks(2, build, changes):
        assert re.search(said, found), found

"""The engine under other objectives: ranks, precision, estimates and what a run notes of them."""

import dataclasses
from typing import Any

import pytest
import torch

from soflow_fast import TrainState, preset, train_step
from soflow_fast.config.schema import Config, DiTConfig
from soflow_fast.errors import ConfigError
from soflow_fast.training.cuda_graph import GraphedFunction
from soflow_fast.training.memory_estimate import estimate_memory
from soflow_fast.training.plan import Cluster, plan
from soflow_fast.training.step import draw, make_graph
from soflow_fast.training.time_estimate import estimate_time
from tests.forked import on_ranks
from tests.training.test_parallel import deviation, trained

MODEL = DiTConfig(input_size=8, patch_size=2, in_channels=1, hidden_size=64, depth=2, num_heads=2, num_classes=10)


def configured(**changes: Any) -> Config:
    config = preset("digits", **{"precision": "fp32", "device": "cpu", "batch_size": 8, **changes})
    return dataclasses.replace(config, model=MODEL)


def batch(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 8, 8, generator=source), torch.arange(n) % 10


@pytest.mark.parametrize(("kind", "parallel"), [("flow-matching", "ddp"), ("meanflow", "ddp"), ("meanflow", "fsdp")])
def test_two_ranks_train_as_one(kind: str, parallel: str) -> None:
    changes: dict[str, Any] = {"objective": kind, "run.parallel": parallel, "run.check_quotient_every": 3}
    if kind == "meanflow":  # of a pair of forwards du/dt has another rounding on each rank
        changes["quotient"] = "increments"
    wanted = trained(None, changes, 6)
    assert ("sc_mse" in wanted.metrics[0], "q_cosine" in wanted.metrics[2]) == (kind == "meanflow",) * 2
    for found in on_ranks(2, trained, changes, 6):
        assert set(found.metrics[2]) == set(wanted.metrics[2])
        assert max(deviation(found, wanted)) < 1e-5


def test_flow_matching_makes_one_call_beside_guidance() -> None:
    state, calls = TrainState.build(configured(objective="flow-matching")), []
    state.flow.network.register_forward_pre_hook(lambda module, given: calls.append(given))
    draws = draw(state, torch.Size((8, 1, 8, 8)))
    assert draws.n_fm == 8 and torch.equal(draws.t, draws.s) and torch.equal(draws.t, draws.l)
    metrics = train_step(state, *batch())
    assert len(calls) == 2 and all(torch.equal(t, s) for _, t, s, *_ in calls)
    assert not [name for name in metrics if name.startswith("sc_")]


@pytest.mark.parametrize("kind", ["pair", "increments"])
def test_meanflow_takes_its_derivative_where_the_times_differ(kind: str) -> None:
    state = TrainState.build(configured(objective="meanflow", quotient=kind, **{"objective.fm_fraction": 0.75}))
    seen: dict[str, Any] = {}
    train_step(state, *batch(), observe=lambda name, **values: seen.update({name: values}))
    points = seen["target"]["points"]
    assert len(points.t) == 2 and (points.s < points.t).all()
    assert ((points.t - points.l) - 3e-4).abs().max() < 1e-6


def test_the_derivative_is_compared_with_float32_on_the_way() -> None:
    state = TrainState.build(configured(objective="meanflow", precision="bf16", **{"run.check_quotient_every": 5}))
    metrics = [train_step(state, *batch()) for _ in range(5)]  # at first the network is constant
    assert 0.999 < metrics[-1]["q_cosine"] < 1.001


@pytest.mark.parametrize("kind", ["flow-matching", "meanflow"])
def test_a_range_of_guidance_scales_goes_along(kind: str) -> None:
    """Each sample's scale is in its target: the step against the objective's own calls."""
    changes = {"objective.fm_fraction": 0.5, "objective.label_drop": 0.25, "objective.mix_ratio": 0.5}
    config = configured(objective=kind, quotient="increments" if kind == "meanflow" else "auto", **changes)
    state = TrainState.build(dataclasses.replace(config, model=dataclasses.replace(MODEL, guidance_range=(1.0, 4.0))))
    with torch.no_grad():
        for i, p in enumerate(state.flow.parameters()):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    x0, y = batch()
    d = draw(state, x0.shape)
    assert d.w is not None and d.w.unique().numel() == 8
    n = d.n_fm
    given = (x0[:n], d.x1[:n], d.t[:n], y[:n], d.label_dropped[:n], d.w[:n])
    wanted = {"fm_mse": state.objective.flow_matching(state.flow, *given).mse}
    if n < 8:
        parts = (v[n:] for v in (x0, d.x1, d.t, d.l, d.s, y, d.label_dropped))
        wanted["sc_mse"] = state.objective.consistency(state.flow, *parts, w=d.w[n:]).mse
    found = train_step(state, x0, y, draws=d)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4 if name == "fm_mse" else 5e-3, atol=0)


@pytest.mark.parametrize("kind", ["flow-matching", "meanflow"])
def test_a_step_as_one_graph_is_the_step(kind: str) -> None:
    """What a graph is handed are tensors alone: here its function runs as it is, as no GPU is here."""
    states = [TrainState.build(configured(objective=kind)) for _ in range(2)]
    make_graph(states[1])
    assert isinstance(states[1].graph, GraphedFunction)
    for _ in range(3):
        found = [train_step(state, *batch()) for state in states]
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=0)


def test_rounded_pairs_have_no_derivative() -> None:
    for changes in ({"precision": "bf16"}, {"precision": "fp32"}):
        config = configured(objective="meanflow", quotient="pair", quotient_precision="bf16", **changes)
        with pytest.raises(ConfigError, match="--quotient pair: of bf16 forwards MeanFlow's derivative"):
            TrainState.build(config)


@pytest.mark.slow
def test_what_a_step_takes_is_predicted_for_each() -> None:
    """MeanFlow's passes are those of SoFlow; flow matching has neither the look-ahead nor the memory for it."""
    kinds = ("soflow", "meanflow", "flow-matching")
    configs = [configured(objective=kind, precision="bf16", **{"objective.mix_ratio": 0.5}) for kind in kinds]
    flops = [estimate_time(config, "h100").total.flops for config in configs]
    assert flops[0] == flops[1] > 1.1 * flops[2]
    memory = [estimate_memory(config).peak for config in configs]
    assert memory[0] >= memory[2] and memory[1] >= memory[2]
    seconds = [plan(config, Cluster("h100", 2, 1)).step.seconds for config in configs]
    assert seconds[1] > seconds[2]

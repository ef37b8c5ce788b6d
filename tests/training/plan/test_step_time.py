"""The time of a step on many GPUs by hand, and what the engines really send."""

import dataclasses
from typing import Any

import pytest
import torch
import torch._dynamo.utils  # FSDP imports dynamo, which would take each fork seconds
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from soflow_fast import preset
from soflow_fast.config.gpus import Gpu, Host
from soflow_fast.config.schema import Config, DiTConfig, override
from soflow_fast.launch import Launch
from soflow_fast.models.dit import DiT
from soflow_fast.training.consistency_target import ConsistencyTarget
from soflow_fast.training.parallel import join
from soflow_fast.training.plan import Cluster, plan
from soflow_fast.training.plan.links import Group, Traffic, layout
from soflow_fast.training.plan.parameters import parameter_groups
from soflow_fast.training.plan.step_time import (
    EXCHANGED,
    HOOK_BYTES,
    HOOK_OPERATIONS,
    SUM_BYTES,
    Engine,
    PhasePlan,
    many_gpus,
    one_gpu,
    replicated_backward,
    sharded_backward,
    sharded_forward,
)
from soflow_fast.training.plan.work import PhaseWork, Work, passes, phase_work
from soflow_fast.training.state import TrainState
from soflow_fast.training.step import train_step
from soflow_fast.training.time_estimate import PHASES, estimate_time
from tests.forked import on_ranks

SIZES = DiTConfig(input_size=8, patch_size=2, in_channels=1, hidden_size=36, depth=3, num_heads=2, num_classes=10)
# No latencies, and copies that take no time: only bytes over NVLink count, one second each.
SLOW = Gpu(
    "card", 0, copy=1e30, products={}, attention=1.0, attention_backward=1.0, nvlink=1.0, network=1.0, launch=0.0,
    collective=0.0, nvlink_hop=0.0, network_hop=0.0,
)  # fmt: skip
GROUPS = parameter_groups(DiT(SIZES))
BLOCK, FINAL, ENDS = (g.gathered(2) for g in (GROUPS.blocks[0], GROUPS.final, GROUPS.ends))


def engine(kind: Any, gpus: int = 2, nodes: int = 1, low: bool = True, reduced: int = 4, gpu: Gpu = SLOW) -> Engine:
    return Engine(GROUPS, layout(kind, gpus, nodes), low, reduced, gpu)


def work(block: float, rest: float = 0.0, host: float = 0.0) -> PhaseWork:
    return PhaseWork(Work(block, host, 1), Work(rest, host, 1))


# One pass


def test_links_that_are_slow_are_all_that_a_forward_takes() -> None:
    """Half of what is gathered comes from the other rank: bf16 of blocks, float32 of the ends."""
    found = sharded_forward(engine("fsdp"), work(block=1.0, rest=5.0), gathers=1)
    g, f, e = BLOCK, FINAL, 2 * ENDS
    assert found.traffic.nvlink == 3 * g + f + e and found.traffic.network == 0
    assert found.compute == pytest.approx(3 + 5)
    # The ends and the first block; then the others and the last modulation, each behind one block; then the rest.
    assert found.seconds == pytest.approx(e + g + 2 * g + f + 5)


def test_links_that_are_fast_hide_but_for_the_first_block() -> None:
    found = sharded_forward(engine("fsdp"), work(block=1e9, rest=5.0), gathers=2)
    assert found.seconds == pytest.approx(2 * (2 * ENDS + BLOCK) + 3e9 + 5, rel=1e-12)
    assert found.gathers == 2 and found.traffic.nvlink == 2 * (3 * BLOCK + FINAL + 2 * ENDS)
    assert sharded_forward(engine("fsdp"), work(1.0, 2.0), gathers=0) == PhasePlan(0, Traffic(), 5.0, 5.0)


def test_a_backward_gathers_and_cuts_by_hand() -> None:
    g, f, e = BLOCK, FINAL, 2 * ENDS
    r, rf, re = 2 * BLOCK, 2 * FINAL, 2 * ENDS  # half of float32
    slow = sharded_backward(engine("fsdp"), work(1.0, 5.0), last=True)
    # The first block's gradients are cut while the second computes and the third is gathered.
    assert slow.seconds == pytest.approx((e + f + g) + (g + (g + r) + r) + (r + rf + re) + 5)
    assert slow.traffic.nvlink == 3 * g + f + e + 3 * r + rf + re
    fast = sharded_backward(engine("fsdp"), work(1e9, 5.0), last=True)
    assert fast.seconds == pytest.approx((e + f + g) + 3e9 + (r + rf + re) + 5, rel=1e-12)
    halved = sharded_backward(engine("fsdp", reduced=2), work(1.0), last=True).traffic.nvlink
    assert slow.traffic.nvlink - halved == (3 * r + rf + re) / 2
    one_block = dataclasses.replace(engine("fsdp"), groups=GROUPS._replace(blocks=GROUPS.blocks[:1]))
    assert sharded_backward(one_block, work(1.0, 5.0), True).seconds == pytest.approx(e + f + g + 1 + r + rf + re + 5)


def test_replicas_of_parts_add_up_in_the_last_micro_batch_alone() -> None:
    """Two nodes of two: between nodes each rank sends its half of the float32 gradients, once."""
    first, last = (sharded_backward(engine("hsdp", 2, 2), work(1.0), last=last) for last in (False, True))
    assert first.traffic.network == 0 and first.traffic.nvlink == last.traffic.nvlink
    cut = sum(sum(group.part(2)) for group in GROUPS.all())
    assert last.traffic.network == pytest.approx(4 * cut)  # 2 S (k - 1) / k
    assert first.traffic == sharded_backward(engine("fsdp", 2, 1), work(1.0), last=False).traffic


def test_a_backward_of_replicas_by_hand() -> None:
    """Two buckets: bf16 of the blocks and float32 of the ends, both added up in float32."""
    low = sum(g.numel for g in (*GROUPS.blocks, GROUPS.final))
    buckets = [4 * low, 4 * GROUPS.ends.numel]  # 2 S (N - 1) / N of two ranks
    found = replicated_backward(engine("ddp"), work(1.0, 5.0), last=True)
    assert found.traffic.nvlink == sum(buckets)
    # From the first block on; the largest has nothing to hide behind.
    assert found.seconds == pytest.approx(1 + 5 + sum(buckets))
    hidden = replicated_backward(engine("ddp"), work(1e9, 5.0), last=True)
    assert hidden.seconds == pytest.approx(3e9 + 5 + max(buckets), rel=1e-12)
    quiet = replicated_backward(engine("ddp"), work(1.0, 5.0), last=False)
    assert quiet.traffic == Traffic() and quiet.seconds == pytest.approx(8)
    copying = dataclasses.replace(SLOW, copy=1.0)
    at_work = replicated_backward(engine("ddp", gpu=copying), work(0.0), last=True)
    assert at_work.compute == HOOK_BYTES * (low + GROUPS.ends.numel)
    assert replicated_backward(engine("ddp", gpu=copying), work(0.0), last=False).compute == SUM_BYTES * low
    assert replicated_backward(engine("ddp", low=False, gpu=copying), work(0.0), last=True).compute == 0


def test_what_fsdp_copies_by_hand() -> None:
    """Into the buffer 4 bytes are read and 2 written of each number of a part; out of it 2 and 2 of all."""
    group, one = GROUPS.blocks[0], engine("fsdp", gpu=dataclasses.replace(SLOW, copy=1.0))
    assert one.copying(group) == 6 * group.numel / 2 + 4 * group.numel
    assert one.copying(group, reduction=True) == (2 + 4) * group.numel
    assert one.copying(GROUPS.ends) == 8 * sum(GROUPS.ends.part(2)) + 8 * GROUPS.ends.gathered(2)


# A step


def test_a_step_is_its_micro_batches_and_one_update() -> None:
    parts, update = {name: work(1.0, 1.0, host=10.0) for name in PHASES}, 4.0
    gathers = {"guidance": 1, "student": 1, "target": 2, "backward": 1}
    two_nodes = many_gpus(engine("hsdp", 2, 2), parts, gathers, 3, Group(2, 2), graph=False)
    assert [phase.gathers for phase in two_nodes.phases.values()] == [3, 3, 6, 3, 0]
    assert two_nodes.phases["update"].compute == pytest.approx(update * _part(2))
    told = two_nodes.phases["update"].traffic
    assert told.nvlink + told.network == pytest.approx(EXCHANGED * 4 * 3 / 4)
    backward = [sharded_backward(engine("hsdp", 2, 2), parts["backward"], last) for last in (False, True)]
    assert two_nodes.phases["backward"].seconds == pytest.approx(2 * backward[0].seconds + backward[1].seconds)
    exchanges = 3 * (5 + 1) * 5 * Host().exchange  # five gatherings and a reduction of five groups
    assert two_nodes.host == pytest.approx((3 * 4 + 1) * 40 + exchanges)
    replicas = many_gpus(engine("ddp"), parts, gathers, 3, Group(2, 1), graph=True)
    assert all(phase.gathers == 0 for phase in replicas.phases.values())
    hooks = 2 * HOOK_OPERATIONS * (Host().dispatch + Host().launch)
    assert replicas.host == pytest.approx((3 * 4 + 1) * 40 + hooks)
    assert replicas.phases["update"].compute == update
    alone = one_gpu(engine("ddp"), parts, 3, graph=False)
    assert alone.whole.seconds == pytest.approx((3 * 4 + 1) * 4) and alone.whole.traffic == Traffic()
    # The host is a bound of a step that is not replayed.
    assert alone.seconds == alone.host and replicas.seconds == replicas.whole.seconds


def _part(ranks: int) -> float:
    return sum(sum(g.part(ranks)) for g in GROUPS.all()) / sum(g.numel for g in GROUPS.all())


def configured(**changes: Any) -> Config:
    config = dataclasses.replace(preset("digits", precision="fp32", batch_size=16, device="cpu"), model=SIZES)
    return override(config, changes)


def test_blocks_and_the_rest_make_the_step_of_one_gpu() -> None:
    config = configured(precision="bf16", batch_size=8, **{"model.depth": 5})
    found, whole = phase_work(config, "h100", 8), estimate_time(config, "h100")
    for name in PHASES:
        told, wanted = found[name].whole(5), whole.phases[name]
        assert told.gpu == pytest.approx(wanted.gpu, rel=0.02) and told.host == pytest.approx(wanted.host, rel=0.05)
        assert told.launches == pytest.approx(wanted.launches, rel=0.05) and found[name].block.gpu >= 0


@pytest.mark.parametrize(
    ("changes", "target", "expected"),
    [
        ({}, ("increments", "bf16", "student"), [1, 1, 1, 1]),
        ({"objective.guidance_scale": 1.0}, ("increments", "bf16", "student"), [0, 1, 1, 1]),
        ({"model.num_classes": 0}, ("increments", "fp16", "student"), [0, 1, 1, 1]),
        ({"objective.fm_fraction": 1.0}, ("increments", "bf16", "student"), [1, 1, 0, 1]),
        ({}, ("increments", "bf16", "ema"), [1, 1, 1, 1]),
        ({}, ("pair", "bf16", "student"), [1, 1, 1, 1]),
        ({}, ("pair", "fp32", "student"), [1, 1, 2, 1]),
        ({}, ("pair", "bf16", "ema"), [1, 1, 2, 1]),
    ],
    ids=str,
)
def test_passes_over_the_network(changes: dict[str, Any], target: tuple[str, str, str], expected: list[int]) -> None:
    assert list(passes(configured(**changes), ConsistencyTarget(*target), "bf16", 8).values()) == expected


# What is really sent


class Sent(TorchDispatchMode):
    """Within the context, the bytes that a rank sends by the formulas of rings; sums are of two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)]
            sizes = [t.numel() * t.element_size() for t in tensors]
            part = {"_allgather_base_": min(sizes), "_reduce_scatter_base_": min(sizes), "allreduce_": 0}
            self.bytes += max(sizes) - part[func._overloadpacket.__name__]
        return func(*args, **(kwargs or {}))


def sent_in_a_step(launch: Launch, changes: dict[str, Any]) -> int:
    """What a rank sends in its fourth step: before, DistributedDataParallel orders its buckets anew."""
    config = configured(**changes)
    state = TrainState.build(config, parallel=join(launch, config.run, torch.device("cpu")))
    B = config.batch_size // launch.world
    source = torch.Generator().manual_seed(launch.rank)
    x0, y = torch.randn(B, 1, 8, 8, generator=source), torch.arange(B) % 10
    for _ in range(3):
        train_step(state, x0, y)
    with Sent() as sent:
        train_step(state, x0, y)
    return sent.bytes


@pytest.mark.parametrize(
    ("nodes", "changes"),
    [
        (1, {"parallel": "fsdp", "precision": "bf16", "micro_batch": 4, "run.reduce_dtype": "bf16"}),
        (1, {"parallel": "ddp", "precision": "bf16", "micro_batch": 4}),
        pytest.param(
            1, {"parallel": "fsdp", "precision": "bf16", "objective": "flow-matching"}, marks=pytest.mark.slow
        ),
        pytest.param(1, {"parallel": "fsdp", "objective": "meanflow"}, marks=pytest.mark.slow),
        pytest.param(
            1,
            {"parallel": "fsdp", "teacher": "ema", "recompute": "block", "model.hidden_size": 44},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            1, {"parallel": "fsdp", "objective.guidance_scale": 1.0, "precision": "bf16"}, marks=pytest.mark.slow
        ),
        pytest.param(
            1, {"parallel": "fsdp", "teacher": "ema", "precision": "bf16", "quotient": "pair"}, marks=pytest.mark.slow
        ),
        pytest.param(1, {"parallel": "fsdp", "teacher": "ema", "precision": "bf16"}, marks=pytest.mark.slow),
        pytest.param(1, {"parallel": "ddp"}, marks=pytest.mark.slow),
        pytest.param(2, {"parallel": "hsdp", "micro_batch": 2, "run.shard_ranks": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_rank_sends_what_is_predicted(nodes: int, changes: dict[str, Any]) -> None:
    """To the byte: processes by gloo, the engines' own collectives."""
    changes = {"run.check_quotient_every": 0, **changes}
    predicted = plan(configured(**changes), Cluster("h100", 2, nodes)).step.whole.traffic
    assert bool(predicted.network) == (nodes > 1)
    assert on_ranks(2 * nodes, sent_in_a_step, changes) == [predicted.nvlink + predicted.network] * 2 * nodes

"""The groups of parameters, the parts of a rank, and the memory of a GPU of many."""

import dataclasses
from typing import Any

import pytest
import torch
import torch._dynamo.utils  # FSDP imports dynamo, which would take each fork seconds
from torch import nn

from soflow_fast import preset
from soflow_fast.config.schema import Config, DiTConfig, RunConfig, override
from soflow_fast.launch import Launch
from soflow_fast.models.dit import DiT
from soflow_fast.models.sharding import shard
from soflow_fast.training.memory_estimate import BLOCK, PassingMemory, estimate_memory, estimate_passing
from soflow_fast.training.parallel import join
from soflow_fast.training.plan import Cluster, peak_of_rank, plan
from soflow_fast.training.plan.links import layout
from soflow_fast.training.plan.memory import BUCKET, GpuMemory, buckets, gpu_memory, passing_memory
from soflow_fast.training.plan.parameters import ParameterGroup, parameter_groups
from soflow_fast.training.plan.planning import share_of
from tests.forked import on_ranks

# Of its sizes some are odd: 12 rows of labels, 36 and 108 of a block, 4 of the last layer.
SIZES = DiTConfig(input_size=8, patch_size=2, in_channels=1, hidden_size=36, depth=3, num_heads=2, num_classes=10)
NO_PASSING = PassingMemory(0, 0, 0)


def configured(**changes: Any) -> Config:
    config = dataclasses.replace(preset("digits", precision="bf16", batch_size=8), model=SIZES)
    return override(config, changes)


def memory(config: Config, kind: Any, gpus: int, nodes: int = 1, passing: PassingMemory = NO_PASSING) -> GpuMemory:
    groups = parameter_groups(DiT(config.model))
    return gpu_memory(config, groups, layout(kind, gpus, nodes), config.precision == "bf16", passing)


def test_every_parameter_is_in_one_group() -> None:
    network = DiT(SIZES)
    groups = parameter_groups(network)
    assert len(groups.blocks) == 3 and len({group.numel for group in groups.blocks}) == 1
    D = 36
    assert groups.blocks[0].numel == 18 * D * D + 15 * D and groups.blocks[0].low
    assert groups.final.numel == 2 * D * D + 2 * D and groups.final.low and not groups.ends.low
    assert sum(group.numel for group in groups.all()) == sum(p.numel() for p in network.parameters())
    assert groups.buffers == (network.pos_embed.shape,)


def test_rows_are_dealt_in_equal_runs() -> None:
    group = ParameterGroup((torch.Size((11, 4)), torch.Size((3,))), low=True)
    assert [group.part(4, rank) for rank in range(4)] == [[12, 1], [12, 1], [12, 1], [8, 0]]
    assert group.gathered(4) == 4 * 13 and group.gathered(1) == group.numel == 47
    assert [group.part(5, rank)[0] for rank in range(5)] == [12, 12, 12, 8, 0]


def local_sizes(launch: Launch) -> list[list[int]]:
    """What `fully_shard` leaves on a rank, group by group."""
    network = DiT(SIZES)
    units: list[nn.Module] = network.units()
    inside = [set(unit.parameters()) for unit in units]
    names = [[n for n, p in network.named_parameters() if p in mine] for mine in inside]
    names.append([n for n, p in network.named_parameters() if not any(p in mine for mine in inside)])
    shard(network, join(launch, RunConfig(parallel="fsdp"), torch.device("cpu")).mesh, blocks=None, reduce=None)
    parameters: Any = dict(network.named_parameters())
    return [[parameters[name].to_local().numel() for name in group] for group in names]


def test_parts_are_those_of_fully_shard() -> None:
    groups = parameter_groups(DiT(SIZES)).all()
    for world in (2, 3):  # 3 ranks cut 4 and 11 rows unevenly
        for rank, found in enumerate(on_ranks(world, local_sizes)):
            assert found == [group.part(world, rank) for group in groups]
            assert sum(map(sum, found)) <= sum(group.gathered(world) for group in groups) // world


@pytest.mark.parametrize("changes", [{}, {"precision": "fp32"}, {"objective.teacher": "ema"}], ids=str)
def test_what_lasts_with_ddp_is_what_lasts_on_one_gpu(changes: dict[str, Any]) -> None:
    config = configured(**changes)
    one, many = estimate_memory(config), memory(config, "ddp", 8)
    for name in ("weights", "masters", "moments", "averages"):
        assert getattr(many, name) == getattr(one, name), name
    assert many.gathered == 0


def test_gradients_of_ddp_by_hand() -> None:
    """Buckets that stay: bf16 of the blocks, float32 of the ends; two float32 copies of the largest on their way."""
    config = configured()
    groups = parameter_groups(DiT(SIZES))
    rounded = [shape.numel() for group in (*groups.blocks, groups.final) for shape in group.shapes]
    full = [shape.numel() for shape in groups.ends.shapes]

    def stored(numbers: list[int], size: int) -> int:
        return sum(-(-n * size // BLOCK) * BLOCK for n in numbers)

    assert sorted(buckets(groups, low=True)) == sorted([(sum(rounded), 2), (sum(full), 4)])
    passing = PassingMemory(activations=10**9, workspace=5, update=7)
    held = stored(rounded, 2) + stored(full, 4)
    copies = 2 * 4 * max(sum(rounded), sum(full))
    assert memory(config, "ddp", 2, 1, passing).gradients == held + copies
    # Over micro-batches the bf16 ones are added up in float32 beside them.
    found = memory(override(config, {"micro_batch": 4}), "ddp", 2, 1, passing)
    assert found.gradients == held + copies + stored(rounded, 4)
    assert memory(override(config, {"run.reduce_dtype": "bf16"}), "ddp", 2, 1, passing).gradients == held + copies // 2
    # In float32 nothing is copied; where nothing else is large the update is the peak.
    plain = memory(override(config, {"precision": "fp32"}), "ddp", 2, 1, PassingMemory(1, 2, 10**9))
    assert plain.gradients == stored(rounded + full, 4) and plain.workspace == 10**9


def test_buckets_are_closed_by_the_parameter_that_fills_them() -> None:
    """With blocks of 23.9 M numbers, as of DiT-XL: each number once, none closed early."""
    config = dataclasses.replace(SIZES, hidden_size=1152, num_heads=16, depth=2)
    with torch.device("meta"):
        groups = parameter_groups(DiT(config))
    found = buckets(groups, low=True)
    assert sum(n for n, _ in found) == sum(group.numel for group in groups.all())
    largest = max(shape.numel() for group in groups.all() for shape in group.shapes)
    assert all(n * size < BUCKET + 2 * largest for n, size in found)
    assert sum(n * size < BUCKET for n, size in found) <= 2  # the last of each dtype


def test_the_parts_of_fsdp_by_hand() -> None:
    config = configured()
    D, N = 36, 2
    groups = parameter_groups(DiT(SIZES))
    block = groups.blocks[0].numel
    passing = PassingMemory(activations=10**9, workspace=5, update=7)
    found = memory(config, "fsdp", N, 1, passing)
    # Two blocks and the last modulation in bf16, the ends in float32; all rows of them are even but 11 of labels.
    ends = groups.ends.numel + D
    assert groups.ends.gathered(N) == ends
    assert found.gathered == 2 * 2 * block + 2 * groups.final.numel + 4 * ends
    # This block's gradients in bf16, and the one's before in float32, both whole.
    assert found.gradients == 2 * block + 4 * block
    assert (found.activations, found.workspace, found.masters) == (10**9, 5, 0)
    parts = [n for group in groups.all() for n in group.part(N)]
    cut = sum(-(-4 * n // BLOCK) * BLOCK for n in parts)
    assert found.moments == 2 * cut + BLOCK * len(parts)
    assert found.weights == found.averages == cut + 4 * 16 * D + (-4 * 16 * D) % BLOCK
    # Over micro-batches parts of gradients are there already; where activations are few the end of the backward counts.
    assert memory(override(config, {"micro_batch": 4}), "fsdp", N, 1, passing).gradients == 6 * block + cut
    late = memory(config, "fsdp", N)
    assert late.gradients == 6 * block + cut and late.activations == 0


def test_state_falls_as_one_over_n_and_hsdp_lies_between() -> None:
    config = override(configured(), {"model.hidden_size": 512, "model.num_heads": 8})
    whole = memory(config, "ddp", 8).state
    # In bf16 a replica holds a rounded copy beside the masters; parts are their own masters.
    copies = memory(config, "ddp", 8).weights + memory(config, "ddp", 8).masters - memory(config, "fsdp", 2).weights * 2
    fixed = 2 * 4 * 16 * 512  # positions, of the network and its average
    states = {n: memory(config, "fsdp", n).state for n in (2, 4, 8, 16, 32)}
    for n, state in states.items():
        assert (state - fixed) * n == pytest.approx(whole - copies, rel=0.06)
    assert list(states.values()) == sorted(states.values(), reverse=True)
    for nodes in (2, 4):
        parted = memory(config, "hsdp", 8, nodes).state
        assert memory(config, "fsdp", 8, nodes).state < parted == memory(config, "fsdp", 8).state < whole


@pytest.mark.parametrize(
    "changes",
    [
        {"model.hidden_size": 512, "model.num_heads": 8, "batch_size": 4},
        pytest.param({"run.recompute": "block", "precision": "fp32"}, marks=pytest.mark.slow),
        pytest.param({"objective.teacher": "ema", "batch_size": 64}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_depths_tell_what_comes_and_goes_at_any_depth(changes: dict[str, Any]) -> None:
    config = override(configured(), {"model.depth": 11, "run.check_quotient_every": 0, **changes})
    whole, told = estimate_passing(config), passing_memory(config)
    assert min(dataclasses.astuple(told)) >= 0
    for name in ("activations", "workspace"):
        assert getattr(told, name) == pytest.approx(getattr(whole, name), rel=0.02, abs=4 * BLOCK)
    assert told.update == pytest.approx(whole.update, rel=0.1, abs=32 * BLOCK)


def test_what_comes_and_goes_is_the_rest_of_one_gpus_peak() -> None:
    config = override(configured(), {"run.check_quotient_every": 0, "batch_size": 256})
    one, passing = estimate_memory(config), estimate_passing(config)
    lasting = one.weights + one.masters + one.moments + one.averages
    assert lasting + passing.activations + passing.workspace == pytest.approx(one.peak - one.gradients, rel=0.02)
    assert passing.activations == pytest.approx(one.activations, rel=0.02) and passing.update > 0


def test_the_peak_of_a_rank_is_that_of_the_plan() -> None:
    config = configured(batch_size=16, micro_batch=2, **{"run.parallel": "fsdp", "run.recompute": "none"})
    share = dataclasses.replace(config, batch_size=4)
    assert peak_of_rank(share, 2, 2) == plan(config, Cluster("h100", 2, 2)).memory.peak
    assert peak_of_rank(share, 2, 2) < estimate_memory(share).peak


def test_micro_batches_of_parts_cost_little_more_than_one_alone() -> None:
    """No gradient stays whole from one to the next."""
    config = configured(batch_size=64, **{"run.parallel": "fsdp", "run.recompute": "none", "model.depth": 8})
    alone = plan(dataclasses.replace(config, batch_size=16), Cluster("h100", 4)).memory
    found = plan(dataclasses.replace(config, micro_batch=4), Cluster("h100", 4)).memory
    assert found.activations + found.workspace <= alone.activations + alone.workspace
    whole = 4 * sum(p.numel() for p in DiT(config.model).parameters())
    assert alone.peak <= found.peak <= alone.peak + 0.3 * whole  # a quarter, in blocks of 512 bytes


@pytest.mark.parametrize("shard_ranks", [0, 1, 4])
def test_the_peak_of_a_rank_needs_no_even_layout(shard_ranks: int) -> None:
    """Two nodes of six, and four nodes of one."""
    config = configured(batch_size=4, **{"run.parallel": "hsdp", "run.shard_ranks": shard_ranks})
    for gpus, nodes in ((6, 2), (1, 4)):
        assert peak_of_rank(config, gpus, nodes) > 0


def test_a_few_images_wait_for_the_ranks_with_consistency_samples() -> None:
    """Of one image a rank, a quarter of the ranks have one."""
    config = configured(batch_size=4, **{"run.parallel": "ddp", "objective.fm_fraction": 0.75})
    assert share_of(config, 4).objective.fm_fraction == 0
    assert share_of(dataclasses.replace(config, batch_size=16), 4).objective.fm_fraction == 0.75

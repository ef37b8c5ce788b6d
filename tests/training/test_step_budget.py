"""What a step costs on a GPU, pinned: launches, bytes, and bytes of all but products and attention, by its parts.

Counted on tensors without data at the shipped widths. A step is a fixed cost and one for each block, so that a few
shallow networks tell what a deep one costs. A change that costs more fails here; one that costs less lowers the pins.
"""

import functools
from typing import NamedTuple

import pytest
import torch

from soflow_fast import preset
from soflow_fast.config.gpus import GPUS, Host
from soflow_fast.config.schema import override
from soflow_fast.training.operation_count import Operation, Operations
from soflow_fast.training.time_estimate import PHASES, PhaseTime, count_step, phase_time
from soflow_kernels.testing import as_on_gpu

DEPTHS = (2, 3, 4)
"""The first block is unlike the others."""
LARGE = 100_000_000
COPIES = ("zeros", "zeros_like", "new_zeros", "zero_", "fill_", "full", "clone", "copy_", "stack", "cat")
"""Operations that compute nothing; casts count to them."""
Copy = tuple[str, str, tuple[int, ...]]
"""Part of the step, operation, shape of the result."""


class Cost(NamedTuple):
    launches: int
    """Exactly."""
    gb: float
    """At most, and at least 98 % of it."""
    other_gb: float


# DiT-XL/2 at a batch of 256: what does not depend on the depth, and a block.
BUDGET = {
    "guidance": (Cost(62, 2.072, 1.278), Cost(8, 5.348, 1.515)),
    "student": (Cost(21, 1.624, 0.985), Cost(9, 5.498, 2.422)),
    "target": (Cost(50, 0.431, 0.242), Cost(9, 1.976, 1.059)),
    "backward": (Cost(60, 3.2, 2.234), Cost(22, 11.693, 5.546)),
    "update": (Cost(57, 0.285, 0.285), Cost(1, 0.957, 0.957)),
}
# Preset, batch, depth, and milliseconds of a step on an H100 by the same count: at most, and at least 98 % of it.
TIMES = [("imagenet256-b4", 32, 12, 7.15), ("imagenet256-b2", 256, 12, 137.2), ("imagenet256-xl2", 256, 28, 615.8)]

B, T, D = 256, 256, 1152
KNOWN: set[Copy] = {
    # The gradient of the tokens, for that of the patch embedding, which is made in float32.
    ("backward", "cast bfloat16 to float32", (B, T, D)),
}
"""Copies above `LARGE` that are there."""


@functools.cache
def counted(
    depth: int, name: str = "imagenet256-xl2", batch: int = 256, qk_norm: bool = False
) -> list[Operation]:  # fmt: skip
    return count_step(override(preset(name), {"model.depth": depth, "model.qk_norm": qk_norm}), batch)


def cost(operations: list[Operation], phase: str | None = None) -> PhaseTime:
    return phase_time([o for o in operations if phase in (None, o.phase)], GPUS["h100"], Host())


def copies(operations: list[Operation]) -> set[Copy]:
    """Operations that only move or fill more than `LARGE` bytes."""
    return {
        (o.phase, o.name, o.shape)
        for o in operations
        if o.launches and o.result > LARGE and (o.name in COPIES or o.name.startswith("cast "))
    }


@pytest.mark.parametrize("phase", PHASES)
def test_a_part_of_the_step_costs_what_it_did(phase: str) -> None:
    two, three, four = (cost(counted(depth), phase) for depth in DEPTHS)
    assert four.bytes - three.bytes == three.bytes - two.bytes, "each block costs the same"
    assert four.other_bytes - three.other_bytes == three.other_bytes - two.other_bytes
    # The update goes through chunks of many parameters, as many in a launch as it holds.
    slack = 1 if phase == "update" else 0
    assert abs((four.launches - three.launches) - (three.launches - two.launches)) <= slack
    block = Cost(three.launches - two.launches, *(gigabytes(b - a) for a, b in sizes(two, three)))
    fixed = Cost(two.launches - 2 * block.launches, *(gigabytes(3 * a - 2 * b) for a, b in sizes(two, three)))
    for part, found, pinned in zip(("beside the blocks", "a block"), (fixed, block), BUDGET[phase], strict=True):
        assert found.launches == pinned.launches, (phase, part, found)
        for value, limit in zip(found[1:], pinned[1:], strict=True):
            assert 0.98 * limit <= value <= limit, (phase, part, found)


# What norms of queries and keys add to a block, launches and passes over the tokens of the batch in bf16: one kernel
# for both in a forward (4), of a quarter more samples behind guidance; in the backward one (6) and the sum of its
# parts; and the increments of a quarter of the samples (6).
QK_NORM = {"guidance": (1, 5.0), "student": (1, 4.0), "target": (1, 1.5), "backward": (2, 6.0)}


@pytest.mark.parametrize("phase", QK_NORM)
def test_norms_of_queries_and_keys_cost_a_kernel_for_both(phase: str) -> None:
    launches, passes = QK_NORM[phase]
    (two, three), (normed_two, normed_three) = (
        [cost(counted(depth, qk_norm=qk_norm), phase) for depth in DEPTHS[:2]] for qk_norm in (False, True)
    )
    assert (normed_three.launches - normed_two.launches) - (three.launches - two.launches) == launches
    more = (normed_three.bytes - normed_two.bytes) - (three.bytes - two.bytes)
    assert more == pytest.approx(passes * 2 * B * T * D, rel=0.01)
    assert copies(counted(DEPTHS[0], qk_norm=True)) == KNOWN


def sizes(a: PhaseTime, b: PhaseTime) -> list[tuple[int, int]]:
    return [(a.bytes, b.bytes), (a.other_bytes, b.other_bytes)]


def gigabytes(size: int) -> float:
    return size / 1e9


@pytest.mark.parametrize(("name", "batch", "depth", "limit"), TIMES)
def test_the_predicted_time_of_a_step(name: str, batch: int, depth: int, limit: float) -> None:
    two, three = (1e3 * cost(counted(depth, name, batch)).gpu for depth in DEPTHS[:2])
    predicted = two + (depth - 2) * (three - two)
    assert 0.98 * limit <= predicted <= limit, f"{name} at a batch of {batch}: {predicted:.3f} ms"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "batch", "depth", "limit"), TIMES)
def test_a_deep_network_costs_what_shallow_ones_say(name: str, batch: int, depth: int, limit: float) -> None:
    two, three, whole = (cost(counted(k, name, batch)) for k in (2, 3, depth))
    assert whole.bytes == two.bytes + (depth - 2) * (three.bytes - two.bytes)
    assert whole.launches == pytest.approx(two.launches + (depth - 2) * (three.launches - two.launches), abs=depth)
    assert whole.gpu == pytest.approx(two.gpu + (depth - 2) * (three.gpu - two.gpu), rel=0.01)


def test_nothing_large_is_copied_filled_or_cast() -> None:
    assert copies(counted(DEPTHS[0])) == KNOWN


def test_the_backward_rounds_nothing_to_bfloat16_outside_the_blocks() -> None:
    """Inside of them all is bfloat16 already."""
    assert [o.shape for o in counted(2) if (o.phase, o.name) == ("backward", "cast float32 to bfloat16")] == []


def test_what_is_large_would_be_found() -> None:
    with as_on_gpu(), Operations() as operations:
        x = torch.zeros(30_000_000)
        torch.stack([x, x.clone()]).to(torch.bfloat16)
        x[:20_000_000].clone()
    assert copies(operations.found) == {
        ("", "zeros", (30_000_000,)),
        ("", "clone", (30_000_000,)),
        ("", "stack", (2, 30_000_000)),
        ("", "cast float32 to bfloat16", (2, 30_000_000)),
    }

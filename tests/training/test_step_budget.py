"""What a step costs on a GPU, pinned: launches, bytes, and bytes of all but products and attention, by its parts.

Counted on tensors without data at the shipped widths. A step is a fixed cost and one for each block, so that a few
shallow networks tell what a deep one costs. A change that costs more fails here; one that costs less lowers the limits.
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

LARGE = 100_000_000
COPIES = ("zeros", "zeros_like", "new_zeros", "zero_", "fill_", "full", "clone", "copy_", "stack", "cat")
"""Operations that compute nothing; casts count to them."""
DEPTHS = (2, 3, 4)
"""The first block is unlike the others."""


class Cost(NamedTuple):
    launches: int
    gb: float
    """At most; not less than 98 % of it."""
    other_gb: float


# DiT-XL/2 at a batch of 256: (what does not depend on the depth, a block).
BUDGET: dict[str, tuple[Cost, Cost]] = {}
LAUNCHES = {"imagenet256-b4": 0, "imagenet256-b2": 0, "imagenet256-xl2": 0}

KNOWN: set[tuple[str, str, tuple[int, ...]]] = set()
"""Copies above `LARGE` that are still there."""


@functools.cache
def counted(depth: int) -> list[Operation]:
    return count_step(override(preset("imagenet256-xl2"), {"model.depth": depth}), batch=256)


def cost(depth: int, phase: str) -> PhaseTime:
    return phase_time([o for o in counted(depth) if o.phase == phase], GPUS["h100"], Host())


def copies(operations: list[Operation], least: int) -> set[tuple[str, str, tuple[int, ...]]]:
    """Operations that only move or fill more than so many bytes: part of the step, name and shape of the result."""
    return {
        (o.phase, o.name, o.shape)
        for o in operations
        if o.launches and o.result > least and (o.name in COPIES or o.name.startswith("cast "))
    }


@pytest.mark.parametrize("phase", PHASES)
def test_a_part_of_the_step_costs_what_it_did(phase: str) -> None:
    below, middle, above = (cost(depth, phase) for depth in DEPTHS)
    fixed, block = BUDGET[phase]
    assert above.bytes - middle.bytes == middle.bytes - below.bytes, "each block costs the same"
    assert above.other_bytes - middle.other_bytes == middle.other_bytes - below.other_bytes
    each = middle.launches - below.launches
    assert above.launches - middle.launches == each
    for what, pinned, found_block, found_2 in (
        ("launches", (fixed.launches, block.launches), each, below.launches),
        ("GB", (fixed.gb, block.gb), (middle.bytes - below.bytes) / 1e9, below.bytes / 1e9),
        (
            "GB of others",
            (fixed.other_gb, block.other_gb),
            (middle.other_bytes - below.other_bytes) / 1e9,
            below.other_bytes / 1e9,
        ),
    ):
        found = found_2 - DEPTHS[0] * found_block, found_block
        for part, limit, value in zip(("beside blocks", "a block"), pinned, found, strict=True):
            assert 0.98 * limit <= value <= limit, f"{phase}, {part}: {value:.4f} {what}, pinned {limit}"


def test_nothing_large_is_copied_filled_or_cast() -> None:
    assert copies(counted(DEPTHS[0]), LARGE) == KNOWN


def test_what_is_large_would_be_found() -> None:
    with as_on_gpu(), Operations() as operations:
        x = torch.zeros(30_000_000)
        torch.stack([x, x.clone()]).to(torch.bfloat16)
        x[:20_000_000].clone()
    assert copies(operations.found, LARGE) == {
        ("", "zeros", (30_000_000,)),
        ("", "clone", (30_000_000,)),
        ("", "stack", (2, 30_000_000)),
        ("", "cast float32 to bfloat16", (2, 30_000_000)),
    }

"""The rules by which operations are counted: launches, bytes, FLOPs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from soflow_fast.training.operation_count import Operation, Operations, multi_tensor_launches
from soflow_kernels import AdamWEMA, attention_increment, bias_gelu
from soflow_kernels.testing import as_on_gpu

HALF = torch.bfloat16


def ran(function: Callable[..., Any], *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Operation]:
    """What a function launches on tensors of these shapes, its own backward included where it returns a scalar."""
    with as_on_gpu():
        tensors = [torch.empty(shape, dtype=dtype) for shape in shapes]
        with Operations() as operations:
            function(*tensors)
    return [o for o in operations.found if o.launches]


def one(function: Callable[..., Any], *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Operation:
    (found,) = ran(function, *shapes, dtype=dtype)
    return found


# Bytes


@pytest.mark.parametrize(
    ("function", "bytes"),
    [
        (lambda x: x + 1, 2 * 4000),
        (lambda x: x + x, 2 * 4000),
        (lambda x: x[0] + x[1], 1200),
        (lambda x: x.add_(1), 2 * 4000),
        (lambda x: x.zero_(), 4000),
        (lambda x: x.copy_(x[:1].expand(10, 100)), 400 + 4000),
        (lambda x: x[:1].expand(10, 100) * 2, 400 + 4000),
        (lambda x: x.to(HALF), 4000 + 2000),
        (lambda x: x[torch.empty(3, dtype=torch.int64)], 24 + 2 * 1200),
        (lambda x: F.embedding(torch.empty(3, dtype=torch.int64), x), 24 + 2 * 1200),
        (lambda x: torch.zeros_like(x), 4000),
        (lambda x: x @ x.t(), 4000 + 400),
    ],
)
def test_a_tensor_is_read_once_and_written_once(function: Callable[[Tensor], Tensor], bytes: int) -> None:
    assert one(function, (10, 100)).bytes == bytes


def test_views_and_allocations_launch_nothing() -> None:
    assert ran(lambda x: (x.view(100, 10).t()[1:], torch.empty_like(x), x.split(2), x.detach()), (10, 100)) == []
    assert ran(lambda x: x[:0] + 1, (10, 100)) == []


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: x.clone(), "clone"),
        (lambda x: x.t().contiguous(), "clone"),
        (lambda x: x.to(HALF), "cast float32 to bfloat16"),
        (lambda x: torch.empty_like(x, dtype=HALF).copy_(x), "cast float32 to bfloat16"),
        (lambda x: torch.empty_like(x).copy_(x), "copy_"),
        (lambda x: torch.stack([x, x]), "stack"),
    ],
)
def test_copies_have_names(function: Callable[[Tensor], Tensor], name: str) -> None:
    found = one(function, (10, 100))
    assert (found.name, found.kind) == (name, "other")


# Launches


@pytest.mark.parametrize(
    ("function", "launches"),
    [
        (lambda x: torch.cat([x] * 129), 2),
        (lambda x: x.sum(), 2),
        (lambda x: x.sum(1), 2),
        (lambda x: x[:, :4096].sum(1), 1),
        (lambda x: torch._foreach_norm([x, x]), 1 + 1 + 1),
        (lambda x: torch._foreach_norm([x, x[0, :9].to(HALF)], dtype=torch.float32), 2 + 1),  # one by one
        (lambda x: torch._foreach_add_([x] * 65, [x] * 65), 65 * 10 // 320 + 1),
        (lambda x: torch._foreach_copy_([x.to(HALF)], [x]), 1),
    ],
)
def test_launches_of_torch(function: Callable[[Tensor], Any], launches: int) -> None:
    assert ran(function, (10, 65536))[-1].launches == launches


def test_a_launch_holds_so_many_chunks_and_tensors() -> None:
    chunk = 65536
    assert multi_tensor_launches([chunk] * 110, 1) == 1
    assert multi_tensor_launches([chunk] * 111, 1) == 2
    assert multi_tensor_launches([320 * chunk], 1) == 1
    assert multi_tensor_launches([320 * chunk + 1], 1) == 2
    assert multi_tensor_launches([319 * chunk, chunk], 2) == 1
    assert multi_tensor_launches([1] * 64 + [0] * 10, 2) == 1
    assert multi_tensor_launches([], 1) == 0


# Products


@pytest.mark.parametrize(("dtype", "precision"), [(HALF, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")])
def test_a_product_has_flops_and_a_precision(dtype: torch.dtype, precision: str) -> None:
    for found in (
        one(lambda x, w: x @ w, (8, 4), (4, 6), dtype=dtype),
        one(lambda x, w, b: torch.addmm(b, x, w), (8, 4), (4, 6), (6,), dtype=dtype),
        one(lambda x, w, b: torch._addmm_activation(b, x, w, use_gelu=True), (8, 4), (4, 6), (6,), dtype=dtype),
    ):
        assert (found.kind, found.flops, found.precision) == ("product", 2 * 8 * 4 * 6, precision)


def test_a_product_of_float32_may_be_one_of_tf32() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert one(lambda x, w: x @ w, (8, 4), (4, 6)).precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_attention_has_two_products_and_its_backward_five() -> None:
    def forward_and_backward(q: Tensor, k: Tensor, v: Tensor) -> None:
        for part in (q, k, v):
            part.requires_grad_()
        out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        out.backward(torch.empty_like(out))

    shape, each = (2, 3, 16, 8), 2 * 2 * 3 * 16 * 16 * 8
    found = [o for o in ran(forward_and_backward, shape, shape, shape, dtype=HALF) if o.kind != "other"]
    assert [(o.kind, o.flops, o.launches) for o in found] == [
        ("attention", 2 * each, 1),
        ("attention backward", 5 * each, 3),
    ]


# Our own operations


def test_our_operations_launch_what_their_code_launches() -> None:
    def forward_and_backward(x: Tensor, bias: Tensor) -> None:
        x.requires_grad_()
        bias.requires_grad_()
        out = bias_gelu(x, bias)
        out.backward(torch.empty_like(out))

    found = [o for o in ran(forward_and_backward, (64, 256), (256,), dtype=HALF) if "/" in o.name]
    S = 64 * 256 * 2
    names = ["bias_gelu/_forward_kernel", "bias_gelu_backward/_backward_kernel", "bias_gelu_backward/_finish_kernel"]
    assert [o.name for o in found] == names
    assert [o.host for o in found] == ["kernel", "kernel", ""]
    assert found[0].bytes == 2 * S + 512 and found[1].bytes == 3 * S + 512 + 256 * 4


def test_a_copy_that_our_operation_makes_counts() -> None:
    found = ran(lambda x, bias: bias_gelu(x.t(), bias), (256, 64), (256,), dtype=HALF)
    assert sorted((o.name, o.host) for o in found) == [("bias_gelu/_forward_kernel", "kernel"), ("clone", "")]


def test_increments_of_attention_make_six_products() -> None:
    pairs = [(2, 3, 16, 8)] * 6
    found = ran(lambda q, k, v, *d: attention_increment(*zip((q, k, v), d, strict=True)), *pairs, dtype=HALF)
    (attention,) = [o for o in found if o.kind == "attention"]
    assert (attention.flops, attention.precision) == (6 * 2 * 2 * 3 * 16 * 16 * 8, "bf16")


def test_the_update_moves_what_it_says() -> None:
    """38 bytes a parameter with a gradient in bfloat16, one average and a weight in low precision."""
    with as_on_gpu():
        p = torch.nn.Parameter(torch.empty(1000, 8, dtype=HALF))
        average = [torch.empty(1000, 8)]
        optimizer = AdamWEMA([p], emas=[average], ema_decays=[0.9])
        p.grad = torch.empty_like(p)
        with Operations() as operations:
            optimizer.step()
    (update,) = [o for o in operations.found if o.name == "adamw_ema"]
    assert update.launches == 1 and update.bytes == pytest.approx(38 * 8000, abs=64)

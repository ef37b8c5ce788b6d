"""The increment of RMSNorm of queries and keys against float64 differences of the plain operation."""

import pytest
import torch

from soflow_kernels import qk_rms_norm_reference, testing
from soflow_kernels.increment import qk_norm, qk_rms_norm_increment

from .pairs import STEPS, check, pair

SHAPES = ((2, 3, 4, 2), (1, 3, 2, 7), (1, 2, 3, 64), (1, 3, 2, 72), (0, 3, 2, 8))


def arguments(shape, step, device, dtype=torch.float32):
    q, k = (pair(shape, step, seed, device, dtype) for seed in (1, 2))
    weights = [(1 + torch.randn(shape[-1], generator=torch.Generator().manual_seed(3 + i))).to(device) for i in (0, 1)]
    return q, k, *weights


def wide(weights):
    return [weight.double() for weight in weights]


@pytest.mark.parametrize(
    ("shape", "step"),
    [(shape, 1e-3) for shape in SHAPES] + [((1, 3, 2, 72), sign * step) for step in (30.0, *STEPS) for sign in (1, -1)],
    ids=str,
)
def test_shapes_and_steps(shape, step, device):
    q, k, *weights = arguments(shape, step, device)
    with testing.poisoned():
        got = qk_rms_norm_increment(q, k, *weights)
    check(got, qk_rms_norm_reference, [q, k], constants=wide(weights))


def test_a_row_that_turns_to_its_opposite_or_to_zero(device):
    """The size of the end is taken from the end itself, not from the start and its growth."""
    q, k, *weights = arguments((1, 3, 2, 16), 1.0, device)
    q[1], k[1] = -2 * q[0], -k[0]
    q[0, :, 0, 0] = 0  # and one that begins at zero
    check(qk_rms_norm_increment(q, k, *weights), qk_rms_norm_reference, [q, k], constants=wide(weights))


def test_nothing_moves_where_nothing_moves(device):
    q, k, *weights = arguments((2, 3, 2, 8), 0.0, device)
    assert not any(out.any() for out in qk_rms_norm_increment(q, k, *weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, device):
    q, k, *weights = arguments((1, 3, 2, 72), 0.01, device, dtype)
    got = qk_rms_norm_increment(q, k, *weights)
    assert {out.dtype for out in got} == {dtype}
    check(got, qk_rms_norm_reference, [q, k], 2 * torch.finfo(dtype).eps, wide(weights))
    assert qk_rms_norm_increment(q, k, *weights, dtype=torch.float32)[1].dtype == torch.float32


def test_dtypes_of_value_and_increment_are_their_own(device):
    (h, dh), k, *weights = arguments((1, 3, 2, 8), 0.01, device)
    for q in ((h.bfloat16(), dh), (h, dh.bfloat16())):
        got = qk_rms_norm_increment(q, k, *weights)
        assert got[0].dtype == q[1].dtype and got[1].dtype == torch.float32
        check(got, qk_rms_norm_reference, [q, k], 2 * torch.finfo(got[0].dtype).eps + 1e-5, wide(weights))


@pytest.mark.parametrize("layout", ["packed", "packed heads", *testing.LAYOUTS[1:]])
def test_layouts(layout, device):
    if layout.startswith("packed"):  # as the products of values and increments leave them
        both = pair((2, 3, 3, 4, 24), 0.01, 1, device)
        q, k, _ = both.unbind(3) if layout == "packed" else both.permute(3, 0, 1, 4, 2, 5)
    else:
        pairs = [pair((2, 3, 4, 24), 0.01, seed, device) for seed in (1, 2)]
        q, k = ([testing.lay_out(part, layout) for part in each] for each in pairs)
    weights = [torch.randn(24, generator=torch.Generator().manual_seed(i)).to(device) for i in (3, 4)]
    got = qk_rms_norm_increment(q, k, *weights)
    check(got, qk_rms_norm_reference, [q, k], constants=wide(weights))
    if layout == "packed heads":
        assert all(out.transpose(1, 2).is_contiguous() for out in got)


def test_kernel_and_reference_agree(device):
    given = arguments((1, 3, 2, 72), 1e-4, device)
    kernel = qk_rms_norm_increment(*given)
    with testing.mode("reference"):
        reference = qk_rms_norm_increment(*given)
    for a, b in zip(kernel, reference, strict=True):
        assert not torch.equal(a, b)  # the kernel did run
        assert (a - b).norm() <= 2e-5 * b.norm()


def test_nan_stays_in_its_row(device):
    q, k, *weights = arguments((1, 3, 2, 8), 0.01, device)
    q[0, 0, 1, 1, 3] = torch.nan
    dq, dk = qk_rms_norm_increment(q, k, *weights)
    assert dq.isnan().any(-1).nonzero().tolist() == [[0, 1, 1]] and not dk.isnan().any()


def test_opcheck(device):
    q, k, *weights = arguments((1, 3, 2, 8), 0.1, device)
    torch.library.opcheck(
        qk_norm._qk_rms_norm.library, (*q, *k, *weights, 1e-6, torch.float32, torch.bfloat16)
    )  # fmt: skip


def test_compile_equals_eager(device):
    given = arguments((1, 3, 2, 24), 0.01, device)
    torch.compiler.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(qk_rms_norm_increment, fullgraph=True, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(compiled(*given), qk_rms_norm_increment(*given), strict=True))


def test_wrong_arguments_are_named(device):
    q, k, *weights = arguments((1, 3, 2, 8), 0.01, device)
    leaf = torch.ones(8, device=device, requires_grad=True)
    cases = (
        ((q[0], k, *weights), "q must be a pair"),
        ((q, (k[0], k[1, ..., :3]), *weights), "the increment of k must have shape"),
        ((q, k, weights[0][:3], weights[1]), r"q_weight must have shape \[8\]"),
        ((q, k, weights[0], leaf), "k_weight must not require a gradient"),
    )
    for given, message in cases:
        with pytest.raises(ValueError, match=f"^qk_rms_norm_increment: {message}"):
            qk_rms_norm_increment(*given)

"""The increment of SiLU against float64 differences of the plain operation."""

import pytest
import torch
import torch.nn.functional as F

from soflow_kernels import testing
from soflow_kernels.increment import silu, silu_increment

from .pairs import STEPS, check, ends, pair

SHAPES = ((5,), (7, 130), (2, 3, 4, 8), (0, 4))


@pytest.mark.parametrize(
    ("shape", "step"),
    [(shape, 1e-3) for shape in SHAPES]
    + [((7, 130), sign * step) for step in (30.0, *STEPS) for sign in (1, -1) if sign * step != 1e-3],
    ids=str,
)
def test_shapes_and_steps(shape, step, device):
    x = pair(shape, step, 1, device)
    x[0] *= 3
    with testing.poisoned():
        got = silu_increment(x)
    check(got, F.silu, [x])


def test_far_tails(device):
    """The exponentials neither overflow nor cancel."""
    h = torch.tensor([-1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4], device=device)
    for dh in (1e-4, 1.0, 200.0, -200.0):
        x = torch.stack([h, torch.full_like(h, dh)])
        start, end = (F.silu(v[0]) for v in ends(x))
        got = silu_increment(x)
        assert got.isfinite().all()
        torch.testing.assert_close(got.double(), end - start, rtol=1e-4, atol=1e-6)


def test_nothing_moves_where_nothing_moves(device):
    out = silu_increment(pair((2, 72), 0.0, 1, device))
    assert (out == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, device):
    x = pair((3, 100), 0.01, 1, device, dtype)
    got = silu_increment(x)
    assert got.dtype == dtype and silu_increment(x, dtype=torch.float32).dtype == torch.float32
    check(got, F.silu, [x], 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("layout", testing.LAYOUTS[1:])
def test_layouts(layout, device):
    x = testing.lay_out(pair((2, 4, 72), 0.01, 1, device), layout)
    check(silu_increment(x), F.silu, [x])


def test_kernel_and_reference_agree(device):
    x = pair((3, 100), 1e-4, 1, device)
    kernel = silu_increment(x)
    with testing.mode("reference"):
        reference = silu_increment(x)
    assert not torch.equal(kernel, reference)  # the kernel did run
    assert (kernel - reference).norm() <= 2e-5 * reference.norm()


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_empty_batch(mode, device):
    x = torch.zeros(2, 0, 8, device=device)
    with testing.mode(mode):
        assert silu_increment(x).shape == x.shape[1:]


def test_nan_stays_in_its_element(device):
    x = pair((3, 8), 0.01, 1, device)
    x[0, 1, 2] = torch.nan
    assert silu_increment(x).isnan().nonzero().tolist() == [[1, 2]]


def test_opcheck(device):
    torch.library.opcheck(silu._silu.library, (*pair((3, 8), 0.1, 1, device), torch.bfloat16))


def test_compile_equals_eager(device):
    x = pair((3, 40), 0.01, 1, device)
    torch.compiler.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    assert torch.equal(torch.compile(silu_increment, fullgraph=True, backend=backend)(x), silu_increment(x))


def test_wrong_arguments_are_named(device):
    x = torch.randn(2, 4).to(device)
    cases = (
        (torch.zeros(3, 4), "x must be a pair"),
        (x.clone().requires_grad_(), "the value of x must not require"),
        ((x[0], x[1].long()), "the increment of x must be bfloat16"),
    )
    for wrong, message in cases:
        with pytest.raises(ValueError, match=f"^silu_increment: {message}"):
            silu_increment(wrong)
    with pytest.raises(ValueError, match="dtype must be bfloat16"):
        silu_increment(x, dtype=torch.int32)

"""The increment of bias and tanh GELU against float64 differences of the plain operation."""

import pytest
import torch
import torch.nn.functional as F

from soflow_kernels import testing
from soflow_kernels.increment import bias_gelu_increment, gelu

from .pairs import STEPS, check, ends, pair

SHAPES = ((5,), (7, 130), (2, 3, 4, 8), (0, 4))


def plain(h, bias=0.0):
    return F.gelu(h + bias, approximate="tanh")


@pytest.mark.parametrize(
    ("shape", "step"),
    [(shape, 1e-3) for shape in SHAPES]
    + [((7, 130), sign * step) for step in (30.0, *STEPS) for sign in (1, -1) if sign * step != 1e-3],
    ids=str,
)
def test_shapes_and_steps(shape, step, device):
    x = pair(shape, step, 1, device)
    x[0] *= 3
    bias = torch.randn(shape[-1], device=device)
    with testing.poisoned():
        got, unbiased = bias_gelu_increment(x, bias), bias_gelu_increment(x)
    check(got, plain, [x], constants=(bias.double(),))
    check(unbiased, plain, [x])


def test_far_tails(device):
    """The exponentials neither overflow nor cancel."""
    h = torch.tensor([-1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4], device=device)
    for dh in (1e-4, 1.0, 200.0, -200.0):
        x = torch.stack([h, torch.full_like(h, dh)])
        start, end = (plain(v[0]) for v in ends(x))
        got = bias_gelu_increment(x)
        assert got.isfinite().all()
        torch.testing.assert_close(got.double(), end - start, rtol=1e-4, atol=1e-6)


def test_nothing_moves_where_nothing_moves(device):
    out = bias_gelu_increment(pair((2, 72), 0.0, 1, device))
    assert (out == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, device):
    x = pair((3, 100), 0.01, 1, device, dtype)
    check(bias_gelu_increment(x), plain, [x], 2 * torch.finfo(dtype).eps)
    # The bias in float32, as in training.
    bias = torch.randn(100, device=device)
    got = bias_gelu_increment(x, bias)
    assert got.dtype == dtype
    check(got, plain, [x], 2 * torch.finfo(dtype).eps, constants=(bias.double(),))
    assert bias_gelu_increment(x, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("layout", testing.LAYOUTS[1:])
def test_layouts(layout, device):
    x = testing.lay_out(pair((2, 4, 72), 0.01, 1, device), layout)
    check(bias_gelu_increment(x), plain, [x])


def test_kernel_and_reference_agree(device):
    x = pair((3, 100), 1e-4, 1, device)
    kernel = bias_gelu_increment(x)
    with testing.mode("reference"):
        reference = bias_gelu_increment(x)
    assert not torch.equal(kernel, reference)  # the kernel did run
    assert (kernel - reference).norm() <= 2e-5 * reference.norm()


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_empty_batch(mode, device):
    x = torch.zeros(2, 0, 3, 8, device=device)
    with testing.mode(mode):
        assert bias_gelu_increment(x, torch.zeros(8, device=device)).shape == x.shape[1:]


def test_dtypes_of_value_and_increment_are_their_own(device):
    h, dh = pair((3, 100), 0.01, 1, device)
    for x in ((h.bfloat16(), dh), (h, dh.bfloat16())):
        got = bias_gelu_increment(x)
        assert got.dtype == x[1].dtype
        check(got, plain, [x], 2 * torch.finfo(got.dtype).eps + 1e-5)


def test_nan_stays_in_its_element(device):
    x = pair((3, 8), 0.01, 1, device)
    x[0, 1, 2] = torch.nan
    assert bias_gelu_increment(x).isnan().nonzero().tolist() == [[1, 2]]


def test_opcheck(device):
    x = pair((3, 8), 0.1, 1, device)
    for bias, dtype in ((None, torch.float32), (torch.ones(8, device=device), torch.bfloat16)):
        torch.library.opcheck(gelu._bias_gelu.library, (*x, bias, dtype))


def test_compile_equals_eager(device):
    x, bias = pair((3, 40), 0.01, 1, device), torch.randn(40, device=device)
    torch.compiler.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(bias_gelu_increment, fullgraph=True, backend=backend)
    assert torch.equal(compiled(x, bias), bias_gelu_increment(x, bias))


def test_wrong_arguments_are_named(device):
    x = torch.randn(2, 3, 4).to(device)
    bias = torch.zeros(4, device=device, requires_grad=True)
    cases = (
        ((torch.zeros(3, 4),), "x must be a pair"),
        (((x[0], x[1, :, :3]),), r"the increment of x must have shape"),
        ((x, torch.zeros(3)), r"bias must have shape \[4\]"),
        ((x, bias), "bias must not require a gradient"),
    )
    for given, message in cases:
        with pytest.raises(ValueError, match=f"^bias_gelu_increment: {message}"):
            bias_gelu_increment(*given)
    with torch.no_grad():
        assert not bias_gelu_increment(x, bias).requires_grad

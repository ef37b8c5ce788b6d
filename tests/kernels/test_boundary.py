"""The halves of the boundaries against what autograd makes of the references, and against float64."""

import pytest
import torch

from soflow_kernels import adaln, boundary, gelu, testing


def inputs(shape, dtype, device, seed=0):
    source = torch.Generator().manual_seed(seed)
    B, T, D = shape

    def draw(*size):
        return torch.randn(size, generator=source).to(device, dtype)

    tensors = {"x": draw(B, T, D), "y": draw(B, T, D), "gate": draw(B, D), "shift": draw(B, D), "scale": draw(B, D)}
    return tensors, draw(D), draw(B, T, D), draw(B, T, D)


def both(tensors, bias, dsum, dout, alone):
    """boundary, then its backward: everything by name."""
    x, y, gate, shift, scale = tensors.values()
    if alone:
        y = gate = bias = None
    made = boundary.boundary(x, y, gate, shift, scale, bias=bias)
    d = boundary.boundary_backward(dout, dsum, made.sum, y, gate, scale, bias, made.mean, made.rstd)
    named = {"sum": made.sum, "out": made.out} | {f"d{name}": value for name, value in d._asdict().items()}
    return {name: value for name, value in named.items() if value is not None}


def by_autograd(tensors, bias, dsum, dout, alone):
    tensors = {name: value.detach().requires_grad_() for name, value in tensors.items()}
    if bias is not None and not alone:
        tensors["bias"] = bias.detach().requires_grad_()
    if alone:
        tensors = {name: tensors[name] for name in ("x", "shift", "scale")}
        x = tensors["x"]
        out = adaln.layernorm_modulate_reference(**tensors)
    else:
        x, out = adaln.gate_residual_layernorm_modulate_reference(**tensors)
    torch.autograd.backward([out] if dsum is None else [out, x], [dout] if dsum is None else [dout, dsum])
    named = {"sum": x.detach(), "out": out.detach()}
    named |= {f"d{name}": value.grad for name, value in tensors.items()}
    if alone and dsum is not None:  # x is a leaf there, which takes a gradient of its own
        named["dx"] = tensors["x"].grad
    return named


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("alone", [False, True], ids=["gated sum", "norm alone"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("has_dsum", [False, True], ids=["", "dsum"])
@pytest.mark.parametrize("shape", [(3, 4, 72), (2, 3, 1152), (1, 5, 100), (0, 3, 72)], ids=str)
def test_against_autograd(shape, has_dsum, has_bias, alone, mode, device):
    tensors, bias, dsum, dout = inputs(shape, torch.float32, device)
    given = (tensors, bias if has_bias else None, dsum if has_dsum else None, dout, alone)
    wide = [
        {name: v.double() for name, v in g.items()} if isinstance(g, dict) else g.double() if g is not None else None
        for g in given[:4]
    ]
    with testing.mode(mode), testing.poisoned():
        got = both(*given)
    testing.assert_matches(got, by_autograd(*given), by_autograd(*wide, alone))


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_low_precision_with_a_wide_bias(mode, device):
    """As the engine calls it: bfloat16 activations, a float32 bias."""
    tensors, bias, dsum, dout = inputs((2, 3, 1152), torch.bfloat16, device)
    wide = {name: value.double() for name, value in tensors.items()}
    exact = by_autograd(wide, bias.double(), dsum.double(), dout.double(), False)
    with testing.mode(mode):
        got = both(tensors, bias.float(), dsum, dout, False)
    assert got["dbias"].dtype == torch.float32 and got["dx"].dtype == torch.bfloat16
    for name, value in exact.items():
        assert (got[name].double() - value).norm() <= 1e-2 * value.norm(), name


def test_float64_and_statistics_go_together(device):
    tensors, bias, dsum, dout = inputs((2, 3, 16), torch.float64, device)
    got, wanted = both(tensors, bias, dsum, dout, False), by_autograd(tensors, bias, dsum, dout, False)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("shape", [(3, 4, 72), (2, 3, 4608), (0, 3, 72)], ids=str)
def test_gelu_backward_writes_the_output_once_more(shape, mode, device):
    source = torch.Generator().manual_seed(0)
    x, dout = (3 * torch.randn(shape, generator=source).to(device) for _ in range(2))
    bias = torch.randn(shape[-1], generator=source).to(device)

    def exact(x, bias, dout):
        found = testing.grads(gelu.bias_gelu_reference, {"x": x, "bias": bias}, [dout])
        return {"dx": found["gradient of x"], "dbias": found["gradient of bias"], "out": found["output 0"]}

    with testing.mode(mode), testing.poisoned():
        got = dict(zip(("dx", "dbias", "out"), gelu.bias_gelu_backward(dout, x, bias), strict=True))
    testing.assert_matches(got, exact(x, bias, dout), exact(x.double(), bias.double(), dout.double()))


def test_gelu_output_in_the_tails(device):
    x = torch.tensor([[-1e6, -30.0, -10.5, 10.5, 30.0, 1e6, torch.nan]], device=device)
    out = gelu.bias_gelu_backward(torch.ones_like(x), x, torch.zeros(7, device=device))[2]
    wanted = torch.tensor([[0.0, 0, 0, 10.5, 30, 1e6, torch.nan]], device=device)
    torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-25, equal_nan=True)


def test_wrong_arguments_are_named(device):
    tensors, bias, _, dout = inputs((2, 3, 16), torch.float32, device)
    x, y, gate, shift, scale = tensors.values()
    made = boundary.boundary(x, y, gate, shift, scale)
    for name, call in {
        "boundary: y": lambda: boundary.boundary(x, y[:, :2], gate, shift, scale),
        "boundary: gate": lambda: boundary.boundary(x, y, None, shift, scale),
        "boundary: bias": lambda: boundary.boundary(x, y, gate, shift, scale, bias=bias[1:]),
        "boundary_backward: dout": lambda: boundary.boundary_backward(
            dout[1:], None, x, y, gate, scale, None, *made[2:]
        ),
        "boundary_backward: dsum": lambda: boundary.boundary_backward(dout, 1, x, y, gate, scale, None, *made[2:]),
        "bias_gelu_backward: dout": lambda: gelu.bias_gelu_backward(dout[1:], x, bias),
    }.items():
        with pytest.raises(ValueError, match=name):
            call()

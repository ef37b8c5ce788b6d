"""adaLN's own forward and backward against the gradients that autograd makes of the references, and against float64."""

import pytest
import torch

from soflow_kernels import adaln, testing


def inputs(shape, dtype, device, seed=0):
    source = torch.Generator().manual_seed(seed)
    B, T, D = shape

    def draw(*size):
        return torch.randn(size, generator=source).to(device, dtype)

    tensors = {"x": draw(B, T, D), "y": draw(B, T, D), "gate": draw(B, D), "shift": draw(B, D), "scale": draw(B, D)}
    return tensors, draw(D), draw(B, T, D), draw(B, T, D)


def both(tensors, bias, dsum, dout, alone):
    """adaln_fwd, then adaln_bwd: every result by name."""
    x, y, gate, shift, scale = tensors.values()
    if alone:
        y = gate = bias = None
    made = adaln.adaln_fwd(x, y, gate, shift, scale, bias=bias)
    d = adaln.adaln_bwd(dout, dsum, made.sum, y, gate, scale, bias, made.mean, made.rstd)
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


# (shape, gradient of the sum, bias, norm alone): every shape with everything, then one thing left out at a time.
CASES = [
    *(((3, 4, 72), dsum, bias, alone) for dsum, bias, alone in ((1, 1, 0), (0, 1, 0), (1, 0, 0), (1, 0, 1), (0, 0, 1))),
    *((shape, 1, 1, 0) for shape in ((2, 3, 1152), (1, 5, 100), (0, 3, 72), (2, 0, 72))),
    ((2, 3, 1152), 1, 0, 1),
    ((0, 3, 72), 0, 0, 1),
]


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize(("shape", "has_dsum", "has_bias", "alone"), CASES, ids=str)
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


def test_wrong_arguments_are_named(device):
    tensors, bias, _, dout = inputs((2, 3, 16), torch.float32, device)
    x, y, gate, shift, scale = tensors.values()
    made = adaln.adaln_fwd(x, y, gate, shift, scale)
    for name, call in {
        "adaln_fwd: y": lambda: adaln.adaln_fwd(x, y[:, :2], gate, shift, scale),
        "adaln_fwd: gate": lambda: adaln.adaln_fwd(x, y, None, shift, scale),
        "adaln_fwd: bias": lambda: adaln.adaln_fwd(x, y, gate, shift, scale, bias=bias[1:]),
        "adaln_bwd: dout": lambda: adaln.adaln_bwd(dout[1:], None, x, y, gate, scale, None, *made[2:]),
        "adaln_bwd: dsum": lambda: adaln.adaln_bwd(dout, 1, x, y, gate, scale, None, *made[2:]),
        "adaln_bwd: mean": lambda: adaln.adaln_bwd(dout, None, x, y, gate, scale, None, made.mean[:, :2], made.rstd),
        "adaln_bwd: rstd": lambda: adaln.adaln_bwd(dout, None, x, y, gate, scale, None, made.mean, None),
    }.items():
        with pytest.raises(ValueError, match=name):
            call()

"""RMSNorm with modulation against float64, beside eager PyTorch in the same dtype."""

from functools import partial

import pytest
import torch

from soflow_kernels import adaln, rmsnorm, testing
from soflow_kernels.rmsnorm import (
    gate_residual_rmsnorm_modulate,
    gate_residual_rmsnorm_modulate_reference,
    rmsnorm_modulate,
    rmsnorm_modulate_reference,
)

GATED = "gate_residual_rmsnorm_modulate"
OPS = {
    "rmsnorm_modulate": (rmsnorm_modulate, rmsnorm_modulate_reference, ("x", "shift", "scale", "weight")),
    GATED: (
        gate_residual_rmsnorm_modulate,
        gate_residual_rmsnorm_modulate_reference,
        ("x", "y", "gate", "shift", "scale", "weight"),
    ),
}
all_ops = pytest.mark.parametrize("op", OPS)
# The rows and chunks are those of `adaln`, whose tests go through every width: here one of each kind.
SHAPES = ((3, 2, 2), (3, 17, 72), (2, 2, 1000), (2, 3, 1152))


def inputs(op, B, T, D, dtype, device, seed=0):
    """{name: tensor} for an operation, and one weight for each of its outputs."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    shapes = {"x": (B, T, D), "y": (B, T, D), "weight": (D,)}
    tensors = {name: draw(shapes.get(name, (B, D))).to(device, dtype) for name in OPS[op][2]}
    return tensors, [draw(B, T, D).to(device, dtype) for _ in range(2 if op == GATED else 1)]


def check(op, tensors, weights, **options):
    """The operation's kernels, with poisoned memory, against its reference in the same dtype and in float64."""
    kernel, reference, _ = OPS[op]
    with testing.poisoned():
        actual = testing.grads(partial(kernel, **options), tensors, weights)
    eager = testing.grads(partial(reference, **options), tensors, weights)
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    exact_options = {name: value for name, value in options.items() if name == "eps"}
    exact_weights = [None if weight is None else weight.double() for weight in weights]
    testing.assert_matches(actual, eager, testing.grads(partial(reference, **exact_options), doubles, exact_weights))


@all_ops
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(op, shape, device):
    check(op, *inputs(op, *shape, torch.float32, device))


@all_ops
@pytest.mark.parametrize("D", [72, 1152])
def test_without_weight(op, D, device):
    tensors, weights = inputs(op, 2, 3, D, torch.float32, device)
    del tensors["weight"]
    check(op, tensors, weights)


@all_ops
@pytest.mark.parametrize(("shape", "dtype"), [((3, 3, 100), torch.float16), ((2, 3, 1152), torch.bfloat16)], ids=str)
def test_half_precision(op, shape, dtype, device):
    check(op, *inputs(op, *shape, dtype, device))


@all_ops
def test_mixed_dtypes(op, device):
    """A float32 residual stream and weight with bfloat16 branches and modulation, as under autocast."""
    tensors, weights = inputs(op, 2, 2, 100, torch.float32, device)
    tensors = {name: value if name in ("x", "weight") else value.bfloat16() for name, value in tensors.items()}
    check(op, tensors, weights)
    check(op, tensors, weights, out_dtype=torch.bfloat16)


@all_ops
@pytest.mark.parametrize("layout", ["chunk", "transposed"])
def test_layouts(op, layout, device):
    tensors, weights = inputs(op, 2, 3, 72, torch.float32, device)
    laid_out = {name: testing.lay_out(tensor, layout) for name, tensor in tensors.items()}
    check(op, laid_out, [testing.lay_out(weight, layout) for weight in weights])


def test_a_strided_weight(device):
    tensors, weights = inputs("rmsnorm_modulate", 2, 3, 72, torch.float32, device)
    tensors["weight"] = torch.stack([tensors["weight"], tensors["weight"]], dim=1)[:, 0]
    check("rmsnorm_modulate", tensors, weights)


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["residual", "norm"])
def test_one_output_used(used, device):
    tensors, weights = inputs(GATED, 2, 3, 72, torch.float32, device)
    if used[1]:
        check(GATED, tensors, [None, weights[1]])
    else:  # torch calls the gradients of what is not used None; zero weights are the same question
        check(GATED, tensors, [weights[0], torch.zeros_like(weights[1])])


def test_eps(device):
    tensors, weights = inputs("rmsnorm_modulate", 2, 3, 72, torch.float32, device)
    check("rmsnorm_modulate", {**tensors, "x": tensors["x"] * 1e-3}, weights, eps=1e-2)


def test_the_mean_stays(device):
    """What RMSNorm is: a row of one value comes out as its sign, where LayerNorm gives 0."""
    x, zero = torch.full((1, 1, 64), -3.0, device=device), torch.zeros(1, 64, device=device)
    torch.testing.assert_close(rmsnorm_modulate(x, zero, zero), torch.full_like(x, -1))
    assert adaln.layernorm_modulate(x, zero, zero).abs().max() == 0


@all_ops
def test_same_bits_every_time(op, device):
    tensors, weights = inputs(op, 2, 9, 100, torch.float32, device)
    runs = [testing.grads(OPS[op][0], tensors, weights) for _ in range(2)]
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


@all_ops
def test_references_have_right_gradients(op):
    tensors, _ = inputs(op, 2, 3, 5, torch.float64, "cpu")
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    reference, names = OPS[op][1:]

    def function(*values):
        return reference(**dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_the_reference_is_torchs_norm():
    tensors, _ = inputs("rmsnorm_modulate", 2, 3, 72, torch.float64, "cpu")
    x, shift, scale, weight = tensors.values()
    wanted = torch.nn.functional.rms_norm(x, (72,), weight, 1e-3) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(rmsnorm_modulate_reference(x, shift, scale, weight, 1e-3), wanted)


@all_ops
@pytest.mark.parametrize("has_weight", [True, False], ids=["weight", "without"])
def test_opcheck(op, has_weight, device):
    tensors, _ = inputs(op, 2, 2, 8, torch.float32, device)
    t = {name: testing.lay_out(tensor, "chunk").requires_grad_() for name, tensor in tensors.items()}
    weight = t["weight"] if has_weight else None
    for stats in (True, False):
        rows = [value if stats else value.detach() for name, value in t.items() if name != "weight"]
        kept = weight if stats or weight is None else weight.detach()
        library = getattr(rmsnorm, f"_{op}").library
        torch.library.opcheck(library, (*rows, kept, 1e-6, torch.bfloat16, stats))


@all_ops
def test_compile_equals_eager(op, device):
    tensors, weights = inputs(op, 2, 2, 100, torch.float32, device)
    kernel = OPS[op][0]
    torch.compiler.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(lambda **t: kernel(**t), fullgraph=True, backend=backend)
    eager, found = (testing.grads(function, tensors, weights) for function in (kernel, compiled))
    assert all(torch.equal(found[name], value) for name, value in eager.items())


@all_ops
def test_without_gradient_no_statistics_are_written(op, device, monkeypatch):
    tensors, _ = inputs(op, 2, 3, 72, torch.float32, device)
    launched, plain = [], adaln.launch
    monkeypatch.setattr(adaln, "launch", lambda *a, **k: launched.append(a) or plain(*a, **k))
    kept = OPS[op][0](**tensors)
    with torch.no_grad():
        quiet = OPS[op][0](**tensors)
    torch.testing.assert_close(quiet, kept, rtol=0, atol=0)
    # A mean there is never.
    sizes = [[value if value is None else value.numel() for value in a[10:12]] for a in launched]
    assert sizes == [[None, 6], [None, None]]


def test_wrong_arguments_are_named(device):
    tensors, _ = inputs(GATED, 2, 3, 16, torch.float32, device)
    for name in tensors:
        if name != "x":
            with pytest.raises(ValueError, match=f"^{GATED}: {name} must have shape"):
                gate_residual_rmsnorm_modulate(**{**tensors, name: tensors[name][..., 1:]})
    x, _, _, shift, scale, weight = tensors.values()
    with pytest.raises(ValueError, match=r"^rmsnorm_modulate: weight must have shape"):
        rmsnorm_modulate(x, shift, scale, weight[1:])
    with pytest.raises(ValueError, match="out_dtype must be"):
        rmsnorm_modulate(x, shift, scale, out_dtype=torch.int32)

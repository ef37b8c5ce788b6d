"""The adaLN boundary kernels and the gated residual against float64, beside eager PyTorch in the same dtype."""

from functools import partial

import pytest
import torch

from soflow_kernels import adaln, gated_residual, testing

OPS = {
    "layernorm_modulate": (adaln.layernorm_modulate, adaln.layernorm_modulate_reference, ("x", "shift", "scale")),
    "gate_residual_layernorm_modulate": (
        adaln.gate_residual_layernorm_modulate,
        adaln.gate_residual_layernorm_modulate_reference,
        ("x", "y", "gate", "shift", "scale", "bias"),
    ),
    "gate_residual": (gated_residual.gate_residual, gated_residual.gate_residual_reference, ("x", "y", "gate", "bias")),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
all_ops = pytest.mark.parametrize("op", OPS)


def inputs(op, B, T, D, dtype, device, seed=0):
    """{name: tensor} for an operation, and one weight for each of its outputs."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator)
    shapes = {"x": (B, T, D), "y": (B, T, D), "bias": (D,)}
    tensors = {name: draw(shapes.get(name, (B, D))).to(device, dtype) for name in OPS[op][2]}
    outputs = 2 if op == "gate_residual_layernorm_modulate" else 1
    return tensors, [draw(B, T, D).to(device, dtype) for _ in range(outputs)]


def check(op, tensors, weights, optional=(), **options):
    """The operation's kernels, with poisoned memory, against its reference in the same dtype and in float64."""
    kernel, reference, _ = (*OPS[op][:2], None)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in optional}
    with testing.poisoned():
        actual = testing.grads(partial(kernel, **options), tensors, weights)
    eager = testing.grads(partial(reference, **options), tensors, weights)
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    exact_weights = [None if weight is None else weight.double() for weight in weights]
    exact = testing.grads(
        partial(reference, **{k: v for k, v in options.items() if k == "eps"}), doubles, exact_weights
    )
    testing.assert_matches(actual, eager, exact)


@all_ops
@pytest.mark.parametrize("shape", testing.SHAPES, ids=str)
def test_forward_and_gradients(op, shape, device):
    check(op, *inputs(op, *shape, torch.float32, device))


@all_ops
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [(3, 3, 100), (2, 3, 1152)], ids=str)
def test_half_precision(op, shape, dtype, device):
    check(op, *inputs(op, *shape, dtype, device))


@pytest.mark.parametrize("op", ["gate_residual_layernorm_modulate", "gate_residual"])
def test_without_bias(op, device):
    check(op, *inputs(op, 2, 5, 1152, torch.float32, device), optional=("bias",))


@all_ops
@pytest.mark.parametrize("layout", testing.LAYOUTS[1:])
def test_layouts(op, layout, device):
    tensors, weights = inputs(op, 3, 4, 72, torch.float32, device)
    laid_out = {name: testing.lay_out(tensor, layout) for name, tensor in tensors.items()}
    check(op, laid_out, [testing.lay_out(weight, layout) for weight in weights])


@all_ops
def test_mixed_dtypes(op, device):
    """A float32 residual stream with bfloat16 branches and modulation, as under autocast."""
    tensors, weights = inputs(op, 2, 3, 100, torch.float32, device)
    tensors = {name: tensor if name == "x" else tensor.bfloat16() for name, tensor in tensors.items()}
    check(op, tensors, weights)
    if op != "gate_residual":
        check(op, tensors, weights, out_dtype=torch.bfloat16)


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["residual", "norm"])
def test_one_output_used(used, device):
    op = "gate_residual_layernorm_modulate"
    tensors, weights = inputs(op, 2, 3, 72, torch.float32, device)
    if not used[1]:  # torch calls the gradients of what is not used None; zero weights are the same question
        weights[1] = torch.zeros_like(weights[1])
        check(op, tensors, weights)
        x = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
        residual, _ = adaln.gate_residual_layernorm_modulate(**x)
        alone = torch.autograd.grad(residual, [x["x"], x["gate"]], torch.ones_like(residual))
        torch.testing.assert_close(alone[0], torch.ones_like(residual))
    else:
        check(op, tensors, [None, weights[1]])


def test_eps_and_same_tensor_twice(device):
    tensors, weights = inputs("layernorm_modulate", 2, 3, 72, torch.float32, device)
    check("layernorm_modulate", {**tensors, "x": tensors["x"] * 1e-3}, weights, eps=1e-2)
    x, m = torch.randn(2, 3, 72, device=device), torch.randn(2, 72, device=device)
    got = adaln.gate_residual_layernorm_modulate(x, x, m, m, m)
    want = adaln.gate_residual_layernorm_modulate_reference(x, x, m, m, m)
    torch.testing.assert_close(got, want)


def test_large_mean_keeps_its_variance(device):
    """The variance comes from centred values: E[x^2] - mean^2 in float32 would be off by 6 % here."""
    tensors, _ = inputs("layernorm_modulate", 1, 3, 1152, torch.float32, device)
    tensors["x"] += 1000
    got = adaln.layernorm_modulate(**tensors)
    want = adaln.layernorm_modulate_reference(**{name: tensor.double() for name, tensor in tensors.items()})
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)


def test_statistics_are_those_of_the_rounded_sum(device):
    """x' = 256 + 0.25 rounds to 256 in bfloat16: the norm must see the constant row that was stored."""
    x = torch.full((1, 1, 64), 256.0, device=device, dtype=torch.bfloat16)
    y = torch.linspace(-0.25, 0.25, 64, device=device).to(torch.bfloat16).view(1, 1, 64)
    one, zero = (torch.full((1, 64), n, device=device, dtype=torch.bfloat16) for n in (0.5, 0.0))
    residual, normed = adaln.gate_residual_layernorm_modulate(x, y, one, zero, zero)
    if residual.unique().numel() == 1:  # rounded to nearest: on a GPU
        assert normed.abs().max() == 0
    want = adaln.layernorm_modulate_reference(residual.double(), zero.double(), zero.double())
    torch.testing.assert_close(normed.double(), want, rtol=2**-7, atol=1e-6)


@all_ops
def test_nan_stays_in_its_sample(op, device):
    """A NaN makes its token and its sample's sums NaN, and touches no other sample."""
    tensors, weights = inputs(op, 2, 3, 100, torch.float32, device)
    tensors["x"][0, 1, 7] = torch.nan
    if "y" in tensors:
        tensors["y"][0, 1, 7] = torch.nan
    found = testing.grads(OPS[op][0], tensors, weights)
    assert found["output 0"][0, 1].isnan().any()
    name = "gradient of scale" if "scale" in tensors else "gradient of gate"
    assert found[name][0].isnan().any()
    for name, value in found.items():
        if value.dim() > 1:
            assert not value[1].isnan().any(), name


@all_ops
def test_same_bits_every_time(op, device):
    tensors, weights = inputs(op, 2, 19, 100, torch.float32, device)
    runs = [testing.grads(OPS[op][0], tensors, weights) for _ in range(3)]
    for name, value in runs[0].items():
        assert all(torch.equal(value, run[name]) for run in runs[1:]), name


@all_ops
def test_references_have_right_gradients(op):
    tensors, _ = inputs(op, 2, 3, 5, torch.float64, "cpu")
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    reference, names = OPS[op][1:]

    def function(*values):
        return reference(**dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


@all_ops
def test_opcheck(op, device):
    tensors, _ = inputs(op, 2, 3, 72, torch.float32, device)
    t = {name: testing.lay_out(tensor, "chunk").requires_grad_() for name, tensor in tensors.items()}
    if op == "layernorm_modulate":
        for stats in (True, False):
            given = {name: value if stats else value.detach() for name, value in t.items()}
            args = (given["x"], given["shift"], given["scale"], 1e-6, torch.bfloat16, stats)
            torch.library.opcheck(adaln._layernorm_modulate, args)
    for bias in (None, tensors["bias"].requires_grad_()) if "bias" in t else ():
        if op == "gate_residual":
            torch.library.opcheck(gated_residual._gate_residual, (t["x"], t["y"], t["gate"], bias))
        else:
            args = (t["x"], t["y"], t["gate"], t["shift"], t["scale"], bias, 1e-6, torch.float32, True)
            torch.library.opcheck(adaln._gate_residual_layernorm_modulate, args)


@all_ops
def test_compile_equals_eager(op, device):
    tensors, weights = inputs(op, 2, 5, 100, torch.float32, device)
    kernel = OPS[op][0]
    torch.compiler.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(lambda **t: kernel(**t), fullgraph=True, backend=backend)
    eager = testing.grads(kernel, tensors, weights)
    found = testing.grads(compiled, tensors, weights)
    for name, value in eager.items():
        assert torch.equal(found[name], value), name


def test_more_than_two_to_the_31_elements(device):
    """The second sample begins 2^31 elements after the first: only 64-bit addresses reach it."""
    memory = torch.empty(
        2**31 + 64, dtype=torch.float16, device=device
    )  # 4 GB, of which two pages are touched on a CPU
    x = memory.as_strided((2, 1, 64), (2**31, 64, 1))
    values = torch.randn(2, 1, 64, device=device).half()
    x.copy_(values)
    shift, scale = torch.randn(2, 2, 64, device=device).half()
    got = adaln.layernorm_modulate(x, shift, scale)
    torch.testing.assert_close(got, adaln.layernorm_modulate(values, shift, scale), rtol=0, atol=0)


def test_a_result_of_whole_numbers_is_refused(device):
    x, m = torch.randn(2, 3, 8).to(device), torch.randn(2, 8).to(device)
    with pytest.raises(ValueError, match="out_dtype must be"):
        adaln.layernorm_modulate(x, m, m, out_dtype=torch.int32)
    with pytest.raises(ValueError, match="out_dtype must be"):
        adaln.gate_residual_layernorm_modulate(x, x, m, m, m, out_dtype=torch.int32)


@pytest.mark.parametrize("op", ["layernorm_modulate", "gate_residual_layernorm_modulate"])
def test_without_gradient_no_statistics_are_written(op, device, monkeypatch):
    tensors, _ = inputs(op, 2, 3, 72, torch.float32, device)
    launched = []
    plain = adaln.launch
    monkeypatch.setattr(adaln, "launch", lambda *a, **k: launched.append((a, k)) or plain(*a, **k))
    kept = OPS[op][0](**tensors)
    with torch.no_grad():
        quiet = OPS[op][0](**tensors)
    torch.testing.assert_close(quiet, kept, rtol=0, atol=0)
    mean_and_rstd = [a[10:12] for a, _ in launched]
    assert [value.numel() for value in mean_and_rstd[0]] == [6, 6] and mean_and_rstd[1] == (None, None)

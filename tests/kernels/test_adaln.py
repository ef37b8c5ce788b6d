"""The adaLN kernels and the gated residual against float64, beside eager PyTorch in the same dtype."""

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
# The operation with everything in it takes every shape; the two others, whose kernels are its kernel without y and a
# simpler one, those that are special to them: one column, a padded row, a row in two segments or tiles, several chunks.
GATED_NORM = "gate_residual_layernorm_modulate"
WIDTHS = [shape for shape in testing.SHAPES if shape[1] < 60]
SHAPES = [(GATED_NORM, shape) for shape in [*WIDTHS, (1, 64, 64), (3, 17, 72)]] + [
    (op, shape)
    for op in ("layernorm_modulate", "gate_residual")
    for shape in ((3, 2, 1), (3, 17, 72) if op == "layernorm_modulate" else (1, 256, 64), (2, 2, 1000), (2, 3, 1152))
]
EMPTY = ((0, 3, 72), (2, 0, 72), (0, 0, 1152))
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
    rounding = 0.0
    if tensors["x"].shape[-1] == 1 and "scale" in tensors:
        # Nothing is left but what a fused multiply-add keeps that a product alone rounds off, times 1 / sqrt(eps).
        g = max(float(weight.abs().max()) for weight in weights) * (1 + float(tensors["scale"].abs().max()))
        rounding = torch.finfo(torch.float32).eps * g * 1e-6**-0.5
    rounded = {f"gradient of {name}": rounding for name in ("x", "y", "gate", "bias")}
    testing.assert_matches(actual, eager, exact, beside=rounded)


@pytest.mark.parametrize(("op", "shape"), SHAPES, ids=str)
def test_forward_and_gradients(op, shape, device):
    check(op, *inputs(op, *shape, torch.float32, device))


@all_ops
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_no_samples_and_no_tokens(op, shape, device):
    """Nothing comes out, and what is summed over nothing is 0: from the kernel, and from the reference."""
    tensors, weights = inputs(op, *shape, torch.float32, device)
    check(op, tensors, weights)
    for mode in ("auto", "reference"):
        with testing.mode(mode):
            found = testing.grads(OPS[op][0], tensors, weights)
        for name, value in found.items():
            assert value.eq(0).all(), name


@all_ops
@pytest.mark.parametrize(("shape", "dtype"), [((3, 3, 100), torch.float16), ((2, 3, 1152), torch.bfloat16)], ids=str)
def test_half_precision(op, shape, dtype, device):
    check(op, *inputs(op, *shape, dtype, device))


@pytest.mark.parametrize("op", [GATED_NORM, "gate_residual"])
def test_without_bias(op, device):
    check(op, *inputs(op, 1, 3, 1152, torch.float32, device), optional=("bias",))


@pytest.mark.parametrize(
    ("op", "layout"),
    [(op, layout) for op in (GATED_NORM, "gate_residual") for layout in testing.LAYOUTS[1:]]
    + [("layernorm_modulate", "chunk"), ("layernorm_modulate", "transposed")],
)
def test_layouts(op, layout, device):
    tensors, weights = inputs(op, 2, 3, 72, torch.float32, device)
    laid_out = {name: testing.lay_out(tensor, layout) for name, tensor in tensors.items()}
    check(op, laid_out, [testing.lay_out(weight, layout) for weight in weights])


@all_ops
def test_mixed_dtypes(op, device):
    """A float32 residual stream with bfloat16 branches and modulation, as under autocast."""
    tensors, weights = inputs(op, 2, 2, 100, torch.float32, device)
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


@pytest.mark.parametrize("size", [1.0, 30.0, 1e5])
def test_a_bias_that_cancels_the_branch(size, device):
    """The gate's gradient is of their sum, which is as exact as the sum is."""
    tensors, weights = inputs(GATED_NORM, 1, 256, 64, torch.float32, device)
    tensors["bias"] *= size
    tensors["y"] -= tensors["bias"]
    check(GATED_NORM, tensors, weights)


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
    tensors, weights = inputs(op, 2, 9, 100, torch.float32, device)
    runs = [testing.grads(OPS[op][0], tensors, weights) for _ in range(3 if device == "cuda" else 2)]
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
    tensors, _ = inputs(op, 2, 2, 8, torch.float32, device)
    t = {name: testing.lay_out(tensor, "chunk").requires_grad_() for name, tensor in tensors.items()}
    if op == "layernorm_modulate":
        for stats in (True, False):
            given = {name: value if stats else value.detach() for name, value in t.items()}
            args = (given["x"], given["shift"], given["scale"], 1e-6, torch.bfloat16, stats)
            torch.library.opcheck(adaln._layernorm_modulate.library, args)
    for bias in (None, tensors["bias"].requires_grad_()) if "bias" in t else ():
        if op == "gate_residual":
            torch.library.opcheck(gated_residual._gate_residual.library, (t["x"], t["y"], t["gate"], bias))
        else:
            args = (t["x"], t["y"], t["gate"], t["shift"], t["scale"], bias, 1e-6, torch.float32, True)
            torch.library.opcheck(adaln._gate_residual_layernorm_modulate.library, args)


@all_ops
def test_compile_equals_eager(op, device):
    tensors, weights = inputs(op, 2, 2, 100, torch.float32, device)
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
    monkeypatch.setattr(adaln, "launch", lambda *a, **k: launched.append(a) or plain(*a, **k))
    kept = OPS[op][0](**tensors)
    with torch.no_grad():
        quiet = OPS[op][0](**tensors)
    # A GPU's code for the two may fuse a multiplication with an addition in one and not in the other.
    torch.testing.assert_close(quiet, kept, rtol=0, atol=0 if device == "cpu" else 1e-6)
    # mean and rstd
    assert [[value if value is None else value.numel() for value in a[10:12]] for a in launched] == [
        [6, 6],
        [None, None],
    ]


# The forward and the backward by themselves.


def adaln_inputs(shape, dtype, device):
    """({name: tensor}, bias, dsum, dout)."""
    tensors, (dsum, dout) = inputs(GATED_NORM, *shape, dtype, device)
    bias = tensors.pop("bias")
    return tensors, bias, dsum, dout


def fwd_and_bwd(tensors, bias, dsum, dout, alone):
    """adaln_fwd, then adaln_bwd: everything by name."""
    x, y, gate, shift, scale = tensors.values()
    if alone:
        y = gate = bias = None
    made = adaln.adaln_fwd(x, y, gate, shift, scale, bias=bias)
    d = adaln.adaln_bwd(dout, dsum, made.sum, y, gate, scale, bias, made.mean, made.rstd, shift=shift)
    without = adaln.adaln_bwd(dout, dsum, made.sum, y, gate, scale, bias, made.mean, made.rstd)
    assert without.out is None and d.out.dtype == dout.dtype
    for value, wanted in zip(d[:-1], without[:-1], strict=True):
        assert value is wanted is None or torch.equal(value, wanted)
    gradients = {f"d{name}": value for name, value in zip(d._fields[:-1], d[:-1], strict=True)}
    named = {"sum": made.sum, "out": made.out, "out again": d.out, **gradients}
    return {name: value for name, value in named.items() if value is not None}


def by_autograd(tensors, bias, dsum, dout, alone):
    """The same from the references and autograd."""
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
    results = {"sum": x.detach(), "out": out.detach(), "out again": out.detach()}
    return results | {f"d{name}": value.grad for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("shape", "alone", "has_bias", "has_dsum"),
    [
        ((3, 4, 72), False, False, False),
        ((3, 4, 72), False, True, False),
        ((3, 4, 72), False, False, True),
        ((3, 4, 72), True, False, False),
        ((3, 4, 72), True, False, True),
        ((1, 5, 100), False, True, True),
        ((2, 3, 1152), False, True, True),
        ((1, 2, 1152), False, False, False),
        *((shape, alone, not alone, True) for shape in EMPTY for alone in (False, True)),
    ],
)
def test_fwd_and_bwd_against_autograd(shape, alone, has_bias, has_dsum, device):
    tensors, bias, dsum, dout = adaln_inputs(shape, torch.float32, device)
    given = (tensors, bias if has_bias else None, dsum if has_dsum else None, dout)
    wide = [{name: v.double() for name, v in tensors.items()}, *(v if v is None else v.double() for v in given[1:])]
    eager, exact = by_autograd(*given, alone), by_autograd(*wide, alone)
    for mode in ("auto", "reference"):
        with testing.mode(mode), testing.poisoned():
            found = fwd_and_bwd(*given, alone)
        testing.assert_matches(found, eager, exact)


def test_fwd_and_bwd_in_low_precision_with_a_wide_bias(device):
    """As the engine calls them: bfloat16 activations, a float32 bias."""
    tensors, bias, dsum, dout = adaln_inputs((2, 3, 1152), torch.bfloat16, device)
    wide = {name: value.double() for name, value in tensors.items()}
    exact = by_autograd(wide, bias.double(), dsum.double(), dout.double(), False)
    for mode in ("auto", "reference"):
        with testing.mode(mode):
            got = fwd_and_bwd(tensors, bias.float(), dsum, dout, False)
        assert got["dbias"].dtype == torch.float32 and got["dx"].dtype == torch.bfloat16
        for name, value in exact.items():
            assert (got[name].double() - value).norm() <= 1e-2 * value.norm(), name


def test_fwd_and_bwd_in_float64(device):
    tensors, bias, dsum, dout = adaln_inputs((2, 3, 16), torch.float64, device)
    got, wanted = (function(tensors, bias, dsum, dout, False) for function in (fwd_and_bwd, by_autograd))
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-12)


def test_wrong_arguments_of_fwd_and_bwd_are_named(device):
    tensors, bias, _, dout = adaln_inputs((2, 3, 16), torch.float32, device)
    x, y, gate, shift, scale = tensors.values()
    stats = adaln.adaln_fwd(x, y, gate, shift, scale)[2:]

    def bwd(dout=dout, dsum=None, y=y, gate=gate, scale=scale, bias=bias, stats=tuple(stats), shift=None):
        return adaln.adaln_bwd(dout, dsum, x, y, gate, scale, bias, *stats, shift=shift)

    for name, call in {
        "adaln_fwd: y": lambda: adaln.adaln_fwd(x, y[:, :2], gate, shift, scale),
        "adaln_fwd: gate": lambda: adaln.adaln_fwd(x, y, None, shift, scale),
        "adaln_fwd: bias": lambda: adaln.adaln_fwd(x, y, gate, shift, scale, bias=bias[1:]),
        "adaln_bwd: dout": lambda: bwd(dout=dout[1:]),
        "adaln_bwd: dsum": lambda: bwd(dsum=1),
        "adaln_bwd: y": lambda: bwd(y=y[1:]),
        "adaln_bwd: gate": lambda: bwd(gate=None),
        "adaln_bwd: shift": lambda: bwd(shift=shift[1:]),
        "adaln_bwd: scale": lambda: bwd(scale=scale[1:]),
        "adaln_bwd: bias": lambda: bwd(bias=bias[1:]),
        "adaln_bwd: mean": lambda: bwd(stats=(stats[0][:, :2], stats[1])),
        "adaln_bwd: rstd": lambda: bwd(stats=(stats[0], None)),
    }.items():
        with pytest.raises(ValueError, match=name):
            call()


def test_the_norm_of_a_dual_number_is_taken_in_float32(monkeypatch):
    """A GPU's norm of bfloat16 has a float32 tangent, which no product takes beside bfloat16 weights."""
    seen, plain = [], torch.nn.functional.layer_norm
    monkeypatch.setattr(adaln.F, "layer_norm", lambda x, *rest: seen.append(x.dtype) or plain(x, *rest))
    x, m = torch.randn(2, 3, 8, dtype=torch.bfloat16), torch.randn(2, 8, dtype=torch.bfloat16)
    value, tangent, *_ = torch.func.jvp(lambda x: adaln.layernorm_modulate_reference(x, m, m), (x,), (x,))
    assert value.dtype == tangent.dtype == torch.bfloat16 and seen == [torch.float32]
    adaln.layernorm_modulate_reference(x, m, m)
    assert seen == [torch.float32, torch.bfloat16]

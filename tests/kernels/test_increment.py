"""The increment operations against float64 differences of the plain operations at both ends."""

import pytest
import torch
import torch.nn.functional as F

from soflow_kernels import increment, testing

SIZES = [
    (2, 3, 1),
    (1, 5, 64),
    (3, 2, 72),
    (2, 3, 100),
    (1, 2, 384),
    (1, 2, 768),
    (2, 2, 1000),
    (1, 3, 1152),
    (0, 3, 72),
]
STEPS = (1.0, 0.1, 1e-3, 1e-5, 1e-7)


def pair(shape, step, seed, device, dtype=torch.float32):
    """A value of size 1 and an increment of size `step`."""
    generator = torch.Generator().manual_seed(seed)
    h, dh = torch.randn(2, *shape, generator=generator)
    return torch.stack([h, step * dh]).to(device, dtype)


def ends(*pairs):
    """The values at the start and at the end, in float64."""
    return [p[0].double() for p in pairs], [p[0].double() + p[1].double() for p in pairs]


def modulated(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def boundary(x, y, gate, shift, scale, bias=0.0):
    x = x + gate[:, None] * (y + bias)
    return x, modulated(x, shift, scale)


def check(got, plain, pairs, tolerance=1e-5, constants=()):
    """Value and increment, relative to their own norms."""
    start, end = (plain(*values, *constants) for values in ends(*pairs))
    start, end = ((v if isinstance(v, tuple) else (v,)) for v in (start, end))
    got = got if isinstance(got, tuple) else (got,)
    for found, a, b in zip(got, start, end, strict=True):
        for part, wanted in ((found[0], a), (found[1], b - a)):
            assert part.shape == wanted.shape
            if wanted.numel():
                error = (part.double() - wanted).norm() / wanted.norm().clamp_min(1e-300)
                assert error <= tolerance, float(error)


def boundary_inputs(B, T, D, step, device, dtype=torch.float32, seed=0):
    tokens = [pair((B, T, D), step, seed + i, device, dtype) for i in range(2)]
    return tokens + [pair((B, D), step, seed + 2 + i, device, dtype) for i in range(3)]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_boundary(size, step, device):
    pairs = boundary_inputs(*size, step, device)
    bias = torch.randn(size[-1], device=device)
    with testing.poisoned():
        got = increment.gate_residual_layernorm_modulate_increment(*pairs, bias)
        norm = increment.layernorm_modulate_increment(pairs[0], *pairs[3:])
    if size[-1] == 1:  # the norm of one number is 0, and so is its increment
        assert torch.equal(norm[:, :, 0], torch.stack([pairs[3][0], pairs[3][1]]))
        return
    # A step below the rounding of the inputs' own sum: their exact difference is what is given.
    check(got, boundary, pairs, constants=(bias.double(),), tolerance=2e-5)
    check(norm, modulated, [pairs[0], *pairs[3:]], tolerance=2e-5)


@pytest.mark.parametrize("still", ["x", "y", "modulation"])
def test_boundary_where_something_stands_still(still, device):
    pairs = boundary_inputs(2, 3, 72, 1e-3, device)
    for i in {"x": [0], "y": [1], "modulation": [2, 3, 4]}[still]:
        pairs[i][1] = 0
    check(increment.gate_residual_layernorm_modulate_increment(*pairs), boundary, pairs)


def test_nothing_moves_where_nothing_moves(device):
    pairs = boundary_inputs(2, 3, 72, 0.0, device)
    outs = (
        *increment.gate_residual_layernorm_modulate_increment(*pairs),
        increment.layernorm_modulate_increment(pairs[0], *pairs[3:]),
        increment.silu_increment(pairs[0]),
        increment.bias_gelu_increment(pairs[0]),
    )
    assert all((out[1] == 0).all() and (out[0] != 0).any() for out in outs)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("step", [30.0, *STEPS])
@pytest.mark.parametrize("shape", [(5,), (7, 130), (2, 3, 4, 8), (0, 4)], ids=str)
def test_gelu_and_silu(shape, step, sign, device):
    x = pair(shape, sign * step, 1, device)
    x[0] *= 3
    bias = torch.randn(shape[-1], device=device)
    with testing.poisoned():
        gelu = increment.bias_gelu_increment(x, bias)
        silu = increment.silu_increment(x)
        unbiased = increment.bias_gelu_increment(x)
    tanh = lambda h, b=0.0: F.gelu(h + b, approximate="tanh")  # noqa: E731
    check(gelu, tanh, [x], constants=(bias.double(),))
    check(unbiased, tanh, [x])
    check(silu, F.silu, [x])


def test_far_tails(device):
    """The exponentials neither overflow nor cancel."""
    h = torch.tensor([-1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4], device=device)
    for dh in (1e-4, 1.0, 200.0, -200.0):
        x = torch.stack([h, torch.full_like(h, dh)])
        for got, plain in (
            (increment.silu_increment(x), F.silu),
            (increment.bias_gelu_increment(x), lambda a: F.gelu(a, approximate="tanh")),
        ):
            start, end = (plain(v[0]) for v in ends(x))
            assert got.isfinite().all()
            torch.testing.assert_close(got[1].double(), end - start, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dt", [0.3, -0.3, 1e-3, -1e-5, 1e-9, 0.0])
def test_sinusoids(dt, device):
    t = torch.tensor([0.0, 1e-4, 0.3, 0.77, 1.0], device=device)
    s = 0.4 * t
    step = torch.full_like(t, dt)
    with testing.poisoned():
        got = increment.time_embedding_increment(t, step, s)
    assert got.shape == (2, 2, 5, 256)
    w = 10_000.0 ** (-torch.arange(128, device=device).double() / 128)
    u = torch.stack([t.double(), (t - s).double()])[..., None] * w
    h = step.double()[:, None] * w / 2
    value = torch.cat([u.cos(), u.sin()], -1)
    assert (got[0].double() - value).abs().max() <= 3e-7
    exact = torch.cat([-2 * (u + h).sin() * h.sin(), 2 * (u + h).cos() * h.sin()], -1)
    assert (got[1].double() - exact).norm() <= 1e-6 * exact.norm()
    reference = increment.time_embedding_increment_reference(t, step, s)
    assert (got[1] - reference[1]).norm() <= 1e-6 * reference[1].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, device):
    pairs = boundary_inputs(2, 3, 100, 0.01, device, dtype)
    eps = torch.finfo(dtype).eps
    # The norm is that of the stored residual, so its increment is relative to a rounded one.
    check(increment.gate_residual_layernorm_modulate_increment(*pairs), boundary, pairs, tolerance=4 * eps)
    check(increment.layernorm_modulate_increment(pairs[0], *pairs[3:]), modulated, [pairs[0], *pairs[3:]], 2 * eps)
    check(increment.silu_increment(pairs[0]), F.silu, [pairs[0]], 2 * eps)


def test_mixed_dtypes(device):
    """A residual in float32, the rest and the result in bfloat16, as in training."""
    x, *rest = boundary_inputs(2, 3, 100, 0.01, device)
    rest = [p.bfloat16() for p in rest]
    residual, out = increment.gate_residual_layernorm_modulate_increment(x, *rest, dtype=torch.bfloat16)
    assert residual.dtype == torch.float32 and out.dtype == torch.bfloat16
    check((residual,), lambda *v: (boundary(*v)[0],), [x, *rest])
    check((out,), lambda *v: (boundary(*v)[1],), [x, *rest], tolerance=2**-7)


@pytest.mark.parametrize("layout", testing.LAYOUTS[1:])
def test_layouts(layout, device):
    pairs = [testing.lay_out(p, layout) for p in boundary_inputs(2, 4, 72, 0.01, device)]
    check(increment.gate_residual_layernorm_modulate_increment(*pairs), boundary, pairs)
    check(increment.bias_gelu_increment(pairs[0]), lambda a: F.gelu(a, approximate="tanh"), [pairs[0]])


def test_modulation_from_views_of_one_tensor(device):
    modulation = pair((2, 6 * 72), 0.01, 3, device)
    parts = modulation.chunk(6, -1)
    x = pair((2, 3, 72), 0.01, 4, device)
    check(increment.layernorm_modulate_increment(x, parts[1], parts[4]), modulated, [x, parts[1], parts[4]])


def test_zero_and_constant_rows(device):
    x = torch.stack([torch.zeros(2, 1, 8), torch.zeros(2, 1, 8)]).to(device)
    x[0, 1], x[1, 1, 0, 0] = 3.0, 0.01
    m = torch.zeros(2, 2, 8, device=device)
    got = increment.layernorm_modulate_increment(x, m, m)
    assert got.isfinite().all() and (got[:, 0] == 0).all()
    check(got, modulated, [x, m, m], tolerance=1e-4)


def test_nan_stays_in_its_row(device):
    pairs = boundary_inputs(2, 3, 40, 0.01, device)
    pairs[0][0, 1, 2, 5] = torch.nan
    for out in increment.gate_residual_layernorm_modulate_increment(*pairs):
        rows = out.isnan().flatten(0, 0).any(-1)
        assert rows[:, 1, 2].any() and rows.sum() == rows[:, 1, 2].sum()
    assert increment.silu_increment(pairs[0]).isnan().sum() == 2


def test_same_bits_every_time(device):
    pairs = boundary_inputs(2, 3, 100, 0.01, device)
    runs = [increment.gate_residual_layernorm_modulate_increment(*pairs) for _ in range(3)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_kernel_and_reference_agree(device):
    pairs = boundary_inputs(2, 3, 100, 1e-4, device)
    calls = [
        lambda: increment.gate_residual_layernorm_modulate_increment(*pairs),
        lambda: (increment.layernorm_modulate_increment(pairs[0], *pairs[3:]),),
        lambda: (increment.silu_increment(pairs[0]), increment.bias_gelu_increment(pairs[0])),
    ]
    for call in calls:
        kernel = call()
        with testing.mode("reference"):
            reference = call()
        assert not all(map(torch.equal, kernel, reference))  # the kernels did run
        for a, b in zip(kernel, reference, strict=True):
            for part, wanted in zip(a, b, strict=True):
                assert (part - wanted).norm() <= 2e-5 * wanted.norm()


def test_opcheck(device):
    x, y, *m = boundary_inputs(1, 2, 8, 0.1, device)
    t = torch.rand(3, device=device)
    torch.library.opcheck(increment._norm, (x, m[0], m[1], 1e-6, torch.float32))
    torch.library.opcheck(increment._boundary, (x, y, *m, None, 1e-6, torch.float32))
    torch.library.opcheck(increment._pointwise, (x, None, True, torch.float32))
    torch.library.opcheck(increment._times, (t, t, t, 16, 1e4, torch.float32))


def test_compile_equals_eager(device):
    pairs = boundary_inputs(2, 3, 40, 0.01, device)

    def several(*pairs):
        x, h = increment.gate_residual_layernorm_modulate_increment(*pairs)
        return x, increment.bias_gelu_increment(h), increment.silu_increment(pairs[2])

    torch.compiler.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    for got, wanted in zip(
        torch.compile(several, fullgraph=True, backend=backend)(*pairs), several(*pairs), strict=True
    ):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", ["x", "y", "gate", "shift", "scale", "bias"])
def test_wrong_arguments_are_named(name):
    op = "gate_residual_layernorm_modulate_increment"
    given = dict(zip(("x", "y", "gate", "shift", "scale"), boundary_inputs(2, 3, 8, 0.1, "cpu"), strict=True))
    given["bias"] = torch.zeros(8)
    good = given[name]
    for wrong in (3.0, good.long(), good[..., None].expand(*good.shape, 5)):
        with pytest.raises(ValueError, match=rf"^{op}: {name} must "):
            increment.gate_residual_layernorm_modulate_increment(**{**given, name: wrong})
    if name != "bias":
        with pytest.raises(ValueError, match=rf"^{op}: {name} must not require a gradient"):
            increment.gate_residual_layernorm_modulate_increment(**{**given, name: good.clone().requires_grad_()})
        with pytest.raises(ValueError, match=rf"^{op}: {name} must (be a pair|have shape)"):
            increment.gate_residual_layernorm_modulate_increment(**{**given, name: torch.cat([good, good])})


def test_other_wrong_arguments_are_named():
    t = torch.rand(3)
    cases = [
        (lambda: increment.silu_increment(torch.zeros(3, 4)), r"silu_increment: x must be a pair \[2, \.\.\.\]"),
        (
            lambda: increment.bias_gelu_increment(torch.zeros(2, 4), t),
            r"bias_gelu_increment: bias must have shape \[4\]",
        ),
        (
            lambda: increment.time_embedding_increment(t, t[:2], t),
            r"time_embedding_increment: dt must have shape \[3\]",
        ),
        (lambda: increment.time_embedding_increment(t, t, t, frequencies=7), "frequencies must be an even number"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_gradient_that_would_be_lost_is_refused(device):
    t = torch.rand(2).to(device)
    asks = t.clone().requires_grad_()
    for name, given in (("t", (asks, t, t)), ("dt", (t, asks, t)), ("s", (t, t, asks))):
        with pytest.raises(ValueError, match=f": {name} must not require a gradient"):
            increment.time_embedding_increment(*given, frequencies=8)
    bias, pair = torch.zeros(4, device=device, requires_grad=True), torch.randn(2, 3, 4).to(device)
    with pytest.raises(ValueError, match="bias must not require a gradient"):
        increment.bias_gelu_increment(pair, bias)
    with torch.no_grad():
        assert not increment.bias_gelu_increment(pair, bias).requires_grad


@pytest.mark.parametrize("period", [0, -1, None, 1e-30, True, "10"])
def test_periods_out_of_range_are_named(period, device):
    t = torch.tensor([0.5], device=device)
    with pytest.raises(ValueError, match="max_period must be a number in"):
        increment.time_embedding_increment(t, -0.01 * t, 0.1 * t, frequencies=64, max_period=period)


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_times_in_half_precision(dtype, mode, device):
    t, dt, s = (torch.tensor(v, device=device, dtype=dtype) for v in ([0.5, 0.7], [-0.01, -0.01], [0.1, 0.2]))
    exact = increment.time_embedding_increment(t.double(), dt.double(), s.double(), frequencies=64)
    with testing.mode(mode):
        got = increment.time_embedding_increment(t, dt, s, frequencies=64, dtype=torch.float32)
    for part, wanted in zip(got.double(), exact, strict=True):
        assert (part - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_single_tensors_and_odd_dtypes_are_named(device):
    pair = torch.randn(2, 4).to(device)
    with pytest.raises(ValueError, match="must be a pair"):
        increment.bias_gelu_increment(pair[0, :2].contiguous())
    with pytest.raises(ValueError, match="dtype must be bfloat16"):
        increment.silu_increment(pair, dtype=torch.int32)

"""The increments of LayerNorm, modulation and gated residual against float64 differences of the plain operations."""

import pytest
import torch
import torch.nn.functional as F

from soflow_kernels import testing
from soflow_kernels.increment import adaln, gate_residual_layernorm_modulate_increment, layernorm_modulate_increment

from .pairs import STEPS, check, pair, token_pairs

SIZES = ((2, 3, 1), (1, 5, 64), (3, 2, 72), (2, 3, 100), (1, 2, 384), (1, 2, 768), (2, 2, 1000), (1, 3, 1152))


def modulated(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def gated(x, y, gate, shift, scale, bias=0.0):
    x = x + gate[:, None] * (y + bias)
    return x, modulated(x, shift, scale)


def gate_increment(x, y, gate, shift, scale, bias=None, **settings):
    """The operation, with the residual that a forward would have made."""
    v = y[0].double() if bias is None else y[0].double() + bias.double()
    total = (x[0].double() + gate[0].double()[:, None] * v).to(x[0].dtype)
    return gate_residual_layernorm_modulate_increment(total, x[1], y, gate, shift, scale, bias, **settings)


@pytest.mark.parametrize(
    ("size", "step"), [(size, 1e-3) for size in SIZES] + [((3, 2, 72), step) for step in STEPS if step != 1e-3], ids=str
)
def test_sizes_and_steps(size, step, device):
    pairs = token_pairs(*size, step, device)
    bias = torch.randn(size[-1], device=device)
    with testing.poisoned():
        got = gate_increment(*pairs, bias)
        norm = layernorm_modulate_increment(pairs[0], *pairs[3:])
    if size[-1] == 1:  # the norm of one number is 0, and so is its increment
        assert torch.equal(norm[:, :, 0], pairs[3][1].expand(2, 3))
        return
    # A step below the rounding of the inputs' own sum: their exact difference is what is given.
    check(got, gated, pairs, constants=(bias.double(),), tolerance=2e-5)
    check(norm, modulated, [pairs[0], *pairs[3:]], tolerance=2e-5)


@pytest.mark.parametrize("still", ["x", "y", "modulation"])
def test_where_something_stands_still(still, device):
    pairs = token_pairs(2, 3, 72, 1e-3, device)
    for i in {"x": [0], "y": [1], "modulation": [2, 3, 4]}[still]:
        pairs[i][1] = 0
    check(gate_increment(*pairs), gated, pairs)


def test_nothing_moves_where_nothing_moves(device):
    pairs = token_pairs(2, 3, 72, 0.0, device)
    outs = (
        *gate_increment(*pairs),
        layernorm_modulate_increment(pairs[0], *pairs[3:]),
    )
    assert all((out == 0).all() for out in outs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, device):
    pairs = token_pairs(2, 3, 100, 0.01, device, dtype)
    eps = torch.finfo(dtype).eps
    # The norm is that of the stored residual, so its increment is relative to a rounded one.
    check(gate_increment(*pairs), gated, pairs, tolerance=4 * eps)
    check(layernorm_modulate_increment(pairs[0], *pairs[3:]), modulated, [pairs[0], *pairs[3:]], 2 * eps)


def test_mixed_dtypes(device):
    """The increment of the residual in float32, all else in bfloat16, as in training."""
    x, *rest = token_pairs(2, 3, 100, 0.01, device)
    rest = [p.bfloat16() for p in rest]
    total = gated(x[0].double(), *(p[0].double() for p in rest))[0].bfloat16()
    dtotal, out = gate_residual_layernorm_modulate_increment(total, x[1], *rest, dtype=torch.bfloat16)
    assert dtotal.dtype == torch.float32 and out.dtype == torch.bfloat16
    check(dtotal, lambda *v: gated(*v)[0], [x, *rest])
    shift, scale = rest[2], rest[3]
    stored = (total, dtotal)  # the norm is that of the residual as it is stored
    check(out, modulated, [stored, shift, scale], tolerance=2**-8)
    got = layernorm_modulate_increment((total, x[1]), shift, scale)
    assert got.dtype == torch.float32
    check(got, modulated, [(total, x[1]), shift, scale])


@pytest.mark.parametrize("layout", testing.LAYOUTS[1:])
def test_layouts(layout, device):
    pairs = [testing.lay_out(p, layout) for p in token_pairs(2, 4, 72, 0.01, device)]
    check(gate_increment(*pairs), gated, pairs)


def test_modulation_from_views_of_one_tensor(device):
    modulation = pair((2, 6 * 72), 0.01, 3, device)
    parts = modulation.chunk(6, -1)
    x = pair((2, 3, 72), 0.01, 4, device)
    check(layernorm_modulate_increment(x, parts[1], parts[4]), modulated, [x, parts[1], parts[4]])


def test_zero_and_constant_rows(device):
    x = torch.stack([torch.zeros(2, 1, 8), torch.zeros(2, 1, 8)]).to(device)
    x[0, 1], x[1, 1, 0, 0] = 3.0, 0.01
    m = torch.zeros(2, 2, 8, device=device)
    got = layernorm_modulate_increment(x, m, m)
    assert got.isfinite().all() and (got[0] == 0).all()
    check(got, modulated, [x, m, m], tolerance=1e-4)


def test_nan_stays_in_its_row(device):
    pairs = token_pairs(2, 3, 40, 0.01, device)
    pairs[0][0, 1, 2, 5] = torch.nan
    total, y, *m = pairs
    out = gate_residual_layernorm_modulate_increment(total[0], total[1], y, *m)[1]
    assert out.isnan().any(-1).nonzero().tolist() == [[1, 2]]
    pairs[1][1, 0, 1, 3] = torch.nan
    for out in gate_residual_layernorm_modulate_increment(torch.zeros_like(total[0]), total[1], y, *m):
        assert out.isnan().any(-1).nonzero().tolist() == [[0, 1]]


def test_same_bits_every_time(device):
    pairs = token_pairs(2, 3, 100, 0.01, device)
    runs = [gate_increment(*pairs) for _ in range(3)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_kernel_and_reference_agree(device):
    pairs = token_pairs(2, 3, 100, 1e-4, device)
    calls = [
        lambda: gate_increment(*pairs),
        lambda: (layernorm_modulate_increment(pairs[0], *pairs[3:]),),
    ]
    for call in calls:
        kernel = call()
        with testing.mode("reference"):
            reference = call()
        assert not all(map(torch.equal, kernel, reference))  # the kernels did run
        for found, wanted in zip(kernel, reference, strict=True):
            assert (found - wanted).norm() <= 2e-5 * wanted.norm()


def test_opcheck(device):
    x, y, gate, shift, scale = (tuple(pair) for pair in token_pairs(1, 2, 8, 0.1, device))
    m = (shift[1], *scale)
    torch.library.opcheck(adaln._layernorm_modulate.library, (*x, *m, 1e-6, torch.float32))
    for bias in (None, torch.ones(8, device=device)):
        torch.library.opcheck(adaln._gate_residual.library, (*x, *y, *gate, bias, *m, 1e-6, torch.bfloat16))


def test_compile_equals_eager(device):
    pairs = token_pairs(2, 3, 40, 0.01, device)

    def both(*pairs):
        x, h = gate_residual_layernorm_modulate_increment(pairs[0][0], pairs[0][1], *pairs[1:])
        return x, h, layernorm_modulate_increment((pairs[0][0], x), *pairs[3:])

    torch.compiler.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    for got, wanted in zip(torch.compile(both, fullgraph=True, backend=backend)(*pairs), both(*pairs), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", ["total", "dx", "y", "gate", "shift", "scale", "bias"])
def test_wrong_arguments_are_named(name):
    op = "gate_residual_layernorm_modulate_increment"
    x, *rest = token_pairs(2, 3, 8, 0.1, "cpu")
    given = dict(zip(("y", "gate", "shift", "scale"), map(tuple, rest), strict=True))
    given |= {"total": x[0], "dx": x[1], "bias": torch.zeros(8)}
    single = name in ("total", "dx", "bias")
    wrong = [3.0, given[name][None] if single else torch.cat(given[name]), None if name != "bias" else [1]]
    if single:
        wrong += [given[name].long(), given[name].clone().requires_grad_()]
    else:
        value, increment = given[name]
        wrong += [(value, increment[..., None]), (value.long(), increment), (value, increment.clone().requires_grad_())]
        wrong += [(value,), (value, increment, value)]
    for value in wrong:
        with pytest.raises(ValueError, match=rf"^{op}: (the (value|increment) of )?{name} must "):
            gate_residual_layernorm_modulate_increment(**{**given, name: value})
    with pytest.raises(ValueError, match="dtype must be"):
        gate_residual_layernorm_modulate_increment(**given, dtype=torch.int32)


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_empty_batch(mode, device):
    pairs = token_pairs(0, 3, 8, 0.1, device)
    with testing.mode(mode):
        residual, out = gate_increment(*pairs, torch.zeros(8, device=device))
        norm = layernorm_modulate_increment(pairs[0], *pairs[3:])
    assert residual.shape == out.shape == norm.shape == (0, 3, 8)

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


@pytest.mark.parametrize(
    ("size", "step"), [(size, 1e-3) for size in SIZES] + [((3, 2, 72), step) for step in STEPS if step != 1e-3], ids=str
)
def test_sizes_and_steps(size, step, device):
    pairs = token_pairs(*size, step, device)
    bias = torch.randn(size[-1], device=device)
    with testing.poisoned():
        got = gate_residual_layernorm_modulate_increment(*pairs, bias)
        norm = layernorm_modulate_increment(pairs[0], *pairs[3:])
    if size[-1] == 1:  # the norm of one number is 0, and so is its increment
        assert torch.equal(norm[:, :, 0], torch.stack([pairs[3][0], pairs[3][1]]))
        return
    # A step below the rounding of the inputs' own sum: their exact difference is what is given.
    check(got, gated, pairs, constants=(bias.double(),), tolerance=2e-5)
    check(norm, modulated, [pairs[0], *pairs[3:]], tolerance=2e-5)


@pytest.mark.parametrize("still", ["x", "y", "modulation"])
def test_where_something_stands_still(still, device):
    pairs = token_pairs(2, 3, 72, 1e-3, device)
    for i in {"x": [0], "y": [1], "modulation": [2, 3, 4]}[still]:
        pairs[i][1] = 0
    check(gate_residual_layernorm_modulate_increment(*pairs), gated, pairs)


def test_nothing_moves_where_nothing_moves(device):
    pairs = token_pairs(2, 3, 72, 0.0, device)
    outs = (
        *gate_residual_layernorm_modulate_increment(*pairs),
        layernorm_modulate_increment(pairs[0], *pairs[3:]),
    )
    assert all((out[1] == 0).all() and (out[0] != 0).any() for out in outs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, device):
    pairs = token_pairs(2, 3, 100, 0.01, device, dtype)
    eps = torch.finfo(dtype).eps
    # The norm is that of the stored residual, so its increment is relative to a rounded one.
    check(gate_residual_layernorm_modulate_increment(*pairs), gated, pairs, tolerance=4 * eps)
    check(layernorm_modulate_increment(pairs[0], *pairs[3:]), modulated, [pairs[0], *pairs[3:]], 2 * eps)


def test_mixed_dtypes(device):
    """A residual in float32, the rest and the result in bfloat16, as in training."""
    x, *rest = token_pairs(2, 3, 100, 0.01, device)
    rest = [p.bfloat16() for p in rest]
    residual, out = gate_residual_layernorm_modulate_increment(x, *rest, dtype=torch.bfloat16)
    assert residual.dtype == torch.float32 and out.dtype == torch.bfloat16
    check((residual,), lambda *v: (gated(*v)[0],), [x, *rest])
    check((out,), lambda *v: (gated(*v)[1],), [x, *rest], tolerance=2**-7)


@pytest.mark.parametrize("layout", testing.LAYOUTS[1:])
def test_layouts(layout, device):
    pairs = [testing.lay_out(p, layout) for p in token_pairs(2, 4, 72, 0.01, device)]
    check(gate_residual_layernorm_modulate_increment(*pairs), gated, pairs)


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
    assert got.isfinite().all() and (got[:, 0] == 0).all()
    check(got, modulated, [x, m, m], tolerance=1e-4)


def test_nan_stays_in_its_row(device):
    pairs = token_pairs(2, 3, 40, 0.01, device)
    pairs[0][0, 1, 2, 5] = torch.nan
    for out in gate_residual_layernorm_modulate_increment(*pairs):
        rows = out.isnan().flatten(0, 0).any(-1)
        assert rows[:, 1, 2].any() and rows.sum() == rows[:, 1, 2].sum()


def test_same_bits_every_time(device):
    pairs = token_pairs(2, 3, 100, 0.01, device)
    runs = [gate_residual_layernorm_modulate_increment(*pairs) for _ in range(3)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_kernel_and_reference_agree(device):
    pairs = token_pairs(2, 3, 100, 1e-4, device)
    calls = [
        lambda: gate_residual_layernorm_modulate_increment(*pairs),
        lambda: (layernorm_modulate_increment(pairs[0], *pairs[3:]),),
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
    x, y, *m = token_pairs(1, 2, 8, 0.1, device)
    torch.library.opcheck(adaln._layernorm_modulate, (x, m[0], m[1], 1e-6, torch.float32))
    torch.library.opcheck(adaln._gate_residual, (x, y, *m, None, 1e-6, torch.float32))


def test_compile_equals_eager(device):
    pairs = token_pairs(2, 3, 40, 0.01, device)

    def both(*pairs):
        x, h = gate_residual_layernorm_modulate_increment(*pairs)
        return x, h, layernorm_modulate_increment(x, *pairs[3:])

    torch.compiler.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    for got, wanted in zip(torch.compile(both, fullgraph=True, backend=backend)(*pairs), both(*pairs), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", ["x", "y", "gate", "shift", "scale", "bias"])
def test_wrong_arguments_are_named(name):
    op = "gate_residual_layernorm_modulate_increment"
    given = dict(zip(("x", "y", "gate", "shift", "scale"), token_pairs(2, 3, 8, 0.1, "cpu"), strict=True))
    given["bias"] = torch.zeros(8)
    good = given[name]
    for wrong in (3.0, good.long(), good[..., None].expand(*good.shape, 5)):
        with pytest.raises(ValueError, match=rf"^{op}: {name} must "):
            gate_residual_layernorm_modulate_increment(**{**given, name: wrong})
    if name != "bias":
        with pytest.raises(ValueError, match=rf"^{op}: {name} must not require a gradient"):
            gate_residual_layernorm_modulate_increment(**{**given, name: good.clone().requires_grad_()})
        with pytest.raises(ValueError, match=rf"^{op}: {name} must (be a pair|have shape)"):
            gate_residual_layernorm_modulate_increment(**{**given, name: torch.cat([good, good])})


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_empty_batch(mode, device):
    pairs = token_pairs(0, 3, 8, 0.1, device)
    with testing.mode(mode):
        residual, out = gate_residual_layernorm_modulate_increment(*pairs, torch.zeros(8, device=device))
        norm = layernorm_modulate_increment(pairs[0], *pairs[3:])
    assert residual.shape == out.shape == norm.shape == (2, 0, 3, 8)

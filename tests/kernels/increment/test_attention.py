"""attention_increment against the float64 difference of two attentions."""

from itertools import chain

import pytest
import torch

from soflow_kernels import testing
from soflow_kernels.increment import attention as module
from soflow_kernels.increment import attention_increment, attention_increment_reference

from .pairs import STEPS

HEADS = ((16, 24), (63, 64), (70, 128), (20, 8), (33, 96))
"""Tokens and head dimensions, beside the usual (40, 72): one segment of columns or two, padded or not."""


def inputs(T, d, step, device, B=2, H=2, dtype=torch.float32, seed=0):
    """Pairs q, k, v as views of one qkv tensor and its increment of size `step`."""
    generator = torch.Generator().manual_seed(seed)
    qkv = [size * torch.randn(B, T, 3, H, d, generator=generator) for size in (1, step)]
    return pairs_of(*(tensor.to(device, dtype) for tensor in qkv))


def pairs_of(values, increments):
    """Pairs q, k, v [B, H, T, d] as views of [B, T, 3, H, d]."""
    return list(zip(*(tensor.transpose(1, 3).unbind(2) for tensor in (values, increments)), strict=True))


def attention(q, k, v, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.softmax(scale * (q @ k.transpose(-1, -2)), -1) @ v


def exact(q, k, v, scale=None):
    starts, moves = zip(*([part.double() for part in pair] for pair in (q, k, v)), strict=True)
    return attention(*(h + dh for h, dh in zip(starts, moves, strict=True)), scale) - attention(*starts, scale)


def relative(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-300)).item()


def check(given, bound, **settings):
    with testing.poisoned():
        got = attention_increment(*given, **settings)
    assert got.shape == given[0][0].shape and got.dtype == given[2][1].dtype
    assert relative(got, exact(*given, **settings)) <= bound


@pytest.mark.parametrize(
    ("T", "d", "step"),
    [(T, d, 1e-3) for T, d in HEADS] + [(40, 72, sign * step) for step in STEPS for sign in (1, -1)],
)
def test_float32(T, d, step, device):
    check(inputs(T, d, step, device, B=1 + (T < 40), H=1 + (T < 40)), 1e-5)


@pytest.mark.parametrize(
    ("T", "d", "step"), [(63, 64, 1e-3), (17, 24, 1e-3), (64, 128, 1e-3), (40, 72, 0.5), (40, 72, 1e-3), (40, 72, 1e-6)]
)
def test_bfloat16(T, d, step, device):
    check(inputs(T, d, step, device, B=1, dtype=torch.bfloat16), 1.5e-2)


def test_many_tokens(device):
    check(inputs(144, 64, 1e-3, device, B=1, H=1), 1e-5)


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_each_input_alone(moves, device):
    given = inputs(20, 24, 1e-3, device)
    check([(h, dh if i == moves else torch.zeros_like(dh)) for i, (h, dh) in enumerate(given)], 1e-5)


def test_nothing_moves_where_nothing_moves(device):
    assert (attention_increment(*inputs(20, 24, 0.0, device)) == 0).all()


def test_one_token_moves_as_its_value(device):
    q, k, v = inputs(1, 24, 0.1, device)
    torch.testing.assert_close(attention_increment(q, k, v), v[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("step", [1e-3, 3.0])
def test_peaked_rows(step, device):
    """Scores of some 50 and more: almost all of a row's weight on one key."""
    q, k, v = inputs(24, 32, step, device)
    check([tuple(20 * part for part in q), k, v], 1e-4)


def test_large_increments(device):
    """Scores that change by up to 30: nothing overflows, nothing vanishes."""
    q, k, v = inputs(24, 32, 1.0, device)
    q[1].mul_(8)
    assert exact(q, k, v).norm() > 0
    check([q, k, v], 1e-5)


def test_a_common_shift_of_the_keys_is_invisible(device):
    q, k, v = inputs(24, 32, 1e-4, device)
    # Every score of a row changes by the same, much more than it otherwise does.
    check([q, (k[0], k[1] + 1.0), v], 3e-3)


def test_scale(device):
    check(inputs(20, 24, 1e-2, device), 1e-5, scale=0.7)


@pytest.mark.parametrize("layout", testing.LAYOUTS[1:])
def test_layouts(layout, device):
    check([[testing.lay_out(part, layout) for part in pair] for pair in inputs(20, 24, 1e-2, device)], 1e-5)


def test_value_and_increment_lie_each_in_its_own_way(device):
    q, k, v = inputs(20, 24, 1e-2, device)
    (q0, dq), (k0, dk), (v0, dv) = q, k, v
    check([(q0.contiguous(), dq), (k0, dk.contiguous()), (testing.lay_out(v0, "chunk"), dv[:1].expand(dv.shape))], 1e-5)


@pytest.mark.parametrize("far", ["samples", "heads", "rows"])
def test_far_apart_in_memory(far, tmp_path):
    """Offsets of 2^31 elements and more, in a file that takes no room: those of int32 would read its other end."""
    if not testing.INTERPRETED:
        pytest.skip("for memory on the CPU")
    d, start = 24, 2**31
    file = torch.from_file(str(tmp_path / "sparse"), shared=True, size=start + 2**31 + 6 * d, dtype=torch.bfloat16)
    shape = {"samples": (2, 1, 1, d), "heads": (1, 2, 1, d), "rows": (1, 1, 3, d)}[far]
    strides = tuple(2**31 // (n - 1) if n in (2, 3) else 8 for n in shape[:3])
    near = torch.randn(6, *shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    parts = [file.as_strided(shape, (*strides, 1), start + i * d) for i in range(6)]
    for part, values in zip(parts, near, strict=True):
        part.copy_(values)
    got = attention_increment(*(tuple(parts[i : i + 2]) for i in (0, 2, 4)))
    assert torch.equal(got, attention_increment(*(tuple(near[i : i + 2]) for i in (0, 2, 4))))


def test_result_lies_as_the_projection_wants_it(device):
    out = attention_increment(*inputs(20, 24, 1e-2, device))
    assert out.transpose(1, 2).is_contiguous()
    with testing.mode("reference"):
        assert attention_increment(*inputs(20, 24, 1e-2, device)).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shape", [(0, 2, 5, 24), (2, 0, 5, 24), (2, 2, 0, 24)], ids=str)
@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_nothing_to_do(mode, shape, device):
    empty = torch.zeros(shape, device=device)
    with testing.mode(mode):
        assert attention_increment(*((empty, empty),) * 3).shape == empty.shape


def test_kernel_and_reference_agree(device):
    given = inputs(30, 72, 1e-3, device)
    kernel = attention_increment(*given)
    with testing.mode("reference"):
        reference = attention_increment(*given)
    assert not torch.equal(kernel, reference)
    assert relative(kernel, reference.double()) <= 1e-5
    assert torch.equal(reference, attention_increment_reference(*given))


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("step", [0.1, 1e-3, 1e-6])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1.5e-2)], ids=str)
def test_reference_in_pieces(dtype, bound, step, samples, monkeypatch):
    monkeypatch.setattr(module, "PIECE", samples * 2 * 30**2)
    given = inputs(30, 72, step, "cpu", B=3, dtype=dtype)
    assert relative(attention_increment_reference(*given), exact(*given)) <= bound


def test_float16_and_large_heads_take_the_reference(device):
    for given in (inputs(9, 24, 1e-2, device, dtype=torch.float16), inputs(9, 160, 1e-2, device)):
        assert torch.equal(attention_increment(*given), attention_increment_reference(*given))


def test_nan_stays_in_its_head(device):
    given = inputs(20, 24, 1e-2, device)
    given[1][0][1, 0, 7, 3] = torch.nan
    out = attention_increment(*given)
    assert out[1, 0].isnan().all() and not out[0].isnan().any() and not out[1, 1].isnan().any()


def test_same_bits_every_time(device):
    given = inputs(40, 72, 1e-3, device, B=1)
    runs = [attention_increment(*given) for _ in range(2)]
    assert all(torch.equal(runs[0], other) for other in runs[1:])


def test_opcheck(device):
    torch.library.opcheck(module._attention.library, (*chain.from_iterable(inputs(5, 16, 0.1, device)), 0.25))


def test_compile_equals_eager(device):
    given = inputs(20, 24, 1e-2, device)
    torch.compiler.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(attention_increment, fullgraph=True, backend=backend)
    assert torch.equal(compiled(*given), attention_increment(*given))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_wrong_arguments_are_named(name):
    given = dict(zip("qkv", inputs(5, 16, 0.1, "cpu"), strict=True))
    good = given[name]
    for wrong in (None, good[0][:1], good[:1]):
        with pytest.raises(ValueError, match=f"^attention_increment: {name} must be a pair "):
            attention_increment(**{**given, name: wrong})
    for i, part in enumerate(("value", "increment")):
        for wrong in (None, good[i].long(), good[i][0], good[i].clone().requires_grad_()):
            pair = (wrong, good[1]) if i == 0 else (good[0], wrong)
            with pytest.raises(ValueError, match=f"^attention_increment: the {part} of {name} must "):
                attention_increment(**{**given, name: pair})
        if (i, name) != (0, "q"):
            pair = (good[0].half(), good[1]) if i == 0 else (good[0], good[1].half())
            with pytest.raises(ValueError, match=rf"the {part} of {name} must be torch\.float32 like the value of q"):
                attention_increment(**{**given, name: pair})


def test_heads_of_no_dimension(device):
    empty = torch.zeros(1, 1, 3, 0, device=device)
    assert attention_increment(*((empty, empty),) * 3).shape == empty.shape


@pytest.mark.parametrize("size", [3, 8, 20])
@pytest.mark.parametrize("function", [attention_increment, attention_increment_reference])
def test_the_key_that_is_looked_at_may_become_another(function, size, device):
    """Scores of some tens or hundreds that move as far: what a row looked at counts for nothing at its end."""
    q, k, v = inputs(24, 24, 1.0, device)
    q, k = ([size * part for part in pair] for pair in (q, k))
    assert relative(function(q, k, v), exact(q, k, v)) <= 1e-5 * size**2

"""attention_increment against the float64 difference of two attentions."""

import pytest
import torch

from soflow_kernels import testing
from soflow_kernels.increment import attention as module
from soflow_kernels.increment import attention_increment, attention_increment_reference

from .pairs import STEPS

HEADS = ((16, 24), (63, 64), (70, 128), (20, 8), (33, 96))
"""Tokens and head dimensions, beside the usual (40, 72): one segment of columns or two, padded or not."""


def inputs(T, d, step, device, B=2, H=2, dtype=torch.float32, seed=0):
    """Pairs q, k, v as views of one qkv tensor, with increments of size `step`."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(2, B, T, 3, H, d, generator=generator)
    qkv[1] *= step
    return [part.transpose(2, 3) for part in qkv.to(device, dtype).unbind(3)]


def attention(q, k, v, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.softmax(scale * (q @ k.transpose(-1, -2)), -1) @ v


def exact(q, k, v, scale=None):
    pairs = [part.double() for part in (q, k, v)]
    start = attention(*(p[0] for p in pairs), scale)
    return start, attention(*(p[0] + p[1] for p in pairs), scale) - start


def relative(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-300)).item()


def check(given, value_bound, bound, **settings):
    with testing.poisoned():
        got = attention_increment(*given, **settings)
    start, difference = exact(*given, **settings)
    assert got.shape == given[0].shape and got.dtype == given[2].dtype
    assert relative(got[0], start) <= value_bound
    assert relative(got[1], difference) <= bound


@pytest.mark.parametrize(
    ("T", "d", "step"),
    [(T, d, 1e-3) for T, d in HEADS] + [(40, 72, sign * step) for step in STEPS for sign in (1, -1)],
)
def test_float32(T, d, step, device):
    check(inputs(T, d, step, device, B=1 + (T < 40), H=1 + (T < 40)), 1e-6, 1e-5)


@pytest.mark.parametrize(
    ("T", "d", "step"), [(63, 64, 1e-3), (17, 24, 1e-3), (64, 128, 1e-3), (40, 72, 0.5), (40, 72, 1e-3), (40, 72, 1e-6)]
)
def test_bfloat16(T, d, step, device):
    check(inputs(T, d, step, device, B=1, dtype=torch.bfloat16), 1.5e-2, 1.5e-2)


def test_many_tokens(device):
    check(inputs(144, 64, 1e-3, device, B=1, H=1), 1e-6, 1e-5)


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_each_input_alone(moves, device):
    given = inputs(20, 24, 1e-3, device)
    given = [part.clone() for part in given]
    for i, part in enumerate(given):
        if i != moves:
            part[1] = 0
    check(given, 1e-6, 1e-5)


def test_nothing_moves_where_nothing_moves(device):
    assert (attention_increment(*inputs(20, 24, 0.0, device))[1] == 0).all()


def test_one_token_is_its_value(device):
    q, k, v = inputs(1, 24, 0.1, device)
    torch.testing.assert_close(attention_increment(q, k, v), v, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("step", [1e-3, 3.0])
def test_peaked_rows(step, device):
    """Scores of some 50 and more: almost all of a row's weight on one key."""
    q, k, v = inputs(24, 32, step, device)
    q = q * 20
    check([q, k, v], 1e-5, 1e-4)


def test_large_increments(device):
    """Scores that change by up to 30: nothing overflows, nothing vanishes."""
    q, k, v = inputs(24, 32, 1.0, device)
    q[1] *= 8
    assert exact(q, k, v)[1].norm() > 0
    check([q, k, v], 1e-5, 1e-5)


def test_a_common_shift_of_the_keys_is_invisible(device):
    q, k, v = inputs(24, 32, 1e-4, device)
    moved = k.clone()
    moved[1] += 1.0  # every score of a row changes by the same, much more than it otherwise does
    check([q, moved, v], 1e-5, 3e-3)
    got, still = attention_increment(q, moved, v), attention_increment(q, k, v)
    torch.testing.assert_close(got[0], still[0])


def test_scale(device):
    check(inputs(20, 24, 1e-2, device), 1e-6, 1e-5, scale=0.7)


@pytest.mark.parametrize("layout", testing.LAYOUTS[1:])
def test_layouts(layout, device):
    check([testing.lay_out(part.contiguous(), layout) for part in inputs(20, 24, 1e-2, device)], 1e-6, 1e-5)


def test_result_lies_as_the_projection_wants_it(device):
    out = attention_increment(*inputs(20, 24, 1e-2, device))
    assert out.transpose(2, 3).is_contiguous()
    with testing.mode("reference"):
        assert attention_increment(*inputs(20, 24, 1e-2, device)).transpose(2, 3).is_contiguous()


@pytest.mark.parametrize("shape", [(0, 2, 5, 24), (2, 0, 5, 24), (2, 2, 0, 24)], ids=str)
@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_nothing_to_do(mode, shape, device):
    empty = torch.zeros(2, *shape, device=device)
    with testing.mode(mode):
        assert attention_increment(empty, empty, empty).shape == empty.shape


def test_kernel_and_reference_agree(device):
    given = inputs(30, 72, 1e-3, device)
    kernel = attention_increment(*given)
    with testing.mode("reference"):
        reference = attention_increment(*given)
    assert not torch.equal(kernel, reference)
    for part, wanted in zip(kernel, reference, strict=True):
        assert relative(part, wanted.double()) <= 1e-5
    assert torch.equal(reference, attention_increment_reference(*given))


def test_float16_and_large_heads_take_the_reference(device):
    for given in (inputs(9, 24, 1e-2, device, dtype=torch.float16), inputs(9, 160, 1e-2, device)):
        assert torch.equal(attention_increment(*given), attention_increment_reference(*given))


def test_nan_stays_in_its_head(device):
    given = inputs(20, 24, 1e-2, device)
    given[1][0, 1, 0, 7, 3] = torch.nan
    out = attention_increment(*given)
    assert out[:, 1, 0].isnan().all() and not out[:, 0].isnan().any() and not out[:, 1, 1].isnan().any()


def test_same_bits_every_time(device):
    given = inputs(40, 72, 1e-3, device, B=1)
    runs = [attention_increment(*given) for _ in range(2)]
    assert all(torch.equal(runs[0], other) for other in runs[1:])


def test_opcheck(device):
    torch.library.opcheck(module._attention, (*inputs(5, 16, 0.1, device), 0.25))


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
    for wrong in (None, good.long(), good[0], good.clone().requires_grad_()):
        with pytest.raises(ValueError, match=f"^attention_increment: {name} must "):
            attention_increment(**{**given, name: wrong})
    if name != "q":
        with pytest.raises(ValueError, match=rf"{name} must be torch\.float32 like q"):
            attention_increment(**{**given, name: good.half()})


def test_heads_of_no_dimension(device):
    assert attention_increment(*(torch.zeros(2, 1, 1, 3, 0, device=device),) * 3).shape == (2, 1, 1, 3, 0)

"""qk_rms_norm against float64, beside eager PyTorch in the same dtype."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

import soflow_kernels
from soflow_kernels import _dispatch, qk_norm, qk_rms_norm, qk_rms_norm_reference, testing

NAMES = ("q", "k", "q_weight", "k_weight")
# Two numbers, odd heads, the head dimensions of the public sizes and others, parts of a tile and several, nothing.
SHAPES = [(2, 3, 2, 2), (1, 5, 3, 7), (2, 3, 4, 64), (1, 2, 3, 72), (1, 3, 2, 96), (1, 9, 2, 130), (0, 3, 2, 72)]
LAYOUTS = ("packed", "packed heads", *testing.LAYOUTS)


def inputs(shape, dtype, device, layout="packed", seed=0):
    """q and k as a packed product leaves them ("packed heads": as [B, H, T, d]), their weights, and the outputs'."""
    generator = torch.Generator().manual_seed(seed)
    B, M, L, d = shape
    if layout == "packed":
        q, k, _ = (3 * torch.randn(B, M, 3, L, d, generator=generator)).to(device, dtype).unbind(2)
    elif layout == "packed heads":
        q, k, _ = (3 * torch.randn(B, L, 3, M, d, generator=generator)).to(device, dtype).permute(2, 0, 3, 1, 4)
    else:
        q, k = (testing.lay_out(torch.randn(shape, generator=generator).to(device, dtype), layout) for _ in range(2))
    weights = [(1 + torch.randn(d, generator=generator)).to(device, dtype) for _ in range(2)]
    douts = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2)]
    return dict(zip(NAMES, (q, k, *weights), strict=True)), douts


def check(tensors, douts):
    with testing.poisoned():
        actual = testing.grads(qk_rms_norm, tensors, douts)
    eager = testing.grads(qk_rms_norm_reference, tensors, douts)
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    exact = testing.grads(qk_rms_norm_reference, doubles, [dout.double() for dout in douts])
    testing.assert_matches(actual, eager, exact)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, device):
    check(*inputs(shape, torch.float32, device))


@pytest.mark.parametrize(("shape", "dtype"), [((2, 3, 4, 72), torch.bfloat16), ((1, 3, 2, 64), torch.float16)], ids=str)
def test_half_precision(shape, dtype, device):
    check(*inputs(shape, dtype, device))


def test_dtypes_of_their_own(device):
    tensors, douts = inputs((2, 3, 2, 72), torch.float32, device)
    check({**tensors, "q": tensors["q"].bfloat16()}, [douts[0].bfloat16(), douts[1]])
    check({**tensors, "q_weight": tensors["q_weight"].bfloat16()}, douts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device):
    tensors, douts = inputs((2, 3, 4, 24), torch.float32, device, layout)
    check(tensors, [testing.lay_out(dout, layout) if layout in testing.LAYOUTS else dout for dout in douts])
    if not layout.startswith("packed"):  # and q and k that lie differently
        check({**tensors, "k": testing.lay_out(tensors["k"].contiguous(), "transposed")}, douts)


@pytest.mark.parametrize("layout", ["packed", "packed heads"])
def test_results_lie_as_q_does(layout, device):
    """So that nobody copies them."""
    tensors, douts = inputs((2, 3, 4, 24), torch.float32, device, layout)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    outs = qk_rms_norm(**leaves)
    gradients = torch.autograd.grad(outs, [leaves["q"], leaves["k"]], douts)
    for tensor in (*outs, *gradients):
        assert tensor.transpose(1, 2).is_contiguous() if layout == "packed heads" else tensor.is_contiguous()


def test_many_rows_in_several_chunks(device):
    tensors, douts = inputs((3, 80, 2, 8), torch.float32, device)
    assert qk_norm.split_rows(1, 480, qk_norm.LEAST_ROWS)[0] > 3
    check(tensors, douts)


def test_far_apart_in_memory(device):
    """The second sample begins 2^31 numbers after the first: only 64-bit addresses reach it. A GPU needs 4.3 GB."""
    memory = torch.empty(2**31 + 64, dtype=torch.float16, device=device)
    q = memory.as_strided((2, 1, 2, 16), (2**31, 32, 16, 1))
    k = memory[32:].as_strided((2, 1, 2, 16), (2**31, 32, 16, 1))
    values = torch.randn(2, 2, 1, 2, 16, generator=torch.Generator().manual_seed(0)).half().to(device)
    q.copy_(values[0])
    k.copy_(values[1])
    weights = torch.ones(16, device=device), torch.full((16,), 2.0, device=device)
    with torch.no_grad():
        got, want = qk_rms_norm(q, k, *weights), qk_rms_norm(*values, *weights)
        dgot = qk_norm._qk_rms_norm_backward(k, q, q, k, *weights, 1e-6)
        dwant = qk_norm._qk_rms_norm_backward(values[1], values[0], *values, *weights, 1e-6)
    assert all(torch.equal(a, b) for a, b in zip((*got, *dgot), (*want, *dwant), strict=True))


def test_a_row_of_zeros_and_large_rows(device):
    """A norm with an epsilon: zeros stay zeros, and their gradient is finite. Large rows do not overflow."""
    tensors, douts = inputs((1, 2, 2, 16), torch.float32, device)
    tensors["q"] = tensors["q"].clone()
    tensors["q"][0, 0, 0] = 0
    tensors["k"] = 1e15 * tensors["k"]
    check(tensors, douts)
    got = testing.grads(qk_rms_norm, tensors, douts)
    assert not got["output 0"][0, 0, 0].any() and all(value.isfinite().all() for value in got.values())


def test_without_an_epsilon(device):
    """The rows of a tile that are not there have no size to divide by."""
    tensors, douts = inputs((1, 3, 1, 5), torch.float32, device)
    got = testing.grads(lambda **given: qk_rms_norm(**given, eps=0.0), tensors, douts)
    want = testing.grads(lambda **given: qk_rms_norm_reference(**given, eps=0.0), tensors, douts)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5)


def test_nan_stays_in_its_row(device):
    tensors, douts = inputs((1, 3, 2, 8), torch.float32, device)
    tensors["q"] = tensors["q"].clone()
    tensors["q"][0, 1, 1, 3] = torch.nan
    found = testing.grads(qk_rms_norm, tensors, douts)
    for name in ("output 0", "gradient of q"):
        assert found[name].isnan().any(-1).nonzero().tolist() == [[0, 1, 1]], name
    assert not any(found[name].isnan().any() for name in ("output 1", "gradient of k", "gradient of k_weight"))


def test_same_bits_every_time(device):
    tensors, douts = inputs((3, 80, 2, 8), torch.float32, device)
    runs = [testing.grads(qk_rms_norm, tensors, douts) for _ in range(2)]
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_it_is_torchs_rms_norm(device):
    tensors, _ = inputs((2, 3, 2, 72), torch.float32, device)
    got = qk_rms_norm(**tensors, eps=1e-3)
    for out, x, weight in zip(got, ("q", "k"), ("q_weight", "k_weight"), strict=True):
        want = torch.nn.functional.rms_norm(tensors[x], (72,), tensors[weight], 1e-3)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)


def test_kernel_reference_and_float64(device):
    """Which calls go to the kernel; the others get the reference, to the bit."""
    tensors, _ = inputs((2, 3, 2, 8), torch.float32, device)
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    wide, _ = inputs((1, 1, 1, 1040), torch.float32, device)
    with _dispatch.recording() as launches:
        qk_rms_norm(**tensors)
        assert len(launches) == 1
        for given in (doubles, wide):
            got, want = qk_rms_norm(**given), qk_rms_norm_reference(**given)
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True))
        with testing.mode("reference"):
            got = qk_rms_norm(**tensors)
            assert not soflow_kernels.status()["qk_rms_norm"].kernel
        assert all(torch.equal(a, b) for a, b in zip(got, qk_rms_norm_reference(**tensors), strict=True))
        assert len(launches) == 1


@pytest.mark.parametrize("how", ["dual tensor", "torch.func.jvp"])
def test_forward_mode_never_gives_a_silent_zero(how, device):
    tensors, _ = inputs((2, 3, 2, 8), torch.float32, device)
    primal, tangent = tuple(tensors.values()), tuple(torch.randn_like(value) for value in tensors.values())

    def tangents(function):
        if how == "torch.func.jvp":
            return torch.func.jvp(function, primal, tangent)[1]
        with forward_ad.dual_level():
            outs = function(*(forward_ad.make_dual(p, t) for p, t in zip(primal, tangent, strict=True)))
            return [forward_ad.unpack_dual(out).tangent for out in outs]

    for got, want in zip(tangents(qk_rms_norm), tangents(qk_rms_norm_reference), strict=True):
        assert got is not None and want.abs().max() > 0
        torch.testing.assert_close(got, want)


def test_batches_of_gradients(device):
    tensors, _ = inputs((2, 3, 2, 8), torch.float32, device)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors.values()]
    out, _ = qk_rms_norm(*leaves)
    want, _ = qk_rms_norm_reference(*leaves)
    batch = torch.randn(3, *out.shape).to(device)
    chosen = [leaves[0], leaves[2]]
    found = torch.autograd.grad(out, chosen, batch, is_grads_batched=True)
    exact = torch.autograd.grad(want, chosen, batch, is_grads_batched=True)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_references_have_right_gradients():
    tensors, _ = inputs((1, 2, 2, 3), torch.float64, "cpu")
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    assert torch.autograd.gradcheck(qk_rms_norm_reference, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(qk_rms_norm_reference, leaves)


def test_opcheck(device):
    tensors, douts = inputs((2, 3, 2, 24), torch.float32, device, "packed heads")
    leaves = [tensor.detach().requires_grad_() for tensor in tensors.values()]
    torch.library.opcheck(qk_norm._qk_rms_norm.library, (*leaves, 1e-6))
    torch.library.opcheck(qk_norm._qk_rms_norm_backward.library, (*douts, *tensors.values(), 1e-6))


def test_compile_equals_eager(device):
    tensors, douts = inputs((2, 3, 2, 24), torch.float32, device)
    torch.compiler.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(lambda **given: qk_rms_norm(**given), fullgraph=True, backend=backend)
    eager, found = testing.grads(qk_rms_norm, tensors, douts), testing.grads(compiled, tensors, douts)
    assert all(torch.equal(found[name], value) for name, value in eager.items())


@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments_are_named(name):
    q, weight = torch.randn(2, 3, 4, 8), torch.ones(8)
    good = {"q": q, "k": q, "q_weight": weight, "k_weight": weight}
    value = good[name]
    wrong = {
        "must be a tensor": [None, value.tolist()],
        "must be bfloat16": [value.long()],
        "must have shape": [value[None], value[..., None].expand(*value.shape, 2)],
    }
    if name != "q":
        wrong["must have shape"].append(value[..., 1:])
        wrong["must be on cpu"] = [value.to("meta")]
    for expected, values in wrong.items():
        for bad in values:
            with pytest.raises(ValueError, match=rf"^qk_rms_norm: {name} {expected}"):
                qk_rms_norm(**{**good, name: bad})


def test_logits_are_bounded(device):
    """What it is for: however large the weights before it, no logit is above sqrt(d) times that of its own weights."""
    d = 64
    tensors, _ = inputs((1, 4, 2, d), torch.bfloat16, device)
    tensors["q_weight"], tensors["k_weight"] = torch.full((d,), 2.0, device=device), torch.ones(d, device=device)
    for blown_up in (1.0, 1e4, 1e15):
        q, k = qk_rms_norm(**{**tensors, "q": blown_up * tensors["q"], "k": blown_up * tensors["k"]})
        logits = torch.einsum("bthd,bshd->bhts", q.float(), k.float()) * d**-0.5
        assert logits.isfinite().all() and logits.abs().max() <= 1.01 * 2 * d**0.5

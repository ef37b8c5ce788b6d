"""The packed gradient of q, k and v, and the sum of it, against float64."""

import pytest
import torch

from soflow_kernels import testing
from soflow_kernels.packed_gradient import _qkv_gradient, _token_sum, qkv_gradient, qkv_gradient_reference, token_sum

SIZES = ((1, 1, 1), (2, 3, 72), (1, 70, 130), (3, 5, 128), (2, 33, 1152))


def parts(B, T, D, device, dtype=torch.float32):
    source = torch.Generator().manual_seed(0)
    return [torch.randn(B, T, D, generator=source).to(device, dtype) for _ in range(3)]


def check(got, given, tolerance=1e-6):
    dqkv, dbias = got
    wanted = torch.cat(given, -1)
    assert torch.equal(dqkv, wanted) and dqkv.is_contiguous()
    exact = wanted.double().sum((0, 1))
    scale = wanted.double().abs().sum((0, 1))
    assert dbias.dtype == wanted.dtype and dbias.shape == exact.shape
    assert ((dbias.double() - exact).abs() <= tolerance * scale + torch.finfo(dbias.dtype).eps * exact.abs()).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes(size, dtype, device):
    given = parts(*size, device, dtype)
    with testing.poisoned():
        got = qkv_gradient(*given)
    check(got, given)


@pytest.mark.parametrize("layout", testing.LAYOUTS[1:])
def test_layouts(layout, device):
    given = [testing.lay_out(part, layout) for part in parts(2, 4, 72, device)]
    check(qkv_gradient(*given), given)


def test_heads_in_any_order_in_memory(device):
    """As attention's backward leaves them: [B, heads, T, d] in memory, or [B, T, heads, d]."""
    for order in ((0, 1, 2, 3), (0, 2, 1, 3)):
        given = []
        for part in parts(2, 5, 24, device):
            heads = part.view(2, 5, 3, 8).permute(*order).contiguous().permute(*order)
            given.append(heads.flatten(2))
        check(qkv_gradient(*given), given)


def test_thirds_of_one_tensor_are_not_copied(device):
    whole = torch.cat(parts(2, 5, 24, device), -1)
    thirds = list(whole.chunk(3, -1))
    dqkv, dbias = qkv_gradient(*thirds)
    assert dqkv.data_ptr() == whole.data_ptr() and torch.equal(dqkv, whole)
    check((dqkv, dbias), thirds)
    for others in (thirds[::-1], [thirds[0], thirds[1], thirds[2].clone()], [thirds[0]] * 3):
        dqkv, dbias = qkv_gradient(*others)
        assert dqkv.data_ptr() != whole.data_ptr()
        check((dqkv, dbias), others)


def test_kernel_and_reference_agree(device):
    given = parts(2, 33, 130, device)
    kernel = qkv_gradient(*given)
    with testing.mode("reference"):
        reference = qkv_gradient(*given)
    assert torch.equal(kernel[0], reference[0])
    torch.testing.assert_close(kernel[1], reference[1], rtol=1e-5, atol=1e-5)
    doubles = [part.double() for part in given]
    for got, wanted in zip(qkv_gradient(*doubles), qkv_gradient_reference(*doubles), strict=True):
        assert torch.equal(got, wanted)


def test_same_bits_every_time(device):
    given = parts(2, 70, 72, device)
    assert len({tuple(qkv_gradient(*given)[1].tolist()) for _ in range(3)}) == 1


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0)], ids=str)
def test_empty(shape, device):
    dqkv, dbias = qkv_gradient(*(torch.zeros(shape, device=device),) * 3)
    assert dqkv.shape == (*shape[:2], 3 * shape[2]) and dbias.shape == (3 * shape[2],) and not dbias.any()


def test_opcheck(device):
    torch.library.opcheck(_qkv_gradient.library, tuple(parts(1, 2, 8, device)))
    torch.library.opcheck(_token_sum.library, (parts(1, 2, 8, device)[0],))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("shape", [(5,), (70, 130), (2, 33, 72), (2, 3, 4, 8), (0, 3, 8), (2, 3, 0)], ids=str)
def test_token_sum(shape, layout, device):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    x = testing.lay_out(x, layout)
    wanted = torch.atleast_2d(x.double()).flatten(0, -2).sum(0)
    with testing.poisoned():
        got = token_sum(x)
    assert got.dtype == x.dtype
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-5)
    with testing.mode("reference"):
        torch.testing.assert_close(token_sum(x), got, rtol=1e-6, atol=1e-5)
    assert torch.equal(token_sum(x.double()), wanted)


class Thirds(torch.autograd.Function):
    """A product in three parts, whose gradients come back one by one."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return tuple(torch.nn.functional.linear(x, weight, bias).chunk(3, -1))

    @staticmethod
    def backward(ctx, *douts):
        x, weight = ctx.saved_tensors
        dout, dbias = qkv_gradient(*douts)
        return dout @ weight, dout.flatten(0, 1).t() @ x.flatten(0, 1), dbias


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch, of its own class
def test_a_node_that_uses_it_is_compiled_whole(device):
    """In one graph: whose memory a tensor lies in is no question that the tracer can follow."""

    def weighted(x, weight, bias):
        return sum((k + 1) * part for k, part in enumerate(Thirds.apply(x, weight, bias)))

    torch.compiler.reset()
    compiled = torch.compile(weighted, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    leaves = dict(
        zip(("x", "weight", "bias"), (torch.randn(s).to(device) for s in ((2, 3, 8), (24, 8), (24,))), strict=True)
    )
    weights = [torch.randn(2, 3, 8).to(device)]
    eager, found = (testing.grads(f, leaves, weights) for f in (weighted, compiled))
    for name, value in eager.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def test_wrong_arguments_are_named():
    good = torch.zeros(2, 3, 8)
    for k, name in enumerate(("dq", "dk", "dv")):
        for wrong in (3.0, good.long(), good[..., None]):
            given = [good, good, good]
            given[k] = wrong
            with pytest.raises(ValueError, match=rf"^qkv_gradient: {name} must "):
                qkv_gradient(*given)
    for wrong in (3.0, good.long()):
        with pytest.raises(ValueError, match=r"^token_sum: x must "):
            token_sum(wrong)
    with pytest.raises(ValueError, match=r"^qkv_gradient: dv must be torch.float32 like dq, got torch.bfloat16"):
        qkv_gradient(good, good, good.bfloat16())

"""bias_gelu and linear_gelu against float64, beside eager PyTorch in the same dtype."""

import pytest
import torch

from soflow_kernels import gelu, testing

# One column, a tile and parts of one, several tiles side by side and below each other, any rank, empty.
SHAPES = [
    (3, 2, 1),
    (1, 256, 64),
    (3, 3, 100),
    (2, 3, 1152),
    (5,),
    (7, 130),
    (2, 3, 4, 8),
    (0, 3, 72),
    (2, 0, 72),
    (0,),
]


def inputs(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "x": 3 * torch.randn(shape, generator=generator).to(device, dtype),
        "bias": torch.randn(shape[-1], generator=generator).to(device, dtype),
    }
    return tensors, [torch.randn(shape, generator=generator).to(device, dtype)]


def check(tensors, weights):
    with testing.poisoned():
        actual = testing.grads(gelu.bias_gelu, tensors, weights)
    eager = testing.grads(gelu.bias_gelu_reference, tensors, weights)
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    exact = testing.grads(gelu.bias_gelu_reference, doubles, [weight.double() for weight in weights])
    testing.assert_matches(actual, eager, exact)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(shape, device):
    check(*inputs(shape, torch.float32, device))


@pytest.mark.parametrize(("shape", "dtype"), [((3, 3, 100), torch.float16), ((2, 3, 4608), torch.bfloat16)], ids=str)
def test_half_precision(shape, dtype, device):
    check(*inputs(shape, dtype, device))


@pytest.mark.parametrize("layout", testing.LAYOUTS[1:])
def test_layouts(layout, device):
    tensors, weights = inputs((3, 4, 72), torch.float32, device)
    laid_out = {name: testing.lay_out(tensor, layout) for name, tensor in tensors.items()}
    check(laid_out, [testing.lay_out(weight, layout) for weight in weights])


def test_mixed_dtypes(device):
    tensors, weights = inputs((3, 4, 72), torch.float32, device)
    check({"x": tensors["x"].bfloat16(), "bias": tensors["bias"]}, [weights[0].bfloat16()])


def test_many_rows_in_several_chunks(device):
    check(*inputs((300, 40), torch.float32, device))


def test_far_tails(device):
    """Large arguments neither overflow nor cancel: the slope is 1 on the right and 0 on the left."""
    x = torch.tensor([[-100.0, -30.0, -8.0, 0.0, 8.0, 30.0, 100.0, 1e6, -1e6]], device=device)
    tensors = {"x": x, "bias": torch.zeros(9, device=device)}
    found = testing.grads(gelu.bias_gelu, tensors, [torch.ones_like(x)])
    # No relative tolerance for the left: float64's own 1 + tanh has no digit left at -8, where the truth is 3e-21.
    want = torch.tensor([[0.0, 0, 0, 0, 8, 30, 100, 1e6, 0]], device=device)
    torch.testing.assert_close(found["output 0"], want, rtol=1e-6, atol=1e-12)
    want = torch.tensor([[0, 0, 0, 0.5, 1, 1, 1, 1, 0]], device=device)
    torch.testing.assert_close(found["gradient of x"], want, rtol=1e-6, atol=1e-12)


def test_the_output_in_the_backward_is_that_of_the_forward(device):
    """To the ends of the range, where the slope's sigmoid is held at its value at -10."""
    x = torch.tensor([[-3e38, -1e38, -1e6, -10.5, -9.5, -1, 0, 1, 10, 3e38, -torch.inf, torch.inf]], device=device)
    bias = torch.zeros(x.shape[1], device=device)
    out = gelu.bias_gelu_backward(torch.ones_like(x), x, bias)[2]
    torch.testing.assert_close(out, gelu.bias_gelu(x, bias), rtol=1e-6, atol=1e-30, equal_nan=True)


def test_nan_stays_in_its_element(device):
    tensors, weights = inputs((4, 72), torch.float32, device)
    tensors["x"][1, 7] = torch.nan
    found = testing.grads(gelu.bias_gelu, tensors, weights)
    for name in ("output 0", "gradient of x"):
        assert found[name].isnan().nonzero().tolist() == [[1, 7]], name
    assert found["gradient of bias"].isnan().nonzero().tolist() == [[7]]


def test_same_bits_every_time(device):
    tensors, weights = inputs((300, 40), torch.float32, device)
    runs = [testing.grads(gelu.bias_gelu, tensors, weights) for _ in range(3 if device == "cuda" else 2)]
    for name, value in runs[0].items():
        assert all(torch.equal(value, run[name]) for run in runs[1:]), name


def test_references_have_right_gradients():
    tensors, _ = inputs((2, 3, 5), torch.float64, "cpu")
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    assert torch.autograd.gradcheck(gelu.bias_gelu_reference, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(gelu.bias_gelu_reference, leaves)


def test_opcheck(device):
    tensors, _ = inputs((2, 3, 72), torch.float32, device)
    torch.library.opcheck(gelu._bias_gelu.library, tuple(tensor.requires_grad_() for tensor in tensors.values()))


def test_compile_equals_eager(device):
    tensors, weights = inputs((2, 3, 72), torch.float32, device)
    torch.compiler.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(lambda x, bias: gelu.bias_gelu(x, bias), fullgraph=True, backend=backend)
    eager = testing.grads(gelu.bias_gelu, tensors, weights)
    found = testing.grads(compiled, tensors, weights)
    assert all(torch.equal(found[name], value) for name, value in eager.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_gelu(dtype, device):
    """With gradient and without, the tanh form, never the erf form that a CPU's epilogue has."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 3, 32), "weight": (64, 32), "bias": (64,)}
    tensors = {n: torch.randn(s, generator=generator).to(device, dtype) for n, s in shapes.items()}
    weights = [torch.randn(2, 3, 64, generator=generator).to(device, dtype)]
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    actual = testing.grads(gelu.linear_gelu, tensors, weights)
    eager = testing.grads(gelu.linear_gelu_reference, tensors, weights)
    exact = testing.grads(gelu.linear_gelu_reference, doubles, [weights[0].double()])
    testing.assert_matches(actual, eager, exact)
    with torch.no_grad():
        actual = {"output 0": gelu.linear_gelu(**tensors)}
    # cuBLASLt's epilogue takes a hyperbolic tangent of fewer digits: off by 5e-6 where x is 3.4, on an H200.
    beside = {"output 0": 0.0 if device == "cpu" else 2e-5}
    testing.assert_matches(actual, eager, {"output 0": exact["output 0"]}, beside)


def test_dtypes_that_differ_are_named(device):
    x, weight, bias = torch.randn(2, 8).to(device), torch.randn(4, 8).to(device), torch.randn(4).to(device)
    with pytest.raises(ValueError, match=r"weight must be torch\.float32 like x"):
        gelu.linear_gelu(x, weight.bfloat16(), bias)
    with pytest.raises(ValueError, match=r"bias must be torch\.float32 like x"):
        gelu.linear_gelu(x, weight, bias.bfloat16())


@pytest.mark.parametrize("shape", [(3, 4, 72), (2, 3, 4608), (5,), (0, 3, 72), (2, 0, 72)], ids=str)
def test_backward_writes_the_output_once_more(shape, device):
    tensors, (dout,) = inputs(shape, torch.float32, device)

    def reference(tensors, dout):
        found = testing.grads(gelu.bias_gelu_reference, tensors, [dout])
        return {"dx": found["gradient of x"], "dbias": found["gradient of bias"], "out": found["output 0"]}

    eager = reference(tensors, dout)
    exact = reference({name: tensor.double() for name, tensor in tensors.items()}, dout.double())
    for mode in ("auto", "reference"):
        with testing.mode(mode), testing.poisoned():
            found = gelu.bias_gelu_backward(dout, **tensors)
        testing.assert_matches(dict(zip(("dx", "dbias", "out"), found, strict=True)), eager, exact)


def test_output_of_the_backward_in_the_tails(device):
    x = torch.tensor([[-1e6, -30.0, -10.5, 10.5, 30.0, 1e6, torch.nan]], device=device)
    out = gelu.bias_gelu_backward(torch.ones_like(x), x, torch.zeros(7, device=device))[2]
    wanted = torch.tensor([[0.0, 0, 0, 10.5, 30, 1e6, torch.nan]], device=device)
    torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-25, equal_nan=True)


def test_wrong_arguments_of_the_backward_are_named(device):
    tensors, (dout,) = inputs((2, 3, 16), torch.float32, device)
    with pytest.raises(ValueError, match="bias_gelu_backward: dout"):
        gelu.bias_gelu_backward(dout[1:], **tensors)


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (0, 8)], ids=str)
def test_linear_gelu_of_nothing(shape, mode, device):
    shapes = {"x": shape, "weight": (4, 8), "bias": (4,)}
    tensors = {name: torch.randn(size).to(device) for name, size in shapes.items()}
    with testing.mode(mode):
        found = testing.grads(gelu.linear_gelu, tensors, [torch.zeros(*shape[:-1], 4, device=device)])
        with torch.no_grad():
            assert gelu.linear_gelu(**tensors).shape == (*shape[:-1], 4)
    assert found["output 0"].shape == (*shape[:-1], 4)
    assert all(not found[f"gradient of {name}"].any() for name in tensors)

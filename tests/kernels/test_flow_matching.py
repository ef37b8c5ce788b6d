"""flow_matching_loss against float64, beside eager PyTorch in the same dtype, and against its formula."""

import math

import pytest
import torch

from soflow_kernels import flow_matching, testing
from soflow_kernels.flow_matching import flow_matching_loss, flow_matching_loss_reference

SETTINGS = {"guidance_scale": 3.0, "guidance_decay_time": 0.6, "mix_ratio": 0.25, "p": 0.75, "eps": 0.02}
NAMES = ("output", "v_t", "t", "v_null", "label_dropped")


def inputs(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    output, v_t, v_null = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    t, chance = torch.rand(2, shape[0], generator=generator)
    return dict(zip(NAMES, (output, v_t, t.to(device), v_null, (chance < 0.4).to(device)), strict=True))


def run(function, tensors, **settings):
    output = tensors["output"].detach().requires_grad_()
    found = function(**{**tensors, "output": output}, **{**SETTINGS, **settings})
    (3.0 * found[0]).backward()
    return {**dict(zip(("loss", "mse", "weight"), (v.detach() for v in found), strict=True)), "gradient": output.grad}


def check(tensors, **settings):
    with testing.poisoned():
        actual = run(flow_matching_loss, tensors, **settings)
    eager = run(flow_matching_loss_reference, tensors, **settings)
    doubles = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in tensors.items()}
    testing.assert_matches(actual, eager, run(flow_matching_loss_reference, doubles, **settings))


@pytest.mark.parametrize("slope", [1.0, math.pi / 2, -0.5])
@pytest.mark.parametrize(
    "shape", [(3, 4, 8, 8), (1, 4, 32, 32), (2, 3, 40, 40), (2, 1, 1, 1), (3, 7), (4, 5000), (1, 300000)], ids=str
)
def test_loss_and_gradient(shape, slope, device):
    check(inputs(shape, torch.float32, device), velocity_slope=slope)


@pytest.mark.parametrize("without", [("label_dropped",), ("v_null",), ("v_null", "label_dropped")], ids=str)
def test_without_guidance_or_dropped_labels(without, device):
    check(inputs((3, 4, 8, 8), torch.float32, device) | dict.fromkeys(without))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_output(dtype, device):
    tensors = inputs((3, 4, 8, 8), torch.float32, device)
    check(tensors | {"output": tensors["output"].to(dtype)})


@pytest.mark.parametrize("settings", [{"p": 0.0}, {"p": 1.0, "eps": 1e-3}, {"mix_ratio": 1.0}, {"guidance_scale": 1.0}])
def test_settings(settings, device):
    check(inputs((3, 4, 8, 8), torch.float32, device), **settings)


@pytest.mark.parametrize("layout", testing.LAYOUTS[1:])
def test_layouts(layout, device):
    tensors = inputs((3, 4, 8, 8), torch.float32, device)
    check({n: testing.lay_out(v, layout) if v.dim() > 1 else v for n, v in tensors.items()})


def test_formula_by_hand(device):
    """Two samples of one element, the second with its label dropped; w = 3, m = 0.25, no decay, p = 1, eps = 1."""
    output, v_t, v_null = (torch.full((2, 1), v, device=device) for v in (3.0, 2.0, 1.0))
    output.requires_grad_()
    dropped = torch.tensor([False, True], device=device)
    loss, mse, weight = flow_matching_loss(
        output, v_t, torch.full((2,), 0.5, device=device), v_null, dropped,
        guidance_scale=3.0, mix_ratio=0.25, p=1.0, eps=1.0,
    )  # fmt: skip
    # target 0.25 * (2 + 2 (2 - 1)) + 0.75 * 3 = 3.25 and 2: delta = -0.25 and 1, weights 1 / 1.0625 and 1 / 2
    weights, deltas = (1 / 1.0625, 0.5), (-0.25, 1.0)
    losses = [w * d * d for w, d in zip(weights, deltas, strict=True)]
    for got, wanted in zip((loss, mse, weight), (sum(losses) / 2, 1.0625 / 2, sum(weights) / 2), strict=True):
        assert got.item() == pytest.approx(wanted, rel=1e-6)
    loss.backward()
    wanted = [2 * w * d / 2 for w, d in zip(weights, deltas, strict=True)]
    assert output.grad.flatten().tolist() == pytest.approx(wanted, rel=1e-6)


def test_only_the_output_has_a_gradient(device):
    tensors = inputs((2, 8), torch.float32, device)
    for value in tensors.values():
        if value.is_floating_point():
            value.requires_grad_()
    loss, mse, weight = flow_matching_loss(**tensors, **SETTINGS)
    assert not mse.requires_grad and not weight.requires_grad
    loss.backward()
    assert [n for n, v in tensors.items() if v.grad is not None] == ["output"]


def test_reference_is_differentiated_rightly():
    """With p = 0 and m = 1 nothing that depends on the output is held fixed."""
    given = inputs((2, 3), torch.float64, "cpu") | {"t": torch.tensor([0.3, 0.9]).double()}
    output = given.pop("output").requires_grad_()
    settings = {"guidance_scale": 3.0, "guidance_decay_time": 0.6, "p": 0.0, "velocity_slope": 1.5}
    assert torch.autograd.gradcheck(lambda out: flow_matching_loss_reference(out, **given, **settings)[0], (output,))


def test_forward_mode_and_reference_mode(device):
    """A dual tensor takes the reference, whose tangent is exact, and so does everything in reference mode."""
    tensors = inputs((2, 8), torch.float32, device)
    others = {name: value for name, value in tensors.items() if name != "output"}

    def tangent(function):
        output, direction = tensors["output"], torch.ones_like(tensors["output"])
        return torch.func.jvp(lambda out: function(out, **others)[0], (output,), (direction,))[1]

    wanted = tangent(flow_matching_loss_reference)
    assert wanted != 0 and torch.equal(tangent(flow_matching_loss), wanted)
    with testing.mode("reference"):
        got = flow_matching_loss(**tensors)
    assert all(map(torch.equal, got, flow_matching_loss_reference(**tensors)))


@pytest.mark.parametrize("n", [8, 5000])
def test_nan_stays_in_its_sample(n, device):
    tensors = inputs((3, n), torch.float32, device)
    tensors["v_t"][1, 3] = torch.nan
    found = run(flow_matching_loss, tensors)
    assert all(found[name].isnan() for name in ("loss", "mse", "weight"))
    assert found["gradient"].isnan().any(1).tolist() == [False, True, False]


def test_same_bits_every_time(device):
    tensors = inputs((3, 9000), torch.float32, device)
    runs = [run(flow_matching_loss, tensors) for _ in range(3)]
    assert all(torch.equal(runs[0][name], other[name]) for other in runs[1:] for name in runs[0])


def test_opcheck(device):
    output, v_t, t, v_null, dropped = inputs((2, 8), torch.float32, device).values()
    numbers = (3.0, 0.6, 0.25, 0.75, 0.02, 1.0)
    arguments = (output.requires_grad_(), v_t, t, v_null, dropped, *numbers)
    torch.library.opcheck(flow_matching._flow_matching_loss, arguments)


def test_compile_equals_eager(device):
    tensors = inputs((2, 40), torch.float32, device)
    torch.compiler.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(flow_matching_loss, fullgraph=True, backend=backend)
    eager, found = run(flow_matching_loss, tensors), run(compiled, tensors)
    assert all(torch.equal(found[name], value) for name, value in eager.items())


@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments_are_named(name, device):
    tensors = inputs((2, 8), torch.float32, device)
    for wrong in (3.0, tensors[name].long(), torch.zeros(5, 6, 7, device=device)):
        expected = name if name != "output" or not isinstance(wrong, torch.Tensor) or wrong.dim() < 3 else "v_t"
        with pytest.raises(ValueError, match=f"^flow_matching_loss: {expected} must"):
            flow_matching_loss(**{**tensors, name: wrong})


def test_a_slope_of_zero_is_refused(device):
    with pytest.raises(ValueError, match="velocity_slope must not be 0"):
        flow_matching_loss(**inputs((2, 8), torch.float32, device), velocity_slope=0.0)


def test_a_second_derivative_is_refused(device):
    output = torch.full((2, 6), 0.7, device=device, requires_grad=True)
    zeros, t = torch.zeros(2, 6, device=device), torch.full((2,), 0.5, device=device)
    loss = flow_matching.flow_matching_loss(output, zeros, t)[0]
    (first,) = torch.autograd.grad(loss, output, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.square().sum().backward()


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_only_the_output_has_a_gradient_in_any_mode(mode, device):
    output, v_t, v_null = (torch.full((2, 6), v, device=device, requires_grad=True) for v in (0.7, 0.1, -0.2))
    t = torch.full((2,), 0.8, device=device, requires_grad=True)
    with testing.mode(mode):
        flow_matching.flow_matching_loss(
            output, v_t, t, v_null, guidance_scale=3.0, guidance_decay_time=0.5, mix_ratio=0.5
        )[0].backward()
    assert output.grad is not None and v_t.grad is None and t.grad is None and v_null.grad is None


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_plain_squared_error_of_nothing(mode, device):
    ones, t = torch.ones(2, 3, device=device), torch.rand(2).to(device)
    with testing.mode(mode):
        found = flow_matching.flow_matching_loss(ones, ones, t, p=0.0, eps=0.0)
    assert [float(v) for v in found] == [0, 0, 1]


def test_one_number_a_sample(device):
    given = torch.ones(3, device=device), torch.zeros(3, device=device), torch.full((3,), 0.5, device=device)
    got = flow_matching.flow_matching_loss(*given)
    with testing.mode("reference"):
        torch.testing.assert_close(got, flow_matching.flow_matching_loss(*given))

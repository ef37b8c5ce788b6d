"""The two losses against float64, beside eager PyTorch in the same dtype, against their formulas and the engine's."""

import math

import pytest
import torch

from soflow_fast import Objective, ObjectiveConfig, SolutionFlow
from soflow_kernels import losses, testing

KINDS = pytest.mark.parametrize("coefficients", ["euler", "trig"])
LOSSES = pytest.mark.parametrize("op", ["consistency_loss", "flow_matching_loss"])
MODES = pytest.mark.parametrize("mode", ["auto", "reference"])
GUIDANCE = {"guidance_scale": 3.0, "guidance_decay_time": 0.6, "mix_ratio": 0.25, "p": 0.75, "eps": 0.02}
SETTINGS = {"consistency_loss": {}, "flow_matching_loss": GUIDANCE}
# One block, a block that is full, several chunks, one number, an odd number, chunks of several blocks.
SHAPES = [(3, 4, 8, 8), (1, 4, 32, 32), (2, 3, 40, 40), (2, 1, 1, 1), (3, 7), (1, 140000)]


def inputs(op, shape, device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)]
    t = 0.2 + 0.8 * torch.rand(shape[0], generator=generator)
    s = 0.5 * t * torch.rand(shape[0], generator=generator)
    l = t + 0.01 * (s - t)
    dropped = torch.rand(shape[0], generator=generator) < 0.4
    t, l, s, dropped = (v.to(device) for v in (t, l, s, dropped))
    if op == "flow_matching_loss":
        output, v_t, v_null, _ = images
        return {"output": output, "v_t": v_t, "t": t, "v_null": v_null, "label_dropped": dropped}
    output, increment, x, target = images
    return {"output": output, "increment": 0.01 * increment, "x": x, "target": target, "t": t, "l": l, "s": s}


def double(tensors):
    return {k: v.double() if v is not None and v.is_floating_point() else v for k, v in tensors.items()}


def run(function, tensors, **settings):
    output = tensors["output"].detach().requires_grad_()
    found = function(**{**tensors, "output": output}, **settings)
    (3.0 * found[0]).backward()
    return {**dict(zip(("loss", "mse", "weight"), (v.detach() for v in found), strict=True)), "gradient": output.grad}


def check(op, tensors, **settings):
    function, reference = getattr(losses, op), getattr(losses, f"{op}_reference")
    settings = {**SETTINGS[op], **settings}
    with testing.poisoned():
        actual = run(function, tensors, **settings)
    eager, exact = run(reference, tensors, **settings), run(reference, double(tensors), **settings)
    if op == "consistency_loss":
        # The loss is a sum of both signs, far smaller than its terms: its unit is theirs.
        terms = tensors["output"].double().abs().mean() * exact["gradient"].abs().mean() * exact["gradient"].numel()
        for found in (actual, eager, exact):
            found["loss"] = found["loss"] / terms.item() + 1
    testing.assert_matches(actual, eager, exact)


# Both losses


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@LOSSES
def test_loss_and_gradient(op, shape, device):
    check(op, inputs(op, shape, device), **({} if op == "consistency_loss" else {"velocity_slope": -0.5}))


@pytest.mark.parametrize("shape", [(5, 4, 8, 8), (3, 3, 40, 40)], ids=str)
@pytest.mark.parametrize("drops", [True, False])
def test_a_guidance_scale_for_each_sample(shape, drops, device):
    """The same as each sample by itself with a number; in one launch, and in two of several programs a sample."""
    tensors = inputs("flow_matching_loss", shape, device)
    if not drops:
        del tensors["label_dropped"]
    w = torch.linspace(1, 4, shape[0], device=device)
    check("flow_matching_loss", tensors, guidance_scale=w)
    every = run(losses.flow_matching_loss, tensors, **{**GUIDANCE, "guidance_scale": w})
    for b in range(shape[0]):
        one = {name: value[b : b + 1] for name, value in tensors.items()}
        found = run(losses.flow_matching_loss, one, **{**GUIDANCE, "guidance_scale": float(w[b])})
        torch.testing.assert_close(found["gradient"] / shape[0], every["gradient"][b : b + 1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@LOSSES
def test_half_precision_output(op, dtype, device):
    tensors = inputs(op, (3, 4, 8, 8), device)
    check(op, tensors | {"output": tensors["output"].to(dtype)})


@pytest.mark.parametrize("p,eps", [(0.0, 0.01), (0.5, 1.0), (1.0, 1e-3)])
@LOSSES
def test_weights(op, p, eps, device):
    check(op, inputs(op, (3, 4, 8, 8), device), p=p, eps=eps)


@pytest.mark.parametrize("layout", testing.LAYOUTS[1:])
@LOSSES
def test_layouts(op, layout, device):
    tensors = inputs(op, (3, 4, 8, 8), device)
    check(op, {n: testing.lay_out(v, layout) if v.dim() > 1 else v for n, v in tensors.items()})


@MODES
@LOSSES
def test_empty_batch(op, mode, device):
    """The mean over no samples is NaN, as PyTorch's is; the gradient is empty."""
    for shape in ((0, 4, 8, 8), (0,)):
        with testing.mode(mode):
            found = run(getattr(losses, op), inputs(op, shape, device), **SETTINGS[op])
        assert found["gradient"].shape == shape
        assert all(found[name].isnan() and found[name].shape == () for name in ("loss", "mse", "weight"))


@MODES
@LOSSES
def test_samples_of_nothing(op, mode, device):
    with testing.mode(mode):
        found = run(getattr(losses, op), inputs(op, (2, 0), device), **SETTINGS[op])
    assert found["gradient"].shape == (2, 0) and found["loss"] == found["mse"] == 0


@MODES
@LOSSES
def test_only_the_output_has_a_gradient(op, mode, device):
    tensors = inputs(op, (2, 8), device)
    for value in tensors.values():
        if value.is_floating_point():
            value.requires_grad_()
    with testing.mode(mode):
        loss, mse, weight = getattr(losses, op)(**tensors, **SETTINGS[op])
    assert not mse.requires_grad and not weight.requires_grad
    loss.backward()
    assert [n for n, v in tensors.items() if v.grad is not None] == ["output"]


@LOSSES
def test_forward_mode_and_reference_mode(op, device):
    """A dual tensor takes the reference, whose tangent is exact, and so does everything in reference mode."""
    tensors = inputs(op, (2, 8), device)
    others = {name: value for name, value in tensors.items() if name != "output"}
    function, reference = getattr(losses, op), getattr(losses, f"{op}_reference")

    def tangent(function):
        output, direction = tensors["output"], torch.ones_like(tensors["output"])
        return torch.func.jvp(lambda out: function(out, **others)[0], (output,), (direction,))[1]

    wanted = tangent(reference)
    assert wanted != 0 and torch.equal(tangent(function), wanted)
    with testing.mode("reference"):
        got = function(**tensors)
    assert all(map(torch.equal, got, reference(**tensors)))


@pytest.mark.parametrize("n", [8, 5000])
@LOSSES
def test_nan_stays_in_its_sample(op, n, device):
    tensors = inputs(op, (3, n), device)
    tensors["target" if op == "consistency_loss" else "v_t"][1, 3] = torch.nan
    found = run(getattr(losses, op), tensors)
    assert all(found[name].isnan() for name in ("loss", "mse", "weight"))
    assert found["gradient"].isnan().any(1).tolist() == [False, True, False]


@LOSSES
def test_same_bits_every_time(op, device):
    tensors = inputs(op, (3, 5000), device)
    runs = [run(getattr(losses, op), tensors) for _ in range(3)]
    assert all(torch.equal(runs[0][name], other[name]) for other in runs[1:] for name in runs[0])


def test_opcheck(device):
    output, increment, x, target, *times = inputs("consistency_loss", (2, 8), device).values()
    arguments = (output.requires_grad_(), None, increment, x, target, *times, 1.0, 0.01, False)
    torch.library.opcheck(losses._consistency_loss.library, arguments)
    output, v_t, t, v_null, dropped = inputs("flow_matching_loss", (2, 8), device).values()
    arguments = (output.requires_grad_(), v_t, t, v_null, dropped, 3.0, 0.6, 0.25, 0.75, 0.02, 1.0)
    torch.library.opcheck(losses._flow_matching_loss.library, arguments)
    torch.library.opcheck(losses._flow_matching_loss.library, (*arguments, torch.tensor([1.0, 4.0], device=device)))


@LOSSES
def test_compile_equals_eager(op, device):
    tensors = inputs(op, (2, 40), device)
    torch.compiler.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(getattr(losses, op), fullgraph=True, backend=backend)
    eager, found = run(getattr(losses, op), tensors), run(compiled, tensors)
    assert all(torch.equal(found[name], value) for name, value in eager.items())


@LOSSES
def test_a_second_derivative_is_refused(op, device):
    tensors = inputs(op, (2, 8), device)
    output = tensors["output"].requires_grad_()
    loss = getattr(losses, op)(**tensors)[0]
    (first,) = torch.autograd.grad(loss, output, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.square().sum().backward()


@MODES
def test_plain_squared_error_of_nothing(mode, device):
    """p = 0 and eps = 0: the weight is 1 even where the error is 0."""
    tensors = inputs("consistency_loss", (2, 8), device)
    zeros = {name: torch.zeros_like(v) if v.dim() > 1 else v for name, v in tensors.items()}
    ones = torch.ones(2, 3, device=device)
    with testing.mode(mode):
        found = losses.consistency_loss(**zeros, p=0.0, eps=0.0)
        assert [float(v) for v in found] == [0, 0, 1]
        found = losses.flow_matching_loss(ones, ones, tensors["t"], p=0.0, eps=0.0)
        assert [float(v) for v in found] == [0, 0, 1]


@LOSSES
def test_one_number_a_sample(op, device):
    tensors = {n: v[:, 0].contiguous() if v.dim() > 1 else v for n, v in inputs(op, (3, 8), device).items()}
    got = getattr(losses, op)(**tensors)
    with testing.mode("reference"):
        torch.testing.assert_close(got, getattr(losses, op)(**tensors))


@LOSSES
def test_wrong_arguments_are_named(op, device):
    tensors = inputs(op, (2, 8), device)
    for name in tensors:
        # Any shape is a shape of the output; what does not fit it is the next one.
        fits = {"output": "increment" if op == "consistency_loss" else "v_t"}
        for wrong, expected in (
            (3.0, name),
            (tensors[name].long(), name),
            (torch.zeros(5, 6, 7), fits.get(name, name)),
        ):
            wrong = wrong.to(device) if isinstance(wrong, torch.Tensor) else wrong
            with pytest.raises(ValueError, match=f"^{op}: {expected} must"):
                getattr(losses, op)(**{**tensors, name: wrong})


# Solution consistency


@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (2, 5000)], ids=str)
def test_trigonometric_coefficients(shape, device):
    check("consistency_loss", inputs("consistency_loss", shape, device), coefficients="trig")


@KINDS
@pytest.mark.parametrize("n", [256, 5000])
def test_a_value_of_its_own(n, coefficients, device):
    tensors = inputs("consistency_loss", (3, n), device)
    value = tensors["output"] + 0.5
    check("consistency_loss", tensors | {"value": value}, coefficients=coefficients)
    errors = [
        run(losses.consistency_loss, tensors, value=v, coefficients=coefficients)["mse"] for v in (value, None)
    ]  # fmt: skip
    assert not torch.equal(*errors)


def test_a_value_that_does_not_fit_and_coefficients_are_named(device):
    tensors = inputs("consistency_loss", (2, 8), device)
    with pytest.raises(ValueError, match="value must have shape"):
        losses.consistency_loss(**tensors, value=torch.zeros(2, 7, device=device))
    with pytest.raises(ValueError, match="coefficients must be one of euler, trig, got 'eulr'"):
        losses.consistency_loss(**tensors, coefficients="eulr")


@KINDS
@pytest.mark.parametrize("gap", [0.1, 1e-3, 1e-6, 1e-9])
def test_quotient_is_the_divided_difference_and_does_not_cancel(gap, coefficients):
    """q against (f(x_t, t, s) - f(x_l, l, s)) / (t - l) in float64, and in float32 against float64, as l -> t."""
    tensors = double(inputs("consistency_loss", (4, 50), "cpu", torch.float64))
    t, s, x, target = (tensors[name] for name in ("t", "s", "x", "target"))
    l = t - gap * (t - s)
    increment = tensors["increment"] * (t - l)[:, None]
    given = (tensors["output"], increment, x, target, t, l, s)
    flow = SolutionFlow(torch.nn.Identity(), coefficients=coefficients)
    q = losses.quotient(*given, coefficients)
    if gap >= 1e-3:  # the plain difference in float64 is exact enough to compare with
        x_l = x + target * (l - t)[:, None]
        start = flow.to_solution(given[0], x, t, s)
        end = flow.to_solution(given[0] + increment, x_l, l, s)
        torch.testing.assert_close(q, (start - end) / (t - l)[:, None], rtol=1e-9, atol=1e-9)
    if gap >= 1e-6:  # float32 has no time between t and l beyond that
        narrow = [v.float() for v in given]
        again = [v.double() for v in narrow]  # the same rounded times
        error = losses.quotient(*narrow, coefficients).double() - losses.quotient(*again, coefficients)
        assert error.abs().max() <= 1e-5 * q.abs().max()


@KINDS
def test_is_the_engines_loss(coefficients, device):
    """Objective.consistency, with networks that return given numbers."""
    tensors = double(inputs("consistency_loss", (4, 2, 4, 4), "cpu", torch.float64))
    x, v, t, l, s = (tensors[name] for name in ("x", "target", "t", "l", "s"))
    output = tensors["output"].requires_grad_()

    class Given(torch.nn.Module):
        def forward(self, at, time, s, y):
            return output if torch.equal(time, t) else output.detach() + tensors["increment"]

    flow = SolutionFlow(Given(), coefficients=coefficients)
    flow.point = lambda x0, x1, t: (x, v)
    term = Objective(ObjectiveConfig(p=0.75, eps=0.02)).consistency(flow, x, x, t, l, s, None)
    wanted = torch.autograd.grad(term.loss, output)[0]
    found = losses.consistency_loss(**tensors, p=0.75, eps=0.02, coefficients=coefficients)
    torch.testing.assert_close(torch.stack(found), torch.stack(tuple(term)))
    torch.testing.assert_close(torch.autograd.grad(found[0], output)[0], wanted)
    # And the formula once more: 1 / (mean q^2 + eps)^p weighs q, whose sign in the gradient is that of b(t, s) < 0.
    q = losses.quotient(output, *(tensors[k] for k in ("increment", "x", "target", "t", "l", "s")), coefficients)
    weight = (q.square().mean((1, 2, 3)) + 0.02) ** -0.75
    torch.testing.assert_close(wanted, -weight[:, None, None, None] * q / q.numel())


@KINDS
def test_consistency_reference_is_differentiated_rightly(coefficients):
    """With a value of its own nothing that depends on the output is held fixed."""
    given = double(inputs("consistency_loss", (2, 3), "cpu", torch.float64))
    output, value = given.pop("output").requires_grad_(), torch.randn(2, 3, dtype=torch.float64)
    settings = {"value": value, "coefficients": coefficients}
    loss = lambda out: losses.consistency_loss_reference(out, **given, **settings)[0]  # noqa: E731
    assert torch.autograd.gradcheck(loss, (output,))


# Flow matching


@pytest.mark.parametrize("slope", [1.0, math.pi / 2])
def test_slopes(slope, device):
    check("flow_matching_loss", inputs("flow_matching_loss", (3, 4, 8, 8), device), velocity_slope=slope)


@pytest.mark.parametrize("without", [("label_dropped",), ("v_null",), ("v_null", "label_dropped")], ids=str)
def test_without_guidance_or_dropped_labels(without, device):
    check("flow_matching_loss", inputs("flow_matching_loss", (3, 4, 8, 8), device) | dict.fromkeys(without))


@pytest.mark.parametrize("settings", [{"mix_ratio": 1.0}, {"guidance_scale": 1.0}], ids=str)
def test_settings(settings, device):
    check("flow_matching_loss", inputs("flow_matching_loss", (3, 4, 8, 8), device), **settings)


def test_formula_by_hand(device):
    """Two samples of one element, the second with its label dropped; w = 3, m = 0.25, no decay, p = 1, eps = 1."""
    output, v_t, v_null = (torch.full((2, 1), v, device=device) for v in (3.0, 2.0, 1.0))
    output.requires_grad_()
    dropped = torch.tensor([False, True], device=device)
    loss, mse, weight = losses.flow_matching_loss(
        output, v_t, torch.full((2,), 0.5, device=device), v_null, dropped,
        guidance_scale=3.0, mix_ratio=0.25, p=1.0, eps=1.0,
    )  # fmt: skip
    # target 0.25 * (2 + 2 (2 - 1)) + 0.75 * 3 = 3.25 and 2: e = -0.25 and 1, weights 1 / 1.0625 and 1 / 2
    weights, errors = (1 / 1.0625, 0.5), (-0.25, 1.0)
    terms = [w * e * e for w, e in zip(weights, errors, strict=True)]
    for got, wanted in zip((loss, mse, weight), (sum(terms) / 2, 1.0625 / 2, sum(weights) / 2), strict=True):
        assert got.item() == pytest.approx(wanted, rel=1e-6)
    loss.backward()
    wanted = [2 * w * e / 2 for w, e in zip(weights, errors, strict=True)]
    assert output.grad.flatten().tolist() == pytest.approx(wanted, rel=1e-6)


def test_flow_matching_reference_is_differentiated_rightly():
    """With p = 0 and m = 1 nothing that depends on the output is held fixed."""
    given = double(inputs("flow_matching_loss", (2, 3), "cpu")) | {"t": torch.tensor([0.3, 0.9]).double()}
    output = given.pop("output").requires_grad_()
    settings = {"guidance_scale": 3.0, "guidance_decay_time": 0.6, "p": 0.0, "velocity_slope": 1.5}
    loss = lambda out: losses.flow_matching_loss_reference(out, **given, **settings)[0]  # noqa: E731
    assert torch.autograd.gradcheck(loss, (output,))


def test_a_slope_of_zero_is_refused(device):
    with pytest.raises(ValueError, match="velocity_slope must not be 0"):
        losses.flow_matching_loss(**inputs("flow_matching_loss", (2, 8), device), velocity_slope=0.0)

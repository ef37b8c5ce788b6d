"""consistency_loss against float64, beside eager PyTorch in the same dtype, and against the engine's objective."""

import pytest
import torch

from soflow_fast import Objective, ObjectiveConfig, SolutionFlow
from soflow_kernels import consistency, testing

NAMES = ("output", "increment", "x", "target", "t", "l", "s")
KINDS = pytest.mark.parametrize("coefficients", ["euler", "trig"])


def inputs(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)]
    t = 0.2 + 0.8 * torch.rand(shape[0], generator=generator)
    s = 0.5 * t * torch.rand(shape[0], generator=generator)
    l = t + 0.01 * (s - t)
    images[1] = images[1] * 0.01
    return dict(zip(NAMES, [*images, *(v.to(device) for v in (t, l, s))], strict=True))


def run(function, tensors, **settings):
    output = tensors["output"].detach().requires_grad_()
    found = function(**{**tensors, "output": output}, **settings)
    (3.0 * found[0]).backward()
    return {**dict(zip(("loss", "mse", "weight"), (v.detach() for v in found), strict=True)), "gradient": output.grad}


def check(tensors, value=None, **settings):
    exact_settings = {**settings, "value": None if value is None else value.double()}
    settings["value"] = value
    with testing.poisoned():
        actual = run(consistency.consistency_loss, tensors, **settings)
    eager = run(consistency.consistency_loss_reference, tensors, **settings)
    exact = run(consistency.consistency_loss_reference, {k: v.double() for k, v in tensors.items()}, **exact_settings)
    # The loss is a sum of both signs, far smaller than its terms: its unit is theirs.
    scale = (
        tensors["output"].double().abs().mean() * exact["gradient"].abs().mean() * exact["gradient"].numel()
    ).item()
    for found in (actual, eager, exact):
        found["loss"] = found["loss"] / scale + 1
    testing.assert_matches(actual, eager, exact)


@KINDS
@pytest.mark.parametrize(
    "shape", [(3, 4, 8, 8), (1, 4, 32, 32), (2, 3, 40, 40), (2, 1, 1, 1), (3, 7), (4, 5000), (1, 300000)], ids=str
)
def test_loss_and_gradient(shape, coefficients, device):
    check(inputs(shape, torch.float32, device), coefficients=coefficients)


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_output(dtype, coefficients, device):
    tensors = inputs((3, 4, 8, 8), torch.float32, device)
    tensors["output"] = tensors["output"].to(dtype)
    check(tensors, coefficients=coefficients)


@KINDS
@pytest.mark.parametrize("n", [256, 5000])
def test_a_value_of_its_own(n, coefficients, device):
    tensors = inputs((3, n), torch.float32, device)
    value = tensors["output"] + 0.5
    check(tensors, value=value, coefficients=coefficients)
    with_value = run(consistency.consistency_loss, tensors, value=value, coefficients=coefficients)
    assert not torch.equal(
        with_value["mse"], run(consistency.consistency_loss, tensors, coefficients=coefficients)["mse"]
    )


@pytest.mark.parametrize("p,eps", [(0.0, 0.01), (0.5, 1.0), (1.0, 1e-3), (0.75, 1e-3)])
def test_weights(p, eps, device):
    check(inputs((3, 4, 8, 8), torch.float32, device), p=p, eps=eps)


@pytest.mark.parametrize("layout", testing.LAYOUTS[1:])
def test_layouts(layout, device):
    tensors = inputs((3, 4, 8, 8), torch.float32, device)
    wide = {n: testing.lay_out(v, layout) if v.dim() > 1 else v for n, v in tensors.items()}
    check(wide)


@KINDS
@pytest.mark.parametrize("gap", [0.1, 1e-3, 1e-6, 1e-9])
def test_quotient_is_the_divided_difference_and_does_not_cancel(gap, coefficients):
    """q against (f(x_t, t, s) - f(x_l, l, s)) / (t - l) in float64, and in float32 against float64, as l -> t."""
    tensors = {k: v.double() for k, v in inputs((4, 50), torch.float64, "cpu").items()}
    t, s, x, target = (tensors[name] for name in ("t", "s", "x", "target"))
    l = t - gap * (t - s)
    increment = tensors["increment"] * (t - l)[:, None]
    given = (tensors["output"], increment, x, target, t, l, s)
    flow = SolutionFlow(torch.nn.Identity(), coefficients=coefficients)
    q = consistency.quotient(*given, coefficients)
    if gap >= 1e-3:  # the plain difference in float64 is exact enough to compare with
        x_l = x + target * (l - t)[:, None]
        start = flow.to_solution(given[0], x, t, s)
        end = flow.to_solution(given[0] + increment, x_l, l, s)
        torch.testing.assert_close(q, (start - end) / (t - l)[:, None], rtol=1e-9, atol=1e-9)
    if gap >= 1e-6:  # float32 has no time between t and l beyond that
        narrow = [v.float() for v in given]
        again = [v.double() for v in narrow]  # the same rounded times
        error = consistency.quotient(*narrow, coefficients).double() - consistency.quotient(*again, coefficients)
        assert error.abs().max() <= 1e-5 * q.abs().max()


@KINDS
def test_is_the_engines_loss(coefficients, device):
    """Objective.consistency, with networks that return given numbers."""
    tensors = {name: value.double() for name, value in inputs((4, 2, 4, 4), torch.float64, "cpu").items()}
    x, v, t, l, s = (tensors[name] for name in ("x", "target", "t", "l", "s"))
    output = tensors["output"].requires_grad_()

    class Given(torch.nn.Module):
        def forward(self, at, time, s, y):
            return output if torch.equal(time, t) else output.detach() + tensors["increment"]

    flow = SolutionFlow(Given(), coefficients=coefficients)
    flow.point = lambda x0, x1, t: (x, v)
    term = Objective(ObjectiveConfig(p=0.75, eps=0.02)).consistency(flow, x, x, t, l, s, None)
    wanted = torch.autograd.grad(term.loss, output)[0]
    found = consistency.consistency_loss(**tensors, p=0.75, eps=0.02, coefficients=coefficients)
    torch.testing.assert_close(torch.stack(found), torch.stack(tuple(term)))
    torch.testing.assert_close(torch.autograd.grad(found[0], output)[0], wanted)
    # And the formula once more: 1 / (mean q^2 + eps)^p weighs q, whose sign in the gradient is that of b(t, s) < 0.
    q = consistency.quotient(output, *(tensors[k] for k in ("increment", "x", "target", "t", "l", "s")), coefficients)
    weight = (q.square().mean((1, 2, 3)) + 0.02) ** -0.75
    torch.testing.assert_close(wanted, -weight[:, None, None, None] * q / q.numel())


def test_only_the_output_has_a_gradient(device):
    tensors = {n: v.requires_grad_() for n, v in inputs((2, 8), torch.float32, device).items()}
    loss, mse, weight = consistency.consistency_loss(**tensors)
    assert not mse.requires_grad and not weight.requires_grad
    loss.backward()
    assert [n for n, v in tensors.items() if v.grad is not None] == ["output"]


@pytest.mark.parametrize("n", [8, 5000])
def test_nan_stays_in_its_sample(n, device):
    tensors = inputs((3, n), torch.float32, device)
    tensors["target"][1, 3] = torch.nan
    found = run(consistency.consistency_loss, tensors)
    assert all(found[name].isnan() for name in ("loss", "mse", "weight"))
    assert found["gradient"].isnan().any(1).tolist() == [False, True, False]


def test_same_bits_every_time(device):
    tensors = inputs((3, 5000), torch.float32, device)
    runs = [run(consistency.consistency_loss, tensors) for _ in range(3)]
    assert all(torch.equal(runs[0][name], other[name]) for other in runs[1:] for name in runs[0])


def test_opcheck(device):
    tensors = list(inputs((2, 8), torch.float32, device).values())
    tensors[0].requires_grad_()
    torch.library.opcheck(consistency._consistency_loss, (tensors[0], None, *tensors[1:], 1.0, 0.01, False))


def test_compile_equals_eager(device):
    tensors = inputs((2, 40), torch.float32, device)
    torch.compiler.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(consistency.consistency_loss, fullgraph=True, backend=backend)
    eager, found = run(consistency.consistency_loss, tensors), run(compiled, tensors)
    assert all(torch.equal(found[name], value) for name, value in eager.items())


def test_wrong_arguments_are_named(device):
    tensors = inputs((2, 8), torch.float32, device)
    for name in NAMES:
        for wrong in (None, tensors[name].long(), tensors[name][:1].repeat(3, *[1] * (tensors[name].dim() - 1))):
            with pytest.raises(ValueError, match=f"^consistency_loss: {name if name != 'output' else ''}"):
                consistency.consistency_loss(**{**tensors, name: wrong})
    with pytest.raises(ValueError, match="coefficients"):
        consistency.consistency_loss(**tensors, coefficients="eulr")


@KINDS
def test_reference_is_differentiated_rightly(coefficients):
    """With a value of its own nothing that depends on the output is held fixed."""
    given = {name: value.double() for name, value in inputs((2, 3), torch.float64, "cpu").items()}
    output, value = given.pop("output").requires_grad_(), torch.randn(2, 3, dtype=torch.float64)
    settings = {"value": value, "coefficients": coefficients}
    loss = lambda out: consistency.consistency_loss_reference(out, **given, **settings)[0]  # noqa: E731
    assert torch.autograd.gradcheck(loss, (output,))


def test_forward_mode_and_reference_mode(device):
    """A dual tensor takes the reference, whose tangent is exact, and so does everything in reference mode."""
    tensors = inputs((2, 8), torch.float32, device)
    others = {name: value for name, value in tensors.items() if name != "output"}

    def tangent(function):
        output, direction = tensors["output"], torch.ones_like(tensors["output"])
        return torch.func.jvp(lambda out: function(out, **others)[0], (output,), (direction,))[1]

    wanted = tangent(consistency.consistency_loss_reference)
    assert wanted != 0 and torch.equal(tangent(consistency.consistency_loss), wanted)
    with testing.mode("reference"):
        got = consistency.consistency_loss(**tensors)
    assert all(map(torch.equal, got, consistency.consistency_loss_reference(**tensors)))


def test_a_second_derivative_is_refused(device):
    tensors = inputs((2, 8), torch.float32, device)
    output = tensors["output"].requires_grad_()
    loss = consistency.consistency_loss(**tensors)[0]
    (first,) = torch.autograd.grad(loss, output, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.square().sum().backward()


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_only_the_output_has_a_gradient_in_any_mode(mode, device):
    tensors = {n: v.requires_grad_() for n, v in inputs((2, 8), torch.float32, device).items()}
    with testing.mode(mode):
        consistency.consistency_loss(**tensors)[0].backward()
    assert [n for n, v in tensors.items() if v.grad is not None] == ["output"]


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_plain_squared_error_of_nothing(mode, device):
    """p = 0 and eps = 0: the weight is 1 even where q is 0."""
    tensors = inputs((2, 8), torch.float32, device)
    zeros = {name: torch.zeros_like(v) if v.dim() > 1 else v for name, v in tensors.items()}
    with testing.mode(mode):
        found = consistency.consistency_loss(**zeros, p=0.0, eps=0.0)
    assert [float(v) for v in found] == [0, 0, 1]


def test_one_number_a_sample(device):
    tensors = {n: v[:, 0].contiguous() if v.dim() > 1 else v for n, v in inputs((3, 8), torch.float32, device).items()}
    got = consistency.consistency_loss(**tensors)
    with testing.mode("reference"):
        torch.testing.assert_close(got, consistency.consistency_loss(**tensors))


def test_a_value_that_does_not_fit_is_named(device):
    tensors = inputs((2, 8), torch.float32, device)
    with pytest.raises(ValueError, match="value must have shape"):
        consistency.consistency_loss(**tensors, value=torch.zeros(2, 7, device=device))

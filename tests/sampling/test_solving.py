"""The ways from noise to the data: the formula of each, its network calls and noise, and what is refused."""

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from soflow_fast import SolutionFlow, sample
from soflow_fast.config.schema import SamplingMethod
from soflow_fast.sampling import Drawing, image_noise
from soflow_fast.sampling.solving import checked_times

SHAPE = (1, 2, 2)
TIMES = (1.0, 0.6, 0.1)


class Network(nn.Module):
    """N = x / 2 + t - 3 s, and what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.calls: list[tuple[float, float]] = []

    def forward(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls.append((float(t[0]), float(s[0])))
        return x / 2 + (t - 3 * s).reshape(-1, 1, 1, 1) * self.one


def noise(count: int) -> list[Tensor]:
    source = torch.Generator().manual_seed(0)
    return [torch.randn(3, *SHAPE, generator=source, dtype=torch.float64) for _ in range(count)]


def test_consecutive_steps_solve_from_each_time_to_the_next() -> None:
    network = Network()
    drawn = sample(SolutionFlow(network), times=TIMES, method="consecutive", noise=noise(1))
    assert network.calls == [(1.0, 0.6), (0.6, 0.1), (0.1, 0.0)]
    x = noise(1)[0]
    for t, s in network.calls:
        x = x + (s - t) * (x / 2 + t - 3 * s)
    torch.testing.assert_close(drawn, x)


@pytest.mark.parametrize("path", ["linear", "trig"])
def test_euler_goes_along_the_velocity(path: Any) -> None:
    network = Network()
    drawn = sample(SolutionFlow(network, path, "trig"), times=TIMES, method="euler", noise=noise(1))
    assert network.calls == [(1.0, 1.0), (0.6, 0.6), (0.1, 0.1)]
    x = noise(1)[0]
    for t, s in zip(TIMES, (*TIMES[1:], 0), strict=True):
        x = x + (s - t) * math.pi / 2 * (x / 2 + t - 3 * t)
    torch.testing.assert_close(drawn, x)


def test_euler_comes_to_the_end_of_the_velocity_ode() -> None:
    """dx/dt = x / 2 - 2 t: x(t) = 4 t + 8 + c exp(t / 2). The error of Euler's method halves with the step."""
    start = noise(1)[0]
    exact = 8 + (start - 12) * math.exp(-0.5)
    coarse, fine = (
        (sample(SolutionFlow(Network()), nfe=n, method="euler", noise=[start]) - exact).abs().max() for n in (100, 200)
    )
    assert 1.9 < coarse / fine < 2.1


def test_renoising_takes_the_times_that_are_given() -> None:
    network, given = Network(), noise(3)
    drawn = sample(SolutionFlow(network), times=TIMES, noise=given)
    assert network.calls == [(1.0, 0.0), (0.6, 0.0), (0.1, 0.0)]
    x = given[0]
    for k, t in enumerate(TIMES):
        x = x - t * (x / 2 + t)
        if k < 2:
            x = (1 - TIMES[k + 1]) * x + TIMES[k + 1] * given[k + 1]
    torch.testing.assert_close(drawn, x)


def test_even_times_are_the_default_and_of_one_call_all_solutions_are_one() -> None:
    flow = SolutionFlow(Network())
    given: dict[str, Any] = {"seed": 3, "shape": (5, *SHAPE)}
    assert torch.equal(sample(flow, nfe=4, **given), sample(flow, times=[1, 0.75, 0.5, 0.25], **given))
    assert torch.equal(sample(flow, **given), sample(flow, method="consecutive", **given))
    assert not torch.equal(sample(flow, nfe=2, **given), sample(flow, nfe=2, method="consecutive", **given))


@pytest.mark.parametrize("method", get_args(SamplingMethod))
def test_a_seed_gives_the_noise_of_each_call_or_of_the_first(method: SamplingMethod) -> None:
    flow = SolutionFlow(Network())
    tensors = [torch.stack([image_noise(3, i, k, SHAPE) for i in range(4)]) for k in range(3)]
    given = tensors if method == "renoise" else tensors[:1]
    drawn = sample(flow, times=TIMES, method=method, seed=3, shape=(4, *SHAPE), batch_size=4)
    assert torch.equal(sample(flow, times=TIMES, method=method, noise=given), drawn)
    drawing = Drawing.of(flow, times=TIMES, method=method, seed=3, shape=(4, *SHAPE), batch_size=4)
    assert torch.equal(drawing.batch(flow, range(4)), drawn) and drawing.nfe == 3


@pytest.mark.parametrize(
    ("times", "nfe"),
    [
        *(((), None), ((0.9,), None), ((1, 1), None), ((1, 0.5, 0.6), None), ((1, 0), None), ((1, -1), None)),
        *(((1, float("nan")), None), ((float("inf"), 1), None), ((1, 0.5), 1), ((1, 0.5), 3)),
    ],
)
def test_times_that_do_not_fall_from_one_are_refused(times: tuple[float, ...], nfe: int | None) -> None:
    with pytest.raises(ValueError, match=r"^times must "):
        checked_times(nfe, times)
    with pytest.raises(ValueError, match=r"^times must "):
        sample(SolutionFlow(Network()), times=times, nfe=nfe, seed=0, shape=(1, *SHAPE))


def test_a_method_that_is_none_and_noise_that_is_not_asked_for_are_refused() -> None:
    flow = SolutionFlow(Network())
    with pytest.raises(ValueError, match="method must be one of renoise, consecutive, euler, got 'heun'"):
        sample(flow, method="heun", seed=0, shape=(1, *SHAPE))  # type: ignore[arg-type]
    for method in ("consecutive", "euler"):
        with pytest.raises(ValueError, match=f"one tensor for method {method}: 1, got 3"):
            sample(flow, times=TIMES, method=method, noise=noise(3))


def test_eulers_method_takes_ten_calls_of_any_flow_unless_it_is_said_otherwise() -> None:
    """One would be the mean of the data; solutions are drawn in one."""
    flow, given = SolutionFlow(Network()), {"shape": (5, *SHAPE)}
    assert torch.equal(
        sample(flow, method="euler", seed=3, **given), sample(flow, nfe=10, method="euler", seed=3, **given)
    )
    start = noise(1)
    ten = sample(flow, nfe=10, method="euler", noise=start)
    assert torch.equal(sample(flow, method="euler", noise=start), ten)
    calls = {method: Drawing.of(flow, method=method, **given).nfe for method in get_args(SamplingMethod)}
    assert calls == {"renoise": 1, "consecutive": 1, "euler": 10} and Drawing.of(flow, **given).nfe == 1
    assert Drawing.of(flow, method="euler", nfe=1, **given).nfe == 1
    assert Drawing.of(flow, method="euler", times=TIMES, **given).nfe == len(TIMES)


def test_a_flow_that_has_learned_its_velocity_alone_goes_along_it() -> None:
    """By Euler's method in ten calls, unless it is said otherwise; there are no solutions to draw by."""
    flow = SolutionFlow(Network(), objective="flow-matching")
    given: dict[str, Any] = {"seed": 3, "shape": (5, *SHAPE)}
    for nfe in (None, 4):
        wanted = sample(SolutionFlow(Network()), nfe=nfe or 10, method="euler", **given)
        assert torch.equal(sample(flow, nfe=nfe, **given), wanted)
    drawing = Drawing.of(flow, **given)
    assert (drawing.method, drawing.nfe) == ("euler", 10) and Drawing.of(flow, times=TIMES, **given).nfe == 3
    for method in ("renoise", "consecutive"):
        with pytest.raises(ValueError, match=f"method must be euler, got '{method}': .* trained by flow-matching"):
            sample(flow, method=method, **given)
    x, y = noise(1)[0], torch.zeros(3, dtype=torch.int64)
    t, s = torch.full((2, 3), 0.5, dtype=torch.float64) * torch.tensor([[1.0], [0.4]])
    torch.testing.assert_close(flow(x, t, s, y), x - 0.3 * flow.velocity(x, t, y))  # a call is one such step
    with pytest.raises(ValueError, match=r"^objective\.kind must be one of soflow, flow-matching, meanflow"):
        SolutionFlow(Network(), objective="flowmatching")  # type: ignore[arg-type]

"""`policy.solution`: path, solution function, losses and samples, in the time that has the noise at 0."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from soflow_fast import policy
from soflow_fast.rng import generator
from tests.policies import policy as random_policy


def drawn(*shape: int, purpose: str = "values") -> Tensor:
    return torch.randn(*shape, generator=generator(0, 0, 0, purpose), dtype=torch.float64)


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_path_goes_from_noise_to_the_action():
    x_0, x_1 = drawn(3, 4, 2, purpose="noise"), drawn(3, 4, 2, purpose="action")
    x_t = policy.interpolate(x_0, x_1, times(0, 0.25, 1))
    torch.testing.assert_close(x_t[0], x_0[0])
    torch.testing.assert_close(x_t[1], 0.75 * x_0[1] + 0.25 * x_1[1])
    torch.testing.assert_close(x_t[2], x_1[2])
    assert policy.NOISE_AT_ZERO is True


def test_the_solution_is_an_euler_step():
    x, f = drawn(3, 4, 2), drawn(3, 4, 2, purpose="output")
    t, s = times(0, 0.5, 0.3), times(1, 0.5, 0.7)
    found = policy.euler_parameterize(x, f, t, s)
    torch.testing.assert_close(found[0], x[0] + f[0])
    assert torch.equal(found[1], x[1])
    torch.testing.assert_close(found[2], x[2] + 0.4 * f[2])


def test_the_losses_are_means_of_squares_and_the_target_has_no_gradient():
    f, v = torch.ones(2, 4, 8, requires_grad=True), torch.full((2, 4, 8), 3.0, requires_grad=True)
    fm = policy.flow_matching_loss(f, v)
    assert fm.item() == 4
    scm = policy.consistency_loss(f, v)
    assert scm.item() == 4
    scm.backward()
    assert v.grad is None
    torch.testing.assert_close(f.grad, torch.full_like(f, 2 * -2 / f.numel()))
    assert policy.combined_loss(torch.tensor(1.0), torch.tensor(2.0)).item() == 1.5
    assert policy.combined_loss(torch.tensor(1.0), torch.tensor(2.0), lam=0.25).item() == 1.75


def test_one_step_is_noise_and_the_output_over_all_times():
    net, noise, seen = random_policy(), drawn(6, 4, 3), drawn(6, 5, purpose="observations")
    wanted = noise + net(noise, torch.zeros(6).double(), torch.ones(6).double(), seen)
    torch.testing.assert_close(policy.one_step_sample(net, seen, noise), wanted)
    assert torch.equal(policy.multi_step_sample(net, seen, noise, steps=1), policy.one_step_sample(net, seen, noise))


def test_more_steps_are_equal_segments_without_noise_between():
    calls: list[tuple[float, float]] = []

    def towards_five(x: Tensor, t: Tensor, s: Tensor, observations: Tensor) -> Tensor:
        """The mean velocity of dx/dt = 5 - x from t to s, so that any number of segments gives the same."""
        calls.append((float(t[0]), float(s[0])))
        assert (t == t[0]).all() and (s == s[0]).all() and observations.shape == (6, 5)
        dt = (s - t)[:, None, None]
        return (5 - x) * (1 - torch.exp(-dt)) / dt

    noise, seen = drawn(6, 4, 3), drawn(6, 5, purpose="observations")
    net: Callable = towards_five
    exact = 5 + (noise - 5) * torch.exp(times(-1.0))
    torch.testing.assert_close(policy.multi_step_sample(net, seen, noise), exact)
    assert calls == [(0, 0.5), (0.5, 1)]
    torch.testing.assert_close(policy.multi_step_sample(net, seen, noise, steps=5), exact)
    assert [at for call in calls[2:] for at in call] == pytest.approx([0, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8, 1])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: policy.interpolate(drawn(2, 4, 3), drawn(2, 4, 2), times(0, 1)), r"x_1 must be floating \[2, 4, 3\]"),
        (lambda: policy.interpolate(drawn(2, 4, 3), drawn(2, 4, 3), times(0)), r"t must be floating \[2\]"),
        (lambda: policy.interpolate(drawn(2, 4), drawn(2, 4), times(0, 1)), r"floating \[B, horizon, dim\]"),
        (lambda: policy.euler_parameterize(*[drawn(2, 4, 3)] * 2, times(0, 1), times(0, 1)[:, None]), "s must be"),
        (lambda: policy.euler_parameterize(drawn(2, 4, 3), drawn(1, 4, 3), *[times(0, 1)] * 2), "f_theta must be"),
        (lambda: policy.flow_matching_loss(drawn(2, 4, 3), drawn(1, 4, 3)), "velocity must be"),
        (lambda: policy.consistency_loss(drawn(2, 4, 3), drawn(1, 4, 3)), "f_target must be"),
        (lambda: policy.combined_loss(times(1), times(1), lam=1.5), r"lam must be in \[0, 1\], got 1.5"),
        (lambda: policy.multi_step_sample(random_policy(), drawn(2, 5), drawn(2, 4, 3), steps=0), "steps must be"),
        (lambda: policy.multi_step_sample(random_policy(), drawn(2, 5), drawn(2, 4, 3), steps=True), "steps must be"),
        (lambda: policy.one_step_sample(random_policy(), drawn(2, 5), drawn(2, 12)), "noise must be floating"),
        (lambda: policy.one_step_sample(random_policy(), drawn(3, 5), drawn(2, 4, 3)), "observations must be"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], Tensor], message: str):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_every_public_docstring_says_where_the_noise_is():
    for name in policy.__all__:
        value = getattr(policy, name)
        if callable(value):
            assert "NOISE_AT_ZERO" in (value.__doc__ or ""), name
    assert "NOISE_AT_ZERO" in (policy.SoFlowPolicy.forward.__doc__ or "")

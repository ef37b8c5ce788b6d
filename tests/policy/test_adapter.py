"""`policy.adapter`: an action at a time, of chunks, as lerobot's code asks for them."""

import pytest
import torch
from torch import Tensor

from soflow_fast.data.dataset import Normalisation
from soflow_fast.policy import LeRobotPolicy, euler_sample, multi_step_sample, one_step_sample
from soflow_fast.rng import generator
from tests.policies import policy

UNITS = Normalisation((1.0, 2, 3, 4, 5), (2.0,) * 5, (10.0, 20, 30), (0.5, 1, 2))


def batch(B: int = 2) -> dict[str, Tensor]:
    drawn = torch.randn(B, 5, generator=generator(0, 0, 0, "observations"))
    return {"observation.environment_state": drawn[:, 3:], "observation.state": drawn[:, :3], "task": torch.zeros(B)}


def adapter(**settings) -> LeRobotPolicy:
    return LeRobotPolicy(policy(torch.float32), UNITS, **({"executed": 3} | settings))


@pytest.mark.parametrize(
    "settings, draw",
    [
        ({}, one_step_sample),
        ({"steps": 3}, lambda *given: multi_step_sample(*given, steps=3)),
        ({"steps": 4, "solves": False}, lambda *given: euler_sample(*given, steps=4)),
    ],
)
def test_a_chunk_is_drawn_in_normalised_numbers_and_given_in_those_of_the_demonstrations(settings, draw):
    given, noise = batch(), torch.randn(2, 4, 3, generator=generator(0, 0, 0, "policy noise"))
    seen = torch.cat([given["observation.state"], given["observation.environment_state"]], 1)
    wanted = draw(policy(torch.float32), (seen - torch.tensor([1.0, 2, 3, 4, 5])) / 2, noise)
    wanted = wanted * torch.tensor([0.5, 1, 2]) + torch.tensor([10.0, 20, 30])
    torch.testing.assert_close(adapter(**settings).predict_action_chunk(given), wanted)


def test_euler_steps_take_the_velocity_alone():
    net, noise, seen = policy(), torch.randn(2, 4, 3).double(), torch.randn(2, 5).double()
    x = noise
    for k in range(4):
        t = torch.full((2,), k / 4).double()
        x = x + 0.25 * net(x, t, t, seen)
    torch.testing.assert_close(euler_sample(net, seen, noise, steps=4), x)


def test_actions_come_one_by_one_and_a_new_chunk_after_those_that_are_executed():
    chunks, acting = adapter(), adapter()
    first, second = chunks.predict_action_chunk(batch()), chunks.predict_action_chunk(batch())
    assert not torch.equal(first, second)  # other noise
    taken = [acting.select_action(batch()) for _ in range(4)]
    assert taken[0].shape == (2, 3)
    for k, wanted in enumerate((first[:, 0], first[:, 1], first[:, 2], second[:, 0])):
        assert torch.equal(taken[k], wanted), k


def test_a_reset_drops_the_chunk_in_hand_and_draws_other_noise():
    acting, again = adapter(), adapter()
    first = acting.select_action(batch())
    acting.reset()
    after = acting.select_action(batch())
    assert not torch.equal(first, after) and len(acting._queue) == 2
    again.reset()
    assert torch.equal(again.select_action(batch()), after)  # a function of the episode, not of what was drawn before
    assert not torch.equal(adapter(seed=1).select_action(batch()), first)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"batch must hold observation.state or .*, got task"):
        adapter().select_action({"task": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"observations must be \[B, 5\], got \[2, 3\]"):
        adapter().select_action({"observation.state": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="executed must be from 1 to 4, the actions in a chunk, got 5"):
        adapter(executed=5)
    with pytest.raises(ValueError, match=r"normalisation is of sizes \(1, 3\), the policy of \(5, 3\)"):
        LeRobotPolicy(policy(), UNITS._replace(observation_mean=(0.0,)), executed=1)


def test_it_is_a_module_of_its_policy():
    acting = adapter()
    assert acting.double().select_action(batch()).dtype == torch.float64
    assert {name.partition(".")[0] for name, _ in acting.named_parameters()} == {"policy"}

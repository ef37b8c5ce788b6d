"""`policy.network`: the residual MLP, against the same written out in float64 numpy, and its sizes."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from soflow_fast.policy import SoFlowPolicy, output_size, recommended_defaults
from soflow_fast.rng import generator
from tests.policies import SIZES, policy


def inputs(B: int = 6, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    source = generator(1, 0, 0, "inputs")
    shapes = {"x_t": (B, 4, 3), "t": (B,), "s": (B,), "observations": (B, 5)}
    return {name: torch.rand(shape, generator=source, dtype=dtype) for name, shape in shapes.items()}


def written_out(net: SoFlowPolicy, x_t: Tensor, t: Tensor, s: Tensor, observations: Tensor) -> np.ndarray:
    """F in numpy: sums of embeddings, then h + silu(W2 silu(W1 h + b1) + b2), then the output."""
    w = {name: value.numpy() for name, value in net.state_dict().items()}

    def linear(name: str, h: np.ndarray) -> np.ndarray:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(h: np.ndarray) -> np.ndarray:
        return h / (1 + np.exp(-h))

    half = SIZES["hidden_size"] // 2
    frequencies = np.array([10_000 ** (-k / half) for k in range(half)])
    h = linear("x_embedder", x_t.numpy().reshape(len(x_t), -1)) + linear("obs_embedder", observations.numpy())
    for time in (t.numpy(), s.numpy()):
        h = h + np.concatenate([np.sin(time[:, None] * frequencies), np.cos(time[:, None] * frequencies)], 1)
    for k in range(SIZES["num_layers"]):
        h = h + silu(linear(f"blocks.{k}.fc2", silu(linear(f"blocks.{k}.fc1", h))))
    return linear("output", h).reshape(x_t.shape)


def test_the_forward_is_the_residual_mlp_written_out():
    net, given = policy(), inputs()
    # Both in float64: sums of at most 16 terms, three layers deep.
    np.testing.assert_allclose(net(**given).detach().numpy(), written_out(net, **given), rtol=0, atol=1e-13)


def test_it_learns_from_everything_that_it_is_given():
    net, given = policy(), inputs()
    before = net(**given)
    for name, value in given.items():
        assert not torch.allclose(net(**(given | {name: value + 0.1})), before), name
    before.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def test_a_new_policy_gives_zero_and_is_a_function_of_the_generator():
    one, two = (SoFlowPolicy(**SIZES) for _ in range(2))
    for net in (one, two):
        net.initialize(generator(3, 0, 0, "initialisation"))
    assert torch.equal(one.blocks[1].fc2.weight, two.blocks[1].fc2.weight)
    given = inputs(dtype=torch.float32)
    assert not one(**given).any()
    bound = math.sqrt(6 / 32)  # Xavier uniform of 16 by 16
    assert 0.9 * bound < one.blocks[0].fc1.weight.abs().max() <= bound


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x_t": torch.rand(6, 3, 4)}, r"x_t must be floating \[B, 4, 3\] with B >= 1, got torch.float32 \[6, 3, 4\]"),
        ({"x_t": torch.zeros(0, 4, 3)}, "x_t must be"),
        ({"x_t": torch.zeros(6, 4, 3, dtype=torch.int64)}, "x_t must be"),
        ({"t": torch.rand(6, 1)}, r"t must be floating \[6\]"),
        ({"s": torch.rand(5)}, r"s must be floating \[6\]"),
        ({"t": torch.zeros(6, dtype=torch.int64)}, r"t must be floating \[6\], got torch.int64"),
        ({"observations": torch.rand(6, 4)}, r"observations must be floating \[6, 5\]"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Tensor], message: str):
    with pytest.raises(ValueError, match=message) as error:
        policy(torch.float32)(**(inputs(dtype=torch.float32) | changed))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"obs_size": 0}, "obs_size must be at least 1"),
        ({"action_dim": -1}, "action_dim must be a whole number from 0"),
        ({"hidden_size": 15}, "hidden_size must be even"),
        ({"num_layers": 0}, "num_layers must be a whole number from 1"),
        ({"action_horizon": 2.0}, "action_horizon must be a whole number"),
    ],
)
def test_sizes_that_are_none_are_refused(sizes: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        SoFlowPolicy(**(SIZES | sizes))


def test_sizes():
    assert recommended_defaults() == {"action_dim": 64, "action_horizon": 8, "hidden_size": 256, "num_layers": 4}
    assert output_size() == 512
    assert output_size(action_dim=3, obs_size=5) == 24
    assert output_size(**SIZES) == 12
    with pytest.raises(ValueError, match="horizon: no option of SoFlowPolicy"):
        output_size(horizon=4)
    # A policy of the usual size, counted by hand: 512 numbers in and out, 4 blocks of two layers.
    layers = [(20, 256), (512, 256), *[(256, 256)] * 8, (256, 512)]
    net = SoFlowPolicy(20, **recommended_defaults())
    assert sum(p.numel() for p in net.parameters()) == sum(a * b + b for a, b in layers)


def test_what_is_no_size_or_of_another_dtype_is_refused():
    for wrong in ({"action_dim": -3}, {"action_dim": "a"}, {"action_horizon": True}):
        with pytest.raises(ValueError, match=r"must be a whole number of at least 1"):
            output_size(**wrong)
    policy = SoFlowPolicy(3, 2)
    given = torch.randn(4, 8, 2), torch.rand(4), torch.rand(4), torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"^x_t must be torch.float32 like the parameters, got torch.float64"):
        policy(*(value.double() for value in given))

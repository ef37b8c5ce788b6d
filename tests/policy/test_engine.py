"""`policy.engine`: the other way of time, and the engine's step on a policy against the losses written out there."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from soflow_fast.config.presets import preset
from soflow_fast.config.schema import Config, PolicyConfig
from soflow_fast.errors import ConfigError
from soflow_fast.flow import SolutionFlow
from soflow_fast.launch import Launch
from soflow_fast.policy import (
    PolicyNetwork,
    consistency_loss,
    euler_parameterize,
    flow_matching_loss,
    interpolate,
    multi_step_sample,
    one_step_sample,
)
from soflow_fast.ranks import flow_matching_samples, share
from soflow_fast.rng import generator
from soflow_fast.sampling import sample
from soflow_fast.training.parallel import join
from soflow_fast.training.state import TrainState
from soflow_fast.training.step import draw, train_step
from tests.forked import on_ranks

MODEL = PolicyConfig(obs_size=5, action_dim=3, action_horizon=4, hidden_size=16, num_layers=2)


def configuration(**changes: object) -> Config:
    config = preset("policy", **({"precision": "fp32", "device": "cpu", "batch_size": 12, "steps": 10} | changes))
    return replace(config, model=MODEL)


def build(config: Config) -> TrainState:
    """A state whose weights are all random: those of a new policy end in zeros."""
    state = TrainState.build(config)
    source = generator(7, 0, 0, "weights")
    weights = {n: torch.randn(v.shape, generator=source) / 4 for n, v in state.flow.state_dict().items()}
    for flow in (state.flow, state.ema, state.teacher):
        if flow is not None:
            flow.load_state_dict(weights)
    return state


def batch(B: int = 12) -> tuple[Tensor, Tensor]:
    source = generator(0, 0, 0, "batch")
    return torch.randn(B, 1, 4, 3, generator=source), torch.randn(B, 5, generator=source)


def test_the_engine_sees_time_run_the_other_way():
    network = PolicyNetwork(MODEL).double()
    torch.nn.init.normal_(network.policy.output.weight, generator=generator(0, 0, 0, "output"))
    flow, policy = SolutionFlow(network), network.policy
    x, y = (value.double() for value in batch())
    t, s = torch.linspace(0.4, 1, 12).double(), torch.linspace(0, 0.4, 12).double()
    wanted = euler_parameterize(x[:, 0], policy(x[:, 0], 1 - t, 1 - s, y), 1 - t, 1 - s)
    torch.testing.assert_close(flow.solution(x, t, s, y)[:, 0], wanted)
    torch.testing.assert_close(flow.velocity(x, t, y)[:, 0], -policy(x[:, 0], 1 - t, 1 - t, y))
    x_t, v_t = flow.point(x, -x, t)  # of actions x and noise -x
    torch.testing.assert_close(x_t[:, 0], interpolate(-x[:, 0], x[:, 0], 1 - t))
    torch.testing.assert_close(v_t[:, 0], -(x[:, 0] - -x[:, 0]))


def test_samples_of_the_engine_are_those_of_the_policy():
    state = build(configuration())
    noise, y = batch()
    found = sample(state.flow, y, nfe=1, noise=[noise])
    torch.testing.assert_close(found[:, 0], one_step_sample(state.flow.network.policy, y, noise[:, 0]))
    found = sample(state.flow, y, nfe=3, noise=[noise], method="consecutive")
    torch.testing.assert_close(found[:, 0], multi_step_sample(state.flow.network.policy, y, noise[:, 0], steps=3))


def gradients(state: TrainState) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in state.flow.named_parameters() if p.grad is not None}


def test_flow_matching_of_the_engine_is_the_plain_loss_of_a_policy():
    config = configuration(**{"objective.kind": "flow-matching", "objective.p": 0.0, "optim.lr": 1e-9})
    state = build(config)
    (x0, y), draws = batch(), draw(state, (12, 1, 4, 3))
    policy, t = state.flow.network.policy, 1 - draws.t
    noise, actions = draws.x1[:, 0], x0[:, 0]
    loss = flow_matching_loss(policy(interpolate(noise, actions, t), t, t, y), actions - noise)
    wanted = torch.autograd.grad(loss, [*policy.parameters()])
    metrics = train_step(state, x0, y)
    torch.testing.assert_close(metrics["fm_loss"], loss.detach())
    for found, gradient in zip(gradients(state).values(), wanted, strict=True):
        torch.testing.assert_close(found, gradient, rtol=2e-4, atol=1e-6)


def test_consistency_of_the_engine_is_the_squared_distance_by_the_interval():
    """The published surrogate has the gradient of the squared distance without the division by |b|: of one sample, with
    p = 0, that of `consistency_loss` divided by 2 (l - t) (s - t)."""
    config = configuration(**{"objective.fm_fraction": 0.0, "objective.p": 0.0, "optim.lr": 1e-9})
    state = build(replace(config, batch_size=1))
    (x0, y), draws = batch(1), draw(state, (1, 1, 4, 3))
    policy = state.flow.network.policy
    t, l, s = 1 - draws.t, 1 - draws.l, 1 - draws.s  # t < l < s here
    assert t < l < s
    noise, actions = draws.x1[:, 0], x0[:, 0]
    x_t, x_l = interpolate(noise, actions, t), interpolate(noise, actions, l)
    current = euler_parameterize(x_t, policy(x_t, t, s, y), t, s)
    target = euler_parameterize(x_l, policy(x_l, l, s, y), l, s)
    loss = consistency_loss(current, target) / (2 * (l - t) * (s - t)).squeeze()
    wanted = torch.autograd.grad(loss, [*policy.parameters()])
    metrics = train_step(state, x0, y)
    # float32, and the difference is divided by l - t.
    mse = consistency_loss(current, target).detach() / (l - t).squeeze() ** 2
    torch.testing.assert_close(metrics["sc_mse"], mse, rtol=1e-3, atol=0)
    for found, gradient in zip(gradients(state).values(), wanted, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


@pytest.mark.parametrize("teacher", ["student", "ema"])
def test_micro_batches_and_teachers(teacher: str):
    x0, y = batch()
    found = []
    for size in (0, 5):
        state = build(configuration(**{"objective.teacher": teacher, "micro_batch": size}))
        metrics = train_step(state, x0, y)
        assert all(torch.isfinite(value).all() for value in metrics.values())
        found.append(gradients(state))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


def test_a_step_in_bf16_rounds_products_and_keeps_weights_and_pair_in_float32():
    x0, y = batch()
    exact, rounded = (build(configuration(precision=name)) for name in ("fp32", "bf16"))
    assert (rounded.target.kind, rounded.target.precision) == ("pair", "fp32")
    for state in (exact, rounded):
        train_step(state, x0, y)
    assert all(p.dtype == torch.float32 for p in rounded.flow.parameters())
    one, two = (torch.cat([g.flatten() for g in gradients(state).values()]) for state in (exact, rounded))
    assert not torch.equal(one, two)
    assert torch.nn.functional.cosine_similarity(one, two, dim=0) > 0.999


def test_an_observation_is_wanted_for_each_chunk():
    state = build(configuration())
    x0, y = batch()
    with pytest.raises(ValueError, match="y must be floating"):
        train_step(state, x0, y[:, :4])
    with pytest.raises(ValueError, match="y must be finite"):
        train_step(state, x0, torch.full_like(y, torch.nan))
    with pytest.raises(ValueError, match=r"y: a policy takes observations \[B, obs_size\], got none"):
        train_step(state, x0, None)


@pytest.mark.parametrize(
    "field, value",
    [
        ("objective.label_drop", 0.1),
        ("objective.guidance_scale", 2.0),
        ("flow.path", "trig"),
        ("flow.coefficients", "trig"),
        ("run.parallel", "fsdp"),
        ("run.compile", True),
        ("run.cuda_graph", True),
        ("run.recompute", "block"),
        ("run.attention", "sdpa"),
        ("run.mlp", "quack"),
        ("run.reference", "images"),
        ("run.init", "runs/other"),
        ("precision", "fp8"),
        ("guidance_precision", "fp8"),
        ("quotient", "increments"),
        ("data.kind", "images"),
        ("model.executed", 9),
        ("model.hidden_size", 15),
    ],
)
def test_what_a_policy_has_no_use_for_is_refused(field: str, value: object):
    with pytest.raises(ConfigError, match=f"^{field} must be") as error:
        TrainState.build(preset("policy", **{field: value}))
    assert "\n" not in str(error.value)


def test_images_are_not_learned_from_demonstrations():
    with pytest.raises(ConfigError, match=r"data\.kind must be of images unless the model is a policy"):
        TrainState.build(preset("digits", **{"data.kind": "demonstrations"}))


def two_steps(launch: Launch | None) -> dict[str, Tensor]:
    """The weights after two steps on a share of each batch, or of one process on all of it."""
    config = configuration()
    if launch is None:
        state, mine = TrainState.build(config), torch.arange(12)
    else:
        parallel = join(launch, config.run, torch.device("cpu"))
        state = TrainState.build(config, parallel=parallel)
        first = flow_matching_samples(12, config.objective.flow_matching_fraction)
        mine = share(12, first, launch.rank, launch.world)
    x0, y = batch()
    for _ in range(2):
        train_step(state, x0[mine], y[mine])
    return {name: value.clone() for name, value in state.flow.state_dict().items()}


def test_two_ranks_train_what_one_does():
    alone, (one, two) = two_steps(None), on_ranks(2, two_steps)
    for name, value in alone.items():
        assert torch.equal(one[name], two[name])
        # AdamW's first steps have the size of the rate, 2e-3, wherever a gradient is; sums of ranks round otherwise.
        torch.testing.assert_close(one[name], value, rtol=0, atol=1e-5)


def test_a_policy_draws_by_observations_and_a_seed():
    flow = SolutionFlow(PolicyNetwork(PolicyConfig(3, 2, 8, 16, 1, executed=1)))
    assert sample(flow, torch.zeros(5, 3), seed=0).shape == (5, 1, 8, 2)

"""`data.demonstrations`: chunks and observations of episodes, tasks and their experts, and what is no demonstration."""

import numpy as np
import pytest
import torch

from soflow_fast.config.presets import preset
from soflow_fast.config.schema import NOTHING_LEFT
from soflow_fast.data import fitted, identity, open_source
from soflow_fast.data.demonstrations import Demonstrations, normalisation_of, open_demonstrations
from soflow_fast.data.demonstrations.episodes import Episodes, record
from soflow_fast.data.demonstrations.obstacle import CENTRE, GOAL, RADIUS, SPEED, moved
from soflow_fast.data.demonstrations.tasks import TASKS, open_task
from soflow_fast.errors import ConfigError, DataError


def two_episodes() -> Episodes:
    """Of three and of two steps; the action is the number of the step, and one number of the observation constant."""
    steps = torch.arange(5.0)
    observations = torch.stack([steps * 10, torch.full((5,), 7.0)], 1)
    return Episodes(observations, torch.stack([steps, -steps], 1), torch.tensor([2, 2, 2, 4, 4]), "sum", "two episodes")


def test_chunks_begin_at_each_step_and_repeat_the_last_action_of_the_episode():
    data = Demonstrations(two_episodes(), horizon=3)
    assert len(data) == 5 and data.shape == (1, 3, 2)
    normalisation = data.contents.normalisation
    chunks = normalisation.actions(data.read(torch.arange(5)))[:, 0, :, 0]
    wanted = [[0, 1, 2], [1, 2, 2], [2, 2, 2], [3, 4, 4], [4, 4, 4]]
    torch.testing.assert_close(chunks, torch.tensor(wanted, dtype=torch.float32))
    torch.testing.assert_close(data.read(torch.tensor([3])), data.read(torch.arange(5))[3:4])


def test_what_a_model_sees_has_mean_zero_and_deviation_one_and_constants_stay():
    data = Demonstrations(two_episodes(), horizon=1)
    seen = data.given(torch.arange(5))
    torch.testing.assert_close(seen.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(seen[:, 0].std(correction=0), torch.tensor(1.0))
    assert not seen[:, 1].any()  # and is not divided by its deviation of 0
    actions = data.read(torch.arange(5))[:, 0, 0]
    torch.testing.assert_close(actions.std(0, correction=0), torch.ones(2))
    normalisation = data.contents.normalisation
    back = normalisation.actions(normalisation.normalised_actions(two_episodes().actions))
    torch.testing.assert_close(back, two_episodes().actions)


def test_the_identity_keeps_the_normalisation_and_compares_the_checksum():
    data = Demonstrations(two_episodes(), horizon=3)
    found = identity.identify(data)
    again = identity.from_json(identity.to_json(found))
    assert again == found and again.normalisation == data.contents.normalisation
    other = Episodes(**(vars(two_episodes()) | {"checksum": "another"}))
    assert identity.changes(found, identity.identify(Demonstrations(other, horizon=3)))
    assert "normalisation" not in identity.to_json(identity.Identity("k", 1, (1, 1, 1), (), (), "sum"))


@pytest.mark.parametrize("choice", [0.2, 0.7])
def test_the_expert_of_the_obstacle_passes_it_on_the_side_of_its_choice(choice: float):
    task, place, farthest = open_task("obstacle"), np.array([0.0, 0.0]), 0.0
    for _ in range(task.steps):
        place, stuck = moved(place, task.expert(place.astype(np.float32), choice))
        assert not stuck
        farthest = place[0] if abs(place[0]) > abs(farthest) else farthest
    assert np.linalg.norm(place - GOAL) < SPEED and (farthest > 0) == (choice > 0.5)


def test_the_mean_of_both_sides_runs_into_the_obstacle():
    task, place, stuck = open_task("obstacle"), np.array([0.0, 0.0]), False
    for _ in range(task.steps):
        mean = (task.expert(place, 0.2) + task.expert(place, 0.7)) / 2
        place, stuck = moved(place, mean)
        if stuck:
            break
    assert stuck and np.linalg.norm(place - CENTRE) < RADIUS


def test_the_expert_of_the_pendulum_swings_up_with_less_than_it_would_take_to_lift():
    task = open_task("pendulum")
    hanging = np.array([-1.0, 0.0, 0.1], dtype=np.float32)
    assert task.expert(hanging, 0.0) == task.action_high  # with the swing
    assert task.expert(hanging * [1, 1, -1], 0.0) == task.action_low
    leaning = np.array([np.cos(0.1), np.sin(0.1), 0.0], dtype=np.float32)
    assert task.expert(leaning, 0.0)[0] == pytest.approx(-1.0, rel=1e-5)  # back, by the linear law


@pytest.mark.parametrize("name", TASKS)
def test_recorded_episodes_are_a_function_of_the_seed_and_hold_what_the_expert_meant(name: str):
    pytest.importorskip("gymnasium")
    task = open_task(name)
    episodes, again, other = record(task, 3, 2), record(task, 3, 2), record(task, 4, 2)
    assert torch.equal(episodes.observations, again.observations) and torch.equal(episodes.actions, again.actions)
    assert episodes.checksum == again.checksum != other.checksum
    assert not torch.equal(episodes.observations, other.observations)
    assert episodes.observations.shape == (2 * task.steps, task.obs_size)
    assert episodes.ends.tolist() == [task.steps - 1] * task.steps + [2 * task.steps - 1] * task.steps
    choices = {
        choice
        for choice in (0.2, 0.7)
        if np.array_equal(task.expert(episodes.observations[1].numpy(), choice), episodes.actions[1].numpy())
    }
    assert choices  # the action is the expert's at what is observed, not the disturbed one that was taken
    assert (episodes.actions.numpy() >= task.action_low).all() and (episodes.actions.numpy() <= task.action_high).all()


@pytest.mark.parametrize("name", TASKS)
def test_the_environment_and_the_picture_of_a_task(name: str):
    pytest.importorskip("gymnasium")
    task = open_task(name)
    environment = task.environment()
    seen = [environment.reset(seed=5)[0]]
    assert np.array_equal(seen[0], task.environment().reset(seed=5)[0])
    ended = False
    for step in range(task.steps):
        assert not ended, step
        observation, reward, terminated, ended, _ = environment.step(task.expert(seen[-1], 0.2))
        assert reward <= 0 and not terminated
        seen.append(observation)
    assert ended
    pictures = [np.asarray(task.picture(np.stack(seen[: k + 1]))) for k in (0, task.steps)]
    assert pictures[0].shape == (160, 160, 3) and not np.array_equal(*pictures)


def test_a_run_takes_its_sizes_of_the_data(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("gymnasium")
    config = preset("policy", batch_size=4)
    source = open_source(config)
    model = fitted(config, source, NOTHING_LEFT).model
    assert (model.obs_size, model.action_dim) == (3, 1)
    x0, y = source.batch(0)
    assert x0.shape == (4, 1, 8, 1) and y.shape == (4, 3) and y.dtype == torch.float32
    with pytest.raises(DataError, match=r"--data pendulum: has model.obs_size 3, not 5; leave it out"):
        fitted(preset("policy", **{"model.obs_size": 5}), source, NOTHING_LEFT)


def test_what_is_no_demonstration_is_said_in_one_line(tmp_path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DataError, match=r"--data juggling: no task \(pendulum, obstacle\) and no folder"):
        open_demonstrations("juggling", 8, 0)
    with pytest.raises(DataError, match=r"meta/info.json: No such file.*is this a LeRobot data set"):
        open_demonstrations(str(tmp_path), 8, 0)
    with pytest.raises(DataError, match="--data is missing: a policy needs a task"):
        open_source(preset("policy", data=""))
    with pytest.raises(ValueError, match="the tasks are pendulum, obstacle, got 'juggling'"):
        open_task("juggling")
    monkeypatch.setitem(__import__("sys").modules, "gymnasium", None)
    with pytest.raises(ConfigError, match=r"the task pendulum needs gymnasium: pip install 'soflow-fast\[policy\]'"):
        open_demonstrations("pendulum", 8, 0)


def test_small_numbers_are_normalised_and_constant_ones_are_not(tmp_path, monkeypatch):
    """Whatever the unit: 5e-5 of one is 50 of another."""
    source = torch.Generator().manual_seed(0)
    small = 5e-5 * torch.randn(40, 1, generator=source)
    constant = torch.full((40, 1), 0.1)
    episodes = Episodes(torch.cat([small, constant], 1), small, torch.full((40,), 39), "", "")
    found = normalisation_of(episodes)
    assert found.observation_deviation[0] == pytest.approx(float(small.double().std(correction=0)))
    assert found.observation_deviation[1] == 1 and found.action_deviation[0] < 1e-3


def test_a_folder_of_the_name_of_a_task_is_not_overlooked(tmp_path, monkeypatch):
    (tmp_path / "obstacle").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"^--data obstacle: is a task and a folder here; give \./obstacle"):
        open_demonstrations("obstacle", 4, 0)

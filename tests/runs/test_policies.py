"""A run of a policy from the command line to an episode: training, going on, figures, GIFs, and what it is not."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from soflow_fast import evaluate as evaluate_command
from soflow_fast import load, load_policy
from soflow_fast import train as train_command
from soflow_fast.config.schema import from_json
from soflow_fast.data import identity
from soflow_fast.data.demonstrations.obstacle import moved
from soflow_fast.errors import CheckpointError, ConfigError
from soflow_fast.export import main as export_main
from soflow_fast.runs.checkpoint import export, load_with_data
from soflow_fast.runs.gallery.ways import ways
from soflow_fast.runs.policies import Acting, policy_of, task_of
from soflow_fast.sample import main as sample_main

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("PIL")

TINY = ["--device", "cpu", "--batch-size", "16", "--set", "model.hidden_size=16", "--set", "model.num_layers=1"]
TINY += ["--set", "run.eval_samples=100", "--set", "run.log_every=2", "--checkpoint-every", "2"]


def trained(run: Path, *more: str) -> Path:
    train_command.main(["policy", "--data", "obstacle", "--run-dir", str(run), *TINY, *more])
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps."""
    return trained(tmp_path_factory.mktemp("runs") / "policy", "--steps", "4")


def frames(content: bytes) -> list[np.ndarray]:
    from PIL import Image, ImageSequence

    with Image.open(io.BytesIO(content)) as image:
        return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]


def test_a_run_leaves_an_episode_its_figures_and_what_it_was_trained_on(run: Path):
    config = from_json((run / "config.json").read_text())
    assert (config.model.obs_size, config.model.action_dim, config.data.path) == (2, 2, "obstacle")
    figures = json.loads((run / "evaluation.json").read_text())
    assert figures["task"] == "obstacle" and figures["episodes"] == 100 and figures["nfe"].keys() == {"1", "2"}
    one = figures["nfe"]["1"]
    assert one["share"] == pytest.approx((one["return"] - one["random"]) / (one["expert"] - one["random"]))
    assert one["random"] < one["expert"] < 0
    shown = frames((run / "samples" / "final.gif").read_bytes())
    assert len(shown) > 3 and not np.array_equal(shown[0], shown[-1])
    known = identity.from_json((run / "data.json").read_text())
    assert known.normalisation is not None and len(known.normalisation.observation_mean) == 2
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in logged] == [2, 4] and all(entry["sc_mse"] > 0 for entry in logged)


def test_a_run_that_goes_on_is_the_one_that_was_not_stopped(run: Path, tmp_path: Path, monkeypatch):
    """Stopped by what a full disk raises in the midst, and started again by the same command."""
    from soflow_fast.runs import trainer

    def refuses_the_third(state: Any, *given: Any, **more: Any) -> Any:
        if state.step == 2:
            raise ConfigError("stopped")
        return step(state, *given, **more)

    step = trainer.train_step
    monkeypatch.setattr(trainer, "train_step", refuses_the_third)
    with pytest.raises(ConfigError, match="stopped"):
        trained(tmp_path / "run", "--steps", "4")
    monkeypatch.undo()
    again = load(trained(tmp_path / "run", "--steps", "4"))
    for name, value in load(run).state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_evaluate_prints_returns_and_draws_an_episode(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    evaluate_command.main([str(run), "--n", "3", "--nfe", "1,2", "--gif", str(tmp_path / "episode.gif")])
    said = capsys.readouterr().out
    assert "1 call a chunk: mean return -" in said and "2 calls a chunk" in said and "of 3 episodes" in said
    assert f"an episode: {tmp_path / 'episode.gif'}" in said
    shown = frames((tmp_path / "episode.gif").read_bytes())
    evaluate_command.main([str(run), "--n", "3", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["gif"] == str(run / "samples" / "episode.gif") and found["nfe"]["1"]["return"] < 0
    assert all(map(np.array_equal, frames(Path(found["gif"]).read_bytes()), shown))


def test_an_adapter_acts_as_the_evaluation_does(run: Path):
    """The first chunk is drawn of the same noise in both, so the robots are in the same places after it."""
    flow, config, data = policy_of(run, "cpu")
    acting, adapter, task = Acting(flow, config, data), load_policy(run), task_of(config)
    places = acting.rollout(1, 2, seed=0).observations
    assert (adapter.steps, adapter.executed, adapter.solves) == (1, 4, True) and task is not None
    for step in range(adapter.executed):
        # What is observed counts when a chunk is drawn alone.
        actions = adapter.select_action({"observation.state": torch.from_numpy(places[:, step])})
        for robot, action in enumerate(actions.numpy()):
            there, _ = moved(places[robot, step], action)
            np.testing.assert_allclose(there, places[robot, step + 1], atol=1e-6)


def test_an_exported_policy_acts_and_its_gif_goes_where_it_is_said(run: Path, tmp_path: Path, capsys):
    flow, config, data = load_with_data(run)
    export(flow, config, tmp_path / "exported", data)
    observation = {"observation.state": torch.zeros(1, 2)}
    one, two = (load_policy(place).select_action(observation) for place in (run, tmp_path / "exported"))
    assert torch.equal(one, two)
    evaluate_command.main([str(tmp_path / "exported"), "--n", "1"])
    assert "an episode" not in capsys.readouterr().out  # nothing is written into what was given away


def test_what_is_asked_of_a_policy_that_it_is_not(run: Path, tmp_path: Path):
    for arguments, message in (
        (["--guidance", "2"], "--guidance 2: .* is a policy, which has no use for it"),
        (["--reference", "images"], "--reference images: .* is a policy"),
        (["--times", "1,0.5"], "--times 1,0.5: .* is a policy"),
        (["--n", "0"], "--n must be a whole number from 1"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            evaluate_command.main([str(run), *arguments])
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="is a policy, whose samples are actions"):
        sample_main([str(run), "--out", str(tmp_path / "out")])
    for form in ("hub", "diffusers"):
        with pytest.raises(ConfigError, match=f"--format {form}: .* is a policy; --format safetensors gives it away"):
            export_main([str(run), str(tmp_path / form), "--format", form])
    flow, config, _ = load_with_data(run)
    with pytest.raises(ValueError, match="flow: is a policy, which `export` gives away"):
        flow.save_pretrained(tmp_path / "hub")
    with pytest.raises(ConfigError, match="it is a policy, whose samples are actions"):
        ways(run, torch.device("cpu"))
    export(flow, config, tmp_path / "nameless", None)
    with pytest.raises(CheckpointError, match="does not say how observations and actions are normalised"):
        load_policy(tmp_path / "nameless")


@pytest.mark.slow
def test_a_dry_run_tells_what_a_run_needs(tmp_path: Path, capsys: pytest.CaptureFixture):
    train_command.main(["policy", "--data", "obstacle", "--run-dir", str(tmp_path / "run"), *TINY, "--dry-run"])
    said = capsys.readouterr().out
    assert "policy of 1 blocks of 16 numbers, for chunks of 8 actions of 2 numbers" in said and "steps/s" in said
    assert not (tmp_path / "run").exists()

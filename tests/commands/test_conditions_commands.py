"""Vectors in the place of labels from the command line: trained, gone on with, drawn, measured, given away, refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from soflow_fast import SolutionFlow, TrainState, load, load_official, preset, sample
from soflow_fast.config.authors import to_authors
from soflow_fast.data.conditions import Conditions, read_vectors
from soflow_fast.errors import CheckpointError, ConfigError
from soflow_fast.hub.card import command, model_card
from soflow_fast.runs import checkpoint, samples
from soflow_fast.runs.gallery.ways import ways
from soflow_fast.runs.samples import Evaluations, Grids
from soflow_fast.runs.trainer import beginning
from tests.evaluation.small import pictures, save_folder
from tests.published import small_flow
from tests.states import advance, build

Call = Callable[..., Any]
E = 5
TINY = ["--set", "model.hidden_size=16", "--set", "model.depth=1", "--set", "model.num_heads=2", "--device", "cpu"]


def save_vectors(place: Path, n: int, dtype: Any = np.float32, size: int = E) -> Path:
    np.save(place, np.random.default_rng(0).standard_normal((n, size)).astype(dtype))
    return place


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Of a network that shows its vectors: off its initial zeros."""
    state = build(**{"model.num_classes": 0, "model.condition_size": E, "data.conditions": str(tmp_path / "v.npy")})
    with torch.no_grad():
        for i, p in enumerate(state.ema.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    checkpoint.save(tmp_path / "run", state)
    return tmp_path / "run"


def test_a_run_on_vectors_is_trained_gone_on_with_and_drawn(call: Call, files: Call, tmp_path: Path) -> None:
    given = save_vectors(tmp_path / "digits.npy", 1797, np.float16)
    flags = [*TINY, "--condition-size", E, "--conditions", given, "--run-dir", tmp_path / "run", "--batch-size", "8"]
    result = call("train", "digits", *flags, "--steps", "4", "--set", "run.sample_every=2")
    assert (result.code, result.err) == (0, "")
    assert "conditions: vectors of 5 numbers, float16, from digits.npy" in result.out
    assert load(tmp_path / "run").network.config.condition_size == E
    assert len(json.loads((tmp_path / "run" / "data.json").read_text())["conditions"]) == 64
    assert (tmp_path / "run" / "samples" / "final.png").is_file()
    again = given.rename(tmp_path / "elsewhere.npy")
    flags[flags.index(given)] = again
    result = call("train", "digits", *flags, "--steps", "6")
    assert result.code == 0 and "finished at step 4, goes on" in result.out
    np.save(again, -np.load(again))
    result = call("train", "digits", *flags, "--steps", "8")
    assert result.code == 2 and "other vectors" in result.err and result.err.count("\n") == 1


def test_two_starts_of_a_run_give_its_weights(call: Call, tmp_path: Path) -> None:
    given = save_vectors(tmp_path / "digits.npy", 1797)
    flags = [*TINY, "--condition-size", E, "--conditions", given, "--batch-size", "8", "--precision", "fp32"]
    weights = []
    for name, parts in (("whole", ["4"]), ("parts", ["2", "4"])):
        for steps in parts:
            more = ["--set", "optim.lr_schedule=constant", "--set", "objective.r_schedule=constant"]
            assert call("train", "digits", *flags, *more, "--steps", steps, "--run-dir", tmp_path / name).code == 0
        weights.append(load(tmp_path / name).state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_samples_have_the_vectors_of_a_file_in_turn(call: Call, files: Call, run: Path, tmp_path: Path) -> None:
    given = save_vectors(tmp_path / "v.npy", 3)
    out = tmp_path / "out"
    result = call("sample", run, "--out", out, "--n", "5", "--conditions", given)
    assert (result.code, result.err) == (0, "") and f"conditions: 3 of {given}" in result.out
    y = torch.from_numpy(np.load(given))[torch.tensor([0, 1, 2, 0, 1])]
    wanted = samples.to_uint8(sample(load(run), y, seed=0))
    got = [np.asarray(Image.open(out / f"{i:05d}.png")) for i in range(5)]
    assert np.array_equal(np.stack(got), wanted[..., 0].numpy())
    named = tmp_path / "v.npz"
    np.savez(named, names=["a", "b", "c"], vectors=np.load(given))
    assert call("sample", run, "--out", out, "--n", "5", "--conditions", named).code == 0  # the same: nothing to draw
    result = call("sample", run, "--out", tmp_path / "none", "--n", "5")
    assert result.code == 0 and "without conditions: --conditions FILE gives the images some" in result.out
    assert files(tmp_path / "none") != files(out)
    save_vectors(given, 4)
    np.save(given, 2 * np.load(given))
    result = call("sample", run, "--out", out, "--n", "5", "--conditions", given)
    assert result.code == 2 and "holds images of another command (of other conditions)" in result.err
    result = call("sample", run, "--out", tmp_path / "one", "--n", "5", "--conditions", given, "--format", "npz")
    assert result.code == 0 and np.load(tmp_path / "one" / "samples.npz").files == ["arr_0"]


def test_figures_are_of_the_vectors_that_are_given(call: Call, run: Path, tmp_path: Path) -> None:
    reference = save_folder(pictures(100, 0), tmp_path / "reference")
    given = save_vectors(tmp_path / "v.npy", 7)
    flags = ["--n", "100", "--nfe", "1", "--reference", reference, "--metrics", "fd-random", "--json"]
    found = [
        json.loads(call("evaluate", run, *flags, *more).out)["nfe"]["1"]["fd_random"]
        for more in ([], ["--conditions", given])
    ]
    assert found[0] != found[1]
    said = call("evaluate", run, *flags[:-1]).out
    assert said.startswith("without conditions: --conditions FILE gives the samples some\n")


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_what_does_not_fit_is_refused_in_one_line(command: str, run: Path, refused: Call, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out"] if command == "sample" else ["--n", "100", "--reference", tmp_path]
    labelled = tmp_path / "labelled"
    checkpoint.save(labelled, build())
    always = tmp_path / "always"
    unasked = {"model.null_label": False, "objective.label_drop": 0, "objective.guidance_scale": 1}
    checkpoint.save(always, build(**{"model.num_classes": 0, "model.condition_size": E, **unasked}))
    given, wide, wrong = (tmp_path / f"{name}.npy" for name in ("v", "wide", "wrong"))
    save_vectors(given, 3)
    save_vectors(wide, 3, size=6)
    np.save(wrong, np.array([[0.0] * E, [np.nan] * E], np.float32))
    for place, flags, said in (
        (run, ["--conditions", wide], f"--conditions {wide}: has vectors of 6 numbers, {run} takes 5"),
        (run, ["--conditions", wrong], f"--conditions {wrong}: the vector of row 1 is not finite"),
        (run, ["--conditions", tmp_path / "no.npy"], f"--conditions {tmp_path / 'no.npy'}: No such file or directory"),
        (labelled, ["--conditions", given], f"--conditions {given}: {labelled} takes labels"),
        (always, [], f"--conditions is missing: {always} was trained with a vector each, it has no null one"),
    ):
        assert said in refused(command, place, *out, *flags)
    if command == "sample":
        assert "--labels 3: the model has no classes" in refused("sample", run, *out, "--labels", "3")


def test_a_dry_run_makes_vectors(call: Call, refused: Call, tmp_path: Path) -> None:
    result = call("train", "cifar10", *TINY, "--batch-size", "4", "--condition-size", "7", "--dry-run")
    assert (result.code, result.err) == (0, "") and "random numbers" in result.out
    assert "no conditions, the model takes vectors of 5" in refused("train", "digits", *TINY, "--condition-size", E)
    both = ["--condition-size", E, "--set", "model.num_classes=10"]
    assert "model.num_classes must be 0 beside a condition_size" in refused("train", "digits", *TINY, *both)
    given = save_vectors(tmp_path / "v.npy", 1797)
    said = refused("train", "digits", *TINY, "--conditions", given)
    assert f"--conditions {given}: the model takes labels; give --condition-size 5 too" in said


def test_grids_and_evaluations_have_vectors_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conditions = Conditions(read_vectors(save_vectors(tmp_path / "v.npy", 250)))
    reference = str(save_folder(pictures(10, 0), tmp_path / "reference"))
    fields = {"reference": reference, "run.metrics": "fd-random", "run.eval_samples": 300}
    state = TrainState.build(build(**{"model.num_classes": 0, "model.condition_size": E, **fields}).config)
    given: list[Any] = []
    real = samples.Drawing.of.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(
        samples.Drawing, "of", classmethod(lambda cls, flow, y, **way: given.append(y) or real(cls, flow, y, **way))
    )
    grids = Grids(state, None, print, conditions)
    grids.draw()
    values = torch.from_numpy(np.load(tmp_path / "v.npy"))
    assert torch.equal(given[0], values[torch.arange(100) * 250 // 100])
    Evaluations(state, grids).at(1)
    Evaluations(state, grids, first=False).at(1)  # who draws along draws the same
    assert torch.equal(given[1], values[torch.arange(300) % 250]) and torch.equal(given[1], given[2])


def test_a_flow_of_vectors_is_given_away_and_comes_back(call: Call, run: Path, tmp_path: Path) -> None:
    y, noise = torch.randn(2, E), [torch.randn(2, 1, 8, 8)]
    wanted = sample(load(run), y, noise=noise)
    for form in ("safetensors", "hub"):
        assert call("export", run, tmp_path / form, "--format", form).code == 0
        flow = load(tmp_path / form)
        assert flow.network.config.condition_size == E and torch.equal(sample(flow, y, noise=noise), wanted)
    assert torch.equal(sample(SolutionFlow.from_pretrained(tmp_path / "hub"), y, noise=noise), wanted)
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "vectors of 5 numbers as conditions" in card and "vectors = torch.zeros(2, 5)" in card
    assert "--conditions CONDITIONS" in card
    assert all(str(tmp_path).encode() not in file.read_bytes() for file in (tmp_path / "hub").iterdir())
    found = ways(run, torch.device("cpu"))
    assert found.by_label == [] and len(found.by_seed) == 5 and found.label == ""


def test_the_cards_use_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = small_flow(condition_size=E)
    flow.save_pretrained(tmp_path / "given")
    monkeypatch.chdir(tmp_path)
    code = model_card(flow, None, "given").split("```python\n")[1].split("```")[0]
    space: dict[str, Any] = {}
    exec(code, space)
    assert space["x"].shape == (2, 1, 8, 8)


def test_a_command_names_the_vectors_without_their_place(tmp_path: Path) -> None:
    line = command(preset("digits", condition_size=E, conditions=str(tmp_path / "v.npy")))
    assert "--conditions CONDITIONS" in line and "--condition-size 5" in line and str(tmp_path) not in line


def test_the_authors_know_no_vectors(run: Path) -> None:
    with pytest.raises(ValueError, match=r"^model\.condition_size: their network takes labels"):
        to_authors(preset("imagenet256-b4", condition_size=E), "out")
    weights = {name: value for name, value in load(run).state_dict().items()}
    with pytest.raises(CheckpointError, match="give a DiTConfig"):
        load_official(weights)
    assert load_official(weights, load(run).network.config).network.config.condition_size == E


def test_weights_on_labels_do_not_begin_a_run_on_vectors(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "labelled", advance(build(), 1))
    config = build(**{"model.num_classes": 0, "model.condition_size": E}, init=str(tmp_path / "labelled")).config
    with pytest.raises(ConfigError, match=r"of another network: model\.(num_classes|condition_size) differs"):
        beginning(config, tmp_path / "new")

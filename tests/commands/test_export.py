"""`export`, and files of the authors, DiT and SiT where a run is asked for: what a user types, and what he sees."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import soflow_fast
from soflow_fast import DiT, SolutionFlow, TrainState, load, load_official, preset
from soflow_fast.config import authors, presets, schema
from soflow_fast.config.schema import Config, override
from soflow_fast.data.dataset import LatentSpace
from soflow_fast.data.identity import Identity
from soflow_fast.runs import checkpoint

Call = Callable[..., Any]


@pytest.fixture
def tiny_size(monkeypatch: pytest.MonkeyPatch) -> Config:
    """A size beside the public ones, on the classes and latents of ImageNet."""
    monkeypatch.setitem(schema.DIT_SIZES, "T/2", (1, 16, 2, 2))
    monkeypatch.setitem(authors.SIZES, "DiT-T-2", "T/2")
    monkeypatch.setitem(presets.GUIDANCE, "T/2", 3.0)
    return override(presets.imagenet256("T/2"), {"model.input_size": 4, "batch_size": 4, "run.device": "cpu"})


def test_a_run_becomes_a_directory_that_samples_alike(run_dir: Path, call: Call, files: Call, tmp_path: Path) -> None:
    result = call("export", run_dir, tmp_path / "exported")
    assert (result.code, result.err, result.out) == (0, "", f"safetensors: {tmp_path / 'exported'}\n")
    assert sorted(files(tmp_path / "exported")) == ["config.json", "data.json", "ema.safetensors", "manifest.json"]
    for name, source in (("a", run_dir), ("b", tmp_path / "exported")):
        drawn = call("sample", source, "--out", tmp_path / name, "--n", "2", "--labels", "3,null")
        assert (drawn.code, drawn.err) == (0, "") and "classes: 3, null" in drawn.out
    drawn = [files(tmp_path / name) for name in ("a", "b")]
    settings = [json.loads(found.pop("samples.json"))["settings"] for found in drawn]
    assert drawn[0] == drawn[1] and settings[0] == settings[1]
    figures = [call("evaluate", source, "--n", "100", "--nfe", "1") for source in (run_dir, tmp_path / "exported")]
    assert figures[0] == figures[1] and figures[0].code == 0


def test_a_run_is_given_away_for_the_hub_and_for_diffusers(run_dir: Path, call: Call, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from soflow_fast.pipeline import SoFlowPipeline

    for form in ("hub", "diffusers"):
        result = call("export", run_dir, tmp_path / form, "--format", form)
        assert (result.code, result.err, result.out.splitlines()[-1]) == (0, "", f"{form}: {tmp_path / form}")
        got = load(tmp_path / form)
        for a, b in zip(got.parameters(), load(run_dir).parameters(), strict=True):
            assert torch.equal(a, b)
    assert "1797 samples" in (tmp_path / "hub" / "README.md").read_text()
    pipe = SoFlowPipeline.from_pretrained(tmp_path / "diffusers")
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(class_labels=["3"], output_type="np").images) == 1
    refusal = call("export", tmp_path / "hub", tmp_path / "theirs", "--format", "authors")
    assert refusal.code == 2 and "their code knows" in refusal.err


def test_what_cannot_be_exported_is_said_and_nothing_is_left(run_dir: Path, refused: Call, tmp_path: Path) -> None:
    for arguments, message in (
        ((run_dir, tmp_path), f"{tmp_path}: exists already"),
        ((tmp_path / "nowhere", tmp_path / "out"), "nowhere: no such run or checkpoint"),
        ((run_dir, tmp_path / "out", "--format", "authors"), "--format authors: model: their code knows Imagenet of 4"),
        ((run_dir, tmp_path / "out", "--format", "onnx"), "--format"),
        ((run_dir, "/dev/null/out"), "cannot write /dev/null/out"),
    ):
        assert message in refused("export", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_from_a_run_to_the_authors_and_back(tiny_size: Config, call: Call, tmp_path: Path) -> None:
    state = TrainState.build(override(tiny_size, {"optim.grad_clip": 1.0}))
    space = LatentSpace("nowhere/vae", 0.18215, 0.0)
    state.data = soflow_fast.runs.checkpoint.identity.to_json(
        Identity("latents", 8, (4, 4, 4), tuple(map(str, range(1000))), (0,) * 1000, "x", space)
    )
    checkpoint.save(tmp_path / "run", state)
    result = call("export", tmp_path / "run", tmp_path / "out", "--format", "authors")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines() == [
        f"authors: {tmp_path / 'out' / 'ckpts' / '0.pt'}, step 0, without moments of an optimiser",
        "  their trainer has no optim.grad_clip 1.0",
    ]
    for source in (tmp_path / "out", tmp_path / "out" / "ckpts" / "0.pt"):
        drawn = call("sample", source, "--out", tmp_path / "drawn", "--n", "2")
        assert (drawn.code, drawn.err) == (0, "")
        assert "2 latents of 1 network call each, as .npy" in drawn.out and "stabilityai/sd-vae-ft-mse" in drawn.out
    given = call("export", tmp_path / "out", tmp_path / "hub", "--format", "hub")
    assert given.code == 0
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "data: 4 x 4 x 4" in card and "0.18215" in card and "0 samples" not in card
    again = call("export", tmp_path / "out", tmp_path / "ours")
    assert again.code == 0
    for a, b in zip(load(tmp_path / "ours").parameters(), state.ema.parameters(), strict=True):
        assert torch.equal(a, b)
    refusal = call("export", tmp_path / "out", tmp_path / "twice", "--format", "authors")
    assert refusal.code == 2 and "is of the authors' trainer already" in refusal.err
    evaluated = call("evaluate", tmp_path / "out")
    assert evaluated.code == 2 and evaluated.err.count("\n") == 1


def test_latents_are_never_shown_as_colours(call: Call, refused: Call, files: Call, tmp_path: Path) -> None:
    """Of a configuration that nobody filled in: it says digits, and its network is one of latents."""
    config = override(Config(), {"model.hidden_size": 16, "model.depth": 1, "model.num_heads": 2})
    flow = TrainState.build(override(config, {"run.device": "cpu", "precision": "fp32"})).ema
    checkpoint.export(flow, config, tmp_path / "exported")
    result = call("sample", tmp_path / "exported", "--out", tmp_path / "out", "--n", "2")
    assert result.code == 0 and "2 latents of 1 network call each, as .npy" in result.out
    assert sorted(files(tmp_path / "out")) == [".lock", "00000.npy", "00001.npy", "samples.json"]
    assert np.load(tmp_path / "out" / "00000.npy").shape == (4, 32, 32)
    assert "only labelled digits can be evaluated" in refused("evaluate", tmp_path / "exported")


def test_a_file_without_its_configuration_is_asked_about(call: Call, refused: Call, tmp_path: Path) -> None:
    model = schema.DiTConfig.named("S/2", input_size=4, in_channels=3, num_classes=5)
    flow = SolutionFlow(DiT(model))
    torch.save({"ema_model": flow.state_dict()}, tmp_path / "x.pt")
    line = refused("sample", tmp_path / "x.pt", "--out", tmp_path / "out")
    assert "label table has 6 rows: 6 classes, or 5 and the null label?" in line
    state = {name: value[:-1].repeat(200, 1) if "table" in name else value for name, value in flow.state_dict().items()}
    torch.save({"ema_model": state}, tmp_path / "x.pt")
    assert call("sample", tmp_path / "x.pt", "--out", tmp_path / "out", "--n", "2", "--labels", "999").code == 0
    line = refused("sample", tmp_path / "x.pt", "--out", tmp_path / "none", "--labels", "3,null")
    assert "--labels 3,null: " in line and "no null label" in line and not (tmp_path / "none").exists()


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A file as their trainer writes it after 2 steps, of the model of the tiny runs, which is not one of its own."""
    from soflow_fast.runs.checkpoint.authors import as_authors
    from tests.states import advance, build

    checkpoint.save(tmp_path / "theirs", advance(build(), 2))
    torch.save(as_authors(checkpoint.load_whole(tmp_path / "theirs")), tmp_path / "2.pt")
    return tmp_path / "2.pt"


def test_a_run_goes_on_with_a_file_and_then_with_itself(
    theirs: Path, tiny: list[str], call: Call, refused: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("soflow_fast.runs.samples.EVALUATION_SAMPLES", 100)
    run = ["train", *tiny, "--run-dir", tmp_path / "run", "--resume-official", theirs, "--set=optim.lr=0.001"]
    first = call(*run, "--steps", "4")
    assert (first.code, first.err) == (0, "")
    assert (
        f"going on with {theirs} at step 2 of 4" in first.out and "  lr was 0.004 there, and is 0.001 here" in first.out
    )
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4]
    again = call(*run, "--steps", "6")
    assert (again.code, again.err) == (0, "")
    assert f"resuming {tmp_path / 'run'} at step 4 of 6" in again.out and "going on with" not in again.out
    new = ["train", *tiny, "--run-dir", tmp_path / "new"]
    for flags, message in (
        (["--resume-official", theirs, "--steps", "2"], "has made 2 steps; --steps 2 is not more"),
        (["--resume-official", tmp_path / "run", "--steps", "9"], "no file of the authors' trainer"),
        (["--resume-official", theirs, "--init", theirs], "--resume-official must be empty beside run.init"),
        (["--resume-official", theirs, "--set=model.depth=2"], "blocks.1"),
        (["--init", theirs, "--set=run.init_kind=sit"], "is no sit: its network sees two times already"),
        (["--init", tmp_path / "run", "--set=run.init_kind=sit"], "is a run; run.init_kind sit is of files"),
        (["--set=run.init_kind=sit"], "run.init_kind sit: is of --init FILE"),
    ):
        assert message in refused(*new, *flags)


def test_a_run_begins_with_a_sit(tiny: list[str], call: Call, refused: Call, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("soflow_fast.runs.samples.EVALUATION_SAMPLES", 100)
    model = override(preset("digits"), {"model.hidden_size": 16, "model.depth": 1, "model.num_heads": 2}).model
    state = {name: value for name, value in DiT(model).state_dict().items() if "s_embedder" not in name}
    torch.save({"model": state, "ema": state, "opt": {"state": {}}, "args": None}, tmp_path / "sit.pt")
    run = ["train", *tiny, "--steps", "1", "--run-dir", tmp_path / "run", "--init", tmp_path / "sit.pt"]
    assert "say what it is, --set run.init_kind=dit or sit" in refused(*run)
    assert "a DiT or SiT, whose network sees one time" in refused(
        "sample", tmp_path / "sit.pt", "--out", tmp_path / "x"
    )
    result = call(*run, "--set=run.init_kind=sit", "--set=optim.lr=1e-20", "--set=optim.lr_schedule=constant")
    assert (result.code, result.err) == (0, "")
    got = load(tmp_path / "run").network.state_dict()
    assert torch.equal(got["x_embedder.proj.weight"], state["x_embedder.proj.weight"])
    assert float(got["s_embedder.mlp.2.weight"].abs().max()) < 1e-12


def test_the_command_line_is_the_public_function_too(run_dir: Path, tmp_path: Path) -> None:
    import soflow_fast.export

    flow, config = checkpoint.load_with_config(run_dir)
    soflow_fast.export(flow, config, tmp_path / "a")
    assert load(tmp_path / "a").network.config == config.model
    assert load_official(dict(flow.state_dict()), config.model).network.config == config.model

"""Which checkpoint a run goes on from: none of another run or version; what is passed over is kept."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors

from soflow_fast import TrainState, load
from soflow_fast.errors import CheckpointError
from soflow_fast.runs import checkpoint
from soflow_fast.runs.async_save import Saver
from soflow_fast.runs.checkpoint import reading
from tests.states import advance, build, save_two


def assert_equal(a: TrainState, b: TrainState) -> None:
    left, right = (checkpoint.snapshot(state) for state in (a, b))
    assert left.step == right.step and left.tensors.keys() == right.tensors.keys()
    for file, tensors in left.tensors.items():
        assert tensors.keys() == right.tensors[file].keys()
        assert [name for name in tensors if not torch.equal(tensors[name], right.tensors[file][name])] == []


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with checkpoints of steps 1 and 2; to be copied, not changed."""
    return save_two(tmp_path_factory.mktemp("saved") / "run")


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def test_a_read_error_that_passes_costs_no_checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest, plain, warnings = checkpoint.list_checkpoints(run)[0], reading.read_file, []

    def fail(path: Path, *arguments: Any) -> bytes:
        if path == newest / "network.safetensors":
            raise OSError(5, "Input/output error", str(path))
        return plain(path, *arguments)

    state = build()
    with monkeypatch.context() as patch:
        patch.setattr(reading, "read_file", fail)
        assert checkpoint.resume(run, state, warnings.append)
    assert state.step == 1 and "Input/output error" in warnings[0]
    state.step = 2
    checkpoint.save(run, state)
    again = newest.with_name("step-00000002.aside").rename(newest.with_name("step-00000003"))
    assert checkpoint.read_verified(newest)
    with pytest.raises(CheckpointError, match=r"state\.json: is of step 2"):  # what is renamed is not of another step
        checkpoint.read_verified(again)


def change(folder: Path, **contents: bytes) -> None:
    """Replace files of a checkpoint, "_" for ".", and set their sums right."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, data in contents.items():
        (folder / name.replace("_", ".")).write_bytes(data)
        manifest["sha256"][name.replace("_", ".")] = hashlib.sha256(data).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 7}, "seed: 7 -> 0"),
        ({"model.num_heads": 4}, r"model\.num_heads: 4 -> 2"),  # the shapes are the same
        ({"optim.lr": 0.5}, r"optim\.lr: 0\.5 -> 0\.004"),
    ],
)
def test_a_checkpoint_of_another_run_is_passed_over(
    run: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    place = checkpoint.save(tmp_path / "other", advance(build(**changes), 3))
    shutil.copytree(place, run / "checkpoints" / place.name)
    with pytest.raises(CheckpointError, match=rf"with another configuration \({message}\)"):
        checkpoint.restore(place, build())
    warnings: list[str] = []
    state = build()
    assert checkpoint.resume(run, state, warnings.append) and state.step == 2 and len(warnings) == 1
    assert_equal(state, advance(build(), 2))


def test_what_may_change_from_start_to_start_may_change(run: Path) -> None:
    other = build(keep=5, checkpoint_every=3, optimizer="torch", micro_batch=2)
    assert checkpoint.resume(run, other, pytest.fail) and other.step == 2


@pytest.mark.parametrize("left", [0, 1, 3, -3, -1])
def test_an_optimiser_without_all_weights_is_refused(run: Path, left: int) -> None:
    newest = checkpoint.list_checkpoints(run)[0]
    tensors = load_file(newest / "optimizer.safetensors")
    kept = {name: tensors[name] for name in sorted(tensors)[:left]}
    change(newest, optimizer_safetensors=to_safetensors(kept))
    with pytest.raises(CheckpointError, match="optimiser of"):
        checkpoint.restore(newest, build())


def test_the_first_step_needs_no_optimiser(tmp_path: Path) -> None:
    folder, state = checkpoint.save(tmp_path, build()), build()
    checkpoint.restore(folder, state)
    assert_equal(advance(state, 1), advance(build(), 1))


@pytest.mark.parametrize(
    "key", ["9" * 5000 + ".step", "-1.step", "1e1.step", "0.exp", "\u0663.step", "99.step", "", "."]
)
def test_an_optimiser_with_strange_names_is_refused(run: Path, key: str) -> None:
    newest = checkpoint.list_checkpoints(run)[0]
    tensors = load_file(newest / "optimizer.safetensors") | {key: torch.zeros(())}
    change(newest, optimizer_safetensors=to_safetensors(tensors))
    with pytest.raises(CheckpointError, match="does not fit") as error:
        checkpoint.restore(newest, build())
    assert len(str(error.value)) < 400


def test_old_checkpoints_that_are_links_go_and_what_they_point_to_stays(run: Path, tmp_path: Path) -> None:
    oldest, place = checkpoint.list_checkpoints(run)[-1], tmp_path / "elsewhere"
    oldest.rename(place)
    oldest.symlink_to(place)
    (run / "checkpoints" / ".partial-step-00000007-removed-1").symlink_to(place)  # of an earlier version
    state = build()
    assert checkpoint.resume(run, state, pytest.fail)
    checkpoint.save(run, advance(state, 1))
    assert sorted(os.listdir(run / "checkpoints")) == ["step-00000002", "step-00000003"]
    load(place)


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    plain = os.rename

    def rename(source: Any, target: Any) -> None:
        if "removed" in str(target):
            raise OSError(13, "Permission denied", str(source))
        plain(source, target)

    monkeypatch.setattr(os, "rename", rename)
    state, told = build(), []
    checkpoint.resume(run, state, pytest.fail)
    checkpoint.save(run, advance(state, 1))
    assert f"old checkpoint {run}/checkpoints/step-00000001 not removed: Permission denied" in capsys.readouterr().err
    with Saver(run, 2, told.append) as saver:
        saver.finish(advance(state, 1))
    assert [text.rpartition("/")[2] for text in told] == [
        f"step-0000000{k} not removed: Permission denied" for k in (2, 1)
    ]
    load(checkpoint.list_checkpoints(run)[0])

"""Checkpoints: whole or not there, every flipped bit noticed, the one before it used instead."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from soflow_fast import DiT, SolutionFlow, TrainState, load
from soflow_fast.config.schema import Config, to_json
from soflow_fast.errors import CheckpointError
from soflow_fast.runs import async_save as saver
from soflow_fast.runs import checkpoint
from tests.states import FIELDS, advance, build, save_two

FILES = {
    "config.json",
    "state.json",
    "network.safetensors",
    "ema.safetensors",
    "optimizer.safetensors",
    "manifest.json",
}


def content(state: TrainState) -> dict[str, torch.Tensor]:
    """Every number that training changes."""
    flat = {f"network {k}": v for k, v in state.flow.state_dict().items()}
    flat |= {f"ema {k}": v for k, v in state.ema.state_dict().items()}
    for index, entry in state.optimizer.state_dict()["state"].items():
        flat |= {f"optimizer {index} {k}": v for k, v in entry.items()}
    return flat


def assert_equal(a: TrainState, b: TrainState) -> None:
    left, right = content(a), content(b)
    assert a.step == b.step and left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with checkpoints of steps 1 and 2; to be copied, not changed."""
    return save_two(tmp_path_factory.mktemp("saved") / "run")


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_a_resumed_run_goes_on_to_the_same_bits(run: Path) -> None:
    whole = advance(build(), 5)
    resumed = build()
    assert not torch.equal(content(resumed)["network network.blocks.0.attn.qkv.bias"], torch.ones(48))
    assert checkpoint.resume(run, resumed, pytest.fail)
    assert resumed.step == 2
    assert_equal(advance(resumed, 3), whole)


def test_a_checkpoint_holds_these_files(run: Path) -> None:
    folders = checkpoint.list_checkpoints(run)
    assert [folder.name for folder in folders] == ["step-00000002", "step-00000001"]
    assert all({file.name for file in folder.iterdir()} == FILES for folder in folders)


def test_only_the_newest_stay(tmp_path: Path) -> None:
    state = build()
    for _ in range(4):
        checkpoint.save(tmp_path, advance(state, 1), keep=3)
    assert [folder.name[-1] for folder in checkpoint.list_checkpoints(tmp_path)] == ["4", "3", "2"]


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_flipped_bit_in_any_file_is_noticed_and_the_one_before_is_used(run: Path, name: str) -> None:
    newest, before = checkpoint.list_checkpoints(run)
    whole = (newest / name).read_bytes()
    for position in {0, len(whole) // 3, len(whole) // 2, len(whole) - 1}:
        for bit in (0, 5):
            flip(newest / name, position, bit)
            with pytest.raises(CheckpointError) as error:
                checkpoint.read_verified(newest)
            assert newest.name in str(error.value) and "\n" not in str(error.value)
            with pytest.raises(CheckpointError):
                load(newest)
            (newest / name).write_bytes(whole)
    flip(newest / name, len(whole) // 2)
    warnings: list[str] = []
    state = build()
    assert checkpoint.resume(run, state, warnings.append)
    assert_equal(state, advance(build(), 1))
    assert len(warnings) == 1 and str(newest) in warnings[0] and warnings[0].endswith(f"using {before.name} instead")


def test_every_bit_of_the_manifest_counts(run: Path) -> None:
    newest = checkpoint.list_checkpoints(run)[0]
    manifest = newest / "manifest.json"
    whole = manifest.read_bytes()
    for position in range(len(whole)):
        flip(manifest, position, position % 8)
        with pytest.raises(CheckpointError):
            checkpoint.read_verified(newest)
        manifest.write_bytes(whole)
    assert checkpoint.read_verified(newest).keys() == FILES - {"manifest.json"}


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_or_cut_file_is_noticed(run: Path, name: str) -> None:
    newest = checkpoint.list_checkpoints(run)[0]
    whole = (newest / name).read_bytes()
    (newest / name).write_bytes(whole[:-1] if name != "manifest.json" else whole[: len(whole) // 2])
    with pytest.raises(CheckpointError):
        load(newest)
    (newest / name).unlink()
    with pytest.raises(CheckpointError):
        checkpoint.restore(newest, build())


def test_load_of_a_run_passes_over_a_damaged_checkpoint_with_a_warning(run: Path, capsys: Any) -> None:
    newest, before = checkpoint.list_checkpoints(run)
    expected = load(before)
    assert not torch.equal(expected.network.final_layer.linear.bias, load(newest).network.final_layer.linear.bias)
    flip(newest / "ema.safetensors", 500)
    got = load(run)
    assert torch.equal(got.network.final_layer.linear.bias, expected.network.final_layer.linear.bias)
    err = capsys.readouterr().err
    assert err.startswith("soflow: warning: ") and err.count("\n") == 1
    assert f"{newest / 'ema.safetensors'}: damaged" in err and before.name in err


def test_when_every_checkpoint_is_damaged_the_error_names_the_newest_and_nothing_is_printed(
    run: Path, capsys: Any
) -> None:
    newest, before = checkpoint.list_checkpoints(run)
    for folder in (newest, before):
        flip(folder / "ema.safetensors", 500)
    for use in (lambda: load(run), lambda: checkpoint.resume(run, build(), pytest.fail)):
        with pytest.raises(CheckpointError, match="no older one can be used either") as error:
            use()
        assert str(error.value).startswith(str(newest / "ema.safetensors"))
    assert capsys.readouterr() == ("", "")


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_reached_again(run: Path) -> None:
    newest = checkpoint.list_checkpoints(run)[0]
    flip(newest / "ema.safetensors", 500)
    state = build()
    checkpoint.resume(run, state, lambda text: None)
    damaged = {file.name: file.read_bytes() for file in newest.iterdir()}
    checkpoint.save(run, advance(state, 1), keep=1)
    assert checkpoint.list_checkpoints(run) == [newest]
    aside = newest.with_name(f"{newest.name}.aside")
    assert {file.name: file.read_bytes() for file in aside.iterdir()} == damaged, "it is its owner's to remove"
    again = build()
    assert checkpoint.resume(run, again, pytest.fail)
    assert_equal(again, advance(build(), 2))


def test_a_damaged_checkpoint_pushes_no_good_one_out(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoints" / "step-00000002", run / "checkpoints" / "step-00000009")
    flip(run / "checkpoints" / "step-00000009" / "state.json", 0)
    state = build()
    checkpoint.resume(run, state, lambda text: None)
    checkpoint.save(run, advance(state, 1), keep=1)
    assert [folder.name for folder in checkpoint.list_checkpoints(run)] == ["step-00000003"]
    assert (run / "checkpoints" / "step-00000009.aside").is_dir()


def test_load_gives_the_ema_weights_for_use(run: Path) -> None:
    state = advance(build(), 2)
    flow = load(run)
    expected = state.ema.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in flow.state_dict().items())
    assert not torch.equal(
        state.flow.state_dict()["network.final_layer.linear.bias"], flow.network.final_layer.linear.bias
    )
    assert not flow.training and not any(p.requires_grad for p in flow.parameters())
    for source in (str(run), run / "checkpoints" / "step-00000002"):
        assert torch.equal(load(source).network.final_layer.linear.bias, flow.network.final_layer.linear.bias)


def test_an_exported_directory_loads_to_the_same_bits(tmp_path: Path) -> None:
    state = advance(build(**{"flow.path": "trig", "flow.coefficients": "trig"}), 1)
    folder = checkpoint.export(state.ema, state.config, tmp_path / "out" / "model")
    assert {file.name for file in folder.iterdir()} == {"config.json", "ema.safetensors", "manifest.json"}
    flow, config = checkpoint.load_with_config(folder)
    assert config == state.config and (flow.path, flow.coefficients) == ("trig", "trig")
    assert all(torch.equal(v, state.ema.state_dict()[k]) for k, v in flow.state_dict().items())
    with pytest.raises(ValueError, match=f"folder {folder} exists already"):
        checkpoint.export(state.ema, state.config, folder)
    with pytest.raises(ValueError, match=r"do not belong together: network\.blocks\.1"):
        wrong = replace(state.config, model=replace(state.config.model, depth=state.config.model.depth + 1))
        checkpoint.export(state.ema, wrong, tmp_path / "out" / "wrong")
    assert os.listdir(tmp_path / "out") == ["model"]
    load(folder)


def test_a_later_format_is_refused(run: Path) -> None:
    newest, before = checkpoint.list_checkpoints(run)
    later = json.loads((newest / "state.json").read_text()) | {"format": checkpoint.FORMAT + 1}
    (newest / "state.json").write_text(json.dumps(later))
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["sha256"]["state.json"] = hashlib.sha256((newest / "state.json").read_bytes()).hexdigest()
    (newest / "manifest.json").write_text(json.dumps(manifest))
    for use in (lambda: load(newest), lambda: checkpoint.restore(newest, build())):
        with pytest.raises(CheckpointError, match=rf"{newest}: of format 3; this version reads up to 2"):
            use()
    assert checkpoint.load_with_config(before)[1] == build().config
    names = sorted(os.listdir(run / "checkpoints"))
    for use in (lambda: load(run), lambda: checkpoint.resume(run, build(), pytest.fail)):  # no older one in its place
        with pytest.raises(CheckpointError, match="use a later one"):
            use()
    assert sorted(os.listdir(run / "checkpoints")) == names


def test_nothing_to_load_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place, message in (
        (tmp_path / "nowhere", "no such run"),
        (tmp_path, "no checkpoint"),
        (tmp_path / "file", "not a checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=message) as error:
            load(place)
        assert str(error.value).startswith(str(place))
    assert not checkpoint.resume(tmp_path, build(), pytest.fail)


def write(folder: Path, config: Config, flow: SolutionFlow, more: dict[str, str] | None = None) -> Path:
    """A whole exported directory, whether or not its files belong together."""
    with checkpoint.whole_directory(folder) as temporary:
        (temporary / "config.json").write_text(to_json(config))
        save_file(flow.state_dict(), temporary / "ema.safetensors")
        for name, text in (more or {}).items():
            (temporary / name).write_text(text)
    return folder


def test_a_whole_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    state = build()
    wider = SolutionFlow(DiT(build(**{"model.hidden_size": 24}).config.model))
    deeper = SolutionFlow(DiT(build(**{"model.depth": 2}).config.model))
    cases = [
        (write(tmp_path / "a", state.config, wider), "of another model: network"),
        (write(tmp_path / "b", state.config, deeper), "of another model: network.blocks.1"),
        (write(tmp_path / "c", state.config, state.ema, {"config.json": "{"}), "config.json: not JSON"),
        (write(tmp_path / "d", state.config, state.ema, {"config.json": '{"steps": 0}'}), "config.json: steps must be"),
        (write(tmp_path / "e", state.config, state.ema, {"ema.safetensors": "junk"}), "ema.safetensors: "),
    ]
    for folder, message in cases:
        with pytest.raises(CheckpointError) as error:
            load(folder)
        assert str(folder) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match=r"network\.safetensors is missing"):
        checkpoint.restore(write(tmp_path / "f", state.config, state.ema), state)


@pytest.mark.parametrize("text", ["{", "{}", '{"step": "x"}', "[]"])
def test_a_state_file_of_something_else_is_refused(run: Path, text: str) -> None:
    newest = checkpoint.list_checkpoints(run)[0]
    with checkpoint.whole_directory(run / "checkpoints" / "step-00000003") as temporary:
        for file in newest.iterdir():
            shutil.copy(file, temporary)
        (temporary / "manifest.json").unlink()
        (temporary / "state.json").write_text(text)
    warnings: list[str] = []
    state = build()
    assert checkpoint.resume(run, state, warnings.append)
    assert state.step == 2 and "state.json" in warnings[0]


def test_a_manifest_cannot_point_elsewhere(run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    newest = checkpoint.list_checkpoints(run)[0]
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["sha256"]["../../../secret"] = "0" * 64
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError):
        checkpoint.read_verified(newest)


def test_a_failed_save_leaves_nothing_and_keeps_the_old_ones(run: Path, monkeypatch: Any) -> None:
    state = build()
    checkpoint.resume(run, state, pytest.fail)
    before = sorted(os.listdir(run / "checkpoints"))

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="No space left"):
                checkpoint.save(run, advance(state, 1))
        assert sorted(os.listdir(run / "checkpoints")) == before


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from soflow_fast import TrainState, preset
from soflow_fast.runs import checkpoint
from soflow_fast.runs.checkpoint import folder
import safetensors.torch

torch.set_num_threads(1)
run, fields = Path(sys.argv[1]), eval(sys.argv[2])
state = TrainState.build(preset("digits", **fields))
assert checkpoint.resume(run, state, print)
state.step = 3

def die(function, call):
    count = [0]
    def counted(*arguments, **settings):
        count[0] += 1
        if count[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **settings)
    return counted

points = [(folder, "save_file", 2), (os, "fsync", 3), (os, "rename", 1), (os, "fsync", 8)]
points += [(shutil, "rmtree", 2)]
for point, (module, name, call) in enumerate(points):
    child = os.fork()
    if child == 0:
        setattr(module, name, die(getattr(module, name), call))
        checkpoint.save(run.parent / f"run{point}", state)
        os._exit(0)
    print(os.waitpid(child, 0)[1])
"""


def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(run: Path, environment: dict[str, str]) -> None:
    points = 5
    for point in range(points):
        shutil.copytree(run, run.parent / f"run{point}")
    arguments = [sys.executable, "-c", KILLED, str(run), repr(FIELDS)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["9"] * points, done
    stale = 0
    for point in range(points):
        folder = run.parent / f"run{point}"
        stale += len(list((folder / "checkpoints").glob(".partial-*")))
        load(folder)
        state = build()
        assert checkpoint.resume(folder, state, pytest.fail)
        assert state.step in (2, 3)
        assert not list((folder / "checkpoints").glob(".partial-*"))
        checkpoint.save(folder, advance(state, 1))
        assert all(folder.name.startswith("step-") for folder in (folder / "checkpoints").iterdir())
    assert stale >= 3, "the kills of this test came too late"


def test_saving_on_a_full_disk_leaves_the_older_one(mount: Callable[..., Path], run: Path) -> None:
    disk = mount("size=1m")
    shutil.copytree(run, disk / "run")
    (disk / "ballast").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize - 40_000))
    state = build()
    checkpoint.resume(disk / "run", state, pytest.fail)
    with pytest.raises(OSError, match=r"[Nn]o space left"):
        checkpoint.save(disk / "run", advance(state, 1))
    assert sorted(os.listdir(disk / "run" / "checkpoints")) == ["step-00000001", "step-00000002"]
    load(disk / "run")


def test_no_thread_is_left_when_a_save_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python would end it, at exit, while it frees its tensors, and C++ would abort the process with SIGABRT."""
    plain, gate = saver.Saver._write, threading.Event()

    def write(self: saver.Saver, content: checkpoint.Snapshot) -> None:
        plain(self, content)
        gate.wait(0.2)  # what comes after the save is done

    monkeypatch.setattr(saver.Saver, "_write", write)
    saver.Saver(tmp_path, 2, pytest.fail).finish(build())
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]

"""Single bits that flip in a checkpoint: each is noticed, and the checkpoint before it is used and named."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from soflow_fast.errors import CheckpointError
from soflow_fast.runs import checkpoint

FLIPS = 200


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_200_flipped_bits_in_all_files(run_dir: Path) -> None:
    newest, before = checkpoint.list_checkpoints(run_dir)
    chance, files = random.Random(4), sorted(newest.iterdir())
    assert len(files) == 7
    noticed = 0
    for k in range(FLIPS):
        file = files[k % len(files)]
        content = file.read_bytes()
        flip(file, chance.randrange(8 * len(content)))
        with pytest.raises(CheckpointError) as error:
            checkpoint.load(newest)
        noticed += str(newest) in str(error.value) and "\n" not in str(error.value)
        file.write_bytes(content)
    assert noticed == FLIPS
    checkpoint.load(newest)
    checkpoint.load(before)


@pytest.mark.parametrize("module", ["sample", "evaluate", "train"])
def test_the_one_before_is_used_and_named(
    module: str, run_dir: Path, call: Any, run_flags: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    newest, before = checkpoint.list_checkpoints(run_dir)
    flip(newest / "network.safetensors", 9999)
    monkeypatch.chdir(run_dir.parents[1])
    monkeypatch.setattr("soflow_fast.runs.samples.EVALUATION_SAMPLES", 100)
    arguments = {
        "sample": [run_dir, "--out", "out", "--n", "1"],
        "evaluate": [run_dir, "--n", "100"],
        "train": run_flags,
    }
    result = call(module, *arguments[module])
    said = result.out if module == "train" else result.err
    assert result.code == 0
    assert f"{newest.name}/network.safetensors: damaged" in said and f"using {before.name} instead" in said


def test_a_checkpoint_named_by_the_user_is_not_replaced(run_dir: Path, refused: Any, tmp_path: Path) -> None:
    newest = checkpoint.list_checkpoints(run_dir)[0]
    flip(newest / "ema.safetensors", 12345)
    for module, arguments in (("sample", ["--out", tmp_path / "out"]), ("evaluate", [])):
        assert f"{newest / 'ema.safetensors'}: damaged" in refused(module, newest, *arguments)
    assert not (tmp_path / "out").exists()


def test_nothing_usable_ends_with_exit_2_and_is_left_as_it_was(
    run_dir: Path, refused: Any, run_flags: list[str], files: Any, monkeypatch: Any
) -> None:
    for folder in checkpoint.list_checkpoints(run_dir):
        flip(folder / "manifest.json", 77)
    shutil.copytree(run_dir, run_dir.with_name("copy"))
    monkeypatch.chdir(run_dir.parents[1])
    refused("train", *run_flags)
    assert files(run_dir) == files(run_dir.with_name("copy"))

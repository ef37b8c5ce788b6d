"""Wrong input and full disks: one line on stderr that names the flag or file, exit code 2, nothing half-written."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from soflow_fast.commands.parser import Parser
from soflow_fast.config.schema import SHORT_NAMES

Call = Callable[..., Any]


OUT_OF_RANGE = {
    "--steps": ["0", "-5", "ten", "1.5", "1e9", ""],
    "--batch-size": ["0", "-1", "many", "9999999999"],
    "--micro-batch": ["-2", "most", "1.5", ""],
    "--precision": ["fp17", "tf32", ""],
    "--quotient": ["pairs", ""],
    "--condition-size": ["-1", "many", "1.5", "9999999999"],
    "--guidance-range": ["2", "4,1", "0.5,2", "1,x", "1,2,3", "1,2000"],
    "--guidance-precision": ["bf16", "FP8", ""],
    "--quotient-precision": ["fp8", "tf32", ""],
    "--objective": ["consistency", "MeanFlow", ""],
    "--teacher": ["teacher", ""],
    "--teacher-decay": ["1", "-0.1", "x"],
    "--seed": ["-1", "x", "9223372036854775808"],
    "--device": ["gpu", "cuda:99", "meta", ""],
    "--optimizer": ["adam", ""],
    "--recompute": ["all", ""],
    "--parallel": ["fsdp2", "DDP", ""],
    "--attention": ["flash5", "sdpa-cudnn", ""],
    "--eval-every": ["-1", "often"],
    "--reference": ["nowhere", "x" * 300],
    "--checkpoint-every": ["-1", "often"],
    "--keep": ["1", "-1", "all"],
    "--on-nonfinite": ["ignore", ""],
    "--track": ["tensorboard", "W&B", ""],
    "--data": ["nowhere", "x" * 300],
    "--conditions": ["nowhere", "/dev/null", "x" * 300],
    "--init": ["nowhere", "/dev/null"],
    "--resume-official": ["nowhere", "/dev/null"],
    "--run-dir": ["/dev/null", "/dev/null/run", "x" * 300],
}
SWITCHES = {"compile", "cuda_graph", "resize", "skip_bad"}
"""They take no value."""


@pytest.mark.parametrize("mode", [[], ["--dry-run"]])
@pytest.mark.parametrize("flag", OUT_OF_RANGE)
def test_a_wrong_value_of_a_short_flag_is_refused_by_name(
    flag: str, mode: list[str], tiny: list[str], refused: Call, tmp_path: Path, monkeypatch: Any
) -> None:
    assert {name.removeprefix("--").replace("-", "_") for name in OUT_OF_RANGE} == set(SHORT_NAMES) - SWITCHES
    monkeypatch.chdir(tmp_path)
    for value in OUT_OF_RANGE[flag]:
        if flag == "--run-dir" and mode:
            continue
        line = refused("train", *tiny, *mode, flag, value)
        assert flag in line or (value and value in line), line
        assert os.listdir(tmp_path) == []


WRONG = [
    ("train", ["digit"], ["'digit'", "did you mean 'digits'?"]),
    ("train", ["imagenet-b4"], ["did you mean 'imagenet256-b4'?"]),
    ("train", ["zzz"], ["'zzz'", "digits, digits-latent, cifar10"]),
    ("train", ["--stepz", "5"], ["--stepz", "did you mean --steps?"]),
    ("train", ["--batchsize=5"], ["--batchsize", "did you mean --batch-size?"]),
    ("train", ["--step", "5"], ["--step ", "did you mean --steps?"]),
    ("train", ["--compile=1"], ["--compile", "takes no value, got '1'"]),
    ("train", ["--qqqqqq"], ["--qqqqqq"]),
    ("train", ["digits", "cifar10"], ["argument cifar10"]),
    ("train", ["--steps"], ["--steps"]),
    ("train", ["--set", "objective.epz=1"], ["'objective.epz'", "did you mean 'objective.eps'?"]),
    ("train", ["--set", "objective.eps"], ["--set objective.eps", "FIELD=VALUE"]),
    ("train", ["--set", "objective.eps=0"], ["objective.eps", "above 0"]),
    ("train", ["--set", "model.num_heads=7"], ["model.num_heads"]),
    ("train", ["--set", "optim.betas=0.9"], ["optim.betas"]),
    ("train", ["--teacher", "ema-literal"], ["--teacher must be one of student, ema, got 'ema-literal'"]),
    ("train", ["--compile=on"], ["--compile"]),
    ("train", ["--gpu", "h100"], ["--gpu h100", "--dry-run"]),
    ("train", ["--dry-run", "--gpu", "h300"], ["--gpu", "'h300'", "h100", "h200", "a100"]),
    ("train", ["--dry-run", "--gpu"], ["--gpu"]),
    ("train", ["--gpus", "8"], ["--gpus 8", "--dry-run"]),
    ("train", ["--nodes", "2"], ["--nodes 2", "--dry-run --gpus"]),
    ("train", ["--dry-run", "--nodes", "2"], ["--nodes 2", "--dry-run --gpus"]),
    ("train", ["--dry-run", "--gpus", "0"], ["--gpus ", "from 1 to 1024", "'0'"]),
    ("train", ["--dry-run", "--gpus", "many"], ["--gpus ", "'many'"]),
    ("train", ["--dry-run", "--gpus", "8", "--nodes", "0"], ["--nodes ", "from 1 to 65536", "'0'"]),
    ("train", ["--dry-run", "--gpus", "8", "--nodes", "1.5"], ["--nodes ", "'1.5'"]),
    ("train", ["--dry-run", "--gpus", "1"], ["--gpus 1", "--gpu NAME"]),
    ("train", ["--dry-run", "--gpus", "3"], ["--batch-size ", "multiple of the 3 GPUs"]),
    ("train", ["--dry-run", "--gpus", "8", "--set", "run.shard_ranks=4"], ["run.shard_ranks", "hsdp"]),
    (
        "train",
        ["--dry-run", "--gpus", "8", "--parallel", "hsdp", "--set", "run.shard_ranks=3"],
        ["--parallel hsdp", "cut over 3 ranks, 8 are no multiple"],
    ),
    ("train", ["--dry-run", "--gpus", "2", "--parallel", "fsdp", "--precision", "fp8"], ["--parallel fsdp", "float8"]),
    ("train", ["--dry-run", "--gpus", "2", "--parallel", "fsdp", "--cuda-graph"], ["--cuda-graph", "--parallel fsdp"]),
    ("train", ["--dry-run", "--gpus", "64", "--parallel", "fsdp", "--batch-size", "64"], ["consistency sample"]),
    ("train", ["--set", "compile=on"], ["--compile must be true or false, got 'on'"]),
    ("train", ["--config", "nowhere.json"], ["--config nowhere.json", "No such file"]),
    ("train", ["--config", "."], ["--config .", "directory"]),
    ("train", ["--config", "junk"], ["--config junk", "not JSON"]),
    ("train", ["--config", "binary"], ["--config binary"]),
    ("train", ["--config", "typo.json"], ["--config typo.json", "'model.dept'", "did you mean 'model.depth'?"]),
    ("train", ["--config", "junk", "digits"], ["--config junk", "digits"]),
    ("train", ["--data", "junk"], ["--data junk", "digits"]),
    ("train", ["cifar10"], ["--data is missing"]),
    ("train", ["cifar10", "--data", "junk"], ["--data junk", "cannot be read"]),
    ("train", ["cifar10", "--data", "empty"], ["--data empty", "no images"]),
    ("train", ["imagenet256-b4"], ["--data is missing", "latents"]),
    ("train", ["imagenet256-b4", "--dry-run", "--epochs", "2"], ["--epochs", "needs --data"]),
    ("train", ["--epochs", "0"], ["--epochs must be a whole number"]),
    ("train", ["--epochs", "2", "--steps", "3"], ["--epochs 2 and --steps 3", "give one of the two"]),
    ("train", ["--set", "model.num_classes=9"], ["10 classes, the model 9", "model.num_classes"]),
    ("train", ["--run-dir", "junk"], ["--run-dir junk", "file"]),
    ("train", ["--run-dir", "full"], ["--run-dir full", "neither empty nor a run"]),
    ("train", ["--set", "run.run_dir=full"], ["--run-dir full"]),
    ("sample", ["nowhere", "--out", "out"], ["nowhere", "no such run"]),
    ("sample", ["junk", "--out", "out"], ["junk", "not a checkpoint"]),
    ("sample", ["full", "--out", "out"], ["full", "no checkpoint"]),
    ("sample", ["full"], ["--out"]),
    ("sample", ["--out", "out"], ["RUN"]),
    ("sample", ["RUN", "--out", "junk"], ["--out junk"]),
    ("sample", ["RUN", "--out", "junk/out"], ["--out junk/out"]),
    ("sample", ["RUN", "--out", "out", "--n", "0"], ["--n ", "'0'"]),
    ("sample", ["RUN", "--out", "out", "--n", "x"], ["--n ", "'x'"]),
    ("sample", ["RUN", "--out", "out", "--n", "1000000000"], ["--n ", "to 10000000"]),
    ("sample", ["RUN", "--out", "out", "--nfe", "0"], ["--nfe"]),
    ("sample", ["RUN", "--out", "out", "--nfe", "1001"], ["--nfe ", "to 1000,"]),
    ("sample", ["RUN", "--out", "out", "--times", "0.9,0.5"], ["--times must begin with 1 and fall"]),
    ("sample", ["RUN", "--out", "out", "--times", "1,0.5,0.5"], ["--times must begin with 1 and fall"]),
    ("sample", ["RUN", "--out", "out", "--times", "1,half"], ["--times must be numbers", "'1,half'"]),
    ("sample", ["RUN", "--out", "out", "--times", "1,nan"], ["--times", "[1.0, nan]"]),
    ("sample", ["RUN", "--out", "out", "--times", "1,0.5", "--nfe", "3"], ["--times", "each of 3 network calls"]),
    ("sample", ["RUN", "--out", "out", "--method", "heun"], ["--method", "'heun'", "consecutive"]),
    ("sample", ["RUN", "--out", "out", "--format", "jpg"], ["--format", "'jpg'", "npz"]),
    ("sample", ["RUN", "--out", "out", "--batch-size", "0"], ["--batch-size", "'0'"]),
    ("sample", ["RUN", "--out", "out", "--seed", "-1"], ["--seed"]),
    ("sample", ["RUN", "--out", "out", "--seed", "9223372036854775808"], ["--seed ", "to 9223372036854775807,"]),
    ("sample", ["RUN", "--out", "out", "--labels", "3,10"], ["--labels ", "0 to 9", "'10'"]),
    ("sample", ["RUN", "--out", "out", "--labels", "3,"], ["--labels"]),
    ("sample", ["RUN", "--out", "out", "--labels", ""], ["--labels"]),
    ("sample", ["RUN", "--out", "out", "--labels", "-1"], ["--labels"]),
    ("sample", ["RUN", "--out", "out", "--labels", "3," * 9999 + "9" * 4000], ["--labels ", "'999"]),
    ("sample", ["RUN", "--out", "out", "--device", "cuda:99"], ["--device cuda:99"]),
    ("sample", ["RUN", "--out", "out", "--label", "3"], ["--label ", "did you mean --labels?"]),
    ("sample", ["RUN", "--outt", "out"], ["unknown flag --outt", "did you mean --out?"]),
    ("sample", ["--labels", "3"], ["required", "--out"]),
    ("evaluate", ["nowhere"], ["nowhere"]),
    ("evaluate", ["RUN", "--n", "99"], ["--n "]),
    ("evaluate", ["RUN", "--n", "1000001"], ["--n ", "to 1000000,"]),
    ("evaluate", ["RUN", "--seed", "9223372036854775808"], ["--seed "]),
    ("evaluate", ["RUN", "--nfe", "1,0"], ["--nfe"]),
    ("evaluate", ["RUN", "--nfe", "1,1001"], ["--nfe ", "'1001'"]),
    ("evaluate", ["RUN", "--nfe", ""], ["--nfe"]),
    ("evaluate", ["RUN", "--seeds", "1"], ["did you mean --seed?"]),
]


@pytest.mark.parametrize(("module", "arguments", "parts"), WRONG, ids=[" ".join([m, *a])[:80] for m, a, _ in WRONG])
def test_wrong_input_is_one_line_and_exit_2(
    module: str,
    arguments: list[str],
    parts: list[str],
    refused: Call,
    finished: Any,
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: Any,
    files: Call,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("junk").write_bytes(b"PK\x03\x04 junk")
    Path("binary").write_bytes(b"\xff\xfe\x00")
    Path("typo.json").write_text('{"model": {"dept": 1}}')
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full", "thesis.tex").write_text("mine")
    before = files(tmp_path)
    small = tiny if module == "train" and "--config" not in arguments else []
    line = refused(module, *small, *(str(finished.folder) if text == "RUN" else text for text in arguments))
    assert all(part in line for part in parts) and len(line) < 400, line
    assert files(tmp_path) == before


def test_wrong_input_in_a_process_of_its_own(command: Call, tmp_path: Path) -> None:
    result = command("train", "digitz", cwd=tmp_path)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("soflow: error: unknown preset 'digitz' (did you mean 'digits'?)")
    assert result.err.count("\n") == 1 and os.listdir(tmp_path) == []


@pytest.mark.parametrize("module", ["sample", "evaluate", "train"])
@pytest.mark.parametrize("how", ["damaged", "another model"])
def test_a_run_whose_checkpoints_are_of_no_use(
    module: str,
    how: str,
    run_dir: Path,
    run_flags: list[str],
    refused: Call,
    files: Call,
    monkeypatch: Any,
    damage: Call,
) -> None:
    from soflow_fast.config.presets import preset
    from soflow_fast.runs.checkpoint import directory, list_checkpoints, save
    from soflow_fast.training.state import TrainState
    from soflow_fast.training.step import train_step

    newest = list_checkpoints(run_dir)[0]
    if how == "damaged":
        for folder in list_checkpoints(run_dir):
            damage(folder / "ema.safetensors")
    else:
        small = {"model.depth": 1, "model.num_heads": 2, "device": "cpu", "steps": 20, "batch_size": 8}
        other = TrainState.build(preset("digits", **{"model.hidden_size": 24, **small}))
        right = TrainState.build(preset("digits", **{"model.hidden_size": 16, **small}))
        other.config, other.step = right.config, 19
        train_step(other, torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))
        shutil.rmtree(directory(run_dir))
        newest = save(run_dir, other)
    before = files(run_dir)
    monkeypatch.chdir(run_dir.parents[1])
    arguments = {"sample": [run_dir, "--out", "out"], "evaluate": [run_dir], "train": run_flags}[module]
    line = refused(module, *arguments)
    assert newest.name in line and ("damaged" if how == "damaged" else "of another model") in line
    assert files(run_dir) == before and not Path("out").exists()


# Disks


@pytest.mark.parametrize("kilobytes", [4, 60, 120, 200])
def test_training_on_a_full_disk(kilobytes: int, mount: Call, run_flags: list[str], call: Call, tmp_path: Path) -> None:
    disk = mount(f"size={kilobytes}k")
    result = call("train", *run_flags, "--set", "run.keep=9", "--run-dir", disk / "run")
    assert result.code == 2 and result.err.count("\n") == 1, result
    assert str(disk / "run") in result.err and "o space left on device" in result.err
    found = [file for file in disk.rglob("*") if ".partial" in file.name]
    assert found == []
    for line in (disk / "run" / "metrics.jsonl").read_text().splitlines() if kilobytes > 4 else []:
        json.loads(line)
    for folder in (disk / "run" / "checkpoints").glob("*"):
        assert (folder / "manifest.json").stat().st_size


PRINT = "from soflow_fast.commands import process; process.run(lambda: print('x' * 100_000))"


def test_output_to_a_full_disk(environment: dict[str, str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PRINT], env=environment, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (2, "soflow: error: cannot read or write: No space left on device\n")


MISTAKE = """
from soflow_fast import train
from soflow_fast.commands import process
process.run(lambda: train.main(["--steps", "x"]))
"""


def test_an_error_that_cannot_be_printed_keeps_its_exit_code(environment: dict[str, str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", MISTAKE], env=environment, stdout=full, stderr=full)
    assert done.returncode == 2


def test_a_reader_that_goes_away_is_no_error(environment: dict[str, str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", PRINT], env=environment, stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_sampling_on_a_full_disk_keeps_whole_images_and_goes_on(
    mount: Call, finished: Any, refused: Call, call: Call, files: Call, tmp_path: Path
) -> None:
    disk, flags = mount("size=64k"), ["--n", "64", "--batch-size", "8"]
    line = refused("sample", finished.folder, "--out", disk / "out", *flags)
    assert f"--out {disk / 'out'}" in line and "No space left" in line
    assert call("sample", finished.folder, "--out", tmp_path / "whole", *flags).code == 0
    left, whole = files(disk / "out"), files(tmp_path / "whole")
    assert 3 < len(left) < 64 and left.items() <= whole.items()
    subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
    result = call("sample", finished.folder, "--out", disk / "out", *flags)
    assert result.code == 0 and files(disk / "out") == whole
    assert re.match(r"\d+ of 64 are there already\n", result.out)


def test_a_read_only_disk(mount: Call, finished: Any, tiny: list[str], refused: Call) -> None:
    disk = mount("ro,size=1m")
    for place in (disk / "new", disk):
        line = refused("train", *tiny, "--steps", "2", "--run-dir", place)
        assert f"--run-dir {place}" in line and "Read-only file system" in line
        line = refused("sample", finished.folder, "--out", place)
        assert f"--out {place}" in line and "Read-only file system" in line


def test_a_run_on_a_read_only_disk_can_be_drawn_from(mount: Call, run_dir: Path, call: Call, tmp_path: Path) -> None:
    disk = mount("size=4m")
    shutil.copytree(run_dir, disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert call("sample", disk / "run", "--out", tmp_path / "out", "--n", "1").code == 0


def test_abbreviated_flags_are_not_taken() -> None:
    parser = Parser(prog="x")
    parser.add_argument("--checkpoint-every")
    with pytest.raises(ValueError, match="did you mean --checkpoint-every"):
        parser.parse(["--checkpoint", "3"])

"""The command lines as their users meet them: what they print and write, and how they end."""

import dataclasses
import fcntl
import importlib
import io
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from PIL import Image

from soflow_fast.config.presets import preset
from soflow_fast.config.schema import AttentionBackend, from_json, to_json

NAMES = ("train", "sample", "evaluate", "export", "gallery")
COMMANDS = {name: importlib.import_module(f"soflow_fast.{name}") for name in NAMES}
train, sample, evaluate, *_ = COMMANDS.values()
Call = Callable[..., Any]


def png_size(content: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        assert image.format == "PNG"
        return image.size


# The flags: a new one is a decision, to be made here too.


TRAIN = {
    "the run": "latent config set epochs run-dir init resume-official steps seed device eval-every reference "
    "checkpoint-every keep on-nonfinite track",
    "the data": "data resize no-resize skip-bad no-skip-bad batch-size conditions condition-size",
    "learning": "objective teacher teacher-decay guidance-range guidance-precision quotient quotient-precision",
    "speed and memory": "precision micro-batch recompute attention optimizer compile no-compile cuda-graph "
    "no-cuda-graph parallel",
    "diagnosis": "help dry-run gpu gpus nodes env",
}


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        ("train", " ".join(TRAIN.values())),
        (
            "sample",
            "help out n nfe times method guidance labels conditions format batch-size vae seed device overwrite",
        ),
        ("evaluate", "help n nfe times guidance conditions vae seed reference metrics inception dinov2 device json"),
        ("gallery", "help out device"),
        ("export", "help format"),
        ("gallery", "help out device"),
    ],
)
def test_the_flags_are_these_and_help_names_each(
    module: str, flags: str, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    result = call(module, "--help")
    assert (result.code, result.err) == (0, "")
    entries = re.findall(r"^  -.*?(?:  |$)", result.out, re.MULTILINE)
    listed = re.findall(r"(?<=[ ,])--[a-z][a-z0-9-]*", "".join(entries))
    assert listed == COMMANDS[module].parser().flags()
    assert sorted(listed) == sorted(f"--{flag}" for flag in flags.split())
    assert f"python -m soflow_fast.{module}" in result.out
    lines = result.out.splitlines()
    assert len(lines) <= 92 and max(map(len, lines)) <= 120


def test_help_of_train_groups_flags_by_what_a_person_wants_and_says_what_they_take(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    text = call("train", "--help").out
    for title, flags in TRAIN.items():
        group = text.split(f"\n{title}:\n")[1].split("\n\n")[0]
        assert re.findall(r"--([a-z][a-z-]*)", re.sub(r" {4}.*", "", group)) == flags.split()
    said = " ".join(text.split())
    assert f"{', '.join(get_args(AttentionBackend))}; default auto)" in said
    assert "--keep N Newest checkpoints that stay, at least 2 (default 2)" in said
    assert all(flag in said for flag in ("--steps N Updates", "--teacher-decay X Decay of the teacher's average"))


# A whole run


def test_a_run_prints_its_progress_in_plain_lines(finished: Any) -> None:
    lines = finished.result.out.splitlines()
    assert finished.result.err == ""
    assert lines[0].startswith(
        "training digits in runs/digits: 0.01 M parameters, 1797 images, 20 steps of 8, fp32 on cpu"
    )
    line = r"step (\d+)/20  \d+:\d\d left  fm -?\d+\.\d{3}  sc -?\d+\.\d{3}  mean q\^2 \d+\.\d{3}  \d+ img/s  \d+ MB"
    progress = [re.fullmatch(line, text) for text in lines if text.startswith("step")]
    assert [match[1] if match else None for match in progress][-1] == "20" and all(progress)
    assert "\r" not in finished.result.out
    assert "trained 20 steps; samples: runs/digits/samples/final.png" in lines


def test_a_run_ends_with_figures_of_its_own_samples(finished: Any, call: Call) -> None:
    lines = finished.result.out.splitlines()
    figures = (
        r"{} step.: 0\.\d{{4}} classified as their label, Frechet distance \d+\.\d, 0\.\d{{4}} within distance 4 of .*"
    )
    assert "evaluating 4000 samples" in lines
    assert re.fullmatch(figures.format(1), lines[-2]) and re.fullmatch(figures.format(2), lines[-1])
    kept = json.loads((finished.folder / "evaluation.json").read_text())
    assert kept["step"] == 20 and kept["samples"] == 4000 and kept["nfe"].keys() == {"1", "2"}
    again = call("evaluate", finished.folder, "--nfe", "2")
    assert (again.code, again.err, again.out) == (0, "", lines[-1] + "\n")
    few = call("evaluate", finished.folder, "--nfe", "1", "--n", "100", "--seed", "3", "--json")
    values = json.loads(few.out)
    assert values["samples"] == 100 and values["seed"] == 3 and values["nfe"].keys() == {"1"}
    assert values["nfe"]["1"].keys() == {"accuracy", "frechet", "near_copies"}


def test_a_run_leaves_these_files(finished: Any, files: Call) -> None:
    found = files(finished.folder)
    places = {name.split("/")[0] for name in found}
    texts = {"config.json", "data.json", "code.json", "metrics.jsonl", "evaluation.json"}
    assert places == {*texts, "samples", "checkpoints", "tensorboard", ".lock"}
    assert not [name for name in found if "partial" in name]
    grids = {name for name in found if name.startswith("samples/")}
    assert grids == {"samples/step-00000010.png", "samples/final.png"}
    assert {png_size(found[name]) for name in grids} == {(422, 422)}
    assert {name.split("/")[1] for name in found if name.startswith("checkpoints/")} == {
        "step-00000015",
        "step-00000020",
    }
    entries = [json.loads(line) for line in found["metrics.jsonl"].splitlines()]
    assert [entry["step"] for entry in entries] == list(range(2, 21, 2))
    names = {"fm_loss", "sc_loss", "sc_mse", "grad_norm", "lr", "images_per_s", "memory_mb", "seconds"}
    assert all(
        names <= entry.keys() and all(map(float.__instancecheck__, map(float, entry.values()))) for entry in entries
    )
    assert sum("tfevents" in name and len(content) > 1000 for name, content in found.items()) == 1


def test_config_json_is_resolved_and_taken_back(finished: Any, call: Call, tmp_path: Path, monkeypatch: Any) -> None:
    path = finished.folder / "config.json"
    config = from_json(path.read_text())
    assert (config.precision, config.run.device, config.run.run_dir) == ("fp32", "cpu", "runs/digits")
    assert (config.steps, config.batch_size, config.model.hidden_size, config.run.checkpoint_every) == (20, 8, 16, 5)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("soflow_fast.runs.samples.EVALUATION_SAMPLES", 100)
    result = call("train", "--config", path, "--run-dir", "again", "--set", "run.sample_every=0")
    assert (result.code, result.err) == (0, "")
    for name in ("network", "ema", "optimizer"):
        where = f"checkpoints/step-00000020/{name}.safetensors"
        assert (tmp_path / "again" / where).read_bytes() == (finished.folder / where).read_bytes()


def test_the_same_command_again_after_the_end_changes_no_weight(
    run_dir: Path, run_flags: list[str], call: Call, monkeypatch: Any, files: Call
) -> None:
    before = files(run_dir)
    monkeypatch.chdir(run_dir.parents[1])
    result = call("train", "digits", *run_flags)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("resuming runs/digits at step 20 of 20\n")
    assert files(run_dir) == before


def test_another_configuration_is_refused_with_the_difference(
    run_dir: Path, run_flags: list[str], refused: Call, monkeypatch: Any, files: Call
) -> None:
    before = files(run_dir)
    monkeypatch.chdir(run_dir.parents[1])
    line = refused("train", *run_flags, "--seed", "3", "--set", "objective.p=0.5")
    assert (
        "--run-dir runs/digits: holds a run with another configuration (objective.p: 1.0 -> 0.5; seed: 0 -> 3)" in line
    )
    assert files(run_dir) == before


# Signals, to processes of their own


class Terminal:
    """A command on a terminal of its own. What it wrote is read as late as possible: a full terminal holds it back."""

    def __init__(self, start: Call, *arguments: object, cwd: Path) -> None:
        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
        self.process = start(*arguments, cwd=cwd, stdin=slave, stdout=slave, stderr=subprocess.PIPE)
        os.close(slave)
        self.text = ""

    def read_until(self, pattern: str) -> re.Match[str]:
        """Read on until the pattern has appeared. Fails if the command ends before."""
        while not (found := re.search(pattern, self.text)):
            assert self._read(), f"{pattern} did not appear: {self.text}"
        return found

    def end(self) -> tuple[int, str]:
        """The exit code and stderr."""
        while self._read():
            pass
        assert self.process.stderr
        error = self.process.stderr.read().decode()
        self.process.stderr.close()
        return self.process.wait(), error

    def _read(self) -> bool:
        assert select.select([self.master], [], [], 120)[0], "nothing comes"
        try:
            part = os.read(self.master, 256)
        except OSError:  # how Linux says that nobody is left on the other side
            part = b""
        self.text += part.decode()
        return bool(part)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def test_signals_save_and_the_same_command_goes_on_on_a_terminal(start: Call, tiny: list[str], tmp_path: Path) -> None:
    arguments = ["train", *tiny, "--steps", "30000", "--set", "run.log_every=1", "--run-dir", "run"]
    reached = 0
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        terminal = Terminal(start, *arguments, cwd=tmp_path)
        try:
            if reached:
                terminal.read_until(rf"resuming run at step {reached} of 30000\r\n")
            terminal.read_until(rf"\r\x1b\[2Kstep {reached + 3}/30000  ")  # a live line, rewritten in place
            terminal.process.send_signal(number)
            ended, error = terminal.end()
        finally:
            terminal.close()
        said = re.fullmatch(r"soflow: stopped and saved at step (\d+) of 30000; the same command resumes\n", error)
        assert ended == code and said, (ended, error)
        assert int(said[1]) >= reached + 3
        reached = int(said[1])
        shown = terminal.text.removesuffix("\x1b[?25h")  # the cursor
        assert shown.count("\n") == 5 and re.search(r" MB *\r\n$", shown), shown[-200:]
        newest = max((tmp_path / "run" / "checkpoints").iterdir())
        assert newest.name == f"step-{reached:08d}" and (newest / "manifest.json").exists()


def test_sigterm_during_start_up_ends_with_143(start: Call, tmp_path: Path) -> None:
    process = start("train", python=("-X", "importtime"), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:  # what Python has imported so far: torch is the first thing that takes long
            if " torch." in line:
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait() == 143
    finally:
        process.kill()
        process.stderr.close()
    assert "Traceback" not in rest and rest.splitlines()[-1] == "soflow: interrupted"
    assert os.listdir(tmp_path) == []


def test_no_library_swallows_a_signal(environment: dict[str, str]) -> None:
    swallow = """
import os, signal
from soflow_fast.commands import process

def main():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except Exception:
        print("swallowed")

process.run(main)
"""
    done = subprocess.run([sys.executable, "-c", swallow], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "soflow: interrupted\n")


# --dry-run and --env

ROWS = [
    "preset", "attention", "MLP", "data", "parameters", "FLOPs", "memory", "on a GPU", "speed", "time needed",
    "first losses",
]  # fmt: skip


# The sizes of a preset are set here: what is left of one is its data, patches and micro-batch.
@pytest.mark.parametrize("preset", ["digits", "cifar10", "imagenet256-b4", "imagenet256-b2", "imagenet256-xl2-24gb"])
def test_dry_run_says_what_a_run_needs_and_writes_nothing(
    preset: str, call: Call, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["model.hidden_size=32", "model.depth=2", "model.num_heads=2"]
    result = call(
        "train", preset, "--dry-run", "--device", "cpu", "--batch-size", "16", *(f"--set={text}" for text in small)
    )
    assert (result.code, result.err) == (0, "")
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in result.out.splitlines())
    assert list(rows) == ROWS
    assert rows["preset"].startswith(f"{preset}: DiT of hidden size 32, depth 2")
    assert re.search(r"^[\d.]+ M$", rows["parameters"])
    forwards = re.search(r"GFLOP per image and step, ([\d.]+) forwards$", rows["FLOPs"])
    assert forwards and 3.2 < float(forwards[1]) < 5
    assert re.search(r"\d MB at its peak", rows["memory"])
    assert re.search(r"^predicted: \d+\.\d\d GB at its peak, bf16, batch 16.*: weights .*moments", rows["on a GPU"])
    assert re.search(r"steps/s, [\d.e+]+ images/s at batch 16$", rows["speed"])
    assert re.search(r"^\d+:\d\d(:\d\d)? for \d+ steps$", rows["time needed"])
    assert "nan" not in result.out
    assert os.listdir(tmp_path) == []


def test_dry_run_predicts_a_step_on_a_gpu_that_is_not_here(call: Call, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--device", "cpu", "--batch-size", "16", "--set=model.depth=2", "--set=model.hidden_size=32"]
    plain = call("train", "--dry-run", *small)
    assert plain.code == 0 and "fits" not in plain.out and "TFLOP/s" not in plain.out
    for gpu, title, usable in (("h100", "H100", "77.3"), ("h200", "H200", "136.3"), ("a100", "A100", "77.3")):
        result = call("train", "--dry-run", "--gpu", gpu, *small)
        assert (result.code, result.err) == (0, "")
        rows, _, predicted = result.out.partition("\n\n")
        assert [line.split("  ")[0] for line in rows.splitlines()] == ROWS
        assert re.search(rf"fits {title} SXM, \d+ GB, of which {usable} GB are usable$", rows, re.MULTILINE)
        assert predicted.startswith(title) and "A prediction by arithmetic, not a measurement." in predicted
        assert re.search(r"as a CUDA graph [\d.]+ ms, \d+ images/s; uncaptured [\d.]+ ms", predicted)
    assert os.listdir(tmp_path) == []


def test_a_gpu_that_is_too_small_is_told(call: Call, tmp_path: Path, monkeypatch: Any) -> None:
    from soflow_fast.config.gpus import GPUS

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(GPUS, "a100", dataclasses.replace(GPUS["a100"], memory=10**6))
    result = call("train", "--dry-run", "--gpu", "a100", "--device", "cpu", "--batch-size", "4")
    assert result.code == 0 and "; does not fit A100 SXM, 80 GB, of which 0.0 GB are usable" in result.out


@pytest.mark.slow
def test_dry_run_of_a_public_size(command: Call, tmp_path: Path) -> None:
    result = command("train", "imagenet256-b4", "--dry-run", "--device", "cpu", cwd=tmp_path)
    assert (result.code, result.err) == (0, "")
    assert re.search(r"^parameters +131\.17 M$", result.out, re.MULTILINE)
    assert re.search(r"^FLOPs +50\.\d+ GFLOP per image and step, 4\.5\d forwards$", result.out, re.MULTILINE)
    assert os.listdir(tmp_path) == []


def test_env_says_what_is_here_and_what_is_in_use(call: Call, tmp_path: Path, monkeypatch: Any) -> None:
    import soflow_kernels

    monkeypatch.chdir(tmp_path)
    result = call("train", "--env", "--device", "cpu")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    rows = {line[:14].strip(): line[15:] for line in lines[: lines.index("")]}
    assert rows["torch"].startswith(torch.__version__.split("+")[0]) and rows["device"].startswith("cpu")
    assert {"soflow-fast", "python", "triton", "flash-attn", "xformers", "apex"} <= rows.keys()
    attention, mlp, kernels = (lines.index(heading) for heading in ("attention", "MLP", "kernels"))
    backends = [line for line in lines[attention + 1 : mlp] if line]
    assert [line.split()[0] for line in backends] == list(get_args(AttentionBackend)[1:])
    assert all(re.search(r" (usable|off) +\S", line) for line in backends)
    assert re.search(r"^  sdpa +usable  torch picks", backends[-1])
    assert [line.split()[:2] for line in lines[mlp + 1 : kernels - 1]] == [["kernels", "usable"], ["quack", "off"]]
    assert lines[kernels - 2].endswith("needs an NVIDIA GPU")
    for name, (on, why) in soflow_kernels.status().items():
        row = next(line for line in lines[kernels:] if line.split()[0] == name)
        assert ("kernel" if on else "reference") in row and row.endswith(why)
    assert os.listdir(tmp_path) == []


# sample


def test_sample_writes_a_grid_and_the_images(
    finished: Any, call: Call, files: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("sample", finished.folder, "--out", "new/out", "--n", "10", "--nfe", "2")
    assert (result.code, result.err) == (0, "")
    classes = "classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\n"
    assert result.out == f"{classes}10 images of 2 network calls each: new/out/grid.png\n"
    found = files(tmp_path / "new" / "out")
    assert set(found) == {".lock", "samples.json", "grid.png", *(f"{i:05d}.png" for i in range(10))}
    assert {png_size(content) for name, content in found.items() if re.fullmatch(r"\d+\.png", name)} == {(8, 8)}
    assert os.listdir(tmp_path / "new") == ["out"]
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "new" / "out").stat().st_mode & 0o777 == 0o777 & ~umask


def test_same_seed_same_images_however_many(finished: Any, call: Call, files: Call, tmp_path: Path) -> None:
    for name, arguments in {
        "many": ["--n", "70"],
        "few": ["--n", "16"],
        "other": ["--n", "16", "--seed", "1"],
        "threes": ["--n", "16", "--labels", "3"],
        "mixed": ["--n", "16", "--labels", "0,3"],
    }.items():
        assert call("sample", finished.folder, "--out", tmp_path / name, *arguments).code == 0
    drawn = {place.name: files(place) for place in tmp_path.iterdir()}
    few = {name: content for name, content in drawn["few"].items() if re.fullmatch(r"\d+\.png", name)}
    assert len(few) == 16 and len(set(few.values())) == 16
    assert all(drawn["many"][name] == content for name, content in few.items())
    assert not set(few.values()) & set(drawn["other"].values())
    for i in range(16):  # the noise is the image's own, the label the command's
        name = f"{i:05d}.png"
        assert drawn["mixed"][name] == drawn["threes" if i % 2 else "few"][name] or (i % 2 == 0 and i % 10)
    assert drawn["threes"]["00003.png"] == few["00003.png"]


def test_the_grid_is_of_the_first_images(finished: Any, call: Call, files: Call, tmp_path: Path) -> None:
    """All of a million would be larger than the memory."""
    for name, most, n in (("few", 70, 70), ("cut", 70, 200)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sample, "GRID", most)
            assert call("sample", finished.folder, "--out", tmp_path / name, "--n", n).code == 0
    few, cut = ({p.name: p.read_bytes() for p in (tmp_path / name).glob("*.png")} for name in ("few", "cut"))
    assert len(few) == 71 and len(cut) == 201
    assert all(cut[name] == content for name, content in few.items())


def test_sample_takes_a_run_a_checkpoint_and_an_export(run_dir: Path, call: Call, files: Call, tmp_path: Path) -> None:
    from soflow_fast.runs.checkpoint import export, load_with_config

    export(*load_with_config(run_dir), tmp_path / "exported")
    sources = {"a": run_dir, "b": run_dir / "checkpoints" / "step-00000020", "c": tmp_path / "exported"}
    for name, source in sources.items():
        assert call("sample", source, "--out", tmp_path / "out" / name, "--n", "3").code == 0
    drawn = {name: files(tmp_path / "out" / name) for name in sources}
    kept = {name: json.loads(found.pop("samples.json")) for name, found in drawn.items()}
    assert drawn["a"] == drawn["b"] == drawn["c"] and len(drawn["a"]) == 5
    assert kept["a"]["settings"] == kept["b"]["settings"] == kept["c"]["settings"]
    assert [kept[name]["made_by"]["run"] for name in sources] == ["digits", "step-00000020", "exported"]


def test_sample_passes_over_a_damaged_checkpoint_with_a_warning(
    run_dir: Path, call: Call, tmp_path: Path, damage: Call
) -> None:
    damage(run_dir / "checkpoints" / "step-00000020" / "ema.safetensors")
    result = call("sample", run_dir, "--out", tmp_path / "out", "--n", "2")
    assert result.code == 0 and result.err.count("\n") == 1
    assert "soflow: warning: " in result.err and "using step-00000015 instead" in result.err


def test_another_precision_chooses_the_quotient_of_a_config_anew(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(to_json(preset("digits", precision="bf16", quotient="increments", quotient_precision="bf16")))

    def asked(*flags):
        config = train.configuration(["--config", str(path), *flags])[0]
        return config.quotient, config.quotient_precision

    assert asked() == ("increments", "bf16")
    assert asked("--precision", "fp32") == asked("--set", "objective.teacher=ema") == ("auto", "auto")
    assert asked("--teacher", "ema", "--quotient", "pair") == ("pair", "auto")
    assert asked("--seed", "3") == ("increments", "bf16")

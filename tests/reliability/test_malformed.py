"""Malformed input of every kind: one line that names the field or file, exit code 2, no traceback; and configurations
made at random, which build or are refused."""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save as to_safetensors

from soflow_fast import DiT, Objective
from soflow_fast.cli import configure
from soflow_fast.config import Config, flatten, from_json, to_json
from soflow_fast.errors import ConfigError
from soflow_fast.flow import SolutionFlow
from soflow_fast.presets import preset

# Content of a config.json, and what the line must name.
CONFIGS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not JSON"),
    "cut off": (b'{"steps": 1', "not JSON"),
    "a list": (b"[1, 2]", "must be an object"),
    "a number": (b"7", "must be an object"),
    "null": (b"null", "must be an object"),
    "deep": (b"[" * 100_000, "not JSON"),
    "utf-16": ('{"steps": 1}'.encode("utf-16"), "--config"),
    "zeros": (bytes(1000), "not JSON"),
    "not a number": (b'{"optim": {"lr": NaN}}', "optim.lr"),
    "infinite": (b'{"optim": {"lr": 1e999}}', "optim.lr"),
    "huge int": (b'{"steps": ' + b"9" * 5000 + b"}", "--config"),
    "section is a number": (b'{"model": 3}', "model must be an object"),
    "section is null": (b'{"objective": null}', "objective must be an object"),
    "field is an object": (b'{"seed": {"a": 1}}', "seed"),
    "field is null": (b'{"batch_size": null}', "batch_size"),
    "unknown field": (b'{"model": {"witdh": 3}}', "model.witdh"),
    "unknown preset": (b'{"preset": "digitz"}', "digitz"),
    "preset is a list": (b'{"preset": ["digits"]}', "preset"),
    "three betas": (b'{"optim": {"betas": [0.9, 0.9, 0.9]}}', "optim.betas"),
    "huge input": (b'{"model": {"input_size": 4000000000, "patch_size": 4}}', "model.input_size"),
    "huge channels": (b'{"model": {"in_channels": 9000000000000}}', "model.in_channels"),
    "huge classes": (b'{"model": {"num_classes": 9000000000000}}', "model.num_classes"),
    "true for a number": (b'{"steps": true}', "steps"),
}


def image(path: Path, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)
    return path


def zipped(place: Path, *names: str, content: bytes = b"") -> Path:
    with zipfile.ZipFile(place, "w") as archive:
        for name in names:
            archive.writestr(name, content)
    return place


def changed(path: Path, change: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(change(path.read_bytes()))
    return path


def encrypted(place: Path) -> Path:
    zipped(place, "a/x.png", content=b"x")
    return changed(
        place,
        lambda c: c.replace(b"PK\x03\x04\x14\0\0", b"PK\3\4\x14\0\1").replace(
            b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1"
        ),
    )


# What makes the data in a folder, and what the line must name beside it.
DATA: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (lambda p: None, "no such file"),
    "empty folder": (lambda p: p.mkdir(), "no images"),
    "no images": (lambda p: (p.mkdir(), (p / "x.txt").write_text("x")), "no images"),
    "empty file": (lambda p: p.write_bytes(b""), "cannot be read"),
    "empty zip": (zipped, "no images"),
    "zip of texts": (lambda p: zipped(p, "a.txt"), "no images"),
    "zip cut off": (lambda p: changed(zipped(p, "a/x.png"), lambda c: c[:-10]), "cannot be read"),
    "encrypted zip": (encrypted, "a/x.png"),
    "empty image": (lambda p: zipped(p, "a/x.png"), "a/x.png"),
    "cut image": (lambda p: changed(image(p / "a" / "x.png"), lambda c: c[:40]), "a/x.png"),
    "text as image": (lambda p: zipped(p, "a/x.png", content=b"hello"), "a/x.png"),
    "other size": (lambda p: image(p / "a" / "x.png", (9, 8)), "9 x 8"),
    "a gif": (lambda p: image(p / "a" / "x.gif").rename(p / "a" / "x.png"), "a/x.png"),
    "too many classes": (lambda p: [image(p / str(i) / "x.png") for i in range(11)], "11 classes"),
    "climbing zip": (lambda p: zipped(p, "../x.png"), "'../x.png'"),
}


def manifest(folder: Path) -> None:
    """Sums that are right, of whatever is there."""
    sums = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir() if f.name != "manifest.json"}
    (folder / "manifest.json").write_text(json.dumps({"sha256": sums}))


def put(name: str, content: bytes, right: bool = True) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)
        if right:
            manifest(folder)

    return change


def tensors(name: str, values: dict[str, torch.Tensor]) -> Callable[[Path], None]:
    return put(f"{name}.safetensors", to_safetensors(values))


def edited(key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = json.loads((folder / "state.json").read_text())
        put("state.json", json.dumps({**values, key: value}).encode())(folder)

    return change


# What is done to a checkpoint, which command reads it, and what the line must name.
CHECKPOINTS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "manifest of nothing": (put("manifest.json", b"{}", False), "sample", "not a whole checkpoint"),
    "manifest is a list": (put("manifest.json", b"[]", False), "sample", "not a whole checkpoint"),
    "manifest is deep": (put("manifest.json", b"[" * 100_000, False), "sample", "not a whole checkpoint"),
    "manifest without sums": (put("manifest.json", b'{"sha256": {}}', False), "sample", "config.json"),
    "manifest climbs": (put("manifest.json", b'{"sha256": {"../x": "0"}}', False), "sample", "damaged"),
    "state is deep": (put("state.json", b"[" * 100_000), "sample", "state.json"),
    "step is negative": (edited("step", -1), "train", "state.json"),
    "step is a fraction": (edited("step", 2.5), "train", "state.json"),
    "step is huge": (edited("step", 10**30), "train", "state.json"),
    "later format": (edited("format", 99), "train", "of format 99"),
    "no weights": (tensors("ema", {}), "sample", "of another model"),
    "weights are integers": (
        tensors("ema", {"network.t_embedder.mlp.0.bias": torch.zeros(16).int()}), "sample", "of another model",
    ),
    "optimiser without number": (tensors("optimizer", {"exp_avg": torch.zeros(1)}), "train", "exp_avg does not fit"),
    "optimiser of others": (tensors("optimizer", {"999.exp_avg": torch.zeros(1)}), "train", "999.exp_avg does not fit"),
    "optimiser of other shapes": (tensors("optimizer", {"0.exp_avg": torch.zeros(1)}), "train", "0.exp_avg does"),
    "optimiser with half": (tensors("optimizer", {"0.step": torch.zeros(())}), "train", "only step"),
    "tensors cut off": (put("ema.safetensors", b"\xff\0\0\0\0\0\0\0{"), "sample", "ema.safetensors"),
    "header without end": (put("ema.safetensors", b"\xff" * 64), "sample", "ema.safetensors"),
}  # fmt: skip


LINES: dict[str, tuple[list[str], str]] = {
    "line break": (["train", "dig\nits"], "preset"),
    "zero byte in a path": (["train", "--run-dir", "a\0b"], "--run-dir"),
    "zero byte in a config": (["train", "--config", "a\0b"], "--config"),
    "zero byte in data": (["train", "cifar10", "--data", "a\0b"], "--data"),
    "zero byte in a run": (["sample", "a\0b", "--out", "out"], "a"),
    "zero byte in out": (["sample", "RUN", "--out", "a\0b"], "--out"),
    "lone surrogate": (["train", "--run-dir", "\udcff" * 300], "name too long"),
    "number of another script": (["train", "--steps", "\u00b2"], "--steps"),
    "long number": (["train", "--steps", "9" * 5000], "--steps"),
    "empty field": (["train", "--set", "=1"], "field"),
    "field of a section": (["train", "--set", "model=1"], "model"),
    "field of a field": (["train", "--set", "steps.x=1"], "steps.x"),
    "huge seed": (["sample", "RUN", "--out", "out", "--seed", "9" * 5000], "--seed"),
}


def test_there_are_at_least_60_cases() -> None:
    assert len(CONFIGS) + len(DATA) + len(CHECKPOINTS) + len(LINES) >= 60


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations(case: str, refused: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    content, named = CONFIGS[case]
    Path("config.json").write_bytes(content)
    line = refused("train", "--config", "config.json")
    assert named in line and ("config.json" in line or "--" in line or "." in named), line
    assert os.listdir(tmp_path) == ["config.json"]


@pytest.mark.parametrize("case", DATA)
def test_data(case: str, refused: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    make, named = DATA[case]
    make(Path("set"))
    small = ["--device", "cpu", "--set=model.input_size=8", "--set=model.hidden_size=16", "--set=model.depth=1"]
    line = refused("train", "cifar10", *small, "--steps", "1", "--set=model.num_heads=2", "--data", "set")
    assert named in line and ("--data set" in line or "classes" in named), line
    assert not Path("runs").exists()


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(case: str, refused: Any, run_dir: Path, run_flags: list[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(run_dir.parents[1])
    change, module, named = CHECKPOINTS[case]
    newest = run_dir / "checkpoints" / "step-00000020"
    shutil.rmtree(run_dir / "checkpoints" / "step-00000015")
    change(newest)
    line = refused(module, *([newest, "--out", "out"] if module == "sample" else run_flags))
    assert named in line and newest.name in line, line


@pytest.mark.parametrize("case", LINES)
def test_command_lines(
    case: str, refused: Any, finished: Any, tiny: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (module, *arguments), named = LINES[case]
    arguments = [str(finished.folder) if text == "RUN" else text for text in arguments]
    line = refused(module, *(tiny if module == "train" and "--config" not in arguments else []), *arguments)
    assert named in line, line
    assert os.listdir(tmp_path) == []


# Random configurations

USUAL = flatten(Config())
NAMES = st.sampled_from(sorted(USUAL))
JUNK = st.one_of(
    st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=8), st.lists(st.floats(), max_size=3)
)
WHOLE = st.one_of(st.integers(-2, 70), st.sampled_from([2**12, 2**16, 2**20, 2**31, 2**63, 10**30]))
WORDS = (
    "auto on off linear trig euler constant cosine exponent soflow torch none mlp block stop skip pair increments ema"
)
TEXT = st.one_of(
    st.sampled_from([*WORDS.split(), "fp32", "bf16", "digits", "images", "sdpa", "student"]), st.text(max_size=4)
)


def values(name: str) -> st.SearchStrategy[Any]:
    """Mostly of the field's type, and often what it may be."""
    usual = USUAL[name]
    near: Any = TEXT
    if isinstance(usual, bool):
        near = st.booleans()
    elif isinstance(usual, int):
        near = WHOLE
    elif isinstance(usual, float):
        near = st.one_of(st.floats(0, 1), st.floats(-1e3, 1e3))
    elif isinstance(usual, tuple):
        near = st.tuples(st.floats(-3, 3), st.floats(-1, 3)).map(list)
    return st.one_of(near, near, near, near, JUNK)


CHANGES = st.lists(NAMES.flatmap(lambda name: st.tuples(st.just(name), values(name))), max_size=6).map(dict)
SIZES = st.fixed_dictionaries(
    {"model.hidden_size": st.sampled_from([8, 24, 64]), "model.num_heads": st.sampled_from([1, 2, 3])}
)


def test_random_configurations_build_or_are_refused(count: Any) -> None:
    ended = {"built": 0, "refused": 0}

    @settings(
        max_examples=count(250, 1000),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(changes=CHANGES, sizes=SIZES)
    def check(changes: dict[str, Any], sizes: dict[str, int]) -> None:
        try:
            config = configure(preset("digits"), {**sizes, **changes})
        except ConfigError as error:
            assert str(error) and "\n" not in str(error)
            ended["refused"] += 1
            return
        assert from_json(to_json(config)) == config
        model = replace(config.model, depth=min(config.model.depth, 2))  # more of the same
        with torch.device("meta"):
            SolutionFlow(DiT(model), config.flow.path, config.flow.coefficients)
        Objective(config.objective).r(config.steps - 1, config.steps)
        ended["built"] += 1

    check()
    assert min(ended.values()) >= count(250, 1000) // 20, ended

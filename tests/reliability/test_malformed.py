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
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save as to_safetensors

from soflow_fast.commands.dry_run import dry_run
from soflow_fast.commands.parser import configure
from soflow_fast.config.presets import preset
from soflow_fast.config.schema import SHORT_NAMES, TYPES, Config, flatten, from_json, to_json
from soflow_fast.config.validation import LARGEST, SMALLEST
from soflow_fast.errors import ConfigError, UserError
from soflow_fast.runs import trainer
from soflow_fast.training.state import TrainState, build_flow
from soflow_fast.training.step import train_step

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
    "beyond float32": (b'{"optim": {"lr": 3.5e38}}', "optim.lr must be 0 or of a size from"),
    "below float32": (b'{"objective": {"eps": 1e-39}}', "objective.eps must be 0 or of a size from"),
    "4000 digits": (b'{"batch_size": ' + b"9" * 4000 + b"}", "--batch-size"),
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
    "zero byte in a path": (b'{"run": {"run_dir": "\\u0000x"}}', "--run-dir must be a name"),
    "lone surrogate in a path": (b'{"run": {"run_dir": "x\\ud800y"}}', "--run-dir must be a name"),
    "zero byte in data": (b'{"data": {"kind": "images", "path": "x\\u0000"}}', "--data must be a name"),
    "lone surrogate in data": (b'{"data": {"kind": "images", "path": "\\udfff"}}', "--data must be a name"),
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
    "empty file": (lambda p: p.write_bytes(b""), "is empty"),
    "empty zip": (zipped, "no images"),
    "zip of texts": (lambda p: zipped(p, "a.txt"), "no images"),
    "zip cut off": (lambda p: changed(zipped(p, "a/x.png"), lambda c: c[:-10]), "cannot be read"),
    "encrypted zip": (encrypted, "a/x.png"),
    "empty image": (lambda p: zipped(p, "a/x.png"), "a/x.png"),
    "cut image": (lambda p: changed(image(p / "a" / "x.png"), lambda c: c[:40]), "a/x.png"),
    "text as image": (lambda p: zipped(p, "a/x.png", content=b"hello"), "a/x.png"),
    "many pixels": (lambda p: image(p / "a" / "x.png", (2**14, 2**13), "1"), "a/x.png has 16384 x 8192 pixels"),
    "an icon": (lambda p: image(p / "a" / "x.ico").rename(p / "a" / "x.png"), "a/x.png"),
    "an empty class": (lambda p: (image(p / "a" / "x.png"), (p / "b").mkdir()), "b is a class without an image"),
    "labels cut off": (lambda p: (image(p / "x.png"), (p / "dataset.json").write_text("{")), "dataset.json is not"),
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
    "manifest without sums": (put("manifest.json", b'{"sha256": {}}', False), "sample", "config.json is missing"),
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
    "zero byte in a run": (["sample", "a\0b", "--out", "out"], "RUN 'a\\x00b'"),
    "zero byte in out": (["sample", "RUN", "--out", "a\0b"], "--out"),
    "lone surrogate": (["train", "--run-dir", "\udcff" * 300], "--run-dir: "),
    "number of another script": (["train", "--steps", "\u00b2"], "--steps"),
    "long number": (["train", "--steps", "9" * 5000], "--steps"),
    "empty field": (["train", "--set", "=1"], "unknown field ''"),
    "field of a section": (["train", "--set", "model=1"], "unknown field 'model'"),
    "field of a field": (["train", "--set", "steps.x=1"], "steps.x"),
    "many images": (["sample", "RUN", "--out", "out", "--n", "1000000000"], "--n"),
    "many calls": (["sample", "RUN", "--out", "out", "--nfe", "1000000"], "--nfe"),
    "many labels": (["sample", "RUN", "--out", "out", "--labels", "1," * 30_000 + "10"], "--labels"),
    "many samples": (["evaluate", "RUN", "--n", "1000000000"], "--n"),
    "many steps": (["evaluate", "RUN", "--nfe", "1," * 30_000 + "100000"], "--nfe"),
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
    small.append("--set=model.num_classes=10")
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
NAMES = [*USUAL, *(f"--{short.replace('_', '-')}" for short in SHORT_NAMES)]
DECAY = st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 0.5, 1 - 2**-53]))
PART = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0]))
LARGE = st.sampled_from([0, 1, 7, 2**31, 2**63, 10**30])
ABOVE_0 = st.one_of(st.floats(1e-4, 2), st.sampled_from([SMALLEST, 1e-30, 1.0, 1e30, LARGEST]))
TIMES = st.tuples(st.floats(-1e3, 1e3), ABOVE_0).map(list)

# What each field may be, and now and then what only just passes; sizes that fit together come from `sizes`.
CHOICES = {name: get_args(kind) for name, kind in TYPES.items() if get_origin(kind) is Literal}
FITTING: dict[str, st.SearchStrategy[Any]] = {
    **{name: st.sampled_from(choices) for name, choices in CHOICES.items()},
    "objective.guidance_scale": st.one_of(st.floats(1, 9), st.sampled_from([1.0, LARGEST])),
    "objective.guidance_decay_time": st.one_of(PART, ABOVE_0),
    "objective.mix_ratio": PART,
    "objective.p": st.one_of(PART, ABOVE_0),
    "objective.eps": ABOVE_0,
    "objective.r_init": st.one_of(st.floats(1e-3, 1), st.sampled_from([SMALLEST, 1.0])),
    "objective.r_end": st.one_of(st.floats(1e-3, 1), st.sampled_from([SMALLEST, 1.0])),
    "objective.fm_fraction": PART,
    "objective.label_drop": PART,
    **{f"objective.{name}": TIMES for name in ("fm_time", "sc_time", "sc_end_time")},
    "optim.lr": ABOVE_0,
    "optim.warmup_steps": LARGE,
    "optim.betas": st.lists(DECAY, min_size=2, max_size=2),
    "optim.eps": ABOVE_0,
    "optim.weight_decay": st.one_of(PART, ABOVE_0),
    "optim.grad_clip": st.one_of(PART, ABOVE_0),
    "optim.ema_decay": DECAY,
    "optim.ema_warmup": st.booleans(),
    "data.flip": st.booleans(),
    "run.log_every": LARGE.map(lambda n: n + 1),
    "run.sample_every": LARGE,
    "run.checkpoint_every": LARGE,
    "run.check_quotient_every": LARGE,
    "run.keep": LARGE.map(lambda n: n + 2),
    "run.optimizer": st.sampled_from(["soflow", "torch"]),
    "run.attention": st.sampled_from(["auto", "sdpa", "sdpa-math"]),
    "run.mlp": st.sampled_from(["auto", "kernels"]),
    "steps": st.sampled_from([1, 2, 1000, 10**8 - 1]),
    "batch_size": st.sampled_from([1, 2, 7, 2**20]),
    "micro_batch": st.one_of(LARGE, st.just("auto")),
    "precision": st.sampled_from(["auto", "fp32", "bf16"]),
    "quotient_precision": st.sampled_from(["auto", "bf16", "fp32"]),
    "seed": st.integers(0, 2**63 - 1),
}
WORDS = sorted({word for choices in CHOICES.values() for word in choices})
WILD = st.one_of(
    st.integers(-2, 70),
    st.sampled_from([2**12, 2**16, 2**20, 2**31, 2**63, 10**30, 10**400]),
    st.floats(),
    st.sampled_from([5e-324, 1e-39, 3.5e38, 1e308]),
    st.booleans(),
    st.none(),
    st.text(max_size=8),
    st.sampled_from(WORDS),
    st.lists(st.floats(), max_size=3),
)


@st.composite
def sizes(draw: Any) -> dict[str, Any]:
    """A tiny network whose sizes fit together."""
    patch, heads = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3, 4]))
    return {
        "model.input_size": patch * draw(st.integers(1, 3)),
        "model.patch_size": patch,
        "model.in_channels": draw(st.integers(1, 5)),
        "model.hidden_size": heads * 4 * draw(st.integers(1, 3)),
        "model.num_heads": heads,
        "model.depth": draw(st.integers(1, 2)),
        "model.mlp_ratio": draw(st.sampled_from([0.25, 1, 2.6, 4.0])),
        "model.num_classes": draw(st.sampled_from([0, 1, 10])),
    }


def some(known: dict[str, st.SearchStrategy[Any]], most: int) -> st.SearchStrategy[dict[str, Any]]:
    """Up to so many fields with values of their own strategies."""
    chosen = st.sampled_from(sorted(known)).flatmap(lambda name: st.tuples(st.just(name), known[name]))
    return st.lists(chosen, max_size=most).map(dict)


FIT = st.builds(lambda model, others: {**model, **others}, sizes(), some(FITTING, 12))
SLIPS = some(dict.fromkeys(USUAL, WILD), 2)
ANY = st.one_of(
    FIT,  # twice, as hypothesis takes each as often
    FIT.map(lambda fit: fit),
    st.builds(lambda fit, slips: {**fit, **slips}, FIT, SLIPS),
    some(dict.fromkeys(USUAL, WILD), 6),
)


def parameters(config: Config) -> int:
    """Parameters of the whole network, from two blocks without data."""
    one, two = (
        sum(p.numel() for p in build_flow(replace(config, model=replace(config.model, depth=d))).parameters())
        for d in (1, 2)
    )
    return one + (two - one) * (config.model.depth - 1)


def a_step(config: Config) -> None:
    """The work of a run up to its first metrics, on a few images."""
    small = replace(config, batch_size=min(config.batch_size, 5), run=replace(config.run, device="cpu", compile=False))
    state = TrainState.build(trainer.resolved(small))
    state.set_attention(trainer.resolve_attention(state))
    trainer.set_mlp(state, trainer.resolve_mlp(state).name)
    model, n = small.model, small.batch_size
    images = torch.zeros(n, model.in_channels, model.input_size, model.input_size)
    for value in train_step(state, images, torch.zeros(n, dtype=torch.int64)).values():
        assert value.shape == ()


def one_line(error: UserError) -> None:
    text = str(error)
    assert any(name in text for name in NAMES) and "\n" not in text and len(text) < 400, text


@pytest.mark.parametrize("runs", [80, pytest.param(250, marks=pytest.mark.slow)])
def test_random_configurations_build_or_are_refused(runs: int, count: Any) -> None:
    runs = count(runs, 1000)
    ended = {"refused": 0, "built": 0, "stepped": 0, "tried out": 0}

    @settings(
        max_examples=runs,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(changes=ANY)
    def check(changes: dict[str, Any]) -> None:
        try:
            config = configure(preset("digits"), changes)
        except ConfigError as error:
            one_line(error)
            ended["refused"] += 1
            return
        assert from_json(to_json(config)) == config
        ended["built"] += 1
        if parameters(config) > 100_000:
            return
        try:
            a_step(config)
            ended["stepped"] += 1
            if ended["tried out"] < count(2, 20):  # a second each
                run = replace(config.run, device="cpu", compile=False)
                dry_run(replace(config, data=replace(config.data, kind="latents"), run=run))
                ended["tried out"] += 1
        except UserError as error:  # for what this machine or the data lacks
            one_line(error)

    check()
    assert ended["built"] >= 0.4 * runs and ended["refused"] >= 0.2 * runs, ended
    assert ended["stepped"] >= 0.3 * runs and ended["tried out"] == count(2, 20), ended

"""Configurations: JSON there and back, overrides, and every mistake named by its field."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soflow_fast.config.presets import PRESETS, preset
from soflow_fast.config.schema import (
    AUTO,
    SHORT_NAMES,
    TYPES,
    Config,
    DiTConfig,
    UNetConfig,
    difference,
    flatten,
    from_dict,
    from_json,
    override,
    to_dict,
    to_json,
)
from soflow_fast.config.validation import validate
from soflow_fast.errors import ConfigError
from soflow_fast.runs.trainer import resolved
from soflow_fast.training.state import TrainState
from soflow_fast.training.step import train_step


@pytest.mark.parametrize("name", PRESETS)
def test_json_gives_the_preset_back(name: str) -> None:
    config = preset(name)
    assert validate(config) is config
    assert config.preset == name
    assert from_json(to_json(config)) == config
    assert from_dict(to_dict(config)) == config


def test_json_gives_changed_values_back() -> None:
    changes = {
        "objective.fm_time": (0.5, 2.0),
        "optim.betas": (0.1, 0.2),
        "data.flip": True,
        "seed": 2**62,
        "run.run_dir": "ü",
    }
    config = override(Config(), changes)
    assert from_json(to_json(config)) == config
    assert {name: flatten(from_json(to_json(config)))[name] for name in changes} == changes


def test_json_may_leave_fields_out() -> None:
    assert from_json('{"model": {"depth": 2}}') == Config(model=DiTConfig(depth=2))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"stepz": 3}', ["'stepz'", "did you mean 'steps'?"]),
        ('{"model": {"dept": 3}}', ["'model.dept'", "did you mean 'model.depth'?"]),
        ('{"rundir": "x"}', ["'rundir'", "did you mean 'run.run_dir'?"]),
        ('{"model": 3}', ["model must be an object", "3"]),
        ('{"steps": "many"}', ["steps must be a whole number", "many"]),
        ('{"steps": 1.5}', ["steps must be a whole number", "1.5"]),
        ('{"steps": true}', ["steps must be a whole number", "True"]),
        ('{"steps": null}', ["steps must be a whole number", "None"]),
        ('{"optim": {"lr": NaN}}', ["optim.lr must be a number", "nan"]),
        ('{"optim": {"lr": 1e999}}', ["optim.lr must be a number", "inf"]),
        ('{"optim": {"betas": [0.9]}}', ["optim.betas must be two numbers"]),
        ('{"optim": {"betas": 0.9}}', ["optim.betas must be two numbers"]),
        ('{"data": {"flip": "perhaps"}}', ["data.flip must be true or false"]),
        ('{"data": {"path": 7}}', ["data.path must be text", "7"]),
        ("[]", ["the configuration must be an object"]),
        ("", ["not JSON"]),
        ("{", ["not JSON"]),
        ("[" * 100_000, ["not JSON"]),
    ],
)
def test_wrong_json_is_named(text: str, parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        from_json(text)
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("steps", "20", 20),
        ("steps", " 1e3 ", 1000),
        ("objective.p", "0.5", 0.5),
        ("objective.p", 1, 1.0),
        ("data.flip", "true", True),
        ("data.flip", "0", False),
        ("compile", True, True),
        ("cuda_graph", "false", False),
        ("cuda_graph", "auto", None),
        ("cuda_graph", None, None),
        ("seed", "9223372036854775807", 2**63 - 1),
        ("optim.lr", ".5", 0.5),
        ("micro_batch", "auto", AUTO),
        ("data", Path("photos"), "photos"),
        ("optim.betas", "0.5,0.6", (0.5, 0.6)),
        ("optim.betas", "(0.5, 0.6)", (0.5, 0.6)),
        ("optim.betas", [0, 0.5], (0.0, 0.5)),
        ("data", "photos.zip", "photos.zip"),
        ("flow.path", "trig", "trig"),
    ],
)
def test_text_becomes_the_fields_type(name: str, text: Any, value: Any) -> None:
    got = flatten(override(Config(), {name: text}))[SHORT_NAMES.get(name, name)]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("objective.epz", 1, ["'objective.epz'", "'objective.eps'"]),
        ("batchsize", 1, ["'batchsize'", "'batch_size'"]),
        ("model", 1, ["'model'"]),
        ("steps.more", 1, ["'steps.more'"]),
        ("", 1, ["''"]),
        ("steps", "ten", ["steps", "'ten'"]),
        ("steps", "9" * 5000, ["steps must be a whole number"]),
        ("seed", "²", ["seed must be a whole number"]),
        ("optim.lr", "nan", ["optim.lr must be a number"]),
        ("optim.betas", "0.9", ["optim.betas must be two numbers"]),
        ("data.flip", "maybe", ["data.flip must be true or false"]),
        ("compile", "on", ["run.compile must be true or false", "'on'"]),
        ("micro_batch", "most", ["micro_batch must be a whole number or auto", "'most'"]),
    ],
)
def test_wrong_overrides_are_named(name: str, value: Any, parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        override(Config(), {name: value})
    assert all(part in str(error.value) for part in parts), error.value


OUT_OF_RANGE = {
    "model.input_size": 0,
    "model.patch_size": 3,
    "model.in_channels": 0,
    "model.hidden_size": 0,
    "model.kind": "resnet",
    "model.channels": 20,
    "model.multipliers": (1, 0),
    "model.blocks": 0,
    "model.attention_sizes": (12,),
    "model.dropout": 1,
    "model.depth": 0,
    "model.num_heads": 7,
    "model.mlp_ratio": 0,
    "model.num_classes": -1,
    "model.null_label": False,  # with labels that are dropped
    "model.condition_size": -1,
    "model.guidance_range": (4.0, 1.0),
    "flow.path": "straight",
    "flow.coefficients": "eulre",
    "objective.kind": "mean-flow",
    "objective.guidance_scale": 0.5,
    "objective.guidance_decay_time": -1,
    "objective.mix_ratio": 1.5,
    "objective.p": -1,
    "objective.eps": 0,
    "objective.r_schedule": "sqrt",
    "objective.r_init": 0,
    "objective.r_end": 1.5,
    "objective.fm_fraction": -0.1,
    "objective.label_drop": 2,
    "objective.fm_time": (0, 0),
    "objective.sc_time": (0, -1),
    "objective.sc_end_time": (0, 0),
    "objective.mf_time": (0, 0),
    "objective.teacher": "emaa",
    "objective.teacher_decay": 1,
    "optim.kind": "adam",
    "optim.ema_every": 0,
    "optim.ema_precision": "fp64",  # without radam
    "optim.lr": 0,
    "optim.lr_schedule": "linear",
    "optim.warmup_steps": -1,
    "optim.betas": (0.9, 1.0),
    "optim.eps": 0,
    "optim.weight_decay": -1,
    "optim.grad_clip": -1,
    "optim.ema_decay": 1,
    "data.kind": "image",
    "data.augment": 1.5,
    "run.init_kind": "unet",
    "run.workers": -2,
    "run.track": "mlflow",
    "run.log_every": 0,
    "run.sample_every": -1,
    "run.eval_every": -1,
    "run.eval_samples": 99,
    "run.checkpoint_every": -1,
    "run.check_quotient_every": -1,
    "run.keep": 1,
    "run.on_nonfinite": "ignore",
    "run.optimizer": "adam",
    "run.recompute": "all",
    "run.attention": "flash5",
    "run.mlp": "quak",
    "run.parallel": "fsdp2",
    "run.shard_ranks": 8,  # without hsdp
    "run.reduce_dtype": "fp16",
    "run.hang_seconds": -1,
    "steps": 0,
    "batch_size": 0,
    "micro_batch": -2,
    "precision": "fp16",
    "guidance_precision": "bf16",
    "quotient": "triple",
    "quotient_precision": "fp8",
    "seed": -1,
}
UNET = UNetConfig()
FREE = {
    *(
        "preset",
        "data.path",
        "data.vae",
        "data.conditions",
        "data.flip",
        "data.resize",
        "data.skip_bad",
        "model.qk_norm",
        "model.augmentation_labels",
        "run.init",
        "run.resume_official",
        "run.run_dir",
        "run.device",
        "optim.ema_warmup",
    ),
    *("run.compile", "run.cuda_graph", "run.data_on_gpu"),
    *("run.reference", "run.metrics", "run.inception", "run.dinov2"),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_name(name: str) -> None:
    unet = name in flatten(UNET, "model.") and name not in flatten(Config())
    config = override(Config(model=UNET) if unet else Config(), {name: OUT_OF_RANGE[name]})
    with pytest.raises(ValueError, match=rf"^{name} must be ") as error:
        validate(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 2.5), ("steps", True), ("batch_size", "8"), ("seed", 1.0), ("precision", None), ("optim.lr", "1"),
        ("optim.betas", [0.9, 0.99]), ("optim.betas", (0.9,)), ("data.flip", 1), ("data.path", 3), ("run.keep", 2.0),
        ("run.compile", "on"), ("run.compile", None), ("run.cuda_graph", 1), ("optim.lr", math.nan),
        ("optim.lr", math.inf), ("optim.betas", (0.9, math.nan)), ("model.guidance_range", [1.0, 4.0]),
        ("model.guidance_range", (1.0,)), ("model.guidance_range", "1,4"), ("model.guidance_range", False),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused_by_name(name: str, value: Any) -> None:
    """As a configuration made in Python can hold it."""
    *path, last = name.split(".")
    config = Config()
    changed = replace(getattr(config, path[0]) if path else config, **{last: value})
    what = "a whole number|a number|two numbers( or none)?|true or false|true, false or auto|text"
    with pytest.raises(ValueError, match=rf"^{name} must be ({what}), "):
        validate(replace(config, **{path[0]: changed}) if path else changed)
    validate(replace(config, optim=replace(config.optim, lr=1)))  # a whole number is a number


def test_every_field_has_its_range_tested() -> None:
    known = set(flatten(Config())) | set(flatten(UNET, "model."))
    assert known == set(TYPES) == set(OUT_OF_RANGE) | FREE


def test_the_choices_of_a_type_are_the_ones_that_pass() -> None:
    choices = {name: get_args(kind) for name, kind in TYPES.items() if get_origin(kind) is Literal}
    beside = {"optim.ema_precision": {"optim.kind": "radam"}}
    assert len(choices) == 23
    for name, allowed in choices.items():
        for value in allowed:
            validate(override(Config(), {name: value, **beside.get(name, {})}))
        wrong = f"{name} must be one of {', '.join(allowed)}, got '{allowed[-1]}x' (did you mean "
        with pytest.raises(ValueError, match=re.escape(wrong)):
            validate(override(Config(), {name: allowed[-1] + "x"}))
    with pytest.raises(ValueError, match=r"^objective\.teacher must be one of student, ema, got 'ema-literal'"):
        validate(override(Config(), {"teacher": "ema-literal"}))


@pytest.mark.parametrize(("word", "value"), [("auto", None), ("off", False), ("on", True)])
def test_switches_of_older_files_are_read(word: str, value: bool | None) -> None:
    old = from_json(json.dumps({"run": {"compile": word, "cuda_graph": word}}))
    assert (old.run.compile, old.run.cuda_graph) == (bool(value), value)
    assert from_json(to_json(old)) == old


def test_resolving_leaves_attention_and_mlp_open_and_nothing_else() -> None:
    config = resolved(preset("digits", device="cpu", micro_batch="auto"))
    found = [name for name, value in flatten(config).items() if value in ("auto", AUTO)]
    assert found == ["run.workers", "run.attention", "run.mlp"]  # as they are, whatever machine goes on
    assert resolved(config) == config and validate(config)


def test_difference_names_what_changed_and_not_where_it_is_written() -> None:
    old, new = Config(), override(Config(), {"steps": 7, "objective.p": 0.5, "run_dir": "x", "device": "cpu"})
    assert difference(old, new) == ["objective.p: 1.0 -> 0.5", "steps: 400000 -> 7"]
    assert difference(old, replace(old)) == []


def test_preset_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ConfigError, match=r"unknown preset 'digit' \(did you mean 'digits'\?\)"):
        preset("digit")
    with pytest.raises(ConfigError, match=r"unknown field 'stepz' \(did you mean 'steps'\?\)"):
        preset("digits", stepz=1)
    assert preset("digits", precision="fp32", steps="5", **{"objective.eps": 0.1}).objective.eps == 0.1


@pytest.mark.parametrize("typed", ["1,4", "(1.0, 4.0)", [1, 4]])
def test_a_range_is_typed_read_and_left_out(typed: Any) -> None:
    config = override(Config(), {"guidance_range": typed})
    assert config.model.guidance_range == (1.0, 4.0)
    assert from_json(to_json(config)) == config
    for nothing in ("none", None):
        assert override(config, {"guidance_range": nothing}) == Config()
    with pytest.raises(ValueError, match="two numbers or none"):  # of a script, whose variable is not set
        override(config, {"guidance_range": ""})


def test_sizes_by_name() -> None:
    assert DiTConfig.named("DiT-XL/2") == DiTConfig.named("XL/2") == DiTConfig()
    with pytest.raises(ValueError, match=r"unknown DiT size 'X/2'.*B/4"):
        DiTConfig.named("X/2")


small = st.integers(-1, 3)
unit = st.floats(-0.5, 1.5)
CONFIGURATIONS = st.fixed_dictionaries(
    {},
    optional={
        "model.input_size": st.sampled_from([0, 4, 6, 8]),
        "model.patch_size": small,
        "model.in_channels": small,
        "model.hidden_size": st.sampled_from([0, 4, 6, 8, 16]),
        "model.depth": small,
        "model.num_heads": small,
        "model.mlp_ratio": st.floats(-0.1, 2),
        "model.num_classes": small,
        "model.condition_size": small,
        "model.guidance_range": st.none() | st.tuples(st.floats(0.5, 2), st.floats(1, 4)),
        "flow.path": st.sampled_from(["linear", "trig", "line"]),
        "flow.coefficients": st.sampled_from(["euler", "trig", ""]),
        "objective.guidance_scale": st.floats(0.5, 3),
        "objective.mix_ratio": unit,
        "objective.fm_fraction": unit,
        "objective.label_drop": unit,
        "objective.p": unit,
        "objective.r_schedule": st.sampled_from(["exponent", "cosine", "linear", "constant", "none"]),
        "objective.r_init": unit,
        "optim.betas": st.tuples(unit, unit),
        "optim.warmup_steps": small,
        "optim.lr_schedule": st.sampled_from(["constant", "cosine"]),
        "optim.grad_clip": unit,
        "batch_size": small,
        "micro_batch": small,
        "steps": small,
        "precision": st.sampled_from(["auto", "fp32", "bf16", "int8"]),
        "seed": st.integers(-1, 2**64),
    },
)
BASE = override(
    preset("digits"),
    {"model.hidden_size": 8, "model.depth": 1, "model.num_heads": 1, "batch_size": 2, "steps": 3, "device": "cpu"},
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(CONFIGURATIONS)
def test_a_configuration_makes_a_step_or_is_refused(changes: dict[str, Any]) -> None:
    config = override(BASE, changes)
    assert from_json(to_json(config)) == config
    try:
        state = TrainState.build(config)
    except ValueError as error:
        assert any(str(error).startswith((name, f"--{name}")) for name in flatten(config)), error
        return
    model, B = config.model, config.batch_size
    x = torch.zeros(B, model.in_channels, model.input_size, model.input_size)
    metrics = train_step(state, x, torch.zeros(B, dtype=torch.long))
    assert state.step == 1
    assert all(value.isfinite() for value in metrics.values()), metrics


def test_json_is_readable_by_others() -> None:
    values = json.loads(to_json(preset("cifar10")))
    assert values["model"]["hidden_size"] == 384 and values["run"]["keep"] == 2


def test_a_partial_file_is_completed_from_the_preset_that_it_names(tmp_path: Path) -> None:
    from soflow_fast.train import configuration

    path = tmp_path / "partial.json"
    path.write_text('{"preset": "cifar10", "objective": {"eps": 0.5}}')
    config, _ = configuration(["--config", str(path)])
    assert config == override(preset("cifar10"), {"objective.eps": 0.5})


def test_a_teachers_decay_needs_a_teacher() -> None:
    config = Config()
    with pytest.raises(ValueError, match=r"^objective\.teacher_decay must be left at 0\.99 with the teacher student"):
        validate(override(config, {"teacher_decay": 0.5}))
    validate(override(config, {"teacher_decay": 0.5, "teacher": "ema"}))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"objective": "flow-matching", "teacher": "ema"}, "objective.teacher"),
        ({"objective": "flow-matching", "quotient": "pair"}, "quotient"),
        ({"objective": "flow-matching", "quotient_precision": "fp32"}, "quotient_precision"),
        ({"objective": "meanflow", "flow.coefficients": "trig"}, "flow.coefficients"),
    ],
)
def test_what_an_objective_has_no_use_for_is_refused(changes: dict[str, str], field: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field} must be .* with the objective {changes['objective']}") as error:
        validate(override(preset("digits"), changes))
    assert "\n" not in str(error.value)
    validate(override(preset("digits"), {**changes, "objective": "soflow"}))


def test_a_run_of_flow_matching_begins_with_the_file_of_another(tmp_path: Path) -> None:
    """Whose quotient was resolved; its own is left open, as it has none."""
    from soflow_fast.train import configuration

    path = tmp_path / "config.json"
    path.write_text(to_json(resolved(preset("digits", device="cpu"))))
    config, _ = configuration(["--config", str(path), "--objective", "flow-matching"])
    assert (config.quotient, config.quotient_precision) == ("auto", "auto")
    assert (resolved(config).quotient, resolved(config).objective.flow_matching_fraction) == ("auto", 1.0)
    assert resolved(override(config, {"objective": "meanflow"})).quotient != "auto"


def test_a_network_of_another_kind_begins_with_its_defaults() -> None:
    config = override(preset("digits"), {"model.channels": "64", "model.kind": "unet", "model.multipliers": "1, 2,2"})
    assert config.model == UNetConfig(channels=64, multipliers=(1, 2, 2))
    assert from_json(to_json(config)) == config and override(config, {"model.kind": "dit"}).model == DiTConfig()
    assert "model.kind: 'dit' -> 'unet'" in difference(preset("digits"), config)
    assert from_json('{"model": {"kind": "unet", "attention_sizes": [0]}}').model == UNetConfig(attention_sizes=(0,))
    assert from_json('{"model": {"depth": 2}}').model == DiTConfig(depth=2)  # a file from before there were two


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.depth": 2}, "unknown field 'model.depth' of a network of the kind unet"),
        ({"model.kind": "dit", "model.blocks": 2}, "unknown field 'model.blocks' of a network of the kind dit"),
        ({"model.multipliers": "2,x"}, "model.multipliers must be whole numbers, got '2,x'"),
        ({"model.multipliers": []}, "model.multipliers must be whole numbers"),
        ({"model.multipliers": 2}, "model.multipliers must be whole numbers, got 2"),
        ({"model.attention_sizes": (16.5,)}, "model.attention_sizes must be whole numbers"),
    ],
)
def test_fields_of_networks_are_told_apart(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        override(preset("cifar10-unet"), changes)

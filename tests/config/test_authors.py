"""The authors' YAML files: what is read of them, what is refused, and that what is written is read again."""

import importlib
from pathlib import Path

import pytest
import yaml

from soflow_fast.config.authors import SIZES, from_authors, read_yaml, to_authors, unknown_to_authors
from soflow_fast.config.presets import imagenet256, preset
from soflow_fast.config.schema import Config, DiTConfig, difference, override
from soflow_fast.errors import ConfigError

THEIRS = """\
# Training
working_dir: ./runs/b4   # where all goes
noising_type: 'Linear'
coefficient_type: "Euler"
model_type: DiT-B-4
dataset_type: Imagenet
data_size: 32
dataset_path: ./imagenet latents#2

velocity_loss_ratio: 0.75
p: 1.0
eps: 0.01
time_mean: [-0.2, -1.0, 0.2]
time_std:
  - 1.0
  - 0.8
  - 0.8
cfg_scale: 3.0
mix_ratio: 0.25
cfg_drop_rate: 0.1
cfg_decay_time: 0.8
l_schedule: Exponent
l_init_ratio: 0.1
l_end_ratio: 0.002
total_steps: 400_000
ema_decay_rate: 0.9999
learning_rate: 1e-4
betas: [0.9, 0.99]
weight_decay: 0.0
batch_size: 256
num_workers: 12
eval_demo_shape: [4, 8]
logging_steps: 100
ckpt_saving_steps: 200000
eval_demo_steps: 1000
seed: 42
"""


def test_their_published_file_is_our_preset() -> None:
    config = from_authors(read_yaml(THEIRS))
    ours = override(imagenet256("B/4"), {"seed": 42})
    assert difference(ours, config) == [] and config.preset == ours.preset
    assert config.data.path == "./imagenet latents#2"
    assert (config.run.log_every, config.run.sample_every, config.run.checkpoint_every) == (100, 1000, 200_000)


def test_a_number_is_one_where_yaml_takes_it_for_text() -> None:
    ours, theirs = read_yaml(THEIRS), yaml.safe_load(THEIRS)
    assert theirs["learning_rate"] == "1e-4" and ours["learning_rate"] == 1e-4
    assert ours | {"learning_rate": 0} == theirs | {"learning_rate": 0}


@pytest.mark.parametrize(("spelt", "path"), [("Linear", "linear"), ("Trig", "trig"), ("Triangular", "trig")])
def test_both_spellings_of_the_trigonometric_path(spelt: str, path: str) -> None:
    values = read_yaml(THEIRS) | {"noising_type": spelt, "coefficient_type": spelt.replace("Linear", "Euler")}
    config = from_authors(values)
    assert (config.flow.path, config.flow.coefficients) == (path, path.replace("linear", "euler"))
    text = to_authors(config, "there")  # of which their model knows one
    assert f'noising_type: "{"Linear" if path == "linear" else "Triangular"}"' in text


def test_without_labels_that_are_dropped_there_is_no_null_label() -> None:
    config = from_authors(read_yaml(THEIRS) | {"cfg_scale": 1.0, "cfg_drop_rate": 0.0})
    assert not config.model.null_label and config.objective.label_drop == 0
    left_out = from_authors({"model_type": "DiT-XL-2"})  # as their trainer's defaults are
    assert (left_out.objective.guidance_scale, left_out.objective.label_drop, left_out.seed) == (1, 0, 42)
    assert left_out.model == DiTConfig.named("XL/2", null_label=False)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_written_is_read_again_by_us_and_by_yaml(size: str) -> None:
    config = override(
        imagenet256(SIZES[size]),
        {"objective.eps": 1e-05, "objective.p": 0.5, "objective.r_schedule": "constant", "optim.betas": (0.8, 0.95)},
    )
    text = to_authors(config, "/a b/c")
    assert difference(from_authors(read_yaml(text)), config) == []
    theirs = yaml.safe_load(text)
    assert theirs["working_dir"] == "/a b/c" and theirs["model_type"] == size
    assert type(theirs["eps"]) is float and theirs["eps"] == 1e-05
    assert type(theirs["total_steps"]) is int and theirs["time_mean"] == [-0.2, -1.0, 0.2]


@pytest.mark.parametrize("kind", ["flow-matching", "meanflow"])
def test_what_their_code_would_take_for_its_own_is_not_written(kind: str) -> None:
    with pytest.raises(ValueError, match=rf"^objective.kind: their code trains and samples soflow, not {kind}"):
        to_authors(override(imagenet256("B/4"), {"objective": kind}), "/a")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cfg_scal: 2", "unknown field 'cfg_scal' (did you mean 'cfg_scale'?)"),
        ("cfg_scale: much", "cfg_scale must be a number, got 'much'"),
        ("cfg_scale: .nan", "cfg_scale must be a number"),
        ("cfg_scale: 0.5", "objective.guidance_scale must be at least 1"),
        ("time_std: [1, 2]", "time_std must be a list of 3 numbers"),
        ("model_type: UNet", "model_type UNet goes with dataset_type CIFAR10"),
        ("model_type: DiT-S-2", "model_type must be one of DiT-B-4"),
        ("noising_type: straight", "noising_type must be one of Linear, Triangular, Trig"),
        ("a: {b: 1}", "line 1 is no field"),
        ("a: &x 1", "line 1 is no field"),
        ("  a: 1", "line 1 is no field"),
        ("a: 1\na: 2", "line 2: a is there twice"),
        ("a: 'b", "line 1: a quotation mark is missing"),
        ("cfg_drop_rate: 0.0\ncfg_scale: 2.0", "model.null_label must be true unless"),
    ],
)
def test_what_is_wrong_is_said_by_its_field_or_line(line: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        from_authors(read_yaml(line))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_their_code_does_not_let_be_chosen_is_named() -> None:
    for changes, message in (
        ({"model.depth": 3}, "their code builds DiT-B-4, .*, not depth 3"),
        ({"model.num_heads": 6}, "not depth 12, hidden_size 768, 6 heads"),
        ({"model.qk_norm": True}, "^model.qk_norm: their network has no norms of queries and keys$"),
        ({"model.num_classes": 7}, "their code knows Imagenet of 4 channels, 1000 classes or CIFAR10"),
    ):
        with pytest.raises(ValueError, match=message):
            to_authors(override(imagenet256("B/4"), changes), "x")
    strange = override(Config(), {"optim.grad_clip": 1.0, "optim.lr_schedule": "cosine", "optim.lr": 1})
    assert unknown_to_authors(strange) == ["optim.lr_schedule cosine", "optim.grad_clip 1.0"]
    assert unknown_to_authors(imagenet256("B/4")) == []


def test_a_run_is_configured_by_their_file(tmp_path: Path) -> None:
    train = importlib.import_module("soflow_fast.train")
    (tmp_path / "config.yaml").write_text(THEIRS)
    config, _ = train.configuration(["--config", str(tmp_path / "config.yaml"), "--steps", "7", "--run-dir", "here"])
    assert difference(override(imagenet256("B/4"), {"seed": 42, "steps": 7}), config) == []
    (tmp_path / "config.yaml").write_text(THEIRS + "cfg_scal: 2\n")
    with pytest.raises(ConfigError, match=r"--config .*config\.yaml: unknown field 'cfg_scal'"):
        train.configuration(["--config", str(tmp_path / "config.yaml")])


def test_the_configuration_of_their_unet_is_read_and_not_written() -> None:
    text = """
model_type: UNet
dataset_type: CIFAR10
velocity_loss_ratio: 0.0
p: 0.75
eps: 0.001
time_mean: [-0.9, -4.0, -0.9]
time_std: [1.6, 1.6, 1.6]
l_schedule: Exponent
l_init_ratio: 1.0
l_end_ratio: 0.0003125
total_steps: 800000
batch_size: 1024
"""
    config = from_authors(read_yaml(text))
    assert difference(config, preset("cifar10-unet")) == ["seed: 42 -> 0"]
    with pytest.raises(ValueError, match="a U-Net of theirs is read, but not written"):
        to_authors(config, "/a")

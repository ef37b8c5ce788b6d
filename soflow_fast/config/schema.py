"""The configuration of a run: frozen dataclasses, JSON in and out.

A configuration is plain data. Building one never fails on meaning; `validation.validate` says what is wrong, by field.
The `Literal` types are the only lists of choices: whoever needs one as a tuple takes `typing.get_args`. The first
paragraph of a field's docstring is its help on the command line.
"""

import contextlib
import dataclasses
import difflib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

ModelKind = Literal["dit", "unet", "policy"]
FlowPath = Literal["linear", "trig"]
Coefficients = Literal["euler", "trig"]
ObjectiveKind = Literal["soflow", "flow-matching", "meanflow"]
RSchedule = Literal["exponent", "cosine", "linear", "constant"]
Teacher = Literal["student", "ema"]
LRSchedule = Literal["constant", "cosine"]
OptimizerKind = Literal["adamw", "radam"]
AveragePrecision = Literal["fp32", "fp64"]
DataKind = Literal["digits", "digits-latent", "images", "latents", "demonstrations"]
OnNonfinite = Literal["stop", "skip"]
OptimizerName = Literal["soflow", "torch", "apex"]
Recompute = Literal["auto", "nothing", "none", "mlp", "block"]
AttentionBackend = Literal[
    "auto", "flash4", "flash3", "flash2", "xformers", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient", "sdpa-math", "sdpa"
]
MLPProducts = Literal["auto", "kernels", "quack"]
Parallelism = Literal["ddp", "fsdp", "hsdp"]
InitKind = Literal["soflow", "dit", "sit"]
Track = Literal["none", "wandb", "trackio"]
ReduceDtype = Literal["fp32", "bf16"]
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp8"]
SamplingMethod = Literal["renoise", "consecutive", "euler"]
SampleFormat = Literal["png", "npz", "both"]
GuidancePrecision = Literal["step", "fp8"]
QuotientKind = Literal["auto", "increments", "pair"]
QuotientPrecision = Literal["auto", "bf16", "fp16", "tf32", "fp32"]

SWITCH = bool | None
"""The type of a field that is true, false or left to the machine."""
RANGE = tuple[float, float] | None
"""The type of a field that is a range, or none."""
WHOLES = tuple[int, ...]
"""The type of a field that is some whole numbers."""
AUTO = -1
"""The micro-batch that is found at start-up."""

# name: depth, hidden_size, num_heads, patch_size (Peebles & Xie 2023, arXiv 2212.09748; M: arXiv 2512.15657)
DIT_SIZES = {
    "S/2": (12, 384, 6, 2),
    "B/4": (12, 768, 12, 4),
    "B/2": (12, 768, 12, 2),
    "M/2": (16, 1024, 16, 2),
    "L/2": (24, 1024, 16, 2),
    "XL/2": (28, 1152, 16, 2),
}


@dataclass(frozen=True)
class DiTConfig:
    """The shape of a Diffusion Transformer; the defaults are DiT-XL/2 on 32 x 32 x 4 latents."""

    input_size: int = 32
    """Height and width of the input, in pixels or latent cells."""
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    """Row `num_classes` of the label table is the null label, so the table has one row more."""
    null_label: bool = True
    """Whether the table has that row, or the network a null vector.

    A network without it was trained with every label, and is not asked for samples without one."""
    condition_size: int = 0
    """Size of the vector that each image has as its condition, in place of a label; 0: labels.

    The embedding of a text, say. A learned null vector, zero at first, is that of no condition."""
    qk_norm: bool = False
    """RMSNorm of queries and keys over the head dimension, each with a weight, which bounds the logits of attention.

    The published networks have none."""
    guidance_range: tuple[float, float] | None = None
    """Guidance scales, as 1,4, of which each image is trained with one of its own, in place of one for all.

    The network has an embedder for it (w), so that samples choose it without a second call (arXiv 2512.02012)."""
    kind: ModelKind = "dit"
    """Network; dit: a Diffusion Transformer, unet: a U-Net without labels, policy: an MLP on chunks of actions;
    these two have other fields."""

    @property
    def conditional(self) -> bool:
        """Whether samples have labels or vectors."""
        return self.num_classes > 0 or self.condition_size > 0

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.in_channels, self.input_size, self.input_size

    @property
    def words(self) -> str:
        """The shape, for people."""
        tokens = (self.input_size // self.patch_size) ** 2
        return f"DiT of hidden size {self.hidden_size}, depth {self.depth}, {tokens} tokens"

    @classmethod
    def named(cls, size: str, **others: Any) -> "DiTConfig":
        """A public size by name ("S/2", "B/4", "B/2", "M/2", "L/2", "XL/2"; a leading "DiT-" is allowed)."""
        key = size.removeprefix("DiT-")
        if key not in DIT_SIZES:
            raise ValueError(
                f"unknown DiT size {size!r}{nearest(key, DIT_SIZES)}; the sizes are {', '.join(DIT_SIZES)}"
            )
        depth, hidden_size, num_heads, patch_size = DIT_SIZES[key]
        return cls(depth=depth, hidden_size=hidden_size, num_heads=num_heads, patch_size=patch_size, **others)


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a U-Net without labels, DDPM++ as EDM has it (arXiv 2206.00364); the defaults are its network for
    CIFAR-10 with the channels of SoFlow's."""

    num_classes: ClassVar[int] = 0
    condition_size: ClassVar[int] = 0
    conditional: ClassVar[bool] = False
    null_label: ClassVar[bool] = True
    guidance_range: ClassVar[None] = None

    input_size: int = 32
    """Height and width of the input, in pixels."""
    in_channels: int = 3
    channels: int = 128
    """Channels of the first convolution."""
    multipliers: tuple[int, ...] = (2, 2, 2)
    """Channels of each level in units of `channels`; from one to the next the sides are halved."""
    blocks: int = 4
    """Residual blocks of each level on the way down; on the way up there is one more."""
    attention_sizes: tuple[int, ...] = (16,)
    """Sides of the levels whose blocks have attention. The middle of the network has it in any case."""
    dropout: float = 0.3
    """Probability with which a number inside a residual block is left out in training."""
    augmentation_labels: bool = True
    """Whether the network sees how an image was changed (`data.augment`), as nine numbers; of samples they are 0."""
    kind: ModelKind = "unet"

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.in_channels, self.input_size, self.input_size

    @property
    def words(self) -> str:
        """The shape, for people."""
        widths = ", ".join(str(self.channels * multiplier) for multiplier in self.multipliers)
        return f"U-Net with levels of {widths} channels, blocks in each: {self.blocks}"


@dataclass(frozen=True)
class PolicyConfig:
    """The shape of an action policy (`policy.SoFlowPolicy`), and how its chunks of actions are executed."""

    num_classes: ClassVar[int] = 0
    null_label: ClassVar[bool] = False
    guidance_range: ClassVar[None] = None
    conditional: ClassVar[bool] = True

    obs_size: int = 0
    """Numbers in an observation; 0: as many as the demonstrations have."""
    action_dim: int = 0
    """Numbers in an action; 0: as many as the demonstrations have."""
    action_horizon: int = 8
    """Actions in a chunk."""
    hidden_size: int = 256
    num_layers: int = 4
    """Residual blocks of two linear layers each."""
    executed: int = 4
    """Actions of a chunk that are executed before the next one is drawn."""
    kind: ModelKind = "policy"

    @property
    def condition_size(self) -> int:
        """Observations are the vectors that samples depend on."""
        return self.obs_size

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """A chunk of actions, as the engine has it."""
        return 1, self.action_horizon, self.action_dim

    @property
    def words(self) -> str:
        """The shape, for people."""
        chunk = f"{self.action_horizon} actions of {self.action_dim} numbers"
        return f"policy of {self.num_layers} blocks of {self.hidden_size} numbers, for chunks of {chunk}"


ModelConfig = DiTConfig | UNetConfig | PolicyConfig
"""The shape of a network, of any kind."""


@dataclass(frozen=True)
class FlowConfig:
    """The path from data to noise and the coefficients of the solution function."""

    path: FlowPath = "linear"
    coefficients: Coefficients = "euler"


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is learned; the defaults are SoFlow's public ImageNet recipe (arXiv 2512.15657)."""

    kind: ObjectiveKind = "soflow"
    """Objective; soflow: one-step solutions by their consistency, meanflow: the same by average velocities,
    flow-matching: the velocity alone, which takes many steps to sample.

    MeanFlow is arXiv 2505.13447."""
    guidance_scale: float = 3.0
    """w of the guided velocity; 1 is no guidance. Of a network with a range of them it has no part."""
    guidance_decay_time: float = 0.8
    """t_d: guidance fades for t > t_d; 1 or more: never."""
    mix_ratio: float = 0.25
    """m: weight of the guided velocity in the target, the rest being the network's own."""
    p: float = 1.0
    """Power of the Huber-like weight; 0 is the plain squared error."""
    eps: float = 0.01
    r_schedule: RSchedule = "exponent"
    r_init: float = 0.1
    """r at the first step: how far the middle time l lies from t towards s."""
    r_end: float = 0.002
    fm_fraction: float = 0.75
    """lambda: fraction of the batch that takes the flow-matching loss; of flow-matching it is all, whatever this is."""
    label_drop: float = 0.1
    fm_time: tuple[float, float] = (-0.2, 1.0)
    """Mean and deviation of logit t, flow matching."""
    sc_time: tuple[float, float] = (0.2, 0.8)
    """Mean and deviation of logit t, consistency."""
    sc_end_time: tuple[float, float] = (-1.0, 0.8)
    """Mean and deviation of logit s, consistency."""
    mf_time: tuple[float, float] = (-0.4, 1.0)
    """Mean and deviation of the logits of both times, meanflow, in place of the three others."""
    teacher: Teacher = "student"
    """Network behind the consistency target; student: the stop-gradient student, ema: an average of its weights.

    The published target is the student's. An average gives both ends of the increment, the student the value."""
    teacher_decay: float = 0.99
    """Decay of the teacher's average.

    It is apart from the average that is sampled; at first it is (1 + step) / (10 + step)."""

    @property
    def flow_matching_fraction(self) -> float:
        """The fraction of the batch that takes the flow-matching loss, at one time each: l = s = t."""
        return 1.0 if self.kind == "flow-matching" else self.fm_fraction


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and the exponential moving average of the weights."""

    kind: OptimizerKind = "adamw"
    """Optimiser; adamw, or radam: Adam with a rectified learning rate (arXiv 1908.03265)."""
    lr: float = 1e-4
    lr_schedule: LRSchedule = "constant"
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float = 0.0
    """Largest gradient norm; 0: no clipping."""
    ema_decay: float = 0.9999
    ema_warmup: bool = False
    """Let the decay rise as (1 + step) / (10 + step), so that a short run forgets its initial weights."""
    ema_every: int = 1
    """Updates between accumulations of the average, each with the decay of as many."""
    ema_precision: AveragePrecision = "fp32"
    """Precision in which the average is accumulated; what is sampled and given away is float32."""


@dataclass(frozen=True)
class DataConfig:
    """The data set."""

    kind: DataKind = "digits"
    """digits: the handwritten digits of scikit-learn, digits-latent: their latents, by a VAE that is trained first;
    images: a folder or zip of images, CLASS/NAME; latents: VAE latents; demonstrations: actions at observations, of a
    task's expert or a LeRobot data set."""
    path: str = ""
    """Folder or archive with the samples, which is recognised: images by class, known data sets, latents."""
    vae: str = ""
    """VAE that latents must be of, by the name that they bear; empty: any."""
    conditions: str = ""
    """File of a vector for each sample, .npz by name or .npy in order, with --condition-size; empty: conditions.npz or
    conditions.npy in the folder of the data."""
    flip: bool = False
    """Mirror each sample with probability one half."""
    augment: float = 0.0
    """Probability of each of EDM's geometric changes of an image beside mirroring, which the network sees; 0: none.

    Mirroring then has the probability one half (arXiv 2206.00364)."""
    resize: bool = False
    """Scale both sides of images to the size of the model, in place of the centre crop."""
    skip_bad: bool = False
    """Leave out images that cannot be read, in place of ending the start at the first."""

    @property
    def latent(self) -> bool:
        """Whether samples are latents and not pixels."""
        return self.kind in ("latents", "digits-latent")

    @property
    def of_digits(self) -> bool:
        """Whether samples are handwritten digits, or latents of them."""
        return self.kind in ("digits", "digits-latent")


@dataclass(frozen=True)
class RunConfig:
    """Settings that may differ from one start of a run to the next without changing what it learns."""

    run_dir: str = ""
    """Folder for everything that is written; by default runs/PRESET."""
    init: str = ""
    """Run, checkpoint, exported directory or the authors' file, whose averaged weights a new run begins with.

    Of the authors' file the weights that were trained and their average, each for its own."""
    init_kind: InitKind = "soflow"
    """Network that `init` is a file of; soflow: one with two times, dit, sit: a DiT or SiT, with one."""
    resume_official: str = ""
    """The authors' file with which a new run goes on: weights, average, moments and step."""
    device: str = "auto"
    """Device, such as cpu, cuda or cuda:1; auto: the GPU if there is one."""
    workers: int = AUTO
    """Processes that read samples ahead; 0: none, -1: as many as there are processors beside the one that trains, at
    most eight, and none where the samples lie in memory."""
    data_on_gpu: bool | None = None
    """Hold the whole data set on the GPU; by default latents and arrays of pixels, where they fit beside a step."""
    log_every: int = 10
    sample_every: int = 500
    eval_every: int = 0
    """Updates between evaluations of the samples of one network call; 0: only at the end."""
    eval_samples: int = 0
    """Samples of each evaluation; 0: 4000."""
    reference: str = ""
    """Images to compare samples with: a data set, or an .npz of ADM.

    Without one the digits alone are evaluated."""
    metrics: str = "fid"
    """Figures of that comparison, with commas between them, as `evaluate --metrics` takes them."""
    inception: str = ""
    """File of the weights of Inception; empty: downloaded once."""
    dinov2: str = ""
    """File or folder of the weights of DINOv2."""
    checkpoint_every: int = 500
    """Updates between checkpoints; 0: only the last."""
    check_quotient_every: int = 500
    """Updates between measurements of the cosine of the quotient with its float32 value on a few samples; 0: never."""
    track: Track = "none"
    """Service that is sent numbers, grids and configuration too, by its package, beside TensorBoard."""
    keep: int = 2
    """Newest checkpoints that stay, at least 2.

    A damaged one needs one before it."""
    on_nonfinite: OnNonfinite = "stop"
    """Reaction to a number that is not finite; stop: the run ends, skip: up to ten steps in a row are left out.

    Such a step changes nothing in any case."""
    optimizer: OptimizerName = "soflow"
    """AdamW of this package (one pass with averages and copies), torch (fused) or apex (FusedAdam)."""
    compile: bool = False
    """Compile the blocks with torch.compile."""
    cuda_graph: bool | None = None
    """Record the whole step as one CUDA graph; by default where every operation of it can be recorded."""
    recompute: Recompute = "auto"
    """Values that the backward makes again to save memory; nothing: none, none: norms and GELUs alone, mlp: each MLP's
    first product too, block: all of each block; auto: nothing on a CPU and where the GPU has room for it, else none."""
    attention: AttentionBackend = "auto"
    """Attention backend; auto: the fastest as measured, sdpa: torch picks; --env says which are usable."""
    mlp: MLPProducts = "auto"
    """Products around the GELU of each MLP; kernels: torch's, the GELU after them, quack: quack-kernels', the GELU in
    them, auto: the faster as measured.

    In bf16 steps that are not compiled, on GPUs of compute capability 9.0 or more; elsewhere auto is kernels."""
    parallel: Parallelism = "ddp"
    """Share of the state that each of several processes holds; ddp: all of it, fsdp: one part of as many as there are
    processes, hsdp: as fsdp within a node, and the same in every node."""
    shard_ranks: int = 0
    """Processes that a copy of the state is cut over with hsdp; 0: those of a node."""
    reduce_dtype: ReduceDtype = "fp32"
    """Precision in which gradients of several processes are added up."""
    hang_seconds: int = 20
    """Seconds without progress, beyond ten usual steps, after which a process counts as hanging; 0: never."""


@dataclass(frozen=True)
class Config:
    """One training run, resolved: the same Config and the same versions give the same weights."""

    preset: str = "digits"
    model: ModelConfig = field(default_factory=DiTConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)
    steps: int = 400_000
    """Updates in the whole run."""
    batch_size: int = 256
    """Images per update, over all ranks and micro-batches."""
    micro_batch: int = 0
    """Images per forward and backward on one rank; 0: the whole batch, auto: as many as fit.

    -1 is what "auto" is kept as: as many as the memory of the GPU is predicted to hold when the run starts. The result
    of the training is the same up to rounding."""
    precision: Precision = "auto"
    """Precision of products; auto: bf16 where a GPU has it or a CPU is faster in it, else fp32; fp8: by torchao."""
    guidance_precision: GuidancePrecision = "step"
    """Precision of the forward behind guidance; step: the step's, fp8: its blocks' products, by torchao."""
    quotient: QuotientKind = "auto"
    """Form of the consistency quotient; increments: value and increment side by side, pair: two forwards.

    "auto" is increments where products are rounded, a pair in float32."""
    quotient_precision: QuotientPrecision = "auto"
    """Precision of the products behind it; auto: the step's for increments, fp32 for a pair."""
    seed: int = 0
    """Seed of initialisation, data order, noise and times."""

    @property
    def dit(self) -> DiTConfig:
        """The shape of the network, where another kind cannot come."""
        assert isinstance(self.model, DiTConfig), self.model.kind
        return self.model

    @property
    def image_model(self) -> DiTConfig | UNetConfig:
        """The shape of the network, where a policy cannot come."""
        assert not isinstance(self.model, PolicyConfig), self.model.kind
        return self.model


class DataChoices(NamedTuple):
    """What a run leaves to its data."""

    classes_fixed: bool = True
    """Whether the data must have as many classes as the model; else the model takes the data's number."""
    epochs: int | None = None
    """Passes over the data, in place of the configuration's steps."""


NOTHING_LEFT = DataChoices()


# The flags that people type every day, and the fields that they set.
SHORT_NAMES = {
    "run_dir": "run.run_dir",
    "init": "run.init",
    "resume_official": "run.resume_official",
    "data": "data.path",
    "conditions": "data.conditions",
    "resize": "data.resize",
    "skip_bad": "data.skip_bad",
    "steps": "steps",
    "batch_size": "batch_size",
    "micro_batch": "micro_batch",
    "precision": "precision",
    "condition_size": "model.condition_size",
    "guidance_range": "model.guidance_range",
    "guidance_precision": "guidance_precision",
    "objective": "objective.kind",
    "quotient": "quotient",
    "quotient_precision": "quotient_precision",
    "teacher": "objective.teacher",
    "teacher_decay": "objective.teacher_decay",
    "seed": "seed",
    "device": "run.device",
    "optimizer": "run.optimizer",
    "compile": "run.compile",
    "cuda_graph": "run.cuda_graph",
    "recompute": "run.recompute",
    "attention": "run.attention",
    "parallel": "run.parallel",
    "eval_every": "run.eval_every",
    "reference": "run.reference",
    "checkpoint_every": "run.checkpoint_every",
    "track": "run.track",
    "keep": "run.keep",
    "on_nonfinite": "run.on_nonfinite",
}


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested dicts of JSON values."""
    return dataclasses.asdict(config)


def to_json(config: Config) -> str:
    """A configuration as JSON text, one field a line."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """A configuration as {"objective.eps": 0.01, ...}."""
    flat = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            flat |= flatten(value, f"{prefix}{item.name}.")
        else:
            flat[prefix + item.name] = value
    return flat


def from_json(text: str, base: Config | None = None) -> Config:
    """The inverse of `to_json`; a field left out is as in `base`, by default `Config()`.

    Raises ValueError naming what is wrong.
    """
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    return from_dict(values, base)


def from_dict(values: Any, base: Config | None = None) -> Config:
    """The inverse of `to_dict`; a field left out is as in `base`, by default `Config()`.

    Raises ValueError naming a wrong field.
    """
    flat: dict[str, Any] = {}
    for name, value in _items(values, "the configuration"):
        flat |= {f"{name}.{key}": item for key, item in _items(value, name)} if name in _SECTIONS else {name: value}
    for name in ("run.compile", "run.cuda_graph"):  # of files from when these were words
        if flat.get(name) in ("on", "off"):
            flat[name] = flat[name] == "on"
    if flat.get("run.compile") == "auto":
        flat["run.compile"] = False
    return _replace(base or Config(), flat, TYPES)


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with some fields replaced, by short name ("run_dir") or full name ("objective.eps").

    Values may be text, as typed on a command line. A `condition_size` leaves no classes unless their number is given.
    Raises ValueError naming the field.
    """
    full = {SHORT_NAMES.get(name, name): value for name, value in changes.items()}
    changed = _replace(config, full, [*TYPES, *SHORT_NAMES])
    if changed.model.condition_size and "model.condition_size" in full and "model.num_classes" not in full:
        changed = replace(changed, model=replace(changed.model, num_classes=0))
    return changed


def difference(old: Config, new: Config) -> list[str]:
    """The fields that make two runs different, as lines "objective.eps: 0.01 -> 0.1".

    `run` and the micro-batch do not count, nor where the data is and what was left out of it: its content does (see
    `data.identity`)."""
    before, after = flatten(old), flatten(new)
    free = ("run.", "micro_batch", "data.path", "data.vae", "data.conditions", "data.skip_bad")
    both = [name for name in before if name in after]  # of networks of two kinds, the kind
    changed = [name for name in both if before[name] != after[name] and not name.startswith(free)]
    return [f"{name}: {before[name]!r} -> {after[name]!r}" for name in changed]


def disagreement(old: Config, new: Config, *, finished: bool = False) -> list[str]:
    """`difference`; a field that `old` left open ("auto") is what it has come to in `new`.

    finished: the run of `old` has made all its steps, and may go on with more."""
    open_fields = {name: flatten(new)[name] for name, value in flatten(old).items() if value == "auto"}
    if finished and new.steps > old.steps:
        open_fields["steps"] = new.steps
    return difference(override(old, open_fields), new)


def nearest(name: str, known: Iterable[str]) -> str:
    """ " (did you mean ...?)" for a misspelt name or flag, or nothing."""
    close = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f" (did you mean {close[0] if close[0].startswith('-') else repr(close[0])}?)" if close else ""


def shown(value: Any) -> str:
    """A value as a message shows it: long ones shortened."""
    if isinstance(value, int) and value.bit_length() > 1000:  # Python refuses to write the longest
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def check_type(name: str, value: Any, given: Any = None) -> None:
    """Raise ValueError, showing `given` or else `value`, if `value` is not of the type of the field `name`."""
    kind = TYPES[name]
    parts = get_args(kind) if get_origin(kind) is tuple else (float, float) if kind == RANGE else ()
    if kind == RANGE and value is None:
        return
    if kind == WHOLES:
        if not isinstance(value, tuple) or not value or not all(type(part) is int for part in value):
            raise ValueError(f"{name} must be whole numbers, got {shown(value if given is None else given)}")
        return
    if parts:
        fits = isinstance(value, tuple) and len(value) == len(parts) and all(map(_is, value, parts))
    else:
        fits = _is(value, kind)
    if not fits:
        words = {int: "a whole number", float: "a number", bool: "true or false", SWITCH: "true, false"}
        wanted = "two numbers" if parts else words.get(kind, "text")
        or_auto = " or auto" if name == "micro_batch" or kind == SWITCH else " or none" if kind == RANGE else ""
        raise ValueError(f"{name} must be {wanted}{or_auto}, got {shown(value if given is None else given)}")


def _is(value: Any, kind: Any) -> bool:
    if kind is float:
        return type(value) in (int, float) and abs(value) < math.inf
    if kind == SWITCH:
        return value is None or type(value) is bool
    return type(value) is (str if get_origin(kind) is Literal else kind)


def _types(kind: Any = Config, prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, hint in get_type_hints(kind).items():
        classes = [each for each in (hint, *get_args(hint)) if is_dataclass(each)]
        for each in classes:
            found |= _types(each, f"{prefix}{name}.")
        if not classes and get_origin(hint) is not ClassVar:
            found[prefix + name] = hint
    return found


TYPES: dict[str, Any] = _types()
"""The type of each field, by its full name; of networks of every kind."""
_KINDS: dict[str, type] = {made().kind: made for made in get_args(ModelConfig)}
_SECTIONS = {name.partition(".")[0] for name in TYPES if "." in name}


def _items(values: Any, name: str) -> Iterable[tuple[str, Any]]:
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} must be an object, got {shown(values)}")
    return values.items()


def _replace(config: Config, changes: Mapping[str, Any], known: Iterable[str]) -> Config:
    """`config` with fields replaced by full name. Raises ValueError naming one that is unknown or of the wrong type.

    Another kind of network begins with the defaults of its kind."""
    kind = changes.get("model.kind", config.model.kind)
    if kind != config.model.kind and isinstance(kind, str) and kind in _KINDS:
        config = replace(config, model=_KINDS[kind]())
    for name, given in changes.items():
        if name not in TYPES:
            raise ValueError(f"unknown field {shown(name)}{nearest(name, known)}")
        if name.startswith("model.") and name not in flatten(config.model, "model."):
            raise ValueError(f"unknown field {shown(name)} of a network of the kind {config.model.kind}")
        value = _read(given, TYPES[name]) if (name, given) != ("micro_batch", "auto") else AUTO
        check_type(name, value, given)
        section, _, last = name.rpartition(".")
        inner = replace(getattr(config, section), **{last: value}) if section else value
        config = replace(config, **{section or last: inner})
    return config


def _read(value: Any, kind: Any) -> Any:
    """`value`, from JSON or as typed, as a field of type `kind` has it; what does not fit stays as it is."""
    if kind == RANGE and value == "none":
        return None
    if kind == WHOLES:
        parts = value.strip("()[] ").rstrip(",").split(",") if isinstance(value, str) else value
        return tuple(_read(part, int) for part in parts) if isinstance(parts, (list, tuple)) else value
    if get_origin(kind) is tuple or (kind == RANGE and value is not None):
        parts = value.strip("()[] ").split(",") if isinstance(value, str) else value
        return tuple(_read(part, float) for part in parts) if isinstance(parts, (list, tuple)) else value
    if kind == SWITCH and value == "auto":
        return None
    if kind in (bool, SWITCH) and isinstance(value, str):
        return {"true": True, "false": False, "1": True, "0": False}.get(value.lower(), value)
    if kind in (int, float) and isinstance(value, str):
        for number in (int, float):  # "1e3" is a whole number, and a float would round the largest ones
            with contextlib.suppress(ValueError):
                value = number(value)
                break
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is float and type(value) is int:
        with contextlib.suppress(OverflowError):
            return float(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value

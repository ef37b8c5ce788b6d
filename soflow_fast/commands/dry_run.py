"""`--dry-run`: builds everything, makes one step and says what the whole run needs. Writes nothing."""

from dataclasses import replace
from pathlib import Path

import torch

from ..config.gpus import GIGA, GPUS
from ..config.schema import NOTHING_LEFT, Config, DataChoices, UNetConfig
from ..data import Source, fitted, identity, open_source
from ..errors import ConfigError
from ..flow import conditions
from ..models.attention import flop_counter
from ..models.mlp_autotune import Choice
from ..ranks import flow_matching_samples
from ..runs.progress import duration
from ..runs.samples import check_evaluations
from ..runs.trainer import (
    beginning,
    choose_precision,
    enough_memory,
    memory_mb,
    recompute_in,
    resolve_attention,
    resolve_mlp,
    resolved,
    seconds_per_step,
    set_mlp,
)
from ..training.memory_estimate import USABLE, MemoryEstimate, estimate_memory, summary
from ..training.state import TrainState
from ..training.step import train_step
from ..training.time_estimate import estimate_time, table

CPU_FLOPS_PER_STEP = 0.25e12
"""On a CPU the step is made on fewer images where the whole batch would need more than this."""
FORWARDS_PER_IMAGE = 4.5
"""Forwards per image and step that are assumed for it: about those of the public recipe."""


def forward_flops(state: TrainState) -> int:
    """The FLOPs of one forward of the network on one image, counted by torch."""
    model = state.config.model
    x = torch.zeros(1, model.in_channels, model.input_size, model.input_size, device=state.device)
    t = torch.ones(1, device=state.device)
    w = t if model.guidance_range else None
    counter = flop_counter()
    with torch.no_grad(), counter:
        state.flow.network(x, t, t, *conditions(None, w))
    return counter.get_total_flops()


def forwards_per_image(state: TrainState, config: Config) -> float:
    """The forwards per image of a whole step, in units of one forward of the network without gradient.

    They add up from its three calls: guidance, student with backward (3), look-ahead (1 per consistency sample, or 2
    where the value at t is not the student's own output).
    """
    objective, B = state.objective, config.batch_size
    consistency = 1 - flow_matching_samples(B, config.objective.flow_matching_fraction) / B
    guided = objective.guided and config.model.conditional
    guidance = guided * (1 + consistency * objective.mixed)
    target = state.target
    own_value = target.kind == "pair" and target.precision == state.precision and target.teacher != "ema"
    return guidance + 3 + consistency * (1 if own_value or state.rides_along() else 2)


def dry_run(config: Config, gpu: str | None = None, choices: DataChoices = NOTHING_LEFT) -> str:
    """The text that `--dry-run` prints; gpu: one of `GPUS`, for which memory and time of a step are predicted. Raises
    UserError as a run would."""
    check_evaluations(config.run)
    with enough_memory(config):
        return _report(config, gpu, choices)


def with_data(given: Config, choices: DataChoices) -> tuple[Config, Source | None]:
    """The configuration as its data wants it, and the data, if any is given."""
    if given.data.kind == "digits" or given.data.path:
        source = open_source(given)
        return fitted(given, source, choices), source
    if choices.epochs is not None:
        raise ConfigError("--epochs: needs --data, whose size makes an epoch")
    return given, None


def _report(given: Config, gpu: str | None, choices: DataChoices) -> str:
    given, source = with_data(given, choices)  # first, as it finds most mistakes
    config = resolved(choose_precision(given)[0])
    # On the CPU "auto" has been resolved for it, and the prediction is for a GPU.
    on_gpu = given if config.run.device == "cpu" else config
    if gpu is not None and on_gpu.run.recompute == "auto":
        on_gpu = replace(on_gpu, run=replace(on_gpu.run, recompute=recompute_in(on_gpu, GPUS[gpu].memory)))
    predicted = estimate_memory(on_gpu)
    start = beginning(config, Path(config.run.run_dir))
    state = TrainState.build(config, weights=start.network if start else None)
    backend, mlp = resolve_attention(state), resolve_mlp(state)
    model = config.model
    one_forward = forward_flops(state)
    batch = config.batch_size
    if state.device.type == "cpu":
        batch = max(1, min(batch, int(CPU_FLOPS_PER_STEP / (FORWARDS_PER_IMAGE * one_forward))))
        state.config = replace(config, batch_size=batch)
    else:
        torch.cuda.reset_peak_memory_stats(state.device)
    if source is None:
        x = torch.randn(batch, model.in_channels, model.input_size, model.input_size)
        E = model.condition_size
        y = torch.randn(batch, E) if E else torch.randint(max(model.num_classes, 1), (batch,))
    else:
        x, y = (value[:batch] for value in source.batch(0))
    counter = flop_counter()
    with counter:
        metrics = train_step(state, x, y)
    state.set_attention(backend)  # not before, as FLOPs are only counted in torch's own attention and products
    set_mlp(state, mlp.name)
    whole = batch == config.batch_size
    flops = counter.get_total_flops() / batch if whole else forwards_per_image(state, config) * one_forward
    seconds = seconds_per_step(state, x, y) * config.batch_size / batch
    data = ["random numbers (no data was given or read)"]
    if source:
        data = identity.describe(source.dataset, identity.identify(source.dataset), config.data.path)
    rows = [
        (
            "preset",
            f"{config.preset}: {model.words}; {state.precision} on {state.device}",
        ),
        *([] if isinstance(model, UNetConfig) else _choices(config, backend, mlp)),
        ("data", "; ".join(line.strip() for line in data).removeprefix("data: ")),
        ("parameters", f"{state.parameter_count() / 1e6:.2f} M"),
        ("FLOPs", f"{flops / 1e9:.4g} GFLOP per image and step, {flops / one_forward:.2f} forwards"),
        ("memory", f"{memory_mb(state.device):.0f} MB at its peak{'' if whole else f', batch {batch}'}"),
        ("on a GPU", f"predicted: {summary(predicted)}{_fits(predicted, gpu)}"),
        (
            "speed",
            f"{1 / seconds:.3g} steps/s, {config.batch_size / seconds:.4g} images/s at batch {config.batch_size}"
            + ("" if whole else f", scaled from a step of {batch}"),
        ),
        ("time needed", f"{duration(seconds * config.steps)} for {config.steps} steps"),
        ("first losses", ", ".join(f"{k} {float(v):.4f}" for k, v in metrics.items() if k.endswith(("loss", "mse")))),
    ]
    text = "\n".join(f"{name:<13} {value}" for name, value in rows)
    if gpu is None:
        return text
    if isinstance(model, UNetConfig):
        return f"{text}\n\nThe time of a step on a GPU is predicted of a DiT alone."
    return f"{text}\n\n{table(estimate_time(on_gpu, gpu))}"


def _choices(config: Config, backend: str, mlp: Choice) -> list[tuple[str, str]]:
    """What was chosen for the blocks of a DiT."""
    return [
        ("attention", f"{backend}{' (the fastest here)' if config.run.attention == 'auto' else ''}"),
        ("MLP", mlp.said.removeprefix("MLP by ") or mlp.name),
    ]


def _fits(predicted: MemoryEstimate, gpu: str | None) -> str:
    """Whether the peak stays within the usable part of a GPU's memory."""
    if gpu is None:
        return ""
    memory = GPUS[gpu].memory
    verdict = "fits" if predicted.peak <= USABLE * memory else "does not fit"
    return f"; {verdict} {GPUS[gpu].title}, of which {USABLE * memory / GIGA:.1f} GB are usable"

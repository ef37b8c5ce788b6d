"""float32 or bf16 for a run on a CPU: the one in which its step takes less time, measured once and kept in a file.

bf16 products are worth it on CPUs that have them (avx512_bf16, amx), in networks whose time goes into products.
"""

import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from ..config.schema import Config, DiTConfig
from ..files import cache_folder
from ..models.measured_choice import read_choices, setting, write_choices
from .state import TrainState, no_conditions
from .step import train_step

NARROWEST = 256
"""Hidden size below which it is float32 unmeasured: products are not what such a step's time goes into."""
GAIN = 1.1
"""How many times as fast bf16 must be, so that it is not taken by chance."""
BLOCKS = 2
TOKENS = 2048
"""Of the step that is timed, at most."""
ROUNDS = 5


class Choice(NamedTuple):
    """What was found."""

    precision: str
    fp32: float
    """Seconds of a step of a few blocks; 0: not measured."""
    bf16: float


def has_products() -> bool:
    """Whether this CPU multiplies matrices in bf16."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def choose(config: Config, clock: Callable[[], float], cache: Path | None = None) -> Choice:
    """The faster precision for a run on the CPU: what the file `cache` (None: the user's) holds for its shape and this
    machine, or measured and put there."""
    if not isinstance(config.model, DiTConfig) or not has_products() or config.model.hidden_size < NARROWEST:
        return Choice("fp32", 0.0, 0.0)
    path, key = cache or cache_folder() / "cpu_precision.json", _key(config)
    known = read_choices(path).get(key)
    if isinstance(known, dict) and known.get("precision") in ("fp32", "bf16"):
        seconds = [known.get(name) for name in ("fp32", "bf16")]
        if all(isinstance(value, float) for value in seconds):
            return Choice(known["precision"], *seconds)  # pyright: ignore[reportArgumentType]
    found = measure(config, clock)
    write_choices(path, read_choices(path) | {key: found._asdict()})
    return found


def measure(config: Config, clock: Callable[[], float]) -> Choice:
    """Time a step of a few blocks in both, in turn. Raises ConfigError for a configuration that is wrong."""
    tokens = (config.dit.input_size // config.dit.patch_size) ** 2
    batch = min(config.batch_size, max(4, TOKENS // tokens))
    model = replace(config.dit, depth=min(BLOCKS, config.dit.depth))
    run = replace(config.run, check_quotient_every=0, compile=False, optimizer="soflow")
    config = replace(config, model=model, run=run, batch_size=batch, micro_batch=0)
    images = torch.zeros(batch, model.in_channels, model.input_size, model.input_size)
    labels = no_conditions(model, batch, images.device)
    states = {name: TrainState.build(replace(config, precision=name)) for name in ("fp32", "bf16")}
    seconds: dict[str, list[float]] = {name: [] for name in states}
    for _ in range(1 + ROUNDS):  # the first calls prepare
        for name, state in states.items():
            began = clock()
            train_step(state, images, labels)
            seconds[name].append(clock() - began)
    fp32, bf16 = (statistics.median(times[1:]) for times in seconds.values())
    return Choice("bf16" if bf16 * GAIN < fp32 else "fp32", fp32, bf16)


def _key(config: Config) -> str:
    model, objective = config.dit, config.objective
    shape = (model.input_size, model.patch_size, model.in_channels, model.hidden_size, model.num_heads, model.mlp_ratio)
    cpu = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads of {os.cpu_count()}"
    parts = (setting(torch.device("cpu"), torch.float32, ()), sys.platform, cpu, shape, config.batch_size)
    norms = ("qk_norm",) if model.qk_norm else ()
    norms += (f"vectors {model.condition_size}",) if model.condition_size else ()
    return "; ".join(map(str, (*parts, objective.teacher, config.run.recompute, *norms)))

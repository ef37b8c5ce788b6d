"""The time of a training step on a GPU, predicted without one: the real step runs on tensors without data, and every
operation takes as long as its launches, its bytes or its FLOPs at rates that are assumed for the GPU, whichever is
longest.

A prediction by arithmetic, not a measurement. Left out: what two kernels do at the same time, what stays in a cache
between them, time lost at the end of a wave of programs, and clocks that fall under load. The host is another bound: it
dispatches every operation, except in a step that is replayed as a CUDA graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from soflow_kernels.testing import as_on_gpu

from ..config.schema import Config
from .memory_estimate import as_counted, build_as_on_gpu, images
from .operation_count import Operation, Operations
from .step import train_step

PHASES = ("guidance", "student", "target", "backward", "update")
"""The parts of a step. Draws and points count to "guidance", the losses to "target"."""


@dataclass(frozen=True)
class Gpu:
    """Rates at which a GPU is assumed to work in shapes of this size: below its peak."""

    title: str
    memory: int
    """Bytes."""
    copy: float
    """Bytes a second, read and written."""
    products: dict[str, float]
    """FLOP/s of products, by the precision of their operands."""
    attention: float
    attention_backward: float
    """FLOP/s."""
    launch: float = 2e-6
    """Seconds from one kernel to the next, the least that one takes."""


_GB, _TERA = 10**9, 1e12

GPUS = {
    # Peak without sparsity: 989 TFLOP/s in bf16, 3.35 TB/s (NVIDIA's data sheet of the H100 SXM).
    "h100": Gpu(
        "H100 SXM 80 GB", 80 * _GB, 2.9 * _TERA,
        {"bf16": 700 * _TERA, "fp16": 700 * _TERA, "fp8": 1300 * _TERA, "tf32": 380 * _TERA, "fp32": 50 * _TERA},
        250 * _TERA, 200 * _TERA,
    ),
    # The same multiprocessors, more power for them, 4.8 TB/s.
    "h200": Gpu(
        "H200 SXM 141 GB", 141 * _GB, 4.2 * _TERA,
        {"bf16": 790 * _TERA, "fp16": 790 * _TERA, "fp8": 1450 * _TERA, "tf32": 430 * _TERA, "fp32": 50 * _TERA},
        250 * _TERA, 200 * _TERA,
    ),
    # Peak 312 TFLOP/s in bf16, 156 in TF32, 19.5 in float32, 2.0 TB/s; no float8.
    "a100": Gpu(
        "A100 SXM 80 GB", 80 * _GB, 1.6 * _TERA,
        {"bf16": 250 * _TERA, "fp16": 250 * _TERA, "tf32": 125 * _TERA, "fp32": 17 * _TERA},
        170 * _TERA, 130 * _TERA,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Host:
    """Seconds that the host is assumed to take for what it dispatches. They differ between machines by a factor."""

    dispatch: float = 5e-6
    """An operation of torch, views included, with what Python and autograd do for it."""
    launch: float = 2.5e-6
    """A kernel of torch."""
    operation: float = 13e-6
    """An operation of ours, its checks included."""
    kernel: float = 8e-6
    """A Triton kernel."""


@dataclass(frozen=True)
class PhaseTime:
    """What a phase of a step comes to, or a whole step."""

    launches: int
    bytes: int
    """Read and written."""
    other_bytes: int
    """Of all that is neither a product nor attention."""
    flops: int
    gpu: float
    """Seconds of the GPU."""
    host: float
    """Seconds of the host, uncaptured."""


@dataclass(frozen=True)
class TimeEstimate:
    """The predicted time of one step."""

    gpu: str
    phases: dict[str, PhaseTime]
    batch: int
    precision: str

    @property
    def total(self) -> PhaseTime:
        """The whole step."""
        columns = zip(*(vars(phase).values() for phase in self.phases.values()), strict=True)
        return PhaseTime(*map(sum, columns))

    @property
    def eager(self) -> float:
        """Seconds of a step as it is."""
        return max(self.total.gpu, self.total.host)

    @property
    def graph(self) -> float:
        """Seconds of a step as a CUDA graph."""
        return self.total.gpu


def count_step(config: Config, batch: int | None = None) -> list[Operation]:
    """The operations of one ordinary step of `config` on `batch` images (None: its own) on a GPU, with their phases.

    fp8 is counted as bf16, apex's optimiser as torch's, compiled blocks as plain ones. Of many micro-batches two are
    run. Raises ConfigError naming a wrong field.
    """
    counted = as_counted(config, batch)
    with as_on_gpu():
        state = build_as_on_gpu(counted)
        operations = Operations()

        def follow(name: str, **values: Any) -> None:
            if name in NEXT:
                operations.phase = NEXT[name]

        with operations:
            train_step(state, *images(state, 1))  # makes the moments
            operations.found.clear()
            operations.phase = PHASES[0]
            train_step(state, *images(state, counted.batch_size), observe=follow)
    return operations.found


NEXT = {"losses": "guidance", "guidance": "student", "student": "target", "backward": "backward", "update": "update"}
"""The phase that begins where a step says that it is at a point."""


def seconds(operation: Operation, gpu: Gpu) -> float:
    """The time of an operation on a GPU."""
    if not operation.launches:
        return 0.0
    rates = {"attention": gpu.attention, "attention backward": gpu.attention_backward}
    rate = rates.get(operation.kind) or gpu.products.get(operation.precision, 0.0)
    return max(
        operation.launches * gpu.launch,
        operation.bytes / gpu.copy,
        operation.flops / rate if operation.flops else 0.0,
    )


def host_seconds(operation: Operation, host: Host) -> float:
    """The time of the host for an operation."""
    if operation.host == "torch":
        return host.dispatch + operation.launches * host.launch
    return operation.launches * host.kernel + (host.operation if operation.host else 0.0)


def phase_time(operations: Sequence[Operation], gpu: Gpu, host: Host) -> PhaseTime:
    """What some operations come to."""
    return PhaseTime(
        sum(o.launches for o in operations),
        sum(o.bytes for o in operations),
        sum(o.bytes for o in operations if o.kind == "other"),
        sum(o.flops for o in operations),
        sum(seconds(o, gpu) for o in operations),
        sum(host_seconds(o, host) for o in operations),
    )


def estimate_time(config: Config, gpu: str, *, batch: int | None = None) -> TimeEstimate:
    """The predicted time of one step of `config` on one of `GPUS`. Needs no GPU and computes no number."""
    operations = count_step(config, batch)
    phases = {phase: phase_time([o for o in operations if o.phase == phase], GPUS[gpu], Host()) for phase in PHASES}
    counted = as_counted(config, batch)
    return TimeEstimate(
        gpu, phases, counted.batch_size, config.precision if config.precision == "fp8" else counted.precision
    )

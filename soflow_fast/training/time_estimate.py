"""The time of a training step on a GPU, predicted without one: the real step runs on tensors without data, and every
operation takes as long as its launches, its bytes or its FLOPs, whichever takes longest at rates that are assumed.

A prediction by arithmetic, not a measurement. Left out: what two kernels do at the same time, what stays in a cache
between them, shapes too small to fill the GPU, clocks that fall under load. The host is another bound: it dispatches
every operation, except in a step that is replayed as a CUDA graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from soflow_kernels.testing import as_on_gpu

from ..config.gpus import GIGA, GPUS, TERA, Gpu, Host
from ..config.schema import Config
from .memory_estimate import as_counted, build_as_on_gpu, images, take_two_micro_batches
from .operation_count import Operation, Operations
from .step import train_step

PHASES = ("guidance", "student", "target", "backward", "update")
"""The parts of a step. Draws and points go to "guidance", the losses to "target"."""
NEXT = {
    "micro-batch": "guidance",
    "guidance": "student",
    "student": "target",
    "backward": "backward",
    "update": "update",
}
"""The part that begins where a step says that it has come to a point."""


@dataclass(frozen=True)
class PhaseTime:
    """What a part of a step, or a whole one, comes to."""

    launches: int
    bytes: int
    """Read and written."""
    other_bytes: int
    """Of all that is neither a product nor attention."""
    flops: int
    gpu: float
    """Seconds of the GPU."""
    host: float
    """Seconds of the host, where it dispatches everything."""


@dataclass(frozen=True)
class TimeEstimate:
    """The predicted time of one step."""

    gpu: str
    """Its name in `GPUS`."""
    phases: dict[str, PhaseTime]
    batch: int
    precision: str
    """The precision that was counted."""

    @property
    def total(self) -> PhaseTime:
        """The whole step."""
        return PhaseTime(*(sum(getattr(p, f.name) for p in self.phases.values()) for f in fields(PhaseTime)))

    @property
    def graph(self) -> float:
        """Seconds of a step as a CUDA graph."""
        return self.total.gpu

    @property
    def eager(self) -> float:
        """Seconds of a step whose operations the host dispatches."""
        return max(self.total.gpu, self.total.host)


def estimate_time(config: Config, gpu: str, *, batch: int | None = None) -> TimeEstimate:
    """The predicted time of one step of `config` on `batch` images (None: its own) on one of `GPUS`.

    Needs no GPU and computes no number. Raises ConfigError naming a wrong field.
    """
    counted = as_counted(config, batch)
    return priced(count_step(config, batch), gpu, counted.batch_size, counted.precision)


def priced(operations: Sequence[Operation], gpu: str, batch: int, precision: str) -> TimeEstimate:
    """The predicted time of counted operations, by their phases."""
    by_phase: dict[str, list[Operation]] = {phase: [] for phase in PHASES}
    for operation in operations:
        by_phase.setdefault(operation.phase, []).append(operation)
    phases = {phase: phase_time(found, GPUS[gpu], Host()) for phase, found in by_phase.items() if found}
    return TimeEstimate(gpu, phases, batch, precision)


def count_step(config: Config, batch: int | None = None) -> list[Operation]:
    """The operations of an ordinary step of `config` on a GPU, one that does not check the quotient.

    float8 is counted as bf16, apex's optimiser as torch's, compiled blocks as plain ones. Of many micro-batches two
    are run, as the others are like the second. Raises ConfigError naming a wrong field.
    """
    counted = as_counted(config, batch)
    counted = replace(counted, run=replace(counted.run, check_quotient_every=0))
    starts: list[int] = []
    with as_on_gpu():
        state = build_as_on_gpu(counted)
        parts, n = take_two_micro_batches(state)
        operations = Operations()

        def follow(name: str, **values: Any) -> None:
            operations.phase = NEXT.get(name, operations.phase)
            if name in ("micro-batch", "update"):
                starts.append(len(operations.found))

        first, second = images(state, 1), images(state, n)
        with operations:
            train_step(state, *first)  # makes the moments
            operations.found.clear()
            operations.phase = PHASES[0]
            train_step(state, *second, observe=follow)
    found = operations.found
    if parts <= 2:
        return found
    _, second, update = starts
    return [*found[:second], *found[second:update] * (parts - 1), *found[update:]]


def seconds(operation: Operation, gpu: Gpu) -> float:
    """The time of an operation on a GPU."""
    if not operation.launches:
        return 0.0
    rates = {"attention": gpu.attention, "attention backward": gpu.attention_backward}
    rate = rates.get(operation.kind) or gpu.products.get(operation.precision, gpu.products["bf16"])
    return max(operation.launches * gpu.launch, operation.bytes / gpu.copy, operation.flops / rate)


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


def table(estimate: TimeEstimate) -> str:
    """The prediction as lines of text: its parts, the time of a step in both ways, and what was assumed."""
    gpu, B = GPUS[estimate.gpu], estimate.batch
    head = f"{'':<10}{'launches':>10}{'GB':>9}{'of others':>11}{'TFLOP':>9}{'GPU ms':>9}{'host ms':>9}"
    rows = [
        f"{name:<10}{p.launches:>10}{p.bytes / GIGA:>9.2f}{p.other_bytes / GIGA:>11.2f}{p.flops / TERA:>9.2f}"
        f"{1e3 * p.gpu:>9.2f}{1e3 * p.host:>9.2f}"
        for name, p in (*estimate.phases.items(), ("step", estimate.total))
    ]
    ways = [
        f"{way} {1e3 * time:.4g} ms, {B / time:.0f} images/s"
        for way, time in (("as a CUDA graph", estimate.graph), ("uncaptured", estimate.eager))
    ]
    rates = [f"{name} {rate / TERA:g}" for name, rate in gpu.products.items()]
    host = Host()
    notes = [
        f"a step of {B} in {estimate.precision}: {'; '.join(ways)}",
        "A prediction by arithmetic, not a measurement. Of others: all but products and attention.",
        f"Assumed of the GPU: products {', '.join(rates)} TFLOP/s, attention {gpu.attention / TERA:g} and backward "
        f"{gpu.attention_backward / TERA:g}, copies {gpu.copy / TERA:g} TB/s, {1e6 * gpu.launch:g} us a launch;",
        f"of the host: {1e6 * host.dispatch:g} us an operation of torch and {1e6 * host.launch:g} its launch, "
        f"{1e6 * host.operation:g} us an operation of soflow_kernels and {1e6 * host.kernel:g} a kernel of it.",
    ]
    return "\n".join([f"{gpu.title}, predicted", head, *rows, *notes])

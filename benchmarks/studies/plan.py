"""`python -m benchmarks.plan`: steps on many GPUs that are not here, predicted, as a record.

Nothing is measured: `soflow_fast.training.plan` says how bytes, hops and operations become seconds. DiT-XL/2 and a DiT
of 3 billion parameters, on 8 to 512 GPUs in nodes of 8: with so many images for each GPU, and with a batch that stays.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.harness import command
from benchmarks.report import record
from soflow_fast.config.presets import preset
from soflow_fast.config.schema import AUTO, Config, Parallelism, override
from soflow_fast.errors import ConfigError
from soflow_fast.training.plan import Cluster, Plan, plan

GPU = "h100"
NODE = 8
KINDS: tuple[Parallelism, ...] = ("ddp", "fsdp", "hsdp")
NETWORKS = {
    "XL/2": {},
    "3 B": {"model.hidden_size": 2304, "model.depth": 32, "model.num_heads": 18},
}
"""Changes of the preset imagenet256-xl2."""
SHARE = 32
"""Images of each GPU where the batch grows with their number."""
BATCH = 2048
"""Images of all where it stays."""


class Point(NamedTuple):
    """A network on some GPUs."""

    network: str
    case: str
    kind: Parallelism
    gpus: int
    batch: int


def points() -> Iterator[Point]:
    """All that is predicted, in the order of the tables. On one node hsdp is fsdp."""
    for network in NETWORKS:
        for gpus in (8, 16, 32, 64, 128, 256, 512):
            for kind in KINDS if gpus > NODE else KINDS[:2]:
                yield Point(network, f"{network}, {SHARE} images a GPU", kind, gpus, SHARE * gpus)
    for network in NETWORKS:
        for gpus in (8, 64, 512):
            for kind in KINDS if gpus > NODE else KINDS[:2]:
                yield Point(network, f"{network}, batch {BATCH}", kind, gpus, BATCH)


def configuration(point: Point) -> Config:
    """The run of a point."""
    changes = {**NETWORKS[point.network], "batch_size": point.batch, "micro_batch": AUTO, "parallel": point.kind}
    return override(preset("imagenet256-xl2"), changes)


def predicted(point: Point) -> dict | None:
    """The row of a point; None: not even single images fit."""
    try:
        found = plan(configuration(point), Cluster(GPU, NODE, point.gpus // NODE))
    except ConfigError as error:
        if not str(error).startswith("--micro-batch auto"):
            raise
        return None
    return row(point, found)


def row(point: Point, found: Plan) -> dict:
    """What a record keeps of a prediction."""
    step, whole = found.step, found.step.whole
    return {
        "case": point.case,
        "parallel": point.kind,
        "gpus": point.gpus,
        "batch": point.batch,
        "parameters": found.parameters,
        "micro_batches": found.micro_batches,
        "recompute": found.config.run.recompute,
        "memory": {**found.memory.parts(), "peak": found.memory.peak},
        "nvlink_bytes": round(whole.traffic.nvlink),
        "network_bytes": round(whole.traffic.network),
        "gpu_ms": round(1e3 * whole.compute, 3),
        "links_ms": round(1e3 * (whole.seconds - whole.compute), 3),
        "host_ms": round(1e3 * step.host, 3),
        "step_ms": round(1e3 * step.seconds, 3),
        "images_per_s": round(found.images_per_second, 1),
        "efficiency": round(found.efficiency, 4),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = command.Parser(prog="python -m benchmarks.plan", description=__doc__)
    parser.parse(argv)
    kept = record.Growing("plan", argv)
    rows: list[dict] = []
    missing = [f"{point.case}, {point.kind}, {point.gpus}" for point in points()]
    for point in points():
        found = predicted(point)
        missing.pop(0)
        if found is None:
            print(f"{point.case}: {point.kind} on {point.gpus}: does not fit", flush=True)
            continue
        rows.append(found)
        print(
            f"{point.case}: {point.kind} on {point.gpus}: {found['memory']['peak'] / 1e9:.1f} GB, "
            f"{found['step_ms']:.4g} ms, {found['images_per_s']:.5g} images/s, {found['efficiency']:.1%}",
            flush=True,
        )
        kept.keep(rows, missing)
    kept.finish(rows, missing)

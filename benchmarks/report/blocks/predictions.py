"""Blocks of steps on GPUs that are not here, by arithmetic."""

import itertools

from benchmarks.report.blocks.layout import page
from benchmarks.report.tables import (
    number,
)


def prediction(run: dict) -> str:
    """A record of benchmarks.prediction as Markdown: a line per network, batch and recipe."""
    lines = []
    gpus = list(run["rows"][0]["predicted_ms"])
    for case, group in itertools.groupby(run["rows"], key=lambda row: row["case"]):
        for k, row in enumerate(group):
            launches = "" if row["launches"] is None else str(row["launches"])
            sizes = [number(row["bytes"] / 1e9), number(row["other_bytes"] / 1e9), number(row["flops"] / 1e12)]
            times = [number(row["predicted_ms"][gpu]) if gpu in row["predicted_ms"] else "" for gpu in gpus]
            lines.append([case if k == 0 else "", row["recipe"], launches, *sizes, *times])
    head = ["network and batch", "recipe", "launches", "GB", "GB of others", "TFLOP", *(f"{g} ms" for g in gpus)]
    note = (
        "Arithmetic, not a measurement: nothing here ran on a GPU. Of others: all but products and attention. Whether "
        f"it fits the memory is another question. `{run['command']}`."
    )
    return page(head, 4 + len(gpus), lines, run, note)


def plan(run: dict) -> str:
    """A record of benchmarks.plan as Markdown: a line per network, batch, number of GPUs and way to share the state."""
    lines = []
    for case, group in itertools.groupby(run["rows"], key=lambda row: row["case"]):
        gpus = None
        for k, row in enumerate(group):
            first = str(row["gpus"]) if row["gpus"] != gpus else ""
            gpus = row["gpus"]
            sizes = [row["memory"]["peak"], row["nvlink_bytes"], row["network_bytes"]]
            cells = [case if k == 0 else "", first, row["parallel"], f"{row['micro_batches']}, {row['recompute']}"]
            cells += [number(size / 1e9) if size else "" for size in sizes]
            cells += [number(row[name]) for name in ("gpu_ms", "links_ms", "host_ms", "step_ms", "images_per_s")]
            lines.append([*cells, f"{100 * row['efficiency']:.0f} %"])
    head = [
        "network and batch", "GPUs", "parallel", "micro-batches, recompute", "GB of memory", "GB by NVLink",
        "GB by network", "GPU ms", "links ms", "host ms", "step ms", "images/s", "efficiency",
    ]  # fmt: skip
    note = (
        "H100, nodes of 8. Arithmetic, not a measurement: nothing here ran on a GPU. Memory is that of one GPU, bytes "
        f"what it sends in a step; what does not fit is left out. `{run['command']}`."
    )
    return page(head, 9, lines, run, note)

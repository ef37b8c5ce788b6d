"""Blocks of steps: their time, memory and parts, on CPUs and GPUs."""

import itertools

from benchmarks.harness.race import figures, speed_ups
from benchmarks.report.blocks.layout import measured, page
from benchmarks.report.figures import picture
from benchmarks.report.gpu_tables import choices_table, timeline_table
from benchmarks.report.tables import (
    efficiency,
    images_per_second,
    kernel_table,
    number,
    quartiles,
    sweep_base,
    sweep_table,
)

HEAD = (
    "network and batch", "recipe", "precision", "images/s", "ms per step (quartiles)", "time over ours",
    "network calls", "forwards per image", "GFLOP per image", "of product ceiling", "of copy bandwidth", "memory",
)  # fmt: skip


def table(run: dict) -> str:
    """A record as Markdown: a line per case and recipe, and what was measured where."""
    lines = []
    for case, group in itertools.groupby(run["rows"], key=lambda row: row["case"]):
        rows = [row for row in group if not row.get("skipped")]
        ratios = speed_ups(rows)
        for row in rows:
            first = case if row is rows[0] else ""
            f, ratio = figures(row), ratios.get(row["recipe"])
            cells = [first, row["recipe"], row["precision"], number(f["images_per_s"])]
            cells += [quartiles(row["seconds"], 1e-3), f"{ratio:.2f}x" if ratio else ""]
            cells += [
                str(row["network_calls"]),
                f"{row['forwards_per_image']:.2f}",
                number(row["flops_per_image"] / 1e9),
                share(f["images_per_s"], row["flops_per_image"], row.get("product_ceiling")),
                share(f["images_per_s"], row.get("bytes_per_image"), row.get("copy_ceiling")),
            ]
            lines.append([*cells, memory(row)])
    rounds = sorted({len(row["seconds"]) for row in run["rows"] if row["seconds"]})
    note = f"`{run['command']}`; the recipes' steps in turn, {' and '.join(map(str, rounds))} rounds."
    if any("product_ceiling" in row for row in run["rows"]):
        note += (
            " Ceilings: one large product in the same precision and one large copy, in the same run; bytes are those"
            " that the operations read and write, which caches may hold, and of compiled code are not seen."
        )
    note += not_run(run["rows"])
    return page(HEAD, 9, lines, run, note)


def not_run(rows: list[dict]) -> str:
    """A sentence on who did not run and why; with the network where it is not the same for all."""
    cases = {row["case"] for row in rows}
    where: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.get("skipped"):
            where.setdefault((row["recipe"], row["skipped"]), []).append(row["case"])
    who: dict[str, list[str]] = {}
    for (recipe, reason), at in where.items():
        who.setdefault(reason, []).append(recipe if set(at) == cases else f"{recipe} ({'; '.join(at)})")
    reasons = "; ".join(", ".join(names) + f": {why}" for why, names in who.items())
    return f" Not run: {reasons}." if who else ""


def share(images_per_s: float, each: float | None, ceiling: float | None) -> str:
    """FLOPs or bytes per image as a share of a ceiling of the device."""
    return f"{images_per_s * each / ceiling:.2f}" if each and ceiling else "not measured"


def memory(row: dict) -> str:
    """Peak memory in GiB, allocated / reserved; on a CPU what autograd keeps for the backward."""
    if row["peak_allocated"] is not None:
        return f"{row['peak_allocated'] / 2**30:.1f} / {row['peak_reserved'] / 2**30:.1f} GiB peak"
    if row.get("kept_for_backward") is not None:
        return f"{number(row['kept_for_backward'] / 2**20)} MiB kept for the backward"
    return "not measured"


def cpu(run: dict) -> str:
    """A record of benchmarks.cpu as Markdown: a line per case and recipe."""
    lines = []
    for case, group in itertools.groupby(run["rows"], key=lambda row: row["case"]):
        rows = list(group)
        first = figures(rows[0])["median_ms"]
        for k, row in enumerate(rows):
            times = f"{first / figures(row)['median_ms']:.2f}x" if k else ""
            lines.append([case if k == 0 else "", row["way"], quartiles(row["seconds"], 1e-3), times])
    note = f"In turn, one run; times as fast as the first. `{run['command']}`."
    return page(["network and batch", "recipe", "ms per step (quartiles)", "times as fast"], 2, lines, run, note)


def peaks(run: dict) -> str:
    """A record of benchmarks.memory as Markdown: a line per case and recipe."""
    lines = []
    for case, group in itertools.groupby(run["rows"], key=lambda row: row["case"]):
        rows = list(group)
        first = rows[0]["peak_bytes"]
        for k, row in enumerate(rows):
            held, peak = (row[name] / 2**20 for name in ("held_bytes", "peak_bytes"))
            share = f"{row['peak_bytes'] / first:.2f}x" if k else ""
            lines.append([case if k == 0 else "", row["way"], number(held), number(peak), share, number(held + peak)])
    head = ["network and batch", "recipe", "MiB held between steps", "MiB more at the peak of a step", "of the first"]
    note = f"Counted by torch's profiler, one recipe after the other. `{run['command']}`."
    return page([*head, "MiB together"], 4, lines, run, note)


def sweeps(run: dict) -> str:
    """A record of benchmarks.sweeps as Markdown: a line per point and recipe."""
    note = (
        f"Both recipes in turn. {sweep_base(run['rows'])} Peak memory of "
        "each recipe alone: allocated on a GPU, what the process's resident memory rose by on a CPU. "
        f"`{run['command']}`."
    )
    plot = picture("sweeps", "Time and memory of a step over batch, tokens and depth.")
    return f"{plot}\n\n{sweep_table(run['rows'])}\n\n{measured(run, note)}"


def scaling(run: dict) -> str:
    """A record of benchmarks.scaling as Markdown: a line per scaling, engine and number of ranks."""
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in run["rows"]):
        rows = [row for row in run["rows"] if row["kind"] == kind]
        for row in rows:
            cells = [f"{kind}: {row['way']}", str(row["batch"])]
            if row["seconds"]:
                of_one = f"{efficiency(row, rows[0]):.2f}" if row["ranks"] > 1 and rows[0]["seconds"] else ""
                cells += [quartiles(row["seconds"], 1e-3), number(images_per_second(row)), of_one]
                sent = [number(row[name] / 1e6) for name in ("sent", "formula")]
                cells += sent if row["ranks"] > 1 else ["", ""]
            lines.append(cells + [row["why_not"] or ""] * (7 - len(cells)))
    head = ["scaling and ranks", "whole batch", "ms per step (quartiles)", "images/s", "efficiency"]
    head += ["MB sent by a rank", "by formula"]
    what = run["rows"][0]["case"].rpartition(", ")[0]
    machine = "" if "gpu" in run else " Ranks are processes of one thread on one CPU: efficiency is that of its cores."
    note = f"{what}, {run['rows'][0]['precision']}.{machine} `{run['command']}`."
    return page(head, 6, lines, run, note)


def kernels(run: dict) -> str:
    """A record of benchmarks/test_kernels.py as Markdown: what it is of, a line per operation, pass and way."""
    if "gpu" in run:
        what = "Of a GPU, at the shapes of DiT-XL/2."
    else:
        what = (
            "Of a CPU, at small shapes, each operation's reference in place of its kernel: that the benchmark works is "
            "all that this shows. It says nothing of the kernels."
        )
    note = (
        "Every operation's ways in turn, one run. MB by the formulas of the operations' docstrings, where they have "
        f"one; their share of what a copy moves per second in the same run. `{run['command']}`."
    )
    return f"{what}\n\n{kernel_table(run['rows'])}\n\n{measured(run, note)}"


def timeline(run: dict) -> str:
    """A record of benchmarks.timeline as Markdown."""
    said = f" {run['note']}" if "note" in run else ""
    said += "".join(f" {row['recipe']}: {row['note']}." for row in run["rows"] if "note" in row)
    note = f"Milliseconds of kernels by kind, from a trace of two steps. `{run['command']}`.{said}"
    return f"{timeline_table(run['rows'])}\n\n{measured(run, note)}"


def choices(run: dict) -> str:
    """A record of what `--attention auto` and `run.mlp` found on a GPU, as Markdown."""
    note = f"On the way of `{run['command']}`."
    return f"{choices_table(run['rows'])}\n\n{measured(run, note)}"

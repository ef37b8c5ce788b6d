"""`python -m benchmarks.report` puts the newest records' tables between their markers in the pages of docs/.

With --check it writes nothing and exits 1 if a page or figure differs from the records. To draw needs matplotlib.
--compare A B shows two records of one benchmark side by side.
"""

import itertools
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.command import Parser
from benchmarks.harness.race import figures, speed_ups
from benchmarks.report import mixture_tables, record
from benchmarks.report.book_tables import look_ahead_table, samples_table, weights_table
from benchmarks.report.compare import compare, find
from benchmarks.report.discrete_tables import discrete_table, pixel_table
from benchmarks.report.equal_work_tables import about, calls_table, costs_table, quality_table, rates_table
from benchmarks.report.figures import draw_the_stale, picture
from benchmarks.report.gpu_tables import choices_table, timeline_table
from benchmarks.report.tables import (
    distance_table,
    efficiency,
    images_per_second,
    kernel_table,
    markdown,
    number,
    quartiles,
    spread,
    sweep_base,
    sweep_table,
)
from benchmarks.report.tokens_tables import tokens_table
from soflow_fast.errors import UserError

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


def page(head: Sequence[str], numbers: int, lines: list[list[str]], run: dict, note: str) -> str:
    """A table, the last `numbers` columns aligned to the right, and below it what was measured where."""
    return f"{markdown(list(head), numbers, lines)}\n\n{measured(run, note)}"


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


def digits(run: dict) -> str:
    """A record of benchmarks.digits as Markdown: a line per seed and number of network calls."""
    head = [
        "seed",
        "network calls per image",
        "classified as their label",
        "Frechet distance",
        "near copies",
        "seconds",
    ]
    lines = []
    for row in run["rows"]:
        for nfe, scores in row["nfe"].items():
            cells = [str(row["seed"]), nfe, f"{scores['accuracy']:.4f}", f"{scores['frechet']:.1f}"]
            cells += [f"{scores['near_copies']:.4f}", f"{row['seconds']:.0f}" if nfe == "1" else ""]
            lines.append(cells)
    note = (
        f"{run['rows'][0]['samples']} samples each. Labels by an SVC fitted on the real digits; Frechet distance in "
        "pixel space, where two halves of the real digits are 16 apart; near copies lie within Euclidean distance 4 of "
        f"a training image, pixels 0..16; seconds of the whole command, evaluation included. `{run['command']}`."
    )
    return page(head, len(head), lines, run, note)


def guidance(run: dict) -> str:
    """A record of benchmarks.guidance as Markdown: a line per scale and training, mean and range over the seeds."""
    groups: dict[tuple[int, str], list[dict]] = {}
    for row in run["rows"]:
        groups.setdefault((row["guidance"], row["trained"]), []).append(row)
    lines = []
    for (w, trained), rows in sorted(groups.items(), key=lambda item: item[0][0]):
        figures = [spread([row[name] for row in rows], places) for name, places in (("accuracy", 4), ("frechet", 1))]
        lines.append([str(w), trained, *figures])
    first, seeds = run["rows"][0], len({row["seed"] for row in run["rows"]})
    note = (
        f"The digits, {first['steps']} steps of each training, {seeds} seed{'s' * (seeds != 1)}; {first['samples']} "
        f"samples of one network call. `{run['command']}`."
    )
    head = ["guidance of the samples", "trained for", "classified as their label", "Frechet distance"]
    return page(head, len(head), lines, run, note)


def precision_errors(run: dict) -> str:
    """A record of benchmarks.precision as Markdown: relative error and cosine of the quotient, by r and way."""
    rows = [row for row in run["rows"] if row["kind"] == "error"]
    ways = list(dict.fromkeys(row["way"] for row in rows))
    found = {(row["r"], row["way"]): f"{row['error']:.1e} / {row['cosine']:.5f}" for row in rows}
    lines = [[f"{r:g}", *(found[r, way] for way in ways)] for r in dict.fromkeys(r for r, _ in found)]
    return page(["r", *ways], 1 + len(ways), lines, run, f"`{run['command']}`.")


def distance(run: dict) -> str:
    """A record of benchmarks.distance as Markdown."""
    trained = {row["network"]: row["steps"] for row in run["rows"]}
    interval = run["rows"][0]["median_interval"]
    networks = "; ".join(f"{name}: {steps} steps" for name, steps in trained.items())
    note = (
        f"256 samples of each network ({networks}), whose median t - s is {interval:.2f}: at r = 0.002 SoFlow's ends "
        f"are {0.002 * interval:.4f} apart. `{run['command']}`."
    )
    return f"{distance_table(run['rows'])}\n\n{measured(run, note)}"


def precision_quality(run: dict) -> str:
    """A record of benchmarks.precision as Markdown: what each recipe learned, mean and range over the seeds."""
    rows = [row for row in run["rows"] if row["kind"] == "quality"]
    head = ["recipe", "r_end", "Frechet, 1 step", "2 steps", "accuracy, 1 step", "2 steps", "mean q^2", "mean weight"]
    lines = []
    for r, recipe in dict.fromkeys((row["r_end"], row["recipe"]) for row in rows):
        group = [row for row in rows if (row["r_end"], row["recipe"]) == (r, recipe)]
        lost = sum(not row["nfe"] for row in group)
        cells = [f"{recipe} ({lost} of {len(group)} not finite, left out)" if lost else recipe, f"{r:g}"]
        for figure, digits in (("frechet", 1), ("accuracy", 4)):
            cells += [spread([row["nfe"][nfe][figure] for row in group if row["nfe"]], digits) for nfe in ("1", "2")]
        cells += [spread([row["last"][name] for row in group if row["nfe"]], 2) for name in ("sc_mse", "sc_weight")]
        lines.append(cells)
    seeds = len({row["seed"] for row in rows})
    note = (
        f"Mean over {seeds} seeds (lowest to highest). mean q^2 and mean weight over the last 100 steps. "
        f"`{run['command']}`."
    )
    return page(head, len(head) - 1, lines, run, note)


def increments(run: dict) -> str:
    """A record of benchmarks.increments as Markdown: a line per case and contestant."""
    lines = []
    for case, group in itertools.groupby(run["rows"], key=lambda row: row["case"]):
        rows = list(group)
        found = {row["way"]: figures(row) for row in rows}
        for k, (way, f) in enumerate(found.items()):
            against = "forward" if way == "paired forward" else "step, increments ride along"
            ratio = f["median_ms"] / found[against]["median_ms"]
            compared = way not in ("forward", "step, increments ride along")
            ms = quartiles(rows[k]["seconds"], 1e-3)
            lines.append([case if k == 0 else "", way, ms, f"{ratio:.2f}x" if compared else ""])
    note = (
        "bf16, everything in turn; steps against the first, the paired forward against one forward of the whole batch. "
        f"`{run['command']}`."
    )
    return page(["network and batch", "what", "ms (quartiles)", "ratio"], 2, lines, run, note)


def derivative(run: dict) -> str:
    """A record of benchmarks.derivative as Markdown: a line per case, precision and way."""
    lines, before = [], ("", "")
    for row in run["rows"]:
        case, precision = row["case"], row["precision"]
        first = case if case != before[0] else ""
        second = precision if (case, precision) != before else ""
        lines.append([first, second, row["way"], f"{row['error']:.1e}", quartiles(row["seconds"], 1e-3)])
        before = case, precision
    note = (
        f"After {run['rows'][0]['steps']} steps of training; the error is relative to forward mode in float64, the "
        f"time that of the derivative alone, everything in turn. `{run['command']}`."
    )
    return page(["network and batch", "student", "du/dt by", "error", "ms (quartiles)"], 2, lines, run, note)


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


def sampling(run: dict) -> str:
    """A record of benchmarks.sampling as Markdown: a line per network, batch and way."""
    lines = []
    for (case, batch), group in itertools.groupby(run["rows"], key=lambda row: (row["case"], row["batch"])):
        for k, row in enumerate(group):
            if row["seconds"]:
                ms, images = quartiles(row["seconds"], 1e-3), number(figures(row)["images_per_s"])
            else:
                ms, images = row["why_not"], ""
            lines.append([case if k == 0 else "", row["way"], str(batch) if k == 0 else "", ms, images])
    head = ["network", "one network call", "batch", "ms (quartiles)", "images/s"]
    return page(head, 3, lines, run, f"In turn, one run. `{run['command']}`.")


def reading(run: dict) -> str:
    """A record of benchmarks.reading as Markdown: a line per set, and how long a step waits for its batch."""
    read = [row for row in run["rows"] if row["way"] == "read by one process"]
    lines = [[row["case"], quartiles(row["seconds"], 1e-3), number(figures(row)["images_per_s"])] for row in read]
    step, wait = (next(row for row in run["rows"] if row["way"] == way) for way in ("step", "wait for its batch"))
    share = sum(wait["seconds"]) / sum(step["seconds"])
    note = (
        f"One process and thread, files in the page cache, random content. {step['case']}, batch {step['batch']}: "
        f"{100 * share:.2f} % of a step's time is waiting for its batch. `{run['command']}`."
    )
    return page(["set", f"ms per {read[0]['batch']} (quartiles)", "samples/s"], 1, lines, run, note)


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


def sweeps(run: dict) -> str:
    """A record of benchmarks.sweeps as Markdown: a line per point and recipe."""
    note = (
        f"Both recipes in turn. {sweep_base(run['rows'])} Peak memory of "
        "each recipe alone: allocated on a GPU, what the process's resident memory rose by on a CPU. "
        f"`{run['command']}`."
    )
    plot = picture("sweeps", "Time and memory of a step over batch, tokens and depth.")
    return f"{plot}\n\n{sweep_table(run['rows'])}\n\n{measured(run, note)}"


def quality_for_time(run: dict) -> str:
    """A record of benchmarks.quality_for_time as Markdown: a line per method, mean and range over the seeds."""
    head = ["method", "ms per step", "seconds of training", "Frechet at a quarter", "at half", "at the end", "accuracy"]
    lines = []
    for method in dict.fromkeys(row["method"] for row in run["rows"]):
        each = [row["points"] for row in run["rows"] if row["method"] == method]
        count = len(each[0])
        cells = [method, spread([1e3 * points[-1]["seconds"] / points[-1]["step"] for points in each], 1)]
        cells.append(spread([points[-1]["seconds"] for points in each], 0))
        cells += [
            spread([points[max(0, k - 1)]["frechet"] for points in each], 1) for k in (count // 4, count // 2, count)
        ]
        lines.append([*cells, spread([points[-1]["accuracy"] for points in each], 4)])
    seeds, steps = len({row["seed"] for row in run["rows"]}), run["rows"][0]["points"][-1]["step"]
    many = next((f" (of flow matching {n} calls)" for row in run["rows"] if (n := row.get("nfe", 1)) > 1), "")
    note = (
        f"Mean over {seeds} seeds (lowest to highest) of {steps} steps each; one-step samples{many} of the averaged "
        f"weights, judging them is not in the seconds. `{run['command']}`."
    )
    shown = picture("quality", "Frechet distance of one-step digits by seconds of training.")
    return f"{markdown(head, len(head) - 1, lines)}\n\n{shown}\n\n{measured(run, note)}"


def equal_work_digits(run: dict) -> str:
    """A record of benchmarks.equal_work as Markdown: the digits after equal work."""
    return f"{quality_table(run, 'digits')}\n\n{measured(run, about(run))}"


def equal_work_photographs(run: dict) -> str:
    """The photographs of the same record."""
    return quality_table(run, "photographs")


def policies(run: dict) -> str:
    """A record of benchmarks.policies as Markdown: a line per task and way to act, mean and range over the seeds."""
    head = [
        "task",
        "policy",
        "mean return",
        "expert",
        "share of the expert, %",
        "ms an action",
        "ms a chunk",
        "trained, s",
    ]
    lines = []
    for task, method in dict.fromkeys((row["task"], row["method"]) for row in run["rows"]):
        each = [row for row in run["rows"] if (row["task"], row["method"]) == (task, method)]
        cells = [task, method, spread([row["return"] for row in each], 1), f"{each[0]['expert']:.1f}"]
        cells.append(spread([100 * row["share"] for row in each], 1))
        cells += [f"{each[0][name]:.2f}" for name in ("ms_per_action", "ms_per_chunk")]
        lines.append([*cells, spread([row["seconds"] for row in each], 0)])
    first, seeds = run["rows"][0], len({row["seed"] for row in run["rows"]})
    random = {row["task"]: row["random"] for row in run["rows"]}
    chance = ", ".join(f"{task} {value:.1f}" for task, value in random.items())
    note = (
        f"Mean over {seeds} seed{'s' * (seeds != 1)} (lowest to highest) of {first['steps']} steps each, and "
        f"{first['episodes']} episodes. "
        f"0 % is the return of uniform actions ({chance}). Of behaviour cloning, flow matching and SoFlow the same "
        f"network. `{run['command']}`."
    )
    shown = picture("policies", "Share of the expert's return by policy and task.")
    return f"{markdown(head, len(head) - 2, lines)}\n\n{shown}\n\n{measured(run, note)}"


def soak(run: dict) -> str:
    """A record of benchmarks.soak in words."""
    total = {name: sum(row[name] for row in run["rows"]) for name in ("passed", "failed", "skipped")}
    minutes = sum(row["duration"] for row in run["rows"]) / 60
    found = {name: value for row in run["rows"] for name, value in row["measured"].items()}
    where = ", ".join(f"`{row['file']}`" for row in run["rows"] if row["failed"])
    note = (
        f"{total['passed']} passed, {total['failed']} failed{f' ({where})' * bool(where)}, {total['skipped']} skipped, "
    )
    note += f"{minutes:.1f} minutes. `{run['command']}`."
    if "MB per 1000 steps" in found:
        slope, steps = found["MB per 1000 steps"], found["steps"]
        note += f" Over {steps:.0f} steps resident memory rose by {slope:.2f} MB per 1000."
    return measured(run, note)


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


def tokens(run: dict) -> str:
    """A record of benchmarks.tokens as Markdown: more tokens at equal work."""
    runs = [row for row in run["rows"] if row["kind"] == "run"]
    work = runs[0]["step_flops"] * runs[0]["steps"]
    seeds, rates = (len({row[name] for row in runs}) for name in ("seed", "lr"))
    note = (
        f"{number(work / 1e12)} TFLOP of training each, {seeds} seed{'s' * (seeds != 1)}, the better of {rates} "
        "learning rates with the first of them. Errors relative to the exact velocity and to the exact f(x_1, 1, 0), "
        f"the latter by band of frequencies in half waves per image, too. `{run['command']}`."
    )
    shown = picture("tokens", "Error of one-step samples over FLOPs of training, and at their end by frequency.")
    return f"{tokens_table(run['rows'])}\n\n{shown}\n\n{measured(run, note)}"


def discrete(run: dict) -> str:
    """A record of benchmarks.discrete as Markdown: discrete values by continuous relaxation."""
    known = next(row for row in run["rows"] if row["kind"] == "reference")
    trained = [row for row in run["rows"] if row["kind"] == "digits"]
    seeds = len({row["seed"] for row in trained})
    note = (
        f"{trained[0]['steps']} steps each, {seeds} seed{'s' * (seeds != 1)}: mean (lowest to highest), where there is "
        "one figure the first seed alone. Half the distance between the values of a channel is its scale, 1 where none "
        f"is named. The data at 16 levels have a Frechet distance of {known['frechet']:.1f} to the data as they are; "
        f"the levels of one half of them vary by {known['variation of halves']:.3f} from the other's. "
        f"`{run['command']}`."
    )
    return f"{discrete_table(run['rows'])}\n\n{measured(run, note)}"


def discrete_pixel(run: dict) -> str:
    """The part of one pixel of a record of benchmarks.discrete, as Markdown."""
    trained = [row for row in run["rows"] if row["kind"] == "pixel"]
    noise = [row["exact_is_largest_noise"] for row in trained if "exact_is_largest_noise" in row]
    note = (
        f"{trained[0]['steps']} steps of 256 pixels each. One-hot, the exact solution goes to the largest channel of "
        f"the noise in {noise[0]:.3f} of the cases. `{run['command']}`."
    )
    shown = picture("discrete", "One grey pixel's exact and learned solution; the largest channel of one-hot samples.")
    return f"{pixel_table(run['rows'])}\n\n{shown}\n\n{measured(run, note)}"


def mixtures(name: str, run: dict) -> str:
    """One table of a record of benchmarks.mixtures, as Markdown."""
    rows = run["rows"]
    note = f"{mixture_tables.NOTES[name](rows)} `{run['command']}`."
    return f"{mixture_tables.TABLES[name](rows)}\n\n{measured(run, note)}"


def of_book(draw: Callable[[list[dict]], str], run: dict) -> str:
    """A table of the record behind the first chapters."""
    note = f"`{run['command']}`."
    return f"{draw(run['rows'])}\n\n{measured(run, note)}"


class Block(NamedTuple):
    """A part of a page that is made from the newest record of a benchmark."""

    page: str
    benchmark: str
    render: Callable[[dict], str]
    gpu: bool | None = None
    """Whether it shows a record of a GPU alone, or of a CPU alone."""


BLOCKS = {
    "step": Block("docs/performance.md", "step", table, gpu=False),
    "step-gpu": Block("docs/performance.md", "step", table, gpu=True),
    "timeline": Block("docs/performance.md", "timeline", timeline),
    "choices": Block("docs/performance.md", "choices", choices),
    "quality-for-time": Block("docs/performance.md", "quality-for-time", quality_for_time),
    "equal-work-digits": Block("docs/equal-work.md", "equal-work", equal_work_digits),
    "equal-work-photographs": Block("docs/equal-work.md", "equal-work", equal_work_photographs),
    "equal-work-calls": Block("docs/equal-work.md", "equal-work", calls_table),
    "equal-work-costs": Block("docs/equal-work.md", "equal-work", costs_table),
    "equal-work-rates": Block("docs/equal-work.md", "equal-work", rates_table),
    "policies": Block("docs/policies.md", "policies", policies),
    "scaling": Block("docs/performance.md", "scaling", scaling),
    "prediction": Block("docs/performance.md", "prediction", prediction),
    "plan": Block("docs/many-gpus-plan.md", "plan", plan),
    "sampling": Block("docs/performance.md", "sampling", sampling),
    "reading": Block("docs/data.md", "reading", reading),
    "digits": Block("docs/performance.md", "digits", digits),
    "guidance": Block("docs/sampling.md", "guidance", guidance),
    "precision-errors": Block("docs/precision.md", "precision", precision_errors),
    "step-batch": Block("docs/performance.md", "step-batch", table),
    "distance": Block("docs/precision.md", "distance", distance),
    "soak": Block("docs/reliability.md", "soak", soak),
    "cpu": Block("docs/performance.md", "cpu", cpu),
    "memory": Block("docs/performance.md", "memory", peaks),
    "increments": Block("docs/precision.md", "increments", increments),
    "derivative": Block("docs/precision.md", "derivative", derivative),
    "precision-quality": Block("docs/precision.md", "precision", precision_quality),
    "kernels": Block("docs/kernels.md", "kernels", kernels),
    "tokens": Block("docs/open-questions.md", "tokens", tokens, gpu=False),
    "discrete": Block("docs/open-questions.md", "discrete", discrete, gpu=False),
    "discrete-pixel": Block("docs/open-questions.md", "discrete", discrete_pixel, gpu=False),
    "book-samples": Block("docs/why-it-works.md", "book", partial(of_book, samples_table)),
    "book-look-ahead": Block("docs/why-it-works.md", "book", partial(of_book, look_ahead_table)),
    "book-weights": Block("docs/why-it-works.md", "book", partial(of_book, weights_table)),
    "sweeps": Block("docs/performance.md", "sweeps", sweeps),
    "mixtures-central": Block("docs/open-questions.md", "mixtures-central", partial(mixtures, "long")),
    **{
        f"mixtures-{name}": Block("docs/open-questions.md", "mixtures", partial(mixtures, name))
        for name in mixture_tables.TABLES
    },
}


def measured(run: dict, note: str) -> str:
    """Where and with what a record was made."""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    threads = f"{run['threads']} CPU thread{'s' * (run['threads'] != 1)}"
    commit = f", commit {run['commit']}" if run["commit"] else ""
    early = " Not everything passed or was reached." if run.get("unfinished") else ""
    early += f" Missing: {'; '.join(run['missing'])}." if run.get("missing") else ""
    return (
        f"{run['date'][:10]}, {run['device']}, {threads}, {versions}{commit}.{early} {note} "
        f"Every sample: `benchmarks/records/{run['file']}`."
    )


def memory(row: dict) -> str:
    """Peak memory in GiB, allocated / reserved; on a CPU what autograd keeps for the backward."""
    if row["peak_allocated"] is not None:
        return f"{row['peak_allocated'] / 2**30:.1f} / {row['peak_reserved'] / 2**30:.1f} GiB peak"
    if row.get("kept_for_backward") is not None:
        return f"{number(row['kept_for_backward'] / 2**20)} MiB kept for the backward"
    return "not measured"


def insert(text: str, block: str, name: str = "step") -> str:
    """`text` with `block` between the markers of `name`. Raises ValueError unless each is there once, in order."""
    begin, end = f"<!-- benchmark:{name} -->", f"<!-- /benchmark:{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"needs one {begin} and, after it, one {end}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"


def main(argv: Sequence[str] | None = None, root: Path = record.ROOT, folder: Path | None = None) -> int:
    """The command; returns its exit code: 1 for a difference found by --check, 2 for what the user has to mend, said in
    one line: no record, a damaged one, two that cannot be compared, no markers, no matplotlib."""
    parser = Parser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page or figure differs")
    about = "write nothing; show two records side by side: files, or names in benchmarks/records"
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help=about)
    try:
        arguments = parser.parse(argv)
        folder = folder or record.RECORDS
        if arguments.compare:
            a, b = arguments.compare
            print(compare(find(a, folder), find(b, folder)))
            return 0
        return bring_up_to_date(root, folder, arguments.check)
    except UserError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return UserError.exit_code


def bring_up_to_date(root: Path, folder: Path, check: bool) -> int:
    """Write the pages and figures of the newest records, or (check) see whether they are there: 1 if one is not.

    Raises UserError naming the record, page or package that stands in the way.
    """
    runs = {name: run for name, block in BLOCKS.items() if (run := record.newest(folder, block.benchmark, block.gpu))}
    if not runs:
        raise UserError(f"no record in {record.shown(folder)}: make one with pytest benchmarks/ --record")
    differing = []
    for page in dict.fromkeys(BLOCKS[name].page for name in runs):
        mine = {name: run for name, run in runs.items() if BLOCKS[name].page == page}
        try:
            text = wanted = (root / page).read_text(encoding="utf-8")
            for name, run in mine.items():
                wanted = insert(wanted, rendered(name, run), name)
        except (OSError, ValueError) as error:
            raise UserError(f"{page}: {getattr(error, 'strerror', None) or error}") from None
        if text != wanted:
            differing.append(f"{page} differs from {', '.join(run['file'] for run in mine.values())}")
            if not check:
                record.replace(root / page, wanted.encode())
    differing += draw_the_stale(root, folder, check)
    for line in differing if check else ():
        print(line, file=sys.stderr)
    return 1 if check and differing else 0


MALFORMED = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, StopIteration)
"""Errors that come of rows that are not those of their benchmark."""


def rendered(name: str, run: dict) -> str:
    """A block's text. Raises UserError naming the record if its rows are not those of its benchmark."""
    try:
        return BLOCKS[name].render(run)
    except MALFORMED as error:
        raise malformed(run, error) from None


def malformed(run: dict, error: BaseException) -> UserError:
    """For a record that says what benchmark it is of, and does not hold what that needs."""
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return UserError(f"{run['file']}: its rows are not those of {run['benchmark']} ({what})")

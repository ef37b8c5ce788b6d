"""Blocks of samples: how good they are, after which training, and how fast they are drawn."""

import itertools

from benchmarks.harness.race import figures
from benchmarks.report.blocks.layout import measured, page
from benchmarks.report.equal_work_tables import about, quality_table
from benchmarks.report.figures import picture
from benchmarks.report.tables import (
    markdown,
    number,
    quartiles,
    spread,
)


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

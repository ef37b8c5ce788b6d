"""Records of operations and sweeps as Markdown. `benchmarks.report` puts them into pages."""

import itertools
import re
import statistics

from benchmarks.harness.operations import OURS

AXES = {"batch": "images in a batch", "tokens": "tokens per image", "depth": "blocks"}


def markdown(head: list[str], numbers: int, rows: list[list[str]]) -> str:
    """A table; the last `numbers` columns are aligned to the right."""
    rule = ["---"] * (len(head) - numbers) + ["---:"] * numbers
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def number(value: float) -> str:
    """Four digits, never an exponent."""
    return f"{value:.0f}" if value >= 1000 else f"{value:#.4g}"


def quartiles(seconds: list[float], unit: float) -> str:
    """Median (quartiles) in multiples of `unit` seconds."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return f"{number(middle / unit)} ({number(low / unit)} to {number(high / unit)})"


def spread(values: list[float], digits: int) -> str:
    """Mean (lowest to highest)."""
    if not values:
        return "not finite"
    mean = sum(values) / len(values)
    return f"{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def images_per_second(row: dict) -> float:
    """Images of all ranks, by the median of a step."""
    return row["batch"] / statistics.median(row["seconds"])


def efficiency(row: dict, alone: dict) -> float:
    """Images per second over as many times those of one process."""
    return images_per_second(row) / (row["ranks"] * images_per_second(alone))


def copied_per_second(rows: list[dict]) -> float:
    """Bytes per second of the copies of a run."""
    copy = next(row for row in rows if row["operation"] == "copy")
    return copy["bytes"] / statistics.median(copy["seconds"])


def kernel_table(rows: list[dict]) -> str:
    """A line per operation, pass and way that was timed; below, what was not, and why."""
    bandwidth, missing, lines = copied_per_second(rows), {}, []
    timed = [row for row in rows if row["operation"] != "copy"]
    for (name, part), group in itertools.groupby(timed, key=lambda row: (row["operation"], row["pass"])):
        members = list(group)
        ours = next(row for row in members if row["way"] == OURS)
        first = True
        for row in sorted(members, key=lambda row: row is not ours):
            if row["why_not"] is not None:
                missing.setdefault((row["way"], row["why_not"]), []).append(f"{name} {part}")
                continue
            middle = statistics.median(row["seconds"])
            # Small inputs stay in a CPU's caches: a share of the memory's bandwidth would mean nothing.
            share = (
                "" if row["bytes"] is None or ours["runs"] != "kernel" else f"{row['bytes'] / middle / bandwidth:.0%}"
            )
            moved = "" if row["bytes"] is None else number(row["bytes"] / 1e6)
            ratio = "" if row is ours else f"{middle / statistics.median(ours['seconds']):.2f}x"
            at = f"{name}, {part}: {row['shape']}, {row['dtype']}" if first else ""
            way = row["way"] if row["runs"] in (None, "kernel") else f"{row['way']} ({row['runs']})"
            if "host included" in (row.get("timed") or ""):
                way += ", host included"
            lines.append([at, way, quartiles(row["seconds"], 1e-6), ratio, moved, share])
            first = False
    head = ["operation", "way", "microseconds (quartiles)", "time over ours", "MB", "share of copy bandwidth"]
    notes = []
    for (way, why), parts in missing.items():
        where = f" ({', '.join(parts)})" if len(parts) < 4 else ""
        notes.append(f"{way}{where}: {why}")
    copied = f"A copy moves {number(bandwidth / 1e9)} GB/s here, bytes read and bytes written."
    untimed = f" Not timed: {'; '.join(notes)}." if notes else ""
    return f"{markdown(head, 4, lines)}\n\n{copied}{untimed}"


def distance_table(rows: list[dict]) -> str:
    """A line per method and distance: the difference over the value, then error of the slope and cosine of the residual
    for each network and way."""
    names, ways = (list(dict.fromkeys(row[key] for row in rows)) for key in ("network", "way"))
    columns = [(network, way) for network in names for way in ways]
    lines = []
    for (method, distance), group in itertools.groupby(
        sorted(rows, key=lambda row: (row["method"] != "look-ahead", -row["distance"])),
        key=lambda row: (row["method"], row["distance"]),
    ):
        found = {(row["network"], row["way"]): row for row in group}
        signals = [f"{found[name, ways[0]]['signal']:.2g}" for name in names]
        at = [found[column] for column in columns]
        cells = [f"{row['slope_error']:.1e} / {row['residual_cosine']:.4f}" for row in at]
        first = method if not lines or lines[-1][-1] != method else ""
        lines.append([first, f"{distance:g}", ", ".join(signals), *cells, method])
    head = ["ends", "distance", "size of the difference", *(f"{way}, {name.split(',')[0]}" for name, way in columns)]
    return markdown(head, len(head) - 1, [line[:-1] for line in lines])


def sweep_table(rows: list[dict]) -> str:
    """A line per axis, value and recipe."""
    lines = []
    for (axis, value), group in itertools.groupby(rows, key=lambda row: (row["axis"], row["value"])):
        members = list(group)
        ours = members[0]["seconds"]
        for row in members:
            at = f"{value} {AXES[axis]}" if row is members[0] else ""
            recipe = f"{row['recipe']}, {row['precision']}"
            timed = quartiles(row["seconds"], 1e-3) if row["seconds"] else row["why_not"]
            both = row is not members[0] and row["seconds"] and ours
            ratio = f"{statistics.median(row['seconds']) / statistics.median(ours):.2f}x" if both else ""
            peak = "not measured" if row["peak_bytes"] is None else number(row["peak_bytes"] / 2**20)
            lines.append([at, recipe, timed, ratio, peak])
    return markdown(["at", "recipe", "ms per step (quartiles)", "time over ours", "peak MiB"], 3, lines)


def sweep_base(rows: list[dict]) -> str:
    """A sentence on the network of a sweep, read off its rows: the figures that a part does not change are the same in
    all of them, and those of the base. Where parts disagree each is named with its own."""
    parts: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        parts.setdefault(row["axis"], []).append(_sizes(row["case"]))
    kept = {
        axis: {name: size for name, size in cases[0].items() if all(case.get(name) == size for case in cases)}
        for axis, cases in parts.items()
    }
    base: dict[str, str] = {}
    agreed = True
    for axis, sizes in kept.items():
        for name, size in sizes.items():
            # A part of a single point keeps what it would change, too.
            if name != axis:
                agreed = agreed and base.setdefault(name, size) == size
    if agreed:
        order = [name for name in _sizes(rows[0]["case"]) if name in base]
        names = list(parts)
        each = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
        return f"The network in the middle: {', '.join(base[name] for name in order)}; the parts change its {each}."
    each = (f"{axis} at {', '.join(s for n, s in sizes.items() if n != axis)}" for axis, sizes in kept.items())
    return f"The parts: {'; '.join(each)}."


def _sizes(case: str) -> dict[str, str]:
    """ "sweep: hidden 192, 64 tokens" as {"hidden": "hidden 192", "tokens": "64 tokens"}."""
    return {re.sub(r"[\d ]", "", size): size for size in case.partition(": ")[2].split(", ")}

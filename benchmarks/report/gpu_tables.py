"""Records that only a GPU makes, as Markdown: where the time of a step goes, and which ways were chosen on it."""

import itertools
import statistics

from benchmarks.report.tables import markdown, number, quartiles


def timeline_table(rows: list[dict]) -> str:
    """A line per network and recipe: the time of a step, and what its kernels come to by kind; without a trace the time
    alone."""
    kinds = list(next(row["totals"] for row in rows if "totals" in row))
    lines = []
    for case, group in itertools.groupby(rows, key=lambda row: row["case"]):
        members = list(group)
        ours = statistics.median(members[0]["seconds"])
        for row in members:
            middle = statistics.median(row["seconds"])
            cells = [case if row is members[0] else "", row["recipe"], quartiles(row["seconds"], 1e-3)]
            cells.append("" if row is members[0] else f"{middle / ours:.2f}x")
            found = row.get("totals")
            cells += [number(found[kind]) if found and found[kind] else "" for kind in kinds]
            lines.append([*cells, f"{row['launches']:.0f}" if found else ""])
    head = ["network and batch", "recipe", "ms per step (quartiles)", "time over the first", *kinds, "launches"]
    return markdown(head, len(head) - 2, lines)


def choices_table(rows: list[dict]) -> str:
    """A line per shape in bfloat16 at which attention or an MLP was tried: milliseconds of a forward with backward."""
    lines = []
    for row in rows:
        if row["dtype"] != "bfloat16":
            continue
        skipped = ("what", "dtype", "chosen", "forward", "forward and backward", "passed_over", "as_graph")
        sizes = ", ".join(f"{name} {size}" for name, size in row.items() if name not in skipped)
        times = sorted(row["forward and backward"].items(), key=lambda item: item[1])
        said = ", ".join(f"{name} {number(1e3 * seconds)}" for name, seconds in times)
        wrong = [f"{name}: {why}" for name, why in row.get("passed_over", {}).items() if "wrong" in why]
        way = row["what"] + (" in a CUDA graph" if row.get("as_graph") else "")
        lines.append([way, sizes, f"**{row['chosen']}**", said, "; ".join(wrong)])
    return markdown(["what", "shape", "taken", "ms of a forward with backward", "refused"], 0, lines)

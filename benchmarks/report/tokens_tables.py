"""A record of benchmarks.tokens as Markdown: each way to spend the work, at its own learning rate."""

import itertools
from collections.abc import Sequence
from statistics import mean

from benchmarks.report.tables import markdown


def compared_runs(rows: Sequence[dict]) -> list[list[dict]]:
    """For each way and number of tokens the runs of all seeds, without those that chose the rate."""
    found: dict[tuple[str, int], list[dict]] = {}
    for row in rows:
        if row["kind"] == "run":
            found.setdefault((row["name"], row["tokens"]), []).append(row)
    return list(found.values())


def tokens_table(rows: Sequence[dict]) -> str:
    """A line per way; of errors the mean over the seeds, and of that over everything lowest to highest."""
    lines = []
    for runs in compared_runs(rows):
        first, ends = runs[0], [run["points"][-1] for run in runs]
        cells = [first["name"], str(first["tokens"]), str(first["hidden"]), str(first["batch"]), str(first["steps"])]
        cells += [f"{first['lr']:g}", f"{mean(end['cpu_seconds'] for end in ends):.0f}"]
        for what in ("velocity", "solution"):
            each = [end[what][0] for end in ends]
            spread = f" ({min(each):.3f} to {max(each):.3f})" if len(each) > 1 else ""
            cells.append(f"{mean(each):.3f}{spread}")
        cells += [f"{mean(end['solution'][k] for end in ends):.2f}" for k in range(1, len(ends[0]["solution"]))]
        lines.append(cells)
    count = len(lines[0]) - 9
    for row in rows:
        if row["kind"] == "reference" and "solution" in row:
            velocity = f"{row['velocity'][0]:.3f}" if "velocity" in row else ""
            found = [f"{error:.2f}" for error in row["solution"][1:]]
            lines.append([row["name"], "", "", "", "", "", "", velocity, f"{row['solution'][0]:.3f}", *found])
    head = ["way", "tokens", "width", "batch", "steps", "rate", "CPU-seconds", "error of v", "error of f"]
    return markdown(head + band_names(count), 8 + count, lines)


def band_names(count: int) -> list[str]:
    """Of the bands of frequencies, coarse first."""
    ends = ["4", "8", "16", "32"][: count - 1]
    return [f"f, below {ends[0]}", *(f"{a} to {b}" for a, b in itertools.pairwise(ends)), f"from {ends[-1]}"]

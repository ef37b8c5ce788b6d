"""Blocks of what a run needs beside its steps: data that are read in time, and the promises of reliability."""

from benchmarks.harness.race import figures
from benchmarks.report.blocks.layout import measured, page
from benchmarks.report.tables import number, quartiles


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

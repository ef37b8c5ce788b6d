"""The plots of the pages, as SVG. To draw them needs matplotlib; to check whose they are does not.

A plot says which record it was drawn from, by the record's name and digest, and ends with a digest of itself.
"""

import hashlib
import io
import re
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.harness.recipes import OURS
from benchmarks.report import record
from benchmarks.report.tables import AXES

DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"
SEAL = re.compile(r"<!-- sha256 of the above: ([0-9a-f]{64}) -->\n$")


def fault(run: dict, path: Path) -> str | None:
    """The reason, in words, why a file is not the plot of a record; None if it is."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = ElementTree.fromstring(text)
    except OSError as error:
        return error.strerror or str(error)
    except (ElementTree.ParseError, ValueError):
        return "is no SVG"
    source, described = (next((found.text for found in tree.iter(DUBLIN_CORE + name)), None) for name in _NAMES)
    if source is None or described is None:
        return "does not say which record it was drawn from"
    if (source, described) != _origin(run):
        return f"was drawn from another record, {source}" if source != run["file"] else "its record has changed since"
    seal = SEAL.search(text)
    if seal is None or seal[1] != _sha256(text[: seal.start()]):
        return "was changed after it was drawn"
    return None


_NAMES = ("source", "description")


def _origin(run: dict) -> tuple[str, str]:
    return run["file"], f"sha256 of the record: {record.digest(run)}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def drawn(run: dict, path: Path, *panels: int, size: tuple[float, float]) -> Iterator[Any]:
    """A figure's axes, `size` in inches, as an array of `panels` if given; written to `path` at the end of the block.
    The same record gives the same file."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = path.stem
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(*panels, figsize=size, layout="constrained")
    try:
        yield axes
        source, described = _origin(run)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Source": source, "Description": described})
    finally:
        pyplot.close(figure)
    text = buffer.getvalue()
    record.replace(path, f"{text}<!-- sha256 of the above: {_sha256(text)} -->\n".encode())


def precision(run: dict, path: Path) -> None:
    """Frechet distance of one-step samples by recipe, a dot a seed."""
    rows = [row for row in run["rows"] if row["kind"] == "quality" and row["nfe"]]
    names = list(dict.fromkeys(row["recipe"] for row in rows))
    ends = list(dict.fromkeys(row["r_end"] for row in rows))
    with drawn(run, path, size=(8, 0.5 + 0.45 * len(names))) as axes:
        for k, r in enumerate(ends):
            group = [row for row in rows if row["r_end"] == r]
            heights = [names.index(row["recipe"]) + 0.2 * (k - (len(ends) - 1) / 2) for row in group]
            axes.scatter([row["nfe"]["1"]["frechet"] for row in group], heights, label=f"r_end = {r:g}", alpha=0.8)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlabel("Frechet distance of one-step digits, pixel space (lower is better)")
        axes.grid(axis="x", which="both", alpha=0.3)
        axes.legend()


def quality_for_time(run: dict, path: Path) -> None:
    """Frechet distance of samples over seconds of training, a line a seed."""
    with drawn(run, path, size=(8, 4.5)) as axes:
        for k, method in enumerate(dict.fromkeys(row["method"] for row in run["rows"])):
            for row in (row for row in run["rows"] if row["method"] == method):
                seconds, distances = ([point[name] for point in row["points"]] for name in ("seconds", "frechet"))
                label = method if row["seed"] == run["rows"][0]["seed"] else None
                axes.plot(seconds, distances, marker=".", color=f"C{k}", alpha=0.8, label=label)
        axes.set_yscale("log")
        axes.set_xlabel("seconds of training")
        axes.set_ylabel("Frechet distance of digits in as few calls as usual (lower is better)")
        axes.grid(which="both", alpha=0.3)
        axes.legend()


def policies(run: dict, path: Path) -> None:
    """The share of the expert's return that each policy reaches, a point a seed, over its milliseconds an action."""
    tasks = list(dict.fromkeys(row["task"] for row in run["rows"]))
    with drawn(run, path, 1, len(tasks), size=(10, 4.5)) as panels:
        for task, panel in zip(tasks, panels if len(tasks) > 1 else [panels], strict=True):
            rows = [row for row in run["rows"] if row["task"] == task]
            for method in dict.fromkeys(row["method"] for row in rows):
                each = [row for row in rows if row["method"] == method]
                shares, times = [100 * row["share"] for row in each], [row["ms_per_action"] for row in each]
                panel.scatter(times, shares, label=method, alpha=0.7)
            panel.axhline(100, color="gray", linewidth=0.8)
            panel.axhline(95, color="gray", linewidth=0.8, linestyle=":")
            panel.set_xscale("log")
            panel.set_title(task)
            panel.set_xlabel("ms an action, one thread of a CPU")
            panel.set_ylabel("share of the expert's return, %")
            panel.grid(which="both", alpha=0.3)
            panel.legend(fontsize=8)


def sweeps(run: dict, path: Path) -> None:
    """Time and memory over batch, tokens and depth, both axes logarithmic."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    figures = {
        "ms per step": lambda row: statistics.median(row["seconds"]) * 1e3 if row["seconds"] else None,
        "peak memory, MiB": lambda row: row["peak_bytes"] / 2**20 if row["peak_bytes"] else None,
    }
    with drawn(run, path, 2, len(AXES), size=(10, 6)) as panels:
        for (name, figure_of), line in zip(figures.items(), panels, strict=True):
            for axis, panel in zip(AXES, line, strict=True):
                rows = [row for row in run["rows"] if row["axis"] == axis]
                for recipe in dict.fromkeys(row["recipe"] for row in rows):
                    points = [(row["value"], figure_of(row)) for row in rows if row["recipe"] == recipe]
                    points = [(x, y) for x, y in points if y is not None]
                    marker = "o" if recipe == OURS.name else "s"
                    panel.plot([x for x, _ in points], [y for _, y in points], marker=marker, label=recipe)
                panel.set_xscale("log", base=2)
                panel.set_yscale("log")
                ticks = sorted({row["value"] for row in rows})
                panel.xaxis.set_major_locator(FixedLocator(ticks))
                panel.xaxis.set_major_formatter(FixedFormatter([str(tick) for tick in ticks]))
                panel.xaxis.set_minor_locator(NullLocator())
                panel.set_xlabel(AXES[axis])
                panel.set_ylabel(name)
                panel.grid(which="both", alpha=0.3)
        panels[0][0].legend()

"""A record of benchmarks.discrete as Markdown: the digits in each code, and one pixel alone."""

from collections.abc import Sequence
from statistics import mean

from benchmarks.report.tables import markdown

CODES = {"grey": "grey values", "bits": "four bits", "one-hot": "one-hot"}
METHODS = {"soflow": "SoFlow", "flow-matching": "flow matching"}


def spread(values: Sequence[float], places: int) -> str:
    """Mean (lowest to highest), of one value alone itself."""
    if len(values) == 1:
        return f"{values[0]:.{places}f}"
    return f"{mean(values):.{places}f} ({min(values):.{places}f} to {max(values):.{places}f})"


def named(row: dict) -> str:
    """A code in words."""
    scale = f", scale {row['scale']:g}" if row["code"] == "one-hot" else ""
    return f"{CODES[row['code']]}{scale}, patches of {row['patch']}"


def discrete_table(rows: Sequence[dict]) -> str:
    """The digits: a line per code, method and number of calls."""
    runs = [row for row in rows if row["kind"] == "digits"]
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for row in sorted(runs, key=lambda row: (list(CODES).index(row["code"]), -row["patch"], row["scale"])):
        for calls, found in row["calls"].items():
            groups.setdefault((named(row), METHODS[row["objective"]], calls), []).append(found)
    lines, before = [], ""
    for (code, method, calls), found in groups.items():
        cells = [code if code != before else "", f"{method}, {calls} call{'s' * (calls != '1')}"]
        for name, places in (("accuracy", 4), ("frechet", 1), ("variation", 3), ("near", 3)):
            cells.append(spread([each[name] for each in found], places))
        for name in ("largest", "entropy"):
            cells.append(spread([each[name] for each in found], 3) if name in found[0] else "")
        lines.append(cells)
        before = code
    head = ["pixels as", "drawn by", "classified as their label", "Frechet distance", "variation of levels"]
    return markdown([*head, "near a level", "largest channel", "entropy, bits"], 6, lines)


def pixel_table(rows: Sequence[dict]) -> str:
    """One pixel: a line per code and weight, then the last step's figures."""
    groups: dict[tuple[str, float], list[dict]] = {}
    for row in rows:
        if row["kind"] == "pixel":
            groups.setdefault((row["code"], row["p"]), []).append(row)
    lines = []
    for (code, p), found in sorted(groups.items(), key=lambda item: (item[0][1], list(CODES).index(item[0][0]))):

        def last(name: str, found: list[dict] = found) -> str:
            return spread([row["points"][-1][name] for row in found], 3)

        cells = [CODES[code], f"{p:g}", *(f"{found[0][name]:.3f}" for name in ("exact_near", "exact_variation"))]
        lines.append(cells + [last(name) for name in ("near", "variation", "same_level", "error")])
    head = ["the pixel as", "p", "exact: near a level", "exact: variation", "learned: near a level", "variation"]
    return markdown([*head, "the exact level", "error"], 7, lines)

"""`python -m benchmarks.report` puts the newest records' tables between their markers in README.md.

With --check it writes nothing and exits 1 if README.md differs from the records.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import record
from benchmarks.race import figures, speed_ups

README = record.ROOT / "README.md"
HEAD = (
    "network and batch", "recipe", "precision", "images/s", "ms per step (quartiles)", "time over ours",
    "network calls", "forwards per image", "GFLOP per image", "peak memory",
)  # fmt: skip


def table(run: dict) -> str:
    """A record as Markdown: a line per case and recipe, and what was measured where."""
    lines = [" | ".join(HEAD), " | ".join(["---", "---", "---", *["---:"] * (len(HEAD) - 3)])]
    for case, group in itertools.groupby(run["rows"], key=lambda row: row["case"]):
        rows = list(group)
        ratios = speed_ups(rows)
        for row in rows:
            f, ratio, first = figures(row), ratios.get(row["recipe"]), row is rows[0]
            cells = [case if first else "", row["recipe"], row["precision"], number(f["images_per_s"])]
            cells += [
                f"{number(f['median_ms'])} ({number(f['low_ms'])} to {number(f['high_ms'])})",
                f"{ratio:.2f}x" if ratio else "",
            ]
            cells += [
                str(row["network_calls"]),
                f"{row['forwards_per_image']:.2f}",
                number(row["flops_per_image"] / 1e9),
            ]
            lines.append(" | ".join([*cells, memory(row)]))
    rounds = sorted({len(row["seconds"]) for row in run["rows"]})
    note = f"`{run['command']}`; the recipes' steps in turn, {' and '.join(map(str, rounds))} rounds."
    return "\n".join([*(f"| {line} |" for line in lines), "", measured(run, note)])


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
    lines = [" | ".join(head), " | ".join(["---:"] * len(head))]
    for row in run["rows"]:
        for nfe, scores in row["nfe"].items():
            cells = [str(row["seed"]), nfe, f"{scores['accuracy']:.4f}", f"{scores['frechet']:.1f}"]
            cells += [f"{scores['near_copies']:.4f}", f"{row['seconds']:.0f}" if nfe == "1" else ""]
            lines.append(" | ".join(cells))
    note = (
        f"{run['rows'][0]['samples']} samples each. Labels by an SVC fitted on the real digits; Frechet distance in "
        "pixel space, where two halves of the real digits are 16 apart; near copies lie within Euclidean distance 4 of "
        f"a training image, pixels 0..16; seconds of the whole command, evaluation included. `{run['command']}`."
    )
    return "\n".join([*(f"| {line} |" for line in lines), "", measured(run, note)])


BLOCKS = {"step": table, "digits": digits}


def measured(run: dict, note: str) -> str:
    """Where and with what a record was made."""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    threads = f"{run['threads']} CPU thread{'s' * (run['threads'] != 1)}"
    commit = f", commit {run['commit']}" if run["commit"] else ""
    return (
        f"{run['date'][:10]}, {run['device']}, {threads}, {versions}{commit}. {note} "
        f"Every sample: `benchmarks/records/{run['file']}`."
    )


def number(value: float) -> str:
    """Four digits, never an exponent."""
    return f"{value:.0f}" if value >= 1000 else f"{value:#.4g}"


def memory(row: dict) -> str:
    """Peak memory in GiB, allocated / reserved."""
    if row["peak_allocated"] is None:
        return "not measured"
    return f"{row['peak_allocated'] / 2**30:.1f} / {row['peak_reserved'] / 2**30:.1f} GiB"


def insert(text: str, block: str, name: str = "step") -> str:
    """`text` with `block` between the markers of `name`. Raises ValueError unless each is there once, in order."""
    begin, end = f"<!-- benchmark:{name} -->", f"<!-- /benchmark:{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"needs one {begin} and, after it, one {end}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"


def main(argv: Sequence[str] | None = None, readme: Path = README, folder: Path = record.RECORDS) -> int:
    """The command; returns its exit code: 1 for a difference found by --check, 2 for no record or no markers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if README.md differs")
    check = parser.parse_args(argv).check
    runs = {name: run for name in BLOCKS if (run := record.newest(folder, name))}
    if not runs:
        print("no record in benchmarks/records: make one with pytest benchmarks/ --record", file=sys.stderr)
        return 2
    try:
        text = wanted = readme.read_text(encoding="utf-8")
        for name, run in runs.items():
            wanted = insert(wanted, BLOCKS[name](run), name)
    except (OSError, ValueError) as error:
        print(f"{readme.name}: {error}", file=sys.stderr)
        return 2
    if check and text != wanted:
        print(f"{readme.name} differs from {', '.join(r['file'] for r in runs.values())}", file=sys.stderr)
        return 1
    if text != wanted:
        readme.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

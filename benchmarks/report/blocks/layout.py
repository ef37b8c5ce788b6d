"""What blocks of pages have in common: tables with the machine below them."""

from collections.abc import Sequence

from benchmarks.report.tables import markdown


def page(head: Sequence[str], numbers: int, lines: list[list[str]], run: dict, note: str) -> str:
    """A table, the last `numbers` columns aligned to the right, and below it what was measured where."""
    return f"{markdown(list(head), numbers, lines)}\n\n{measured(run, note)}"


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

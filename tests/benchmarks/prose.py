"""The text of pages, for the tests that hold it to records."""

from benchmarks.report import record


def page(name: str) -> str:
    """A page of docs/, on one line with one space between words."""
    return " ".join((record.ROOT / "docs" / name).read_text(encoding="utf-8").split())

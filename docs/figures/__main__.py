"""`python docs/figures [NAME ...]`: draw figures of the book anew, all of them or those that are named."""

import sys
from pathlib import Path

HOME = Path(__file__).resolve().parent
sys.path[0] = str(HOME.parents[1])

from benchmarks.harness.command import Parser, run  # noqa: E402
from benchmarks.report import figures, record  # noqa: E402
from soflow_fast.errors import UserError  # noqa: E402


def main() -> None:
    """Run the command."""
    parser = Parser(prog="python docs/figures", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="figures, by the names of their scripts")
    found = {script.stem: script for script in figures.scripts(HOME)}
    names = parser.parse().names or [*found]
    for name in names:
        if name not in found:
            raise UserError(f"NAME: there is no figure {name}; there are {', '.join(found)}")
    for name in names:
        for theme, path in figures.drawings(found[name]).items():
            record.replace(path, figures.drawn(found[name], theme, record.RECORDS).encode())
            print(record.shown(path), flush=True)


if __name__ == "__main__":
    run(main)

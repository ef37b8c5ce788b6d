"""`python -m benchmarks.report` puts the newest records' tables between their markers in the pages of docs/.

With --check it writes nothing and exits 1 if a page or figure differs from the records, or shows one that is no longer
there; a block without text is one that was not measured yet. To draw needs matplotlib.
--compare A B shows two records of one benchmark side by side.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.command import Parser
from benchmarks.report import record
from benchmarks.report.blocks import BLOCKS
from benchmarks.report.compare import compare, find
from benchmarks.report.figures import draw_the_stale
from soflow_fast.errors import UserError


def insert(text: str, block: str, name: str = "step") -> str:
    """`text` with `block` between the markers of `name`. Raises ValueError unless each is there once, in order."""
    begin, end = f"<!-- benchmark:{name} -->", f"<!-- /benchmark:{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"needs one {begin} and, after it, one {end}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"


def main(argv: Sequence[str] | None = None, root: Path = record.ROOT, folder: Path | None = None) -> int:
    """The command; returns its exit code: 1 for a difference found by --check, 2 for what the user has to mend, said in
    one line: no record, a damaged one, two that cannot be compared, no markers, no matplotlib."""
    parser = Parser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page or figure differs")
    about = "write nothing; show two records side by side: files, or names in benchmarks/records"
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help=about)
    try:
        arguments = parser.parse(argv)
        folder = folder or record.RECORDS
        if arguments.compare:
            a, b = arguments.compare
            print(compare(find(a, folder), find(b, folder)))
            return 0
        return bring_up_to_date(root, folder, arguments.check)
    except UserError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return UserError.exit_code


def bring_up_to_date(root: Path, folder: Path, check: bool) -> int:
    """Write the pages and figures of the newest records, or (check) see whether they are there: 1 if one is not.

    Raises UserError naming the record, page or package that stands in the way.
    """
    runs = {name: run for name, block in BLOCKS.items() if (run := record.newest(folder, block.benchmark, block.gpu))}
    if not runs:
        raise UserError(f"no record in {record.shown(folder)}: make one with pytest benchmarks/ --record")
    differing = []
    for page in dict.fromkeys(BLOCKS[name].page for name in runs):
        mine = {name: run for name, run in runs.items() if BLOCKS[name].page == page}
        try:
            text = wanted = (root / page).read_text(encoding="utf-8")
            for name, run in mine.items():
                wanted = insert(wanted, rendered(name, run), name)
        except (OSError, ValueError) as error:
            raise UserError(f"{page}: {getattr(error, 'strerror', None) or error}") from None
        if text != wanted:
            differing.append(f"{page} differs from {', '.join(run['file'] for run in mine.values())}")
            if not check:
                record.replace(root / page, wanted.encode())
    differing += lost(root, folder, [*runs]) if check else []
    differing += draw_the_stale(root, folder, check)
    for line in differing if check else ():
        print(line, file=sys.stderr)
    return 1 if check and differing else 0


FILLED = re.compile(r"<!-- benchmark:(\S+) -->(.*?)<!-- /benchmark:\1 -->", re.DOTALL)
"""A block of a page: its name, and what is between its markers."""


def lost(root: Path, folder: Path, kept: Sequence[str]) -> list[str]:
    """A line for each block of README.md and docs/ that has text which nothing brings up to date: there is no record
    for it, or no such block on that page. kept: the names of blocks that have a record. A block without text is no
    fault: its benchmark was not run yet. Raises UserError naming a page that cannot be read."""
    found = []
    for path in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        page = path.relative_to(root).as_posix()
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
        except (OSError, ValueError) as error:
            raise UserError(f"{page}: {getattr(error, 'strerror', None) or error}") from None
        for name in [name for name, shown in FILLED.findall(text) if shown.strip()]:
            block = BLOCKS.get(name)
            if block is None or block.page != page:
                found.append(f"{page}: the block {name} has text, but no benchmark makes it here")
            elif name not in kept:
                where = {None: "", True: " on a GPU", False: " on a CPU"}[block.gpu]
                why = f"no record of {block.benchmark}{where} is in {record.shown(folder)}"
                found.append(f"{page}: the block {name} has text, but {why}")
    return found


MALFORMED = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, StopIteration)
"""Errors that come of rows that are not those of their benchmark."""


def rendered(name: str, run: dict) -> str:
    """A block's text. Raises UserError naming the record if its rows are not those of its benchmark, or if it was
    interrupted before those of this block."""
    try:
        return BLOCKS[name].render(run)
    except MALFORMED as error:
        if not run.get("unfinished"):
            raise malformed(run, error) from None
        what = f"it is not finished, and lacks rows that the block {name} is made of"
        raise UserError(f"{run['file']}: {what}; measure them, or take the file away ({_said(error)})") from None


def malformed(run: dict, error: BaseException) -> UserError:
    """For a record that says what benchmark it is of, and does not hold what that needs."""
    return UserError(f"{run['file']}: its rows are not those of {run['benchmark']} ({_said(error)})")


def _said(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")

"""The fenced blocks of the pages, and the commands in those of a shell."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^(?P<fence>`{3,}|~{3,})(?P<kind>[^\n`]*)\n(?P<text>.*?)^(?P=fence)[ ]*$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"^[ \t>]+(?:`{3,}|~{3,})", re.MULTILINE)
"""A fence that begins in a list or a quotation, where nobody would look for it: pages have none."""
SHELL = ("sh", "bash")
SHOWN = ("text", "bibtex")
"""Languages of blocks that are no code: outputs, formulas, citations."""
OURS = re.compile(r"-m (soflow_fast\.\w+) (.*)")
WITHIN_A_LINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    """Of its first line of text."""
    kind: str
    """Its language; empty: it names none."""
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


class Command(NamedTuple):
    """A command of a shell, or a whole script, as it stands on a page but for its comment."""

    where: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def pages() -> list[str]:
    """Every page whose blocks are run, as paths from the root."""
    found = [ROOT / "README.md", ROOT / "kernels" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path.relative_to(ROOT).as_posix() for path in found]


def blocks(page: str, text: str | None = None) -> list[Block]:
    """The blocks of a page in order; of `text`, if it is given."""
    text = (ROOT / page).read_text(encoding="utf-8") if text is None else text
    found = FENCE.finditer(text)
    return [Block(page, text.count("\n", 0, m.start("text")) + 1, m["kind"].strip(), m["text"]) for m in found]


def commands(block: Block) -> list[Command]:
    """The commands of a block, each in one line, without comments; a script with its `#!`, and a block that is not the
    shell's, are one."""
    if block.kind not in SHELL or block.text.startswith("#!"):
        return [Command(block.where, block.text.strip())]
    found, line = [], block.line
    for text in re.split(r"(?<!\\)\n", block.text.rstrip("\n")):
        joined = re.sub(r"\s*\\\n\s*", " ", text)
        if joined := re.sub(r"\s+#.*$|^#.*$", "", joined).strip():
            found.append(Command(f"{block.page}:{line}", joined))
        line += text.count("\n") + 1
    return found


def calls(command: Command) -> list[tuple[str, list[str]]]:
    """The modules of the engine that a command or script calls, under whatever starts it, with their arguments.

    Brackets of a synopsis, `[--flag VALUE] ...`, are left out.
    """
    text = re.sub(r"\s*\\\n\s*", " ", command.text)
    found = []
    for module, arguments in OURS.findall(text):
        if re.search(r"\[\S+", arguments):
            arguments = re.sub(r"[\[\]]|\.\.\.", "", arguments)
        found.append((module, shlex.split(arguments, comments=True)))
    return found


def everywhere(page: str, text: str | None = None) -> list[Command]:
    """The commands of a page, or of `text`: in blocks of a shell, and those that stand in the prose as code."""
    text = (ROOT / page).read_text(encoding="utf-8") if text is None else text
    found = [command for block in blocks(page, text) if block.kind in SHELL for command in commands(block)]
    prose = FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)
    for part in re.finditer(r"(?:.+\n?)+", prose):
        for code in WITHIN_A_LINE.finditer(part[0]):
            line = prose.count("\n", 0, part.start() + code.start()) + 1
            found.append(Command(f"{page}:{line}", " ".join(code[1].split())))
    return found

"""Every fenced block of code on the pages runs: Python as it stands, commands with flags of tests/blocks/changes.py.

The blocks of a page run in order, in a process of their own and an empty folder but for what they are about
(tests/blocks/prepared.py). What is not run is listed with its reason, and its calls of the engine are parsed.
"""

import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from soflow_fast.errors import UserError
from tests.blocks import changes, outcome
from tests.blocks.pages import INDENTED, ROOT, SHELL, SHOWN, Block, Command, blocks, calls, commands, everywhere, pages

PAGES = [page for page in pages() if any(block.kind not in SHOWN for block in blocks(page))]
ELSEWHERE = {"kernels/README.md": "python"}
"""Pages whose blocks of a language other tests run: tests/kernels/test_readme.py."""


def code(page: str, text: str | None = None) -> list[Block]:
    """The blocks of a page that are code."""
    return [block for block in blocks(page, text) if block.kind not in SHOWN]


def steps(page: str, text: str | None = None) -> list[dict[str, Any]]:
    """What is run of a page, for tests/blocks/runner.py."""
    found: list[dict[str, Any]] = []
    for block in code(page, text):
        if not block.kind or block.kind == ELSEWHERE.get(page):  # the former fails in a test of its own
            continue
        if block.kind == "python":
            source = block.text
            for old, new in changes.REPLACED.get(page, {}).items():
                source = source.replace(old, new)
            found.append({"where": block.where, "line": block.line, "python": source})
            continue
        for command in commands(block):
            if changes.reason(command.text) is None:
                found.append(step(command))
    if found and page in outcome.CHECKS:
        found.append({"where": page, "check": page})
    return found


def step(command: Command) -> dict[str, Any]:
    line = int(command.where.rpartition(":")[2])
    words = [*command.words, *changes.added(command.text, line)]
    return {"where": command.where, "shown": command.text, "words": words, "cleared": changes.cleared(command.text)}


@pytest.fixture(scope="module")
def runner(environment: dict[str, str]) -> Iterator[subprocess.Popen]:
    """tests/blocks/runner.py, waiting for pages."""
    settings = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}:{environment['PYTHONPATH']}"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "tests.blocks.runner"]
    with subprocess.Popen(command, env=environment | settings, **pipes) as process:
        yield process
        assert process.stdin
        process.stdin.close()
        assert process.wait(60) == 0


def run(found: list[dict[str, Any]], home: Path, runner: subprocess.Popen) -> str:
    """Run steps in a folder, to their end or the first failure. Returns "", or the end of what a failure printed."""
    assert runner.stdin and runner.stdout
    (home / "steps.json").write_text(json.dumps(found))
    runner.stdin.write(f"{home / 'steps.json'}\n")
    runner.stdin.flush()
    code = runner.stdout.readline().strip()
    shown = (home / "output").read_text() if (home / "output").exists() else ""
    shutil.rmtree(home)  # a quarter of a gigabyte of some
    return "" if code == "0" else f"{shown[-4000:]}\nexit code {code}"


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=pytest.mark.slow) if p in changes.SLOW else p for p in PAGES if steps(p)]
)
def test_every_block_runs(page: str, tmp_path: Path, runner: subprocess.Popen) -> None:
    failure = run(steps(page), tmp_path, runner)
    assert not failure, failure


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_listed(page: str) -> None:
    """None lacks a language; one that is neither Python nor the shell's is listed with its reason."""
    for block in code(page):
        assert block.kind, f"{block.where}: the block names no language; text is that of what is no code"
        if block.kind not in (*SHELL, "python"):
            assert changes.reason(block.text) is not None, f"{block.where}: {block.kind} is not run and not listed"


def test_what_is_not_run_is_on_a_page_and_parsed() -> None:
    """The engine's own parsers take its flags and values: an example that has grown old fails though it is not run."""
    left = dict(changes.NOT_RUN)
    parsed = 0
    for command in (command for page in PAGES for block in code(page) for command in commands(block)):
        if (begin := changes.reason(command.text)) is None:
            continue
        left.pop(begin, None)
        for module, arguments in calls(command):
            parse(command.where, module, arguments, synopsis=changes.NOT_RUN[begin] == "a synopsis")
            parsed += 1
    assert left == {} and parsed >= 8


def parse(where: str, module: str, arguments: list[str], synopsis: bool) -> None:
    made = importlib.import_module(module)
    try:
        if module == "soflow_fast.train" and not synopsis:
            made.configuration(arguments)
        else:
            made.parser().parse(arguments)
    except UserError as error:
        pytest.fail(f"{where}: {error}")


def test_what_is_changed_is_on_a_page() -> None:
    for page, replaced in changes.REPLACED.items():
        text = "".join(block.text for block in code(page) if block.kind == "python")
        assert [old for old in replaced if old not in text] == []
    shown = [command.text for page in PAGES for block in code(page) for command in commands(block)]
    for entry in changes.ADDED:
        assert any(re.search(entry.command, text) for text in shown), entry
    assert outcome.CHECKS.keys() | changes.SLOW <= set(PAGES)


WRONG = {
    "python": "```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n",
    "warning": "```python\nimport warnings\nwarnings.warn('old', DeprecationWarning)\n```\n",
    "command": "```sh\npython -m soflow_fast.train digits --no-such-flag 1\n```\n",
    "unknown": "```sh\nrm -r nothing\n```\n",
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_block_fails(kind: str, tmp_path: Path, runner: subprocess.Popen) -> None:
    line = 6 if kind == "python" else 2
    assert f"failed: page.md:{line}" in run(steps("page.md", WRONG[kind]), tmp_path, runner)


@pytest.mark.parametrize("page", pages())
def test_no_block_hides_in_a_list(page: str) -> None:
    assert INDENTED.findall((ROOT / page).read_text(encoding="utf-8")) == []


def test_a_block_in_a_list_is_seen() -> None:
    assert len(INDENTED.findall("* text\n\n  ```sh\n  false\n  ```\n> ~~~\n")) == 3


def test_fences_of_every_kind_are_seen() -> None:
    text = "~~~bash\npython -m soflow_fast.train digits\n~~~\n\n````sh\nfalse\n````\n"
    assert [(block.line, block.kind) for block in blocks("page.md", text)] == [(2, "bash"), (6, "sh")]
    found = [(command.where, command.text) for command in everywhere("page.md", text)]
    assert found == [("page.md:2", "python -m soflow_fast.train digits"), ("page.md:6", "false")]

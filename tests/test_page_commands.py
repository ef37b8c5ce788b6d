"""The benchmarks' commands on the pages, in blocks and in the prose: their own parsers take them. None is run."""

import argparse
import importlib
import importlib.util
import os
import re
from collections.abc import Callable

import pytest

from benchmarks import conftest
from benchmarks.harness.command import Parser
from benchmarks.report import record
from soflow_fast.errors import UserError
from tests.blocks.pages import Command, everywhere, pages

PAGES = [*pages(), "CONTRIBUTING.md"]


class Parsed(Exception):
    """The arguments of a command were taken."""


class Refused(Exception):
    """They were not: why, in words."""


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command ends where it has parsed its arguments, with Parsed or Refused; on a machine of many cores."""

    def ending(plain: Callable) -> Callable:
        def parse(self: argparse.ArgumentParser, arguments: list[str]) -> None:
            try:
                plain(self, arguments)
            except UserError as error:
                raise Refused(str(error)) from None
            except SystemExit:
                raise Refused(f"{self.prog} does not take {arguments}") from None
            raise Parsed

        return parse

    def begin(folder: object = None) -> dict:
        raise Refused("it begins without a look at its arguments")

    monkeypatch.setattr(Parser, "parse", ending(Parser.parse))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", ending(argparse.ArgumentParser.parse_args))
    monkeypatch.setattr(record, "begin", begin)
    monkeypatch.setattr(os, "cpu_count", lambda: 1024)


def fault(command: Command) -> str | None:
    """Why a command of the benchmarks is none, in words; None: it is one, or one of somebody else."""
    if found := re.search(r"-m (benchmarks\b[\w.]*)(.*)", command.text):
        return fault_of_module(found[1], Command(command.where, found[2]).words)
    if found := re.match(r"(?:pytest|make bench)\b(.*)", command.text):
        words = Command(command.where, found[1]).words
        return fault_of_pytest([part for word in words for part in word.removeprefix("ARGS=").split()])
    return None


def fault_of_module(name: str, arguments: list[str]) -> str | None:
    """parse_only must be in force."""
    if importlib.util.find_spec(name) is None:
        return f"there is no module {name}"
    module = importlib.import_module(name)
    if hasattr(module, "__path__") and importlib.util.find_spec(f"{name}.__main__"):
        module = importlib.import_module(f"{name}.__main__")
    if not hasattr(module, "main"):
        return f"{name} is no command"
    try:
        module.main(arguments)
    except Parsed:
        return None
    except Refused as refused:
        return f"{name}: {refused}"
    return f"{name}: it ends without a look at its arguments"


def fault_of_pytest(words: list[str]) -> str | None:
    """Of pytest on the benchmarks: its files are there, and long flags are those of benchmarks/conftest.py."""
    known: list[str] = []

    class Options:
        def getgroup(self, name: str) -> "Options":
            return self

        def addoption(self, flag: str, **_: object) -> None:
            known.append(flag)

    conftest.pytest_addoption(Options())  # type: ignore[arg-type]
    for word in words:
        if word.startswith("--") and word.partition("=")[0] not in known:
            return f"benchmarks/conftest.py has no {word}"
        if "/" in word and not (record.ROOT / word.partition("::")[0]).exists():
            return f"{word} is not there"
    return None


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_benchmarks_are_there(page: str, parse_only: None) -> None:
    assert [f"{command.where}: {why}" for command in everywhere(page) if (why := fault(command))] == []


def test_some_commands_are_found() -> None:
    """In blocks, of CONTRIBUTING.md, and in the prose and the lines below tables, of performance.md."""
    for page, least in (("CONTRIBUTING.md", 25), ("docs/performance.md", 20)):
        found = [command for command in everywhere(page) if re.search(r"-m benchmarks\.|pytest bench", command.text)]
        assert len(found) >= least, page


WRONG = {
    "`python -m benchmarks.no_such --seeds 0`": "page.md:1: there is no module benchmarks.no_such",
    "text\n\nMore by `python -m benchmarks.sweeps\n--secnds 3`.": "page.md:3: benchmarks.sweeps: unknown",
    "```sh\nmake bench\npython -m benchmarks.digits --seeds 0 \\\n  -1  # one\n```": "page.md:3: benchmarks.digits: ",
    "```sh\n.venv/bin/python -m benchmarks.report --compare A\n```": "page.md:2: benchmarks.report: argument --compare",
    "`python -m benchmarks.gpu --hours 1`": "page.md:1: benchmarks.gpu: python -m benchmarks.gpu does not take",
    "`python -m benchmarks.soak --rounds 3`": "page.md:1: benchmarks.soak: unknown flag --rounds",
    "`python -m benchmarks.harness.race`": "page.md:1: benchmarks.harness.race is no command",
    "`pytest benchmarks/test_steps.py --record`": "page.md:1: benchmarks/test_steps.py is not there",
    '```sh\nmake bench ARGS="--record --rounds 3"\n```': "page.md:2: benchmarks/conftest.py has no --rounds",
    "`python -m benchmarks.mixtures --workers 2` and `make test` and ``a`b``": "",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_command_is_seen(text: str, parse_only: None) -> None:
    found = [f"{command.where}: {why}" for command in everywhere("page.md", text) if (why := fault(command))]
    assert len(found) == bool(WRONG[text]) and "".join(found).startswith(WRONG[text])

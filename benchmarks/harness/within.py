"""A plugin of pytest for a bounded share of time: `pytest -p benchmarks.harness.within --within SECONDS tests/kernels`.

Begins no test after so many seconds and takes the files in turn, so that when time is up every file has had its share.
The tests that were left out are counted at the end and fail nothing. `--taking device` selects the tests that take a
fixture: those that run kernels, compiled where there is a GPU.
"""

import itertools
import time
from collections.abc import Iterable

import pytest

BEGAN = pytest.StashKey[float]()
LEFT_OUT = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--within", type=float, default=float("inf"), help="begin no test after so many seconds")
    parser.addoption("--taking", help="only tests that take this fixture")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BEGAN], config.stash[LEFT_OUT] = time.monotonic(), []


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    name = config.option.taking
    items[:] = in_turn(item for item in items if name is None or name in getattr(item, "fixturenames", ()))


def in_turn(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """The first test of every file, then the second ones, and so on."""
    files: dict[object, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    return [item for group in itertools.zip_longest(*files.values()) for item in group if item is not None]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    config = item.config
    if time.monotonic() - config.stash[BEGAN] <= config.option.within:
        return None
    config.stash[LEFT_OUT].append(item.nodeid)
    return True  # it is dealt with: nothing runs, and nothing is reported


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if left := config.stash[LEFT_OUT]:
        terminalreporter.line(f"time is up: {len(left)} tests are left out")

"""`--record`, the rows of this session, and their table at the end of the run."""

import itertools

import pytest

from benchmarks import record
from benchmarks.race import figures, speed_ups

ROWS = pytest.StashKey[list[dict]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("soflow-fast benchmarks")
    group.addoption("--record", action="store_true", help="write benchmarks/records/<date>-<device>.json if all passed")
    group.addoption(
        "--seconds", type=float, default=45.0, help="about how long to time each network, at least 5 rounds"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> list[dict]:
    """Where a benchmark leaves its rows for the summary and the record."""
    return request.config.stash[ROWS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    found = config.stash[ROWS]
    if not found:
        return
    terminalreporter.section("a training step, recipes in turn")
    for case, group in itertools.groupby(found, key=lambda row: row["case"]):
        terminalreporter.line(case)
        members = list(group)
        ratios = speed_ups(members)
        for row in members:
            if row["skipped"]:
                terminalreporter.line(f"  {row['recipe']:<52} not run: {row['skipped']}")
                continue
            f, ratio = figures(row), ratios.get(row["recipe"])
            terminalreporter.line(
                f"  {row['recipe']:<52} {f['images_per_s']:9.1f} images/s {f['median_ms']:9.1f} ms "
                f"({f['low_ms']:.1f} to {f['high_ms']:.1f}), {row['forwards_per_image']:.2f} forwards, "
                f"{row['network_calls']} calls, {len(row['seconds'])} rounds"
                + (f"; ours is {ratio:.2f}x as fast" if ratio else "")
            )
    if config.getoption("--record"):
        if exitstatus != 0:
            terminalreporter.line("not recorded: not everything passed")
            return
        words = [str(word).replace(f"{config.rootpath}/", "") for word in config.invocation_params.args]
        path = record.write(found, " ".join(["pytest", *words]))
        terminalreporter.line(f"recorded: {path.relative_to(config.rootpath)}")

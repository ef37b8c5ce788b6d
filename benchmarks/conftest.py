"""`--record`, the rows of this session, and their tables at the end of the run."""

import itertools
import shlex
import signal
from pathlib import Path

import pytest

from benchmarks.harness.race import figures, speed_ups
from benchmarks.report import record
from benchmarks.report.tables import kernel_table
from soflow_fast.errors import UserError


class Rows:
    """What a benchmark has measured so far, on disk after each addition where a record is asked for."""

    def __init__(self, config: pytest.Config, benchmark: str) -> None:
        self.config, self.benchmark = config, benchmark
        self.found: list[dict] = []
        self.missing: list[str] = []
        """The names of the tests that have not ended."""

    def keep(self, *rows: dict) -> None:
        """Add some rows."""
        self.found += rows
        self.write(finished=False)

    def write(self, finished: bool) -> Path | None:
        """Write the record, None: none is asked for, or there is nothing beside a copy."""
        if not self.config.getoption("--record") or len(self.found) < 2:
            return None
        words = [str(word).replace(f"{self.config.rootpath}/", "") for word in self.config.invocation_params.args]
        facts = {"begun": self.config.stash[BEGUN], "finished": finished, "missing": self.missing}
        return record.write(self.found, shlex.join(["pytest", *words]), None, self.benchmark, **facts)


ROWS = pytest.StashKey[Rows]()
KERNEL_ROWS = pytest.StashKey[Rows]()
BEGUN = pytest.StashKey[dict | None]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("soflow-fast benchmarks")
    group.addoption("--record", action="store_true", help="write benchmarks/records/<date>-<device>.json")
    group.addoption("--headline", action="store_true", help="only the recipes of contestants.HEADLINE")
    group.addoption(
        "--seconds", type=float, default=45.0, help="about how long to time each network, at least 5 rounds"
    )
    group.addoption("--batch", type=int, help="images in a batch of the step, its record apart (as the case has it)")
    group.addoption(
        "--kernel-seconds", type=float, default=0.5, help="about how long to time each operation, at least 7 rounds"
    )


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if option.batch is not None and option.batch < 1:
        raise pytest.UsageError(f"--batch must be at least 1, got {option.batch}")
    for name, value in (("--seconds", option.seconds), ("--kernel-seconds", option.kernel_seconds)):
        if not 0 <= value < float("inf"):
            raise pytest.UsageError(f"{name} must be at least 0 and finite, got {value}")
    try:
        config.stash[BEGUN] = record.begin() if option.record else None
    except UserError as error:
        raise pytest.UsageError(str(error)) from None
    # Of pytest-benchmark, on a test that was skipped or interrupted: as an error it would take the summary along.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")
    # Whoever ends the run by a signal, such as one whose time is up, has what was measured on record.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config.stash[ROWS] = Rows(config, "step" if option.batch is None else "step-batch")
    config.stash[KERNEL_ROWS] = Rows(config, "kernels")


def rows_of(item: pytest.Item) -> Rows:
    """Where a benchmark leaves its rows."""
    return item.config.stash[KERNEL_ROWS if item.path.name == "test_kernels.py" else ROWS]


def pytest_collection_finish(session: pytest.Session) -> None:
    for item in session.items:
        rows_of(item).missing.append(item.name)


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> None:
    if call.when == "teardown":  # it has ended, and was neither left out nor interrupted
        rows_of(item).missing.remove(item.name)


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> Rows:
    """Where a benchmark leaves its rows for the summary and the record."""
    return request.config.stash[ROWS]


@pytest.fixture(scope="session")
def kernel_rows(request: pytest.FixtureRequest) -> Rows:
    """The same for the operations of soflow_kernels."""
    return request.config.stash[KERNEL_ROWS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    steps, kernels = config.stash[ROWS], config.stash[KERNEL_ROWS]
    if steps.found:
        _summarize_steps(terminalreporter, steps.found)
    if len(kernels.found) > 1:  # more than the copy
        terminalreporter.section("operations, ways in turn")
        terminalreporter.line(kernel_table(kernels.found))
    for rows in (steps, kernels):
        if path := rows.write(finished=exitstatus == 0):
            but = "" if exitstatus == 0 and not rows.missing else "; not everything passed or was reached"
            terminalreporter.line(f"recorded: {record.shown(path)}{but}")


def _summarize_steps(terminalreporter: pytest.TerminalReporter, found: list[dict]) -> None:
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

"""What a release of torch or triton can break, on each release that is named: python tests/versions.py 2.10 2.11 2.13

Every module is imported; compiled blocks, autograd nodes and interpreted kernels are tested; every kernel is compiled
ahead of time at real shapes. A release that has a file in tests/constraints is installed, with its triton, into
.venv-torchX.Y (--environments: in another folder), where the lines of that file take the place of those of
constraints.txt; the release of constraints.txt itself runs in the environment of this Python. Without a release nothing
is done. Exit code 1 if anything failed, after a table; 2 for a release that is unknown.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PINNED = ROOT / "constraints.txt"
VERSIONS = """
import importlib, importlib.metadata, platform
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"
print(version("torch"), version("triton"), version("numpy"), platform.python_version())
"""
OPTIONAL = ("diffusers",)
"""Packages without which a module says that it needs them; the environments here lack them."""
IMPORTS = (
    f"OPTIONAL = {OPTIONAL}"
    + """
import importlib, pkgutil, soflow_fast, soflow_kernels
names = [m.name for p in (soflow_fast, soflow_kernels) for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".")]
absent = []
for name in names:
    try:
        importlib.import_module(name)
    except ImportError as error:
        if error.name not in OPTIONAL:
            raise
        absent.append(f"{name} without {error.name}")
print(len(names) - len(absent), "modules", *absent)
"""
)
PYTEST = ("-m", "pytest", "-q", "--show-capture=no", "-p", "no:cacheprovider")
STEPS = {
    "imports": ("-W", "error", "-c", IMPORTS),
    "compiled blocks": (*PYTEST, "tests/training/test_compile.py"),
    "autograd nodes": (
        *(*PYTEST, "-m", "not slow"),
        *("tests/test_autograd_nodes.py", "tests/models/test_fused_layers.py"),
    ),
    "interpreted kernels": (
        *(*PYTEST, "-m", "not slow"),
        *(f"tests/kernels/{name}" for name in ("test_adaln.py", "test_gelu.py", "test_empty.py", "increment")),
    ),
    "ahead of time": ("-m", "soflow_kernels.inspect", "--arch", "80", "90", "100"),
}
NEED_TRITON = ("interpreted kernels", "ahead of time")


class Outcome(NamedTuple):
    """How a step ended on a release."""

    passed: bool
    note: str
    """The last line of what it printed."""
    seconds: float


class Row(NamedTuple):
    """A release, the versions that belong to it, and how the steps ended."""

    versions: Sequence[str]
    outcomes: dict[str, Outcome]


def file_of(release: str) -> Path:
    """The constraints in which a release differs from constraints.txt."""
    return ROOT / "tests" / "constraints" / f"torch-{release}.txt"


def pinned_release() -> str:
    """The release of torch in constraints.txt, as 2.13."""
    found = re.search(r"^torch==(\d+\.\d+)\.", PINNED.read_text(encoding="utf-8"), re.MULTILINE)
    assert found, "constraints.txt holds no torch"
    return found[1]


def constraints(release: str) -> str:
    """constraints.txt, where the lines of a release take the place of those of the same packages."""

    def lines(path: Path) -> list[str]:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if "==" in line]

    instead = lines(file_of(release))
    names = {line.partition("==")[0] for line in instead}
    kept = [line for line in lines(PINNED) if line.partition("==")[0] not in names]
    return "\n".join([*instead, *kept]) + "\n"


def environment(release: str, folder: Path) -> str:
    """The Python of a release's environment, which is made if it is not there or was made of other versions."""
    home = folder / f".venv-torch{release}"
    python, made = home / "bin" / "python", home / "made-of.txt"
    pins = constraints(release)
    wanted = pins + (ROOT / "setup.py").read_text(encoding="utf-8")
    if made.exists() and made.read_text(encoding="utf-8") == wanted:
        return str(python)
    print(f"Installing torch {release} into {home}, once: up to 3 GB to download, 7 GB on disk ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
    (home / "constraints.txt").write_text(pins, encoding="utf-8")
    options = ("-q", "--no-input", "--no-compile", "--no-cache-dir", "--disable-pip-version-check")
    packages = ("-e", str(ROOT), "pytest", "hypothesis")
    install = [str(python), "-m", "pip", "install", *options, "-c", str(home / "constraints.txt"), *packages]
    subprocess.run(install, check=True)
    made.write_text(wanted, encoding="utf-8")
    return str(python)


def run(python: str, arguments: Iterable[str], cache: str) -> tuple[int, str]:
    """Exit code and output of a Python process in the repository. cache: what triton compiled, for all releases: its
    keys hold the version of triton, which several releases of torch share."""
    environ = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "SOFLOW_KERNELS")}
    environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "TRITON_CACHE_DIR": cache}
    command = [python, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def test(release: str, python: str, cache: str) -> Row:
    """Every step on one release; what failed is printed."""
    code, output = run(python, ("-c", VERSIONS), cache)
    versions = output.split()
    if code or not versions[0].startswith(f"{release}."):
        raise SystemExit(f"torch {release} was asked for, {python} has {output.strip()}")
    outcomes = {}
    for step, arguments in STEPS.items():
        if versions[1] == "none" and step in NEED_TRITON:
            outcomes[step] = Outcome(True, "no triton here", 0)
            continue
        print(f"torch {release}: {step} ...", flush=True)
        start = time.monotonic()
        code, output = run(python, arguments, cache)
        note = (output.strip() or "nothing printed").splitlines()[-1].strip("= ")
        outcomes[step] = Outcome(code == 0, note, time.monotonic() - start)
        if code:
            print(f"{output[-6000:]}\n^ torch {release}: {step}, exit code {code}", flush=True)
    return Row(versions, outcomes)


def table(rows: Sequence[Row]) -> str:
    """A line for each release and step."""
    lines = [("torch", "triton", "numpy", "Python", "step", "", "seconds", "")]
    for row in rows:
        for step, outcome in row.outcomes.items():
            verdict = "passed" if outcome.passed else "FAILED"
            lines.append((*row.versions, step, verdict, f"{outcome.seconds:.0f}", outcome.note))
    widths = [max(len(line[i]) for line in lines) for i in range(7)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line[:7], widths, strict=True)), line[7]]).rstrip()
        for line in lines
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The tests that a release of torch or triton can break.")
    parser.add_argument("releases", nargs="*", metavar="RELEASE", help="of torch, as 2.11")
    parser.add_argument("--environments", type=Path, default=ROOT, metavar="FOLDER", help="where they are made")
    options = parser.parse_args(argv)
    for release in options.releases:
        if release != pinned_release() and not file_of(release).exists():
            parser.error(f"no file {file_of(release).relative_to(ROOT)}, and constraints.txt has {pinned_release()}")
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for release in options.releases:
            pinned = release == pinned_release()
            rows.append(test(release, sys.executable if pinned else environment(release, options.environments), cache))
    if rows:
        print(f"\n{table(rows)}")
    return int(not all(outcome.passed for row in rows for outcome in row.outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())

"""Records: one JSON file per run, with the machine, the versions, the commit, the command and every sample."""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from soflow_fast.errors import UserError, storage_error
from soflow_fast.version import __version__

ROOT = Path(__file__).parents[2]
HOME = Path(__file__).parents[1] / "records"


def folder_of(name: str | None) -> Path:
    """The absolute path of the folder for records; none, or an empty name: the repository's."""
    return Path(name or HOME).absolute()


RECORDS = folder_of(os.environ.get("SOFLOW_RECORDS"))
"""SOFLOW_RECORDS names another folder, for a trial that is no record to hand in."""
PACKAGES = ("torch", "triton", "numpy", "pytest-benchmark", "flash-attn-4", "flash-attn", "quack-kernels", "torchao")
RENDERED = ("benchmarks/records", "README.md", "docs")
"""Files that change when a record is made and rendered; nothing that is measured depends on them."""
LEAST, MOST = 1e-9, 1e9
"""The least and most seconds that something can have taken."""


class BadRecord(UserError):
    """A file that is no record, or not a whole one: one line that names it."""


def environment() -> dict:
    """The device, its threads, the versions, the commit."""
    versions = {"python": platform.python_version(), "soflow-fast": __version__}
    versions |= {name: version for name in PACKAGES if (version := _version(name))}
    facts: dict = {"device": device_name(), "system": f"{platform.system()} {platform.machine()}"}
    facts |= {"threads": torch.get_num_threads(), "versions": versions, "commit": commit()}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts["gpu"] = {"memory": card.total_memory, "capability": [card.major, card.minor], "cuda": torch.version.cuda}
        facts["clocks"] = clocks()
    return facts


def device_name() -> str:
    """The name of the GPU that is in use, else the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(torch.cuda.current_device())
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return " ".join(found[1].split()) if found else platform.processor() or platform.machine()


def commit(root: Path = ROOT) -> str | None:
    """The commit that was measured, "-dirty" if tracked files other than RENDERED were changed; None outside a
    repository."""
    others = [f":(exclude,top){path}" for path in RENDERED]
    try:
        name = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ":/", *others)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{name}-dirty" if changed else name


def clocks() -> str | None:
    """Clocks and power limit of the GPU that is in use, as nvidia-smi says them; None where it does not."""
    for name in _smi_names(torch.cuda.get_device_properties(torch.cuda.current_device())):
        query = ["nvidia-smi", f"--id={name}", "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,power.limit"]
        try:
            found = subprocess.run([*query, "--format=csv,noheader"], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return found.stdout.strip()
    return None


def _smi_names(card: Any) -> Iterator[str]:
    """The names by which nvidia-smi may know a GPU. Its numbers are no use: CUDA_VISIBLE_DEVICES renumbers torch's."""
    if (uuid := getattr(card, "uuid", None)) is not None:
        yield str(uuid) if str(uuid).startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    if (bus := getattr(card, "pci_bus_id", None)) is not None:
        yield f"{getattr(card, 'pci_domain_id', 0):08X}:{bus:02X}:{getattr(card, 'pci_device_id', 0):02X}.0"


def shown(path: Path) -> str:
    """A path as a reader knows it: from the repository's root where it lies inside."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def command(module: str, arguments: Sequence[str] | None = None) -> str:
    """The command line that was typed, as a shell takes it; None: the arguments of this process."""
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)])


def begin(folder: Path | None = None) -> dict:
    """The facts that a record gives of the machine, before anything is measured; `write` takes them.

    Raises StorageError if the folder cannot be written to, and warns of changed files, both before an hour is spent.
    """
    folder = folder or RECORDS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace(folder / f"{os.getpid()}.trial", b"").unlink()
    except OSError as error:
        raise storage_error(error, "SOFLOW_RECORDS" if folder != HOME else "benchmarks/records") from None
    begun = {"date": _now().isoformat(timespec="seconds")} | environment()
    _warn(begun["commit"])
    if "clocks" in begun:
        begun["clocks_at_start"] = begun.pop("clocks")
    return begun


def write(
    rows: list[dict],
    command: str,
    folder: Path | None = None,
    benchmark: str = "step",
    *,
    begun: dict | None = None,
    finished: bool = True,
    missing: Sequence[str] = (),
) -> Path:
    """Write the rows of this run to <date>-<device>.json; other benchmarks than "step" put their name in between.

    A later run on the same day and device replaces it. begun: from `begin`; None: the machine as it is now. What is not
    finished goes to a file of its own, which the finished record takes away, and says so. missing: what it lacks, by
    name; with any, it is not finished.
    """
    finished = finished and not missing
    folder = folder or RECORDS
    facts = begun or {"date": _now().isoformat(timespec="seconds")} | environment()
    if begun and "gpu" in begun:
        facts = begun | {"clocks": clocks()}
    record: dict = {"benchmark": benchmark, "date": facts["date"], "command": command} | facts
    record |= {} if finished else {"unfinished": True}
    record |= ({"missing": [*missing]} if missing else {}) | {"rows": rows}
    name = record["device"] if benchmark == "step" else f"{benchmark} {record['device']}"
    stem = f"{record['date'][:10]}-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    part, whole = folder / f"{stem}-unfinished.json", folder / f"{stem}.json"
    path = replace(whole if finished else part, (json.dumps(record, indent=1) + "\n").encode())
    if finished:
        part.unlink(missing_ok=True)
        if begun is None:  # else it was said at the beginning
            _warn(record["commit"])
    return path


class Growing:
    """The record of one of our commands, "benchmarks.<benchmark>", written as it comes.

    Made before anything is measured; `begin` says what that raises. arguments: as typed, None: those of this process.
    """

    def __init__(self, benchmark: str, arguments: Sequence[str] | None = None) -> None:
        self._benchmark, self._begun = benchmark, begin()
        self._command = command(f"benchmarks.{benchmark.replace('-', '_')}", arguments)

    def keep(self, rows: list[dict], missing: Sequence[str] = ()) -> None:
        """Write what there is so far, as unfinished, with the names of what is still missing."""
        self._write(rows, missing, finished=False)

    def finish(self, rows: list[dict], missing: Sequence[str] = ()) -> None:
        """Write the record and say where it is; with something missing, as unfinished."""
        print(f"recorded: {shown(self._write(rows, missing, finished=True))}", flush=True)

    def _write(self, rows: list[dict], missing: Sequence[str], finished: bool) -> Path:
        facts = {"benchmark": self._benchmark, "begun": self._begun}
        return write(rows, self._command, finished=finished, missing=missing, **facts)


def replace(path: Path, content: bytes) -> Path:
    """Write a file, whole or not at all, whatever interrupts it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def read(path: Path) -> dict:
    """One record, with its own file name under "file". A file without "benchmark" is none, and returned as it is.

    Rows are shared by all who read the same content: whoever changes them takes a copy. Raises BadRecord naming the
    file and what is wrong with it.
    """
    try:
        found = _parsed(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadRecord(f"{shown(path)}: {getattr(error, 'strerror', None) or error}") from None
    return found | {"file": path.name}


@functools.lru_cache(maxsize=256)
def _parsed(content: bytes) -> dict:
    """The record that a file's content is, parsed once however often a file is read: every block and figure looks
    through the whole folder. Raises ValueError with the fault."""
    try:
        found = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"is no record: holds {type(found).__name__}, not an object")
    if "benchmark" in found and (fault := _fault(found)):
        raise ValueError(fault)
    return found


def newest(folder: Path | None = None, benchmark: str = "step", gpu: bool | None = None) -> dict | None:
    """The record of a benchmark to show, None if there is none: one of a GPU before one of a CPU (gpu: only the one, or
    only the other), one that is finished before one that is not, and then the latest. Raises BadRecord if any file of
    the folder is damaged."""
    found = [read(path) for path in sorted((folder or RECORDS).glob("*.json"))]
    mine = [run for run in found if run.get("benchmark") == benchmark and gpu in (None, "gpu" in run)]
    return max(mine, key=lambda run: ("gpu" in run, not run.get("unfinished"), run["date"]), default=None)


def digest(run: dict) -> str:
    """A digest of a record's content, wherever its file lies and however it is set."""
    kept = {name: value for name, value in run.items() if name != "file"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _fault(found: dict) -> str | None:
    """The fault that keeps an object from being a record; the content of its rows is known to each benchmark."""
    for name, kind in {"benchmark": str, "date": str, "command": str, "device": str, "versions": dict}.items():
        if not isinstance(found.get(name), kind):
            return f"{name} is missing, or is not {'text' if kind is str else 'an object'}"
    try:
        datetime.fromisoformat(found["date"])
    except ValueError:
        return f"date is none: {found['date']!r}"
    rows = found.get("rows")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        return "rows is missing, empty, or is not a list of objects"
    for index, row in enumerate(rows):
        for value in numbers if isinstance(numbers := row.get("seconds", []), list) else [numbers]:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not LEAST <= value <= MOST:
                return f"row {index}: seconds must be numbers from {LEAST:g} to {MOST:g}, got {json.dumps(value)[:40]}"
    return None


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _warn(commit: str | None) -> None:
    if commit is not None and commit.endswith("-dirty"):
        print(
            f"warning: measured on changed files ({commit}): not a record to hand in. Commit, then measure again.",
            file=sys.stderr,
            flush=True,
        )


def _git(root: Path, *arguments: str) -> str:
    found = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

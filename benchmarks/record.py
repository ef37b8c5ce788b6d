"""Records: one JSON file per run, with the machine, the versions, the commit, the command and every sample."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

from soflow_fast.version import __version__

ROOT = Path(__file__).parent.parent
RECORDS = Path(os.environ.get("SOFLOW_RECORDS", Path(__file__).parent / "records"))
"""SOFLOW_RECORDS names another folder, for what is no record to hand in."""
PACKAGES = ("torch", "triton", "numpy", "pytest-benchmark")


def environment() -> dict:
    """The device, its threads, the versions, the commit."""
    versions = {"python": platform.python_version(), "soflow-fast": __version__}
    versions |= {name: version for name in PACKAGES if (version := _version(name))}
    facts: dict = {"device": device_name(), "system": f"{platform.system()} {platform.machine()}"}
    facts |= {"threads": torch.get_num_threads(), "versions": versions, "commit": commit()}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        facts["gpu"] = {"memory": card.total_memory, "capability": [card.major, card.minor], "cuda": torch.version.cuda}
        facts["clocks"] = _clocks()
    return facts


def device_name() -> str:
    """The GPU's name, else the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return " ".join(found[1].split()) if found else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit that was measured, "-dirty" if tracked files were changed; None outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def shown(path: Path) -> str:
    """A path as a reader knows it: from the repository's root where it lies inside."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def write(rows: list[dict], command: str, folder: Path = RECORDS, benchmark: str = "step") -> Path:
    """Write the rows of this run to <date>-<device>.json; other benchmarks than "step" put their name in between.

    A later run on the same day and device replaces it.
    """
    now = datetime.now(timezone.utc)
    record: dict = {"benchmark": benchmark, "date": now.isoformat(timespec="seconds"), "command": command}
    record |= environment() | {"rows": rows}
    name = record["device"] if benchmark == "step" else f"{benchmark} {record['device']}"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{now.date()}-{slug}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def read(path: Path) -> dict:
    """One record, with its own file name under "file"."""
    return json.loads(path.read_text(encoding="utf-8")) | {"file": path.name}


def newest(folder: Path = RECORDS, benchmark: str = "step") -> dict | None:
    """The latest record of a benchmark, None if there is none."""
    found = [record for record in map(read, folder.glob("*.json")) if record.get("benchmark") == benchmark]
    return max(found, key=lambda record: record["date"], default=None)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _clocks() -> str | None:
    query = [
        "nvidia-smi",
        "--id=0",
        "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,power.limit",
        "--format=csv,noheader",
    ]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None

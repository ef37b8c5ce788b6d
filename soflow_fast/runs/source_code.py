"""The versions and the commit that a run is trained with: kept beside it, for those who come to have its weights."""

import json
import subprocess
from pathlib import Path
from typing import Any

import torch

from ..files import TEXT, read_file
from ..version import __version__

CODE = "code.json"
ROOT = Path(__file__).resolve().parents[2]
"""Of a checkout; of an installed package the folder of all packages."""
SECONDS = 10
"""What git may take: a run does not wait for a disk that hangs."""


def versions() -> dict[str, Any]:
    """Of this package and of torch, and the commit, "-dirty" if files that git knows have been changed; None: this is
    no checkout, or git is not there."""
    return {"soflow-fast": __version__, "commit": commit(ROOT), "torch": torch.__version__}


def commit(root: Path) -> str | None:
    """The commit of the checkout at `root`, of which that is the top folder; None: there is none."""
    if not (root / ".git").exists():  # or packages would be of the project in whose folder they are installed
        return None
    try:
        name = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{name}-dirty" if changed else name


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS).stdout.strip()


def read(run_dir: Path) -> dict[str, Any]:
    """What `versions` said when a run was last started; nothing, if that is not known."""
    try:
        values = json.loads(read_file(run_dir / CODE, TEXT))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}

"""Why a run of several ranks ends, and whether an error is its cause or follows from another rank's."""

import hashlib
import json
import re
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ...errors import (
    Diverged,
    ElsewhereError,
    ElsewhereOSError,
    ElsewhereStorageError,
    Interrupted,
    UserError,
)

PACKAGE = Path(__file__).resolve().parents[2]
OF_CONNECTIONS = re.compile(
    r"gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|process group|Socket|collective", re.IGNORECASE
)
"""In the RuntimeErrors that torch raises where another rank has gone."""

SECOND_HAND = (ElsewhereError, ElsewhereOSError, ElsewhereStorageError)
"""Errors of another rank, which is to tell them."""


@dataclass(frozen=True)
class Failure:
    """Why a run ends. `rank` is the one to blame."""

    rank: int
    host: str
    text: str
    """One line, without the rank; nothing is printed of an empty one."""
    code: int
    """Of all processes."""
    kind: Literal["error", "signal", "lost", "judged", "all"]
    """error: raised by that rank; lost: it lost another, or was told by it; judged: what others saw of it; all: nobody
    is to blame."""
    kept: str = ""
    """A file with the traceback, where there is no run directory yet."""

    def line(self, common: bool = False) -> str:
        """What is printed once. common: all ranks failed with this text, as one process would."""
        if self.kind == "signal" or not self.text:
            return self.text
        anonymous = common or self.kind == "all"
        text = self.text if anonymous else named(self.text, self.rank, self.host)
        return f"error: {text}" + (f"; its traceback is in {self.kept}" if self.kept else "")

    def alike(self) -> str:
        """The key under which ranks count that fail with the same text."""
        return "alike/" + hashlib.sha256(self.text.encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def from_json(text: str | bytes) -> Failure:
    """The failure that `to_json` wrote."""
    return Failure(**json.loads(text))


def name(rank: int, host: str) -> str:
    """ "rank 3 (gpu07)"; "rank 3" of a host that is not known yet."""
    return f"rank {rank} ({host})" if host else f"rank {rank}"


def named(text: str, rank: int, host: str) -> str:
    """A text with the rank that says it in front, unless it names the rank that is to blame itself."""
    return text if re.search(r"\brank \d+ \(", text) else f"{name(rank, host)}: {text}"


def kind_of(error: BaseException) -> Literal["error", "signal", "lost"]:
    """What an error that ends a rank is to the others."""
    if isinstance(error, Interrupted):
        return "signal"
    of_torch = any(kind.__name__ == "DistError" for kind in type(error).__mro__)  # its name costs no import of torch
    by_text = isinstance(error, RuntimeError) and OF_CONNECTIONS.search(str(error))
    return "lost" if of_torch or by_text or isinstance(error, SECOND_HAND) else "error"


def described(error: BaseException) -> str:
    """An error in one line: the text of one that is meant for the user, else what and where it is."""
    if isinstance(error, (UserError, Diverged, Interrupted, ElsewhereError)):
        return str(error)
    text = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}".removesuffix(": ")
    frames = traceback.extract_tb(error.__traceback__)
    inside = [PACKAGE in Path(frame.filename).parents for frame in frames]
    last = len(frames) - 1 - inside[::-1].index(True) if True in inside[1:] else -1  # the first is all commands' own
    return f"{text} (at {Path(frames[last].filename).name}:{frames[last].lineno})" if frames else text

"""Where a rank is that has made no progress for a while, and whether it only waits for others there."""

import sys
import threading
from pathlib import Path
from types import FrameType

RUNS = Path(__file__).resolve().parents[1]
SAVER = str(RUNS / "async_save.py")
WAITING = (str(RUNS / "ranks" / "agreement.py"), str(RUNS / "checkpoint" / "together.py"))
"""Ours; of torch's, torch/distributed, and a backward, in which gradients are averaged by C++ code."""


def place() -> tuple[str, bool]:
    """The line that the main thread is at, or the thread that writes a checkpoint where the main one waits for that;
    and whether other ranks are waited for there."""
    frames = sys._current_frames()
    main = frames.get(threading.main_thread().ident or 0)
    writers = [thread.ident or 0 for thread in threading.enumerate() if thread.name == "checkpoint"]
    if main is not None and waits_for_saver(main):
        main = next((frames[ident] for ident in writers if ident in frames), main)
    return ("", False) if main is None else (line_of(main), waits(main))


def line_of(frame: FrameType) -> str:
    """ "step.py:88"."""
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def waits_for_saver(frame: FrameType) -> bool:
    """Whether a thread is in `Saver`, for its thread to be done."""
    at: FrameType | None = frame
    while at is not None and at.f_code.co_filename == threading.__file__:
        at = at.f_back
    return at is not None and at.f_code.co_filename == SAVER


def waits(frame: FrameType) -> bool:
    """Whether it is in a call that waits for other ranks, behind which there is only torch's own code."""
    at: FrameType | None = frame
    while at is not None:
        name = at.f_code.co_filename
        if name in WAITING or "/torch/distributed/" in name or name.endswith("/torch/autograd/graph.py"):
            return True
        if "/torch/" not in name:
            return False
        at = at.f_back
    return False

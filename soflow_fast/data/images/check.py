"""Every image is decoded once before a run begins, and what was found is kept for the next start."""

import contextlib
import hashlib
import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np
import PIL
import torch

from ...files import cache_folder, read_file, write_file
from ...launch import processors
from ...version import __version__
from ..dataset import Files, Wanted, checksum
from .listing import LARGEST_FILE, LARGEST_TEXT
from .pixels import examine, reason
from .quiet import quiet
from .zips import Zip

SECONDS = 5
"""Between two lines about a check that takes long."""
TOGETHER = 32
"""Images that a thread takes at once to check them."""
REMEMBERED = 256
"""Checks of fewer images are not kept: they are soon made again."""

SMALL = 16 * 2**10
"""Bytes of an image below which more than two threads wait for Python more than they work."""


class Outcome(NamedTuple):
    """What the check found."""

    bad: dict[int, str]
    """What is wrong with images, by their numbers, in words that follow a name."""
    transparent: int
    """How many images are, at least in part."""
    animated: int
    """How many have more frames than one."""
    lasting: bool = True
    """Whether it is the same next time, if no file changes: a disk may be mounted, a permission given."""


def checked(files: Files, stamp: str, wanted: Wanted) -> Outcome:
    """The outcome of the check, from the cache folder if it was made before."""
    count = len(files.names)
    if not stamp or count < REMEMBERED:
        return _check(files, wanted)
    digest = hashlib.sha256(repr((__version__, PIL.__version__, stamp)).encode())
    digest.update(checksum(files.names, np.asarray(files.sizes), torch.empty(0, dtype=torch.int64)).encode())
    path = cache_folder() / "images" / f"{digest.hexdigest()}.json"
    with contextlib.suppress(OSError, ArithmeticError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        kept = json.loads(read_file(path, LARGEST_TEXT, follow=True))
        bad = {int(number): str(text) for number, text in kept["bad"].items()}
        if all(0 <= number < count for number in bad):
            return Outcome(bad, int(kept["transparent"]), int(kept["animated"]))
    outcome = _check(files, wanted)
    if outcome.lasting:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, json.dumps(outcome._asdict()).encode(), synced=False)
    return outcome


@quiet
def _check(files: Files, wanted: Wanted) -> Outcome:
    """Decode every image once, in a thread for each processor."""
    count = len(files.names)
    starts = iter(range(0, count, TOGETHER))
    lock, stopped = threading.Lock(), threading.Event()
    bad: dict[int, str] = {}
    seen = Counter[str]()

    def work() -> None:
        while not stopped.is_set():
            with lock:
                start = next(starts, None)
            if start is None:
                return
            numbers = range(start, min(start + TOGETHER, count))
            outcomes = []
            for number in numbers:
                if stopped.is_set():  # an image of many pixels takes seconds
                    return
                outcomes.append(_examined(files, number))
            with lock:
                bad.update((number, fault) for number, (fault, _) in zip(numbers, outcomes, strict=True) if fault)
                seen.update(word for _, words in outcomes for word in words)
                seen["checked"] += len(numbers)

    threads = max(1, min(processors() if np.mean(files.sizes) > SMALL else 2, -(-count // TOGETHER)))
    with ThreadPoolExecutor(threads, "check") as pool:
        working = [pool.submit(work) for _ in range(threads)]
        try:
            while wait(working, SECONDS).not_done:
                wanted.say(f"checking images: {seen['checked']} of {count}, {len(bad)} bad")
        finally:
            stopped.set()
    for done in working:
        done.result()
    return Outcome(bad, seen["transparent"], seen["animated"], not seen["passing"])


def _examined(files: Files, number: int) -> tuple[str, list[str]]:
    """What is wrong with an image, and the words under which it is counted."""
    size = int(files.sizes[number])
    if size > LARGEST_FILE:
        verb = "unpacks to" if isinstance(files, Zip) else "has"
        return f"{verb} {size >> 20} MiB ({size} bytes), and at most {LARGEST_FILE >> 20} MiB are read", []
    try:
        content = files.read(number)
    except Exception as error:
        return reason(error), ["passing"] if isinstance(error, (OSError, MemoryError)) else []
    try:
        transparent, animated = examine(content)
    except Exception as error:
        return reason(error), ["passing"] if isinstance(error, MemoryError) else []
    return "", [word for word, said in (("transparent", transparent), ("animated", animated)) if said]

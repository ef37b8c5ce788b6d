"""The drawing of what a folder lacks, written by several threads, and what is made of all images at the end."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import tee
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import Diverged, Interrupted, storage
from ...files import read_file, write_file
from ..images import from_png, is_whole_png, make_grid, npy, png
from ..progress import Progress
from .folder import GRID, LARGEST, NPZ, THREADS, Folder
from .npz import read_first, write_npz

GRID_IMAGES = 1024
IN_HAND = 8
"""Files that each thread may have before it."""

Draw = Callable[[Iterator[range]], Iterable[Sequence[Tensor]]]
"""Gives, for each batch of rows, a bool [] whether the samples are finite, and then what is written: where images have
files, uint8 [n, H, W, C] for PNGs or float32 [n, C, H, W] for .npy; where samples.npz is asked for, uint8 [n, H, W, C]
for that."""


def fill(
    folder: Folder, batches: Sequence[range], draw: Draw, labels: Tensor | None, *, grid_images: int = GRID_IMAGES
) -> None:
    """Draw the batches of which something is missing, and make the grid and samples.npz of what is there then.

    labels: int64 [n], for samples.npz; None: the model has none. grid_images: the first ones, that are in the grid.

    Raises StorageError, Diverged for samples that are not finite, and Interrupted, which says how many are kept.
    """
    n = folder.settings.n
    with storage(f"--out {folder.path}"):
        missing = folder.missing(batches)
    kept = done = n - sum(map(len, missing))
    began = time.monotonic()
    progress = Progress(n, since=began)

    def count(images: int) -> None:
        nonlocal done
        done, now = done + images, time.monotonic()
        progress.count(done, (done - kept) / max(now - began, 1e-9), now)

    try:
        if kept:
            progress.say(f"{kept} of {n} are there already")
        asked, drawn = tee(missing)
        with storage(f"--out {folder.path}"):
            _write(folder, asked, draw(drawn), count)
            _finish(folder, batches, labels, grid_images)
    except Interrupted as error:
        text = f"interrupted; {done} of {n} are kept, and the same command goes on"
        raise Interrupted(error.exit_code - 128, text, error.at_once) from None
    finally:
        progress.close()


def _write(
    folder: Folder, batches: Iterable[range], drawn: Iterable[Sequence[Tensor]], count: Callable[[int], None]
) -> None:
    """Write batches. count: is told how many images have been written since it was told last."""
    single = npy if folder.settings.latents else png
    begun: deque[tuple[Future[None], int]] = deque()

    def put(path: Path, content: Callable[[Tensor], bytes], x: Tensor) -> None:
        write_file(path, content(x), synced=path.suffix == ".npy")  # a PNG tells by itself whether it is whole

    def wait() -> None:
        written, images = begun.popleft()
        written.result()
        if images:
            count(images)

    with ThreadPoolExecutor(THREADS, "write") as pool:
        for rows, (finite, *forms) in zip(batches, drawn, strict=True):
            if not finite:
                raise Diverged(f"{folder.run}: its samples are not finite")
            files: list[tuple[Path, Callable[[Tensor], bytes], Tensor]] = []
            if folder.singly:
                files += [(folder.image(i), single, x) for i, x in zip(rows, forms[0], strict=True)]
            if folder.parts:
                files.append((folder.part(rows), npy, forms[-1]))
            for k, file in enumerate(files, 1):
                begun.append((pool.submit(put, *file), len(rows) if k == len(files) else 0))
                if len(begun) == IN_HAND * THREADS:
                    wait()
        while begun:
            wait()


def _finish(folder: Folder, batches: Sequence[range], labels: Tensor | None, grid_images: int) -> None:
    grid, archive = folder.path / GRID, folder.path / NPZ
    if folder.parts:
        archive.unlink(missing_ok=True)  # a damaged one, which would take room beside the parts and the new one
        shape = (folder.settings.n, *np.load(folder.part(batches[0]), mmap_mode="r").shape[1:])
        write_npz(archive, (np.load(folder.part(rows)) for rows in batches), shape, labels)
    folder.end()
    if not folder.settings.latents and not (grid.exists() and is_whole_png(read_file(grid, LARGEST))):
        write_file(grid, png(make_grid(_first(folder, grid_images))), synced=False)


def _first(folder: Folder, count: int) -> Tensor:
    """The first images, uint8 [at most count, H, W, C], as they are on the disk."""
    count = min(count, folder.settings.n)
    if folder.singly:
        return torch.stack([from_png(read_file(folder.image(i), LARGEST)) for i in range(count)])
    return torch.from_numpy(read_first(folder.path / NPZ, count))

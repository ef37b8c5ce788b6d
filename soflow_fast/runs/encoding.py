"""Making a folder of latents, of images by a VAE or of latents in another format. The same call resumes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..data import latents
from ..data.dataset import Dataset, Wanted
from ..data.formats import open_dataset
from ..data.latents.layout import Layout
from ..data.latents.writer import Writer, shard_rows
from ..errors import ConfigError, DataError, Interrupted, enough_memory, storage
from .progress import Progress
from .vae import VAE

ROWS_AT_A_TIME = 256
"""Of a conversion."""


def open_images(path: str, size: int, say: Callable[[str], None]) -> Dataset:
    """The images that are to be encoded, uint8 [3, size, size] each. Raises DataError."""
    return open_dataset(path, "images", Wanted(size, 3, say=say))


def encode(
    images: Dataset, out: Path, vae: VAE, *, size: int, flip: bool, batch_size: int, device: torch.device
) -> None:
    """Write the posterior's mean and std of every image, in order, and with `flip` those of its mirror image.

    Batches begin anew with each shard, so that a run that was killed and goes on makes the same bytes as one that was
    not. Raises DataError, ConfigError and StorageError.
    """

    def latents_of(index: Tensor) -> tuple[Tensor, Tensor | None]:
        x = images.decoded(images.read(index).to(device), _none)
        return vae.encoded(x).cpu(), vae.encoded(x.flip(3)).cpu() if flip else None

    with enough_memory(f"--batch-size {batch_size}: out of memory; give a smaller one"):
        _, stored, height, width = latents_of(torch.tensor([0]))[0].shape
        layout = Layout(stored // 2, height, width, True, vae.scale, vae.shift, vae.name)
        wrong = layout.problem()
        if wrong:
            raise ConfigError(f"--vae {vae.name}: {wrong}")
        contents = images.contents
        header = latents.Header(
            layout,
            len(images),
            shard_rows(len(images), layout.row()),
            flip,
            contents.classes,
            size,
            contents.checksum,
            vae.weights,
        )
        _fill(out, header, images.labels, latents_of, batch_size)


def convert(found: latents.Latents, out: Path, vae: str = "") -> None:
    """Write latents in another format as a folder of ours. Raises DataError and StorageError.

    vae: the name that the folder is to bear, "": what the format says.
    """
    known = found.layout
    layout = replace(known, vae=vae or known.vae)
    rows = shard_rows(len(found), layout.row())
    contents = found.contents
    header = latents.Header(layout, len(found), rows, found.mirrors, contents.classes, 0, contents.checksum)

    def latents_of(index: Tensor) -> tuple[Tensor, Tensor | None]:
        twin = found.read(index, torch.ones(len(index), dtype=torch.bool)) if found.mirrors else None
        return found.read(index), twin

    _fill(out, header, found.labels, latents_of, ROWS_AT_A_TIME)


def _none(shape: tuple[int, ...]) -> Tensor:
    raise AssertionError("images take no noise")


Work = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Latents of samples by their numbers, int64 [n], and those of the twins."""


def _fill(out: Path, header: latents.Header, labels: Tensor, work: Work, batch_size: int) -> None:
    """Write what is missing, batch by batch."""
    with _writing(out, header) as writer, _progress(header.count) as progress:
        first = writer.done
        if first:
            progress.say(f"{first} of {header.count} are there already")
        began = time.monotonic()
        for index in _batches(first, header.count, writer.header.rows, batch_size):
            made, twin = work(index)
            with storage(f"cannot write to {out}"):
                writer.append(made, labels[index], twin)
            done, now = int(index[-1]) + 1, time.monotonic()
            progress.count(done, (done - first) / max(now - began, 1e-9), now)


def _batches(first: int, count: int, rows: int, size: int) -> Iterator[Tensor]:
    """Numbers from `first` on, `size` at a time, but no batch across two shards."""
    for start in range(first, count, rows):
        end = min(start + rows, count)
        for at in range(start, end, size):
            yield torch.arange(at, min(at + size, end))


@contextmanager
def _writing(out: Path, header: latents.Header) -> Iterator[Writer]:
    with storage(f"cannot write to {out}"):
        if out.exists() and not out.is_dir():
            raise DataError(f"{out}: is a file")
        writer = Writer(out, header)
    try:
        yield writer
    except Interrupted as error:
        text = f"interrupted; {writer.done} of {header.count} are kept, and the same command goes on"
        raise Interrupted(error.exit_code - 128, text) from None
    finally:
        writer.close()


@contextmanager
def _progress(total: int) -> Iterator[Progress]:
    progress = Progress(total)
    try:
        yield progress
    finally:
        progress.close()

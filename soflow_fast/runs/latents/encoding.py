"""Making a folder of latents, of images by a VAE or of latents in another format. The same call resumes."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import tee
from pathlib import Path

import torch
from torch import Tensor

from ...config.schema import AUTO
from ...data import latents
from ...data._beside import conditions_of
from ...data.dataset import Dataset, Wanted
from ...data.formats import open_dataset
from ...data.latents.layout import Layout
from ...data.latents.writer import Writer, check_free, shard_rows
from ...errors import ConfigError, DataError, Interrupted, enough_memory, storage
from ...files import locked, make_folder
from ...sampling.devices import Devices, uploaded
from ..batches.loader import Ahead, workers_for
from ..progress import Progress
from .vae import VAE

ROWS_AT_A_TIME = 256
"""Of a conversion."""
SAME = 0.02
"""By how much a mean that is encoded again may differ from the one that is kept, as a part of its root mean square.
Another device's rounding (TF32 has 11 bits) is some thousandths, the mean of another image differs by about 1."""

Latents = tuple[Tensor, ...]
"""Those of a batch, and those of the twins if there are any."""


def open_images(path: str, size: int, say: Callable[[str], None]) -> Dataset:
    """The images that are to be encoded, uint8 [3, size, size] each. Raises DataError."""
    return open_dataset(path, "images", Wanted(size, 3, say=say))


def encode(
    images: Dataset,
    out: Path,
    vae: VAE,
    *,
    size: int,
    flip: bool,
    batch_size: int,
    devices: Sequence[torch.device],
    workers: int = AUTO,
) -> None:
    """Write the posterior's mean and std of every image, in order, and with `flip` those of its mirror image.

    Batches begin anew with each shard, so that a run that was killed and goes on makes the same bytes as one that was
    not, on however many devices of a kind. workers: processes that read ahead, AUTO: see `loader.workers_for`. Raises
    DataError, ConfigError and StorageError.
    """

    def read(rows: range) -> Tensor:
        return images.read(torch.arange(rows.start, rows.stop))

    def again(numbers: Tensor) -> Latents:
        return first(images.read(numbers))

    def work_on(device: torch.device) -> Callable[[Tensor], Latents]:
        own = vae.on(device)

        def latents_of(raw: Tensor) -> Latents:
            x = images.decoded(uploaded(raw, device), _none)
            return (own.encoded(x), own.encoded(x.flip(3))) if flip else (own.encoded(x),)

        return latents_of

    workers = workers_for(images, workers, len(devices))
    lost = f"--workers {workers}: one of them was killed, or lacks memory or room in /dev/shm; give fewer"
    with enough_memory(f"--batch-size {batch_size}: out of memory; give a smaller one"):
        vae = vae.on(devices[0])
        vae.check_images(images.shape[0], size)
        first = work_on(devices[0])
        _, stored, height, width = again(torch.tensor([0]))[0].shape
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
            _checksum(images),
        )
        with Ahead(read, workers, lost) as ahead, Devices(devices, work_on) as several:
            work = lambda batches: several.results(ahead.results(batches))  # noqa: E731
            _fill(out, header, images, work, batch_size, again)


def convert(found: latents.Latents, out: Path, vae: str = "") -> None:
    """Write latents in another format as a folder of ours. Raises DataError and StorageError.

    vae: the name that the folder is to bear, "": what the format says.
    """
    known = found.layout
    layout = replace(known, vae=vae or known.vae)
    rows = shard_rows(len(found), layout.row())
    contents = found.contents
    header = latents.Header(
        layout, len(found), rows, found.mirrors, contents.classes, 0, contents.checksum, conditions=_checksum(found)
    )

    def latents_of(rows: range) -> Latents:
        index = torch.arange(rows.start, rows.stop)
        twins = [found.read(index, torch.ones(len(index), dtype=torch.bool))] if found.mirrors else []
        return found.read(index), *twins

    _fill(out, header, found, lambda batches: map(latents_of, batches), ROWS_AT_A_TIME)


def take_conditions(found: Dataset, place: str, given: str, say: Callable[[str], None]) -> None:
    """Let a data set have the vectors that are given or lie beside it, if there are any. Raises DataError."""
    before = len(found.contents.notes)
    found.conditions = conditions_of(found, place, given)
    for note in found.contents.notes[before:]:
        say(note)


def _checksum(found: Dataset) -> str:
    return "" if found.conditions is None else found.conditions.checksum


def _none(shape: tuple[int, ...]) -> Tensor:
    raise AssertionError("images take no noise")


def _fill(
    out: Path,
    header: latents.Header,
    found: Dataset,
    work: Callable[[Iterator[range]], Iterator[Latents]],
    batch_size: int,
    again: Callable[[Tensor], Latents] | None = None,
) -> None:
    """Write what is missing, batch by batch, with the labels and vectors of a data set. work: gives the latents of
    batches, one after the other.

    again: gives those of some numbers, int64 [n], by which the ones that are there already are compared with the
    source; None: its checksum is of all that it holds.
    """
    with _progress(header.count) as progress, _writing(out, header, progress.say) as writer:
        first = writer.done
        if first and again is not None:
            _check_kept(writer, again)
        if first:
            progress.say(f"{first} of {header.count} are there already")
        if found.conditions is not None:
            with storage(f"cannot write to {out}"):
                writer.put_conditions(found.conditions)
        began = time.monotonic()
        batches, worked_on = tee(_batches(first, header.count, writer.header.rows, batch_size))
        for rows, made in zip(batches, work(worked_on), strict=True):
            with storage(f"cannot write to {out}"):
                writer.append(made[0], found.labels[rows.start : rows.stop], *made[1:])
            now = time.monotonic()
            progress.count(rows.stop, (rows.stop - first) / max(now - began, 1e-9), now)


def _check_kept(writer: Writer, again: Callable[[Tensor], Latents]) -> None:
    """Raise DataError if a few of the latents that are kept, the first and the last among them, are of other images.

    The checksum of files is of their names and sizes alone.
    """
    numbers, channels = sorted({0, writer.done // 2, writer.done - 1}), writer.header.layout.channels
    for each in zip(writer.kept(numbers), again(torch.tensor(numbers)), strict=True):
        kept, made = (rows[:, :channels].flatten(1).cpu().float() for rows in each)
        if ((kept - made).norm(dim=1) > SAME * kept.norm(dim=1)).any():
            text = "is encoded from other content; give another folder, or remove this one"
            raise DataError(f"{writer.folder}: {text}")


def _batches(first: int, count: int, rows: int, size: int) -> Iterator[range]:
    """Numbers from `first` on, `size` at a time, but no batch across two shards."""
    for start in range(first, count, rows):
        end = min(start + rows, count)
        for at in range(start, end, size):
            yield range(at, min(at + size, end))


@contextmanager
def _writing(out: Path, header: latents.Header, say: Callable[[str], None]) -> Iterator[Writer]:
    with ExitStack() as held:
        with storage(f"cannot write to {out}"):
            check_free(out)  # before there is a lock in it
            make_folder(out)
            held.enter_context(locked(out, f"{out}: another process writes to it", say))
            writer = Writer(out, header, say)
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

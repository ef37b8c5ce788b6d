"""Making a folder of latents, of images by a VAE or of latents in another format. The same call resumes."""

import copy
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import tee
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.schema import AUTO
from ..data import latents
from ..data.dataset import Dataset, LatentSpace, Wanted
from ..data.formats import open_dataset
from ..data.latents.layout import Factor, Layout
from ..data.latents.writer import Writer, shard_rows
from ..errors import ConfigError, DataError, Interrupted, enough_memory, storage
from ._devices import Devices
from .loader import Ahead, workers_for
from .progress import Progress

ROWS_AT_A_TIME = 256
"""Of a conversion."""
DECODED = 16
"""Latents that are decoded at a time."""

Latents = tuple[Tensor, ...]
"""Those of a batch, and those of the twins if there are any."""


def open_images(path: str, size: int, say: Callable[[str], None]) -> Dataset:
    """The images that are to be encoded, uint8 [3, size, size] each. Raises DataError."""
    return open_dataset(path, "images", Wanted(size, 3, say=say))


@dataclass
class VAE:
    """An encoder, and how a model takes what it makes."""

    name: str
    model: Any
    """diffusers' AutoencoderKL, in eval mode."""
    scale: Factor
    shift: Factor
    weights: str
    """SHA-256 of names and values of all weights."""

    def on(self, device: torch.device) -> "VAE":
        """The same on a device: itself, or a copy."""
        if next(self.model.parameters()).device == device:
            return self
        return replace(self, model=copy.deepcopy(self.model).to(device))

    @torch.inference_mode()
    def encoded(self, x: Tensor) -> Tensor:
        """Mean || std of the posterior of images [n, 3, H, W] in [-1, 1]: float32 [n, 2C, h, w]."""
        posterior = self.model.encode(x).latent_dist
        return torch.cat([posterior.mean, posterior.std], 1)

    @torch.inference_mode()
    def decoded(self, x: Tensor, space: LatentSpace) -> Tensor:
        """Images [n, 3, H, W] in about [-1, 1] of a model's latents [n, C, h, w], on the device of the VAE."""
        weight = next(self.model.parameters())
        scale, shift = (torch.tensor(value, device=weight.device).view(-1, 1, 1) for value in space[1:])
        parts = [part.to(weight) / scale + shift for part in x.split(DECODED)]
        return torch.cat([self.model.decode(part).sample for part in parts])


def load_vae(name: str, device: torch.device, *, local: bool = False) -> VAE:
    """An AutoencoderKL by its name on the hub or its folder, from safetensors. Raises ConfigError.

    local: it must be on this machine.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise ConfigError(f"--vae {name}: needs diffusers: pip install 'soflow-fast[hub]'") from None
    below = {"subfolder": "vae"} if (Path(name) / "vae" / "config.json").is_file() else {}
    try:
        model: Any = AutoencoderKL.from_pretrained(
            name, use_safetensors=True, low_cpu_mem_usage=False, local_files_only=local, **below
        )
    except Exception as error:  # diffusers, safetensors and the hub raise many kinds
        text = " ".join(str(error).split())
        raise ConfigError(f"--vae {name}: cannot be loaded ({type(error).__name__}: {text[:200]})") from None
    config = model.config
    scale, shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        scale, shift = tuple(scale / float(value) for value in std), tuple(map(float, mean))
    weights = _digest(model)
    return VAE(name, model.to(device).eval().requires_grad_(False), scale, shift, weights)


def _digest(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + b"\0")
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


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

    def work_on(device: torch.device) -> Callable[[Tensor], Latents]:
        own = vae.on(device)

        def latents_of(raw: Tensor) -> Latents:
            x = images.decoded(raw, _none)
            return (own.encoded(x), own.encoded(x.flip(3))) if flip else (own.encoded(x),)

        return latents_of

    workers = workers_for(images, workers, len(devices))
    lost = f"--workers {workers}: one of them was killed, or lacks memory or room in /dev/shm; give fewer"
    with enough_memory(f"--batch-size {batch_size}: out of memory; give a smaller one"):
        vae = vae.on(devices[0])
        _, stored, height, width = work_on(devices[0])(read(range(1)).to(devices[0]))[0].shape
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
        with Ahead(read, workers, lost) as ahead, Devices(devices, work_on) as several:
            _fill(out, header, images.labels, lambda batches: several.results(ahead.results(batches)), batch_size)


def convert(found: latents.Latents, out: Path, vae: str = "") -> None:
    """Write latents in another format as a folder of ours. Raises DataError and StorageError.

    vae: the name that the folder is to bear, "": what the format says.
    """
    known = found.layout
    layout = replace(known, vae=vae or known.vae)
    rows = shard_rows(len(found), layout.row())
    contents = found.contents
    header = latents.Header(layout, len(found), rows, found.mirrors, contents.classes, 0, contents.checksum)

    def latents_of(rows: range) -> Latents:
        index = torch.arange(rows.start, rows.stop)
        twins = [found.read(index, torch.ones(len(index), dtype=torch.bool))] if found.mirrors else []
        return found.read(index), *twins

    _fill(out, header, found.labels, lambda batches: map(latents_of, batches), ROWS_AT_A_TIME)


def _none(shape: tuple[int, ...]) -> Tensor:
    raise AssertionError("images take no noise")


def _fill(
    out: Path,
    header: latents.Header,
    labels: Tensor,
    work: Callable[[Iterator[range]], Iterator[Latents]],
    batch_size: int,
) -> None:
    """Write what is missing, batch by batch. work: gives the latents of batches, one after the other."""
    with _writing(out, header) as writer, _progress(header.count) as progress:
        first = writer.done
        if first:
            progress.say(f"{first} of {header.count} are there already")
        began = time.monotonic()
        batches, worked_on = tee(_batches(first, header.count, writer.header.rows, batch_size))
        for rows, made in zip(batches, work(worked_on), strict=True):
            with storage(f"cannot write to {out}"):
                writer.append(made[0], labels[rows.start : rows.stop], *made[1:])
            now = time.monotonic()
            progress.count(rows.stop, (rows.stop - first) / max(now - began, 1e-9), now)


def _batches(first: int, count: int, rows: int, size: int) -> Iterator[range]:
    """Numbers from `first` on, `size` at a time, but no batch across two shards."""
    for start in range(first, count, rows):
        end = min(start + rows, count)
        for at in range(start, end, size):
            yield range(at, min(at + size, end))


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

"""Making a folder of latents, of images by a VAE or of latents in another format. The same call resumes."""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import latents
from ..data.dataset import Dataset, LatentSpace, Wanted
from ..data.formats import open_dataset
from ..data.latents.layout import Factor, Layout
from ..data.latents.writer import Writer, shard_rows
from ..errors import ConfigError, DataError, Interrupted, enough_memory, storage
from .progress import Progress

ROWS_AT_A_TIME = 256
"""Of a conversion."""
DECODED = 16
"""Latents that are decoded at a time."""


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

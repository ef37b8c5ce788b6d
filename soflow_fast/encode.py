"""Encode images into latents of a VAE, or convert latents in another format: a folder that `train --data` takes.

    python -m soflow_fast.encode IMAGES OUT --vae stabilityai/sd-vae-ft-mse --size 256
    python -m soflow_fast.encode IMAGES OUT --vae DIR --size 512 --flip --device cuda:0,cuda:2 --workers 16
    python -m soflow_fast.encode --from imagenet_latent.hdf5 OUT

IMAGES is a folder or a zip of images. Kept are mean and standard deviation of each image's posterior in float16, with
labels, and with the vectors of --conditions or those that lie beside; --flip keeps those of its mirror image as well.
--from takes the SoFlow authors' HDF5 (or its folder), LightningDiT's safetensors, EDM2's and REPA's .npy with
dataset.json, MeanFlow ports' LMDB, MAR's .npz, .pt per image, and fast-DiT's .npy.

Every GPU that is visible works on batches of its own, or those that --device names; the outcome is the same on however
many of a kind. The same command again, with other devices too, goes on after a kill, at the last whole shard.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .commands import process
from .commands.parser import DEVICES, Parser, whole_number
from .config.schema import AUTO
from .errors import ConfigError, DataError

VAE = "stabilityai/sd-vae-ft-mse"
MOST_PIXELS = 2**14
MOST_CHANNELS = 2**15
MOST_IMAGES = 2**16
"""Of a batch."""
MOST_WORKERS = 256


def parser() -> Parser:
    """The command line."""
    p = Parser(
        prog="python -m soflow_fast.encode",
        usage="python -m soflow_fast.encode IMAGES OUT [flags] | --from FILE OUT [flags]",
        description=__doc__,
    )
    p.add_argument("places", nargs="*", metavar="IMAGES OUT", help="the images, and the folder for the latents")
    p.add_argument("--from", dest="source", metavar="FILE", help="latents to convert, in place of IMAGES")
    p.add_argument("--vae", metavar="NAME", help=f"AutoencoderKL, by its name on the hub or its folder (default {VAE})")
    p.add_argument("--size", metavar="N", help="height and width of the images (default 256)")
    p.add_argument("--conditions", metavar="FILE", help="vectors to keep with them (default: those beside, if any)")
    p.add_argument("--flip", action="store_true", help="encode the mirror images as well")
    p.add_argument("--batch-size", metavar="N", help="images at a time (default 32)")
    p.add_argument("--device", metavar="D", help=DEVICES)
    p.add_argument("--workers", metavar="N", help="processes that decode images ahead (default: by processors)")
    p.add_argument("--channels", metavar="N", help="with --from: of a latent, where the format leaves it open")
    return p


def main(arguments: list[str] | None = None) -> None:
    """Parse and do. Raises UserError and Interrupted."""
    values = parser().parse(arguments)
    process.alone("encode")
    names = ["OUT"] if values.source else ["IMAGES", "OUT"]
    if len(values.places) != len(names):
        raise ConfigError(f"give {' and '.join(names)}, got {len(values.places)} of {len(names)}")
    out = Path(values.places[-1])
    if values.source:
        for flag in ("size", "batch_size", "device", "workers", "flip"):
            if getattr(values, flag):
                raise ConfigError(f"--{flag.replace('_', '-')}: is of no use with --from")
        _convert(
            values.source,
            out,
            values.vae or "",
            whole_number("--channels", values.channels or "0", 0, MOST_CHANNELS),
            values.conditions or "",
        )
        return
    if values.channels:
        raise ConfigError("--channels: is of use with --from only")
    size = whole_number("--size", values.size or "256", 1, MOST_PIXELS)
    batch_size = whole_number("--batch-size", values.batch_size or "32", 1, MOST_IMAGES)
    workers = whole_number("--workers", values.workers, 0, MOST_WORKERS) if values.workers else AUTO

    from .runs.latents import encoding
    from .runs.latents.vae import load_vae
    from .training.precision import resolve_devices

    _check_apart(values.places[0], out)
    devices = resolve_devices(values.device or "auto")
    with _naming("IMAGES"):
        images = encoding.open_images(values.places[0], size, print)
        encoding.take_conditions(images, values.places[0], values.conditions or "", print)
        vae = load_vae(values.vae or VAE, devices[0])
        encoding.encode(
            images, out, vae, size=size, flip=values.flip, batch_size=batch_size, devices=devices, workers=workers
        )
    print(f"{len(images)} images encoded: {out}")


def _convert(source: str, out: Path, vae: str, channels: int, conditions: str) -> None:
    from .data import latent_formats
    from .data.dataset import Wanted
    from .data.latents import recognises
    from .runs.latents import encoding

    place = Path(source)
    if not place.exists():
        raise DataError(f"--from {source}: no such file or folder")
    if recognises(place):
        raise DataError(f"--from {source}: is in our format already; train --data takes it as it is")
    _check_apart(source, out)
    with _naming("--from"):
        found = latent_formats.load(place, Wanted(0, channels, say=print))
        for note in found.contents.notes:
            print(note)
        encoding.take_conditions(found, source, conditions, print)
        encoding.convert(found, out, vae)
    print(f"{len(found)} latents converted: {out}")


def _check_apart(source: str, out: Path) -> None:
    """Raise ConfigError if OUT lies in the folder that is read: the next time it would be read as well."""
    if os.path.isdir(source) and Path(os.path.realpath(out)).is_relative_to(os.path.realpath(source)):
        raise ConfigError(f"OUT {out}: lies in {source}, which is read; give a folder elsewhere")


@contextmanager
def _naming(flag: str) -> Iterator[None]:
    """Name the place by this command's flag where an error inside names it by `--data`, which is that of `train`."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error).replace("--data", flag, 1)) from None


if __name__ == "__main__":
    process.run(lambda: main(sys.argv[1:]))

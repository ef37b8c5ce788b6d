"""Draw images: `python -m soflow_fast.sample RUN --out DIR`; RUN is a run directory, a checkpoint or an exported one.

    python -m soflow_fast.sample runs/digits --out out --n 64 --nfe 1
    python -m soflow_fast.sample runs/digits --out out --labels 3,5 --seed 7

Writes an image each, 00000.png and on, and grid.png of the first 1024. Latents are decoded by the VAE that made them,
if it is on this machine, or by --vae NAME; without, a .npy each. Image i depends on the seed, its label and i alone.

Every GPU that is visible draws batches of its own, or those that --device names; the images are the same with however
many of a kind.
"""

import os
import shutil
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from .commands import process
from .commands.parser import DEVICES, GUIDANCE, MOST_CALLS, MOST_SEED, Parser, number, user_value, whole_number
from .config.schema import nearest
from .errors import ConfigError, Diverged, StorageError, enough_memory, storage_error

MOST = 10**7
"""Images of one call: each is a file."""
GRID = 1024
MOST_WRITERS = 16
"""Threads that make and write files: a PNG of 256 x 256 pixels takes a processor about ten milliseconds."""
IN_HAND = 8
"""Files that each of them may have before it."""
SHOWN = 12
"""Classes that are named in what is printed."""


def parser() -> Parser:
    """The command line."""
    p = Parser(prog="python -m soflow_fast.sample", description=__doc__)
    p.add_argument("run", metavar="RUN", help="run directory, checkpoint or exported directory")
    p.add_argument("--out", required=True, metavar="DIR", help="where the images go")
    p.add_argument("--n", default="64", metavar="N", help="how many (default: 64)")
    p.add_argument("--nfe", default="1", metavar="N", help="network calls per image (default: 1)")
    p.add_argument(
        "--labels", metavar="A,B,...", help="classes by number or name, or null, repeated in turn (default: all)"
    )
    p.add_argument("--guidance", metavar="W", help=GUIDANCE)
    p.add_argument("--vae", metavar="NAME", help="of a model of latents: decode them by this AutoencoderKL, or none")
    p.add_argument("--seed", default="0", metavar="N", help="of the noise (default: 0)")
    p.add_argument("--device", default="auto", metavar="D", help=DEVICES)
    return p


def main(arguments: list[str] | None = None) -> None:
    """Parse and do. Raises UserError."""
    values = parser().parse(arguments)
    process.alone("sample")
    n, nfe = whole_number("--n", values.n, 1, MOST), whole_number("--nfe", values.nfe, 1, MOST_CALLS)
    guidance = number("--guidance", values.guidance)
    seed, out = whole_number("--seed", values.seed, 0, MOST_SEED), Path(values.out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file")

    import torch

    from .runs import images as pictures
    from .runs.checkpoint import load_with_data
    from .sampling import Devices, Drawing, chosen_guidance, draw_on
    from .training.precision import resolve_devices

    with enough_memory(f"--n {n}: out of memory with {values.run}; draw fewer at a time, or on another --device"):
        devices = resolve_devices(values.device)
        flow, config, data = load_with_data(values.run, devices[0])
        model = config.model
        names = data.classes if data is not None and len(data.classes) == model.num_classes else ()
        labels = _labels(values.labels, model.num_classes, names, n)
        if labels and model.num_classes in labels and not model.null_label:
            raise ConfigError(f"--labels {values.labels}: {values.run} has no null label: it was trained without one")
        latents = config.data.latent or not pictures.has_colours(model.in_channels)
        if values.vae and not latents:
            raise ConfigError(f"--vae {values.vae}: the samples of {values.run} are images")
        space = data.space if data is not None else None
        decoder = _decoder(values.vae, space, devices[0], model.in_channels) if latents else None
        shape = (n, model.in_channels, model.input_size, model.input_size)
        y = None if labels is None else torch.tensor(labels)
        w = user_value(lambda: chosen_guidance(flow, guidance), "--guidance")
        drawing = user_value(lambda: Drawing.of(flow, y, nfe=nfe, seed=seed, shape=shape, guidance=w), "--labels")
        as_they_are = latents and decoder is None
        ending, content = ("npy", pictures.npy) if as_they_are else ("png", pictures.png)

        def finish_on(device: torch.device) -> Callable[[Any], Any]:
            decode = decoder(device) if decoder else lambda x: x
            return lambda x: x if as_they_are else pictures.to_uint8(decode(x))

        def files(made: Iterable[tuple[Any, ...]]) -> Iterator[tuple[str, Callable[[], bytes]]]:
            first, count = [], 0
            for finite, batch in made:
                if not finite:
                    raise Diverged(f"{values.run}: its samples are not finite")
                if not as_they_are and count < GRID:
                    first.append(batch[: GRID - count])
                for x in batch:
                    yield f"{count:05d}.{ending}", partial(content, x)
                    count += 1
            if first:
                yield "grid.png", lambda: pictures.png(pictures.make_grid(torch.cat(first)))

        with Devices(devices, draw_on(flow, finish_on)) as several:
            _write(out, files(several.results((drawing, rows) for rows in drawing.batches())))
    if labels and names:
        drawn = dict.fromkeys([*names, "null"][label] for label in labels)
        more = f" and {len(drawn) - SHOWN} more" if len(drawn) > SHOWN else ""
        print(f"classes: {', '.join(list(drawn)[:SHOWN])}{more}")
    calls = f"of {nfe} network call{'s' if nfe > 1 else ''} each"
    if as_they_are:
        name = data.space.vae if data is not None and data.space is not None else ""
        hint = f"--vae {name or 'NAME'}"
        print(f"{n} latents {calls}, as .npy: {out}; {hint} decodes them")
    else:
        print(f"{n} images {calls}: {out / 'grid.png'}")


def _decoder(name: str | None, space: Any, device: Any, channels: int) -> Callable[[Any], Callable[[Any], Any]] | None:
    """What gives, for a device, what makes images of a model's latents there; None: nothing does.

    name: of the VAE, "none" for none; None: that of the latents, if it is on this machine. space: how a model's latents
    belong to those of the VAE, None: as its own say. device: on which it is loaded. channels: of the latents.
    """
    from .data.dataset import LatentSpace
    from .runs.latents.vae import load_vae

    if name == "none" or (name is None and not (space and space.vae)):
        return None
    try:
        vae = load_vae(name or space.vae, device, local=name is None, channels=channels)
    except ConfigError as error:
        if name is None:
            print(f"samples are written as latents, in .npy: {str(error).removeprefix('--vae ')}")
            return None
        raise
    return lambda device: partial(vae.on(device).decoded, space=space or LatentSpace(vae.name, vae.scale, vae.shift))


def _labels(text: str | None, num_classes: int, names: Sequence[str], n: int) -> list[int] | None:
    """The label of each image; None: the model has none. names: of the classes, by number."""
    if not num_classes:
        if text:
            raise ConfigError(f"--labels {text}: the model has no classes")
        return None
    chosen = (
        list(range(num_classes)) if text is None else [_label(part, num_classes, names) for part in text.split(",")]
    )
    return [chosen[i % len(chosen)] for i in range(n)]


def _label(text: str, num_classes: int, names: Sequence[str]) -> int:
    """A class by its name, its number, or "null", which is never a name. A name that is a number counts as a name."""
    text = text if text in names else text.strip()
    if text == "null":
        return num_classes
    if text in names:
        return names.index(text)
    if names and not text.lstrip("-").isdigit():
        raise ConfigError(f"--labels {text}: no class of this run{nearest(text, names)}")
    return whole_number("--labels", text, 0, num_classes - 1)


def _write(out: Path, files: Iterable[tuple[str, Callable[[], bytes]]]) -> None:
    """All files, names with what makes their contents, or none: they are written aside, on the same disk, by several
    threads, and then moved in."""
    new = not out.exists()
    aside = (out.parent if new else out) / f".{out.name}.partial-{os.getpid()}"
    threads = min(MOST_WRITERS, len(os.sched_getaffinity(0)))

    def write(name: str, content: Callable[[], bytes]) -> None:
        (aside / name).write_bytes(content())

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.mkdir()
            with ThreadPoolExecutor(threads, "write") as pool:
                begun: deque[Future[None]] = deque()
                for name, content in files:
                    begun.append(pool.submit(write, name, content))
                    if len(begun) == IN_HAND * threads:
                        begun.popleft().result()
                for written in begun:
                    written.result()
            if new:
                os.rename(aside, out)
            else:
                for name in os.listdir(aside):
                    os.replace(aside / name, out / name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise StorageError(str(storage_error(error, f"--out {out}"))) from None


class _Callable(types.ModuleType):
    """The package's public function `sample` would be hidden by importing this module: so it can be called too."""

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        from .sampling import sample

        return sample(*arguments, **settings)


if __name__ == "__main__":
    process.run(lambda: main(sys.argv[1:]))
else:
    sys.modules[__name__].__class__ = _Callable

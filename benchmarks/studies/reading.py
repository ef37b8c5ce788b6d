"""`python -m benchmarks.reading`: how fast one process reads data sets, and how long a step waits for latents, as a
record.

Files are made for it, of random content that compresses as photographs do: PNG of 32 x 32 in a zip, JPEG of 500 x 375
in folders, cropped to 256 x 256, and latents of 4 x 32 x 32 with their deviations. They are in the page cache, so that
a disk is not what is timed. Batches of 256 in the order of a run, by one thread.

The wait is that of a training on the latents on this device: the seconds in which `runs.upload.Batches` is asked for a
batch, beside those of the whole step, of DiT-S/2 at a batch of 16.
"""

import io
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import command
from benchmarks.harness.race import figures
from benchmarks.harness.timing import Stopwatch
from benchmarks.report import record
from soflow_fast.config.presets import preset
from soflow_fast.config.schema import DiTConfig, override
from soflow_fast.data import Source, open_source
from soflow_fast.data.latents import Header, Layout, Writer
from soflow_fast.runs.batches.upload import Batches
from soflow_fast.training.precision import resolve_device
from soflow_fast.training.state import TrainState
from soflow_fast.training.step import train_step

BATCH = 256
AMOUNTS = {"png": 4096, "jpeg": 512, "latents": 8192}
"""Samples of each set."""
STEP_BATCH = 16
NETWORK = {"model." + name: value for name, value in vars(DiTConfig.named("S/2")).items()}


def photograph(draw: np.random.Generator, width: int, height: int) -> Image.Image:
    """A smooth random image with some noise, RGB."""
    coarse = draw.integers(0, 256, (max(2, height // 16), max(2, width // 16), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noisy = smooth + draw.normal(0, 6, smooth.shape).astype(np.int16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def png_zip(place: Path, n: int) -> Path:
    """A zip of n PNG of 32 x 32 in ten classes."""
    draw, path = np.random.default_rng(0), place / "png.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(n):
            buffer = io.BytesIO()
            photograph(draw, 32, 32).save(buffer, "PNG")
            archive.writestr(f"{i % 10}/{i:06d}.png", buffer.getvalue())
    return path


def jpeg_folder(place: Path, n: int) -> Path:
    """A folder of n JPEG of 500 x 375 in ten classes."""
    draw, path = np.random.default_rng(0), place / "jpeg"
    for i in range(n):
        (path / str(i % 10)).mkdir(parents=True, exist_ok=True)
        photograph(draw, 500, 375).save(path / str(i % 10) / f"{i:06d}.jpg", quality=90)
    return path


def latent_folder(place: Path, n: int) -> Path:
    """A folder of n latents, mean and std, in ten classes."""
    path, layout = place / "latents", Layout(4, 32, 32, True, 0.18215, 0.0, "none")
    header = Header(layout, n, n, False, tuple(map(str, range(10))), 256, "random")
    writer = Writer(path, header)
    source = torch.Generator().manual_seed(0)
    for first in range(0, n, BATCH):
        count = min(BATCH, n - first)
        mean, std = (make(count, 4, 32, 32, generator=source) for make in (torch.randn, torch.rand))
        writer.append(torch.cat([mean, std], 1), torch.arange(first, first + count) % 10)
    writer.close()
    return path


SETS: dict[str, tuple[str, Callable[[Path, int], Path], dict[str, Any]]] = {
    "png": ("PNG of 32 x 32 in a zip", png_zip, {"preset": "cifar10", "data.flip": True}),
    "jpeg": ("JPEG of 500 x 375 to 256 x 256", jpeg_folder, {"preset": "cifar10", "model.input_size": 256}),
    "latents": ("latents of 4 x 32 x 32 with std", latent_folder, {"preset": "imagenet256-b2"}),
}


def opened(name: str, place: Path) -> Source:
    """One of the sets, made and opened."""
    _, make, settings = SETS[name]
    changes = {key: value for key, value in settings.items() if key != "preset"}
    path = make(place, AMOUNTS[name])
    config = override(preset(settings["preset"]), {**changes, "data": str(path), "batch_size": BATCH})
    return open_source(config)


def measure(name: str, source: Source, seconds: float) -> dict:
    """A row with the time of every batch that is read within about so many seconds, at least three."""
    stopwatch, samples = Stopwatch(torch.device("cpu")), []
    source.raw(0)
    began = time.perf_counter()
    while len(samples) < 3 or time.perf_counter() - began < seconds:
        step = len(samples)
        samples.append(stopwatch.seconds(lambda step=step: source.raw(step)))
    return {"case": SETS[name][0], "way": "read by one process", "batch": BATCH, "seconds": samples}


def waits(source: Source, seconds: float) -> list[dict]:
    """Rows of a training on latents: the steps, and in them the time until their batch is there."""
    device = resolve_device("auto")
    changes = {**NETWORK, "model.num_classes": 10, "batch_size": STEP_BATCH, "device": str(device)}
    state = TrainState.build(override(preset("imagenet256-b2"), changes))
    mine = Source(source.dataset, seed=0, batch_size=STEP_BATCH)
    batches, stopwatch = Batches(mine, device), Stopwatch(device)
    waited: list[float] = []
    whole: list[float] = []

    def step() -> None:
        began = time.perf_counter()
        batch = batches.of(state.step)
        waited.append(time.perf_counter() - began)
        train_step(state, *batch)
        batches.begin(state.step)

    began = time.perf_counter()
    while len(whole) < 4 or time.perf_counter() - began < seconds:
        whole.append(stopwatch.seconds(step))
    batches.close()
    case = {"case": f"DiT-S/2 on latents on {device.type}", "batch": STEP_BATCH}
    return [case | {"way": "step", "seconds": whole[1:]}, case | {"way": "wait for its batch", "seconds": waited[1:]}]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = command.Parser(prog="python -m benchmarks.reading", description=__doc__)
    parser.add_argument("--seconds", type=command.seconds, default=10.0, help="about how long to time each (10)")
    seconds = parser.parse(argv).seconds
    kept, rows = record.Growing("reading", argv), []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        for name in SETS:
            source = opened(name, Path(place))
            rows.append(measure(name, source, seconds))
            print(f"{rows[-1]['case']}: {figures(rows[-1])['images_per_s']:.0f} samples/s", flush=True)
            kept.keep(rows)
        step, wait = waits(source, seconds)
        rows += [step, wait]
        share = sum(wait["seconds"]) / sum(step["seconds"])
        print(f"{step['case']}: {100 * share:.2f} % of a step is waiting for its batch", flush=True)
    kept.finish(rows)

"""Draw images: `python -m soflow_fast.sample RUN --out DIR`; RUN is a run directory, a checkpoint or an exported one.

    python -m soflow_fast.sample runs/digits --out out --n 64 --nfe 1
    python -m soflow_fast.sample runs/digits --out out --labels 3,5 --seed 7 --times 1,0.6
    python -m soflow_fast.sample runs/digits --out out --n 50000 --labels random --format npz
    python -m soflow_fast.sample runs/texts --out out --n 8 --conditions texts.npy

Writes an image each, 00000.png and on, or samples.npz in ADM's layout, or both; and grid.png of the first 1024. Latents
are decoded by the VAE that made them, if it is on this machine, or by --vae NAME; without, a .npy each. Image i depends
on the seed, its label or vector and i alone. The same command goes on where it was interrupted.

Every GPU that is visible draws batches of its own, or those that --device names; the images are the same with however
many of a kind.
"""

import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

from .commands import process
from .commands.labels import BALANCED, CONDITIONS, NULL, digest_of, labels_of, parsed_labels, vectors_of
from .commands.parser import DEVICES, GUIDANCE, MOST_CALLS, MOST_SEED, Parser, number, user_value, whole_number
from .config.schema import SampleFormat, SamplingMethod, shown
from .errors import ConfigError, enough_memory

MOST = 10**7
"""Images of one call: each is a file."""
MOST_AT_ONCE = 2**16
GRID = 1024
SHOWN = 12
"""Classes that are named in what is printed."""


def parser() -> Parser:
    """The command line."""
    methods, formats = get_args(SamplingMethod), get_args(SampleFormat)
    p = Parser(prog="python -m soflow_fast.sample", description=__doc__)
    p.add_argument("run", metavar="RUN", help="run directory, checkpoint or exported directory")
    p.add_argument("--out", required=True, metavar="DIR", help="where the images go")
    p.add_argument("--n", default="64", metavar="N", help="how many (default: 64)")
    p.add_argument(
        "--nfe", metavar="N", help="network calls per image (default: as many as --times, or 1; of euler 10)"
    )
    p.add_argument("--times", metavar="1,T,...", help="of the network calls, falling to above 0 (default: even steps)")
    p.add_argument(
        "--method",
        choices=methods,
        help="from one time to the next: solve to 0 and add new noise, solve to the next, or go along the velocity: "
        f"{', '.join(methods)} (default: {methods[0]}; of flow matching {methods[-1]})",
    )
    p.add_argument("--guidance", metavar="W", help=GUIDANCE)
    p.add_argument(
        "--labels",
        default=BALANCED,
        metavar="A,B,...",
        help="balanced, each class in turn; random, by the seed; or classes by number or name, or null, repeated in "
        f"turn (default: {BALANCED})",
    )
    p.add_argument("--conditions", metavar="FILE", help=CONDITIONS)
    p.add_argument(
        "--format", choices=formats, default=formats[0], help=f"{', '.join(formats)} (default: {formats[0]})"
    )
    p.add_argument("--batch-size", default="64", metavar="N", help="images of a network call (default: 64)")
    p.add_argument("--vae", metavar="NAME", help="of a model of latents: decode them by this AutoencoderKL, or none")
    p.add_argument("--seed", default="0", metavar="N", help="of the noise (default: 0)")
    p.add_argument("--device", default="auto", metavar="D", help=DEVICES)
    p.add_argument("--overwrite", action="store_true", help="remove images of another command that DIR holds")
    return p


def main(arguments: list[str] | None = None) -> None:
    """Parse and do. Raises UserError."""
    values = parser().parse(arguments)
    process.alone("sample")
    n, size = whole_number("--n", values.n, 1, MOST), whole_number("--batch-size", values.batch_size, 1, MOST_AT_ONCE)
    nfe = None if values.nfe is None else whole_number("--nfe", values.nfe, 1, MOST_CALLS)
    given = None if values.times is None else _numbers("--times", values.times)
    guidance = number("--guidance", values.guidance)
    seed, out = whole_number("--seed", values.seed, 0, MOST_SEED), Path(values.out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file")

    from .data.dataset import LatentSpace
    from .evaluation.measurement import labels_in_turn
    from .runs import drawn
    from .runs import images as pictures
    from .runs.checkpoint import load_with_data
    from .runs.latents.vae import weights_digest
    from .sampling import Devices, Drawing, checked_method, checked_times, chosen_guidance, draw_on
    from .training.precision import resolve_devices

    user_value(lambda: checked_times(nfe, given), "--times")
    with enough_memory(
        f"--batch-size {size}: out of memory with {values.run}; give a smaller one, or another --device"
    ):
        devices = resolve_devices(values.device)
        flow, config, data = load_with_data(values.run, devices[0])
        model = config.model
        names = data.classes if data is not None and len(data.classes) == model.num_classes else ()
        chosen = parsed_labels(values.labels, model.num_classes, names)
        if isinstance(chosen, list) and model.num_classes in chosen and not model.null_label:
            raise ConfigError(f"--labels {values.labels}: {values.run} has no null label: it was trained without one")
        vectors = vectors_of(values.conditions, model, values.run)
        labels = labels_of(chosen, model.num_classes, n, seed)
        y = labels if vectors is None else labels_in_turn(flow, n, vectors)
        latents = config.data.latent or not pictures.has_colours(model.in_channels)
        if values.vae and not latents:
            raise ConfigError(f"--vae {values.vae}: the samples of {values.run} are images")
        space = data.space if data is not None else None
        vae = _vae(values.vae, space, devices[0], model.in_channels) if latents else None
        as_they_are = latents and vae is None
        if as_they_are and values.format != "png":
            raise ConfigError(f"--format {values.format}: the samples of {values.run} are latents; --vae decodes them")
        if vae is not None:
            space = space or LatentSpace(vae.name, vae.scale, vae.shift)
        shape = (n, model.in_channels, model.input_size, model.input_size)
        method = user_value(lambda: checked_method(values.method, flow), "--method")
        w = user_value(lambda: chosen_guidance(flow, guidance), "--guidance")
        way: Any = {"method": method, "seed": seed, "batch_size": size, "guidance": w}
        drawing = user_value(lambda: Drawing.of(flow, y, nfe=nfe, times=given, shape=shape, **way), "--labels")
        used = None if vectors is None else vectors[:n]
        settings = drawn.Settings(
            n=n,
            times=drawing.times,
            labels=chosen if isinstance(chosen, str) else ",".join(map(str, chosen)),
            format=values.format,
            latents=as_they_are,
            flow=f"{flow.objective}, {flow.path} path, {flow.coefficients} coefficients",
            weights=weights_digest(flow),
            vae=f"{vae.weights} {space[1:]}" if vae and space else "",
            conditions=digest_of(used),
            **way,
        )

        def finish_on(device: Any) -> Callable[[Any], Any]:
            decode = partial(vae.on(device).decoded, space=space) if vae and space else lambda x: x
            return lambda x: x if as_they_are else pictures.in_bytes(decode(x), values.format)

        with (
            Devices(devices, draw_on(flow, finish_on)) as several,
            drawn.taken(out, settings, values.run, values.overwrite, _warn) as folder,
        ):
            draw = lambda wanted: several.results((drawing, rows) for rows in wanted)  # noqa: E731
            drawn.fill(folder, [*drawing.batches()], draw, labels, grid_images=GRID)
    if labels is not None and names:
        print(_classes(list(dict.fromkeys([*names, NULL][label] for label in labels.tolist()))))
    if used is not None:
        print(f"conditions: {len(used)} of {values.conditions}")
    elif model.condition_size:
        print("without conditions: --conditions FILE gives the images some")
    calls = f"of {drawing.nfe} network call{'s' if drawing.nfe > 1 else ''} each"
    if as_they_are:
        hint = f"--vae {space.vae if space is not None and space.vae else 'NAME'}"
        print(f"{n} latents {calls}, as .npy: {out}; {hint} decodes them")
    else:
        print(f"{n} images {calls}: {out / ('grid.png' if values.format == 'png' else 'samples.npz')}")


def _classes(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"classes: {', '.join(names[:SHOWN])}{more}"


def _numbers(flag: str, text: str) -> list[float]:
    """Numbers with commas between. Raises ConfigError."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{flag} must be numbers with commas between, got {shown(text)}") from None


def _warn(text: str) -> None:
    print(f"soflow: warning: {text}", file=sys.stderr)


def _vae(name: str | None, space: Any, device: Any, channels: int) -> Any:
    """The VAE that makes images of a model's latents; None: there is none.

    name: of the VAE, "none" for none; None: that of the latents, if it is on this machine. space: how a model's latents
    belong to those of the VAE, None: as its own say. device: on which it is loaded. channels: of the latents.
    """
    from .runs.latents.vae import load_vae

    if name == "none" or (name is None and not (space and space.vae)):
        return None
    try:
        return load_vae(name or space.vae, device, local=name is None, channels=channels)
    except ConfigError as error:
        if name is None:
            print(f"samples are written as latents, in .npy: {str(error).removeprefix('--vae ')}")
            return None
        raise


class _Callable(types.ModuleType):
    """The package's public function `sample` would be hidden by importing this module: so it can be called too."""

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        from .sampling import sample

        return sample(*arguments, **settings)


if __name__ == "__main__":
    process.run(lambda: main(sys.argv[1:]))
else:
    sys.modules[__name__].__class__ = _Callable

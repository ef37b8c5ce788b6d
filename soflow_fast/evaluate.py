"""Measure samples: `python -m soflow_fast.evaluate RUN`; RUN is a run directory, a checkpoint or an exported one.

    python -m soflow_fast.evaluate runs/digits --n 4000 --nfe 1,2

Digits: the fraction classified as their label, the Frechet distance in pixel space, the fraction of near copies.

Every GPU that is visible draws, or those that --device names; the figures are the same with however many of a kind.
"""

import json
import sys
from functools import partial

from .commands import process
from .commands.parser import DEVICES, GUIDANCE, MOST_CALLS, MOST_SEED, Parser, number, user_value, whole_number
from .errors import ConfigError, enough_memory

MOST = 10**6
"""Samples: all are held in memory, and each is compared with each of the data."""


DIGITS = (1, 8)
"""Channels, and height and width, of the digits."""


def parser() -> Parser:
    """The command line."""
    p = Parser(prog="python -m soflow_fast.evaluate", description=__doc__)
    p.add_argument("run", metavar="RUN", help="run directory, checkpoint or exported directory")
    p.add_argument("--n", default="4000", metavar="N", help="samples (default: 4000)")
    p.add_argument("--nfe", metavar="N,...", help="network calls per image (default: 1,2; of flow matching 10)")
    p.add_argument("--guidance", metavar="W", help=GUIDANCE)
    p.add_argument("--vae", metavar="NAME", help="of a model of latents: its VAE, if it lies elsewhere by now")
    p.add_argument("--seed", default="0", metavar="N", help="of the noise (default: 0)")
    p.add_argument("--device", default="auto", metavar="D", help=DEVICES)
    p.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    return p


def main(arguments: list[str] | None = None) -> None:
    """Parse and do. Raises UserError."""
    values = parser().parse(arguments)
    process.alone("evaluate")
    n, seed = whole_number("--n", values.n, 100, MOST), whole_number("--seed", values.seed, 0, MOST_SEED)
    guidance = number("--guidance", values.guidance)
    parts = [] if values.nfe is None else values.nfe.split(",")
    calls = dict.fromkeys(whole_number("--nfe", part.strip(), 1, MOST_CALLS) for part in parts)

    from .evaluation import describe, measure_digits
    from .runs.checkpoint import load_with_data
    from .runs.latents.vae import load_vae
    from .sampling import Devices, chosen_guidance, draw_on
    from .sampling.solving import usual_calls
    from .training.precision import resolve_devices

    with enough_memory(f"--n {n}: out of memory with {values.run}; draw fewer, or on another --device"):
        devices = resolve_devices(values.device)
        flow, config, data = load_with_data(values.run, devices[0])
        model = config.model
        alike = config.data.latent or (model.in_channels, model.input_size) == DIGITS
        if not config.data.of_digits or model.num_classes != 10 or not alike:
            raise ConfigError(f"{values.run}: only labelled digits can be evaluated in this version")
        if config.data.latent:
            if data is None or data.space is None:
                raise ConfigError(f"{values.run}: does not say which latents it was trained on")
            space = data.space
            vae = load_vae(values.vae or space.vae, devices[0], channels=config.model.in_channels)
            decode_on = lambda device: partial(vae.on(device).decoded, space=space)  # noqa: E731
        else:
            if values.vae:
                raise ConfigError(f"--vae {values.vae}: the samples of {values.run} are images")
            decode_on = lambda device: None  # noqa: E731
        w = user_value(lambda: chosen_guidance(flow, guidance), "--guidance")
        calls = calls or dict.fromkeys((1, 2) if flow.solves else (usual_calls(flow),))
        with Devices(devices, draw_on(flow, decode_on)) as several:
            figures = {nfe: measure_digits(flow, n, nfe, seed, several=several, guidance=w) for nfe in calls}
    if values.json:
        scale = {} if w is None else {"guidance": w}
        print(json.dumps({"samples": n, "seed": seed, **scale, "nfe": {k: v._asdict() for k, v in figures.items()}}))
    else:
        if w is not None:
            print(f"guidance {w:g}")
        print("\n".join(describe(nfe, scores) for nfe, scores in figures.items()))


if __name__ == "__main__":
    process.run(lambda: main(sys.argv[1:]))

"""Measure samples: `python -m soflow_fast.evaluate RUN`, or of images, drawn by whomever, `... DIR` or `... NPZ`.

    python -m soflow_fast.evaluate runs/digits --n 4000 --nfe 1,2
    python -m soflow_fast.evaluate runs/imagenet --reference VIRTUAL_imagenet256_labeled.npz
    python -m soflow_fast.evaluate samples.npz --reference imagenet/val --metrics fid,recall
    python -m soflow_fast.evaluate runs/digits --nfe 2 --times search
    python -m soflow_fast.evaluate runs/policy --n 100 --gif episode.gif

RUN is a run directory, a checkpoint or an exported one. Digits: the fraction classified as their label, the Frechet
distance in pixel space, the fraction of near copies. With --reference, by torch-fidelity's Inception: FID, sFID, IS,
precision, recall and KID; a folder of images, an .npz as ADM has it, or whatever --data of train takes. Policies: the
mean return of --n episodes, beside the expert's, and one of them as a GIF.

Every GPU that is visible draws, or those that --device names; the figures are the same with however many of a kind.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .commands import process
from .commands.labels import CONDITIONS, vectors_of
from .commands.parser import DEVICES, GUIDANCE, MOST_CALLS, MOST_SEED, Parser, number, user_value, whole_number
from .errors import ConfigError, enough_memory

if TYPE_CHECKING:
    from .evaluation import Judge, Measure, Tried

MOST = 10**6
"""Samples: the features of all are held in memory, or all digits, each of which is compared with each of the data."""
DIGITS_N, N = 4000, 50_000
"""Samples of digits, and those that are compared with a reference, if --n does not say how many."""
LEAST = 100
"""Samples of which figures can be made."""
EPISODES = 100
"""Of a policy, if --n does not say how many; a policy alone has so few as one."""
MOST_SEARCHED = 10
"""Network calls whose times are searched for: they are told apart by thousandths."""
DIGITS = (1, 8)
"""Channels, and height and width, of the digits."""


def parser() -> Parser:
    """The command line."""
    p = Parser(prog="python -m soflow_fast.evaluate", description=__doc__)
    p.add_argument("run", metavar="RUN|DIR|NPZ", help="run, checkpoint or exported directory; images")
    counts = f"{DIGITS_N} of digits, {N} with --reference, {EPISODES} episodes of a policy"
    p.add_argument("--n", metavar="N", help=f"samples (default: {counts})")
    p.add_argument("--nfe", metavar="N,...", help="network calls per image (default: 1,2; of flow matching 10)")
    p.add_argument(
        "--times", metavar="T,...", help="of the calls, such as 1,0.6; search: those with the least distance"
    )
    p.add_argument("--guidance", metavar="W", help=GUIDANCE)
    p.add_argument("--conditions", metavar="FILE", help=CONDITIONS)
    p.add_argument("--vae", metavar="NAME", help="of a model of latents: its VAE, if it lies elsewhere by now")
    p.add_argument("--seed", metavar="N", help="of the noise (default: 0)")
    p.add_argument("--reference", metavar="PATH", help="images to compare with, or an .npz of ADM")
    p.add_argument(
        "--metrics",
        metavar="NAME,...",
        help="fid, sfid, is, precision, recall, kid, fd-dinov2, fd-random (default: all of Inception's)",
    )
    p.add_argument("--inception", metavar="FILE", help="its weights, as torch-fidelity has them (default: downloaded)")
    p.add_argument("--dinov2", metavar="FILE", help="weights of DINOv2, the authors' or transformers': adds fd-dinov2")
    p.add_argument("--device", default="auto", metavar="D", help=DEVICES)
    p.add_argument(
        "--gif", metavar="FILE", help="of a policy: where an episode goes (default: samples/episode.gif in RUN)"
    )
    p.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    return p


def main(arguments: list[str] | None = None) -> None:
    """Parse and do. Raises UserError."""
    values = parser().parse(arguments)
    process.alone("evaluate")
    n = None if values.n is None else whole_number("--n", values.n, 1, MOST)
    seed, guidance = whole_number("--seed", values.seed or "0", 0, MOST_SEED), number("--guidance", values.guidance)
    schedules = _schedules(values)
    if not values.reference:
        for flag in ("metrics", "inception", "dinov2"):
            if getattr(values, flag):
                raise ConfigError(f"--{flag} {getattr(values, flag)}: goes with --reference PATH")

    with enough_memory(f"--n {values.n or ''}: out of memory with {values.run}; draw fewer, or on another --device"):
        if _is_images(values.run):
            if values.gif is not None:
                raise ConfigError(f"--gif {values.gif}: {values.run} is images, of which there is no episode")
            _evaluate_images(values)
        else:
            _evaluate_flow(values, n, seed, guidance, schedules)


def _is_images(path: str) -> bool:
    """Whether a path is that of images, and not of a flow."""
    from .data.images import recognises
    from .evaluation import is_npz
    from .runs.checkpoint import is_flow

    place = Path(path)
    return is_npz(path) or (place.is_dir() and not is_flow(place) and recognises(place))


Schedule = tuple[int, tuple[float, ...] | None]
"""Network calls, and their times; None: evenly spaced."""


def _schedules(values: argparse.Namespace) -> list[Schedule]:
    """What --nfe and --times ask for, nothing: what is usual; with --times search, the calls whose times are sought."""
    if values.nfe is None and values.times is None:
        return []
    text = values.nfe if values.nfe is not None else "2"
    calls = dict.fromkeys(whole_number("--nfe", part.strip(), 1, MOST_CALLS) for part in text.split(","))
    if values.times is None:
        return [(nfe, None) for nfe in calls]
    if values.times == "search":
        if len(calls) > 1 or not 2 <= next(iter(calls)) <= MOST_SEARCHED:
            raise ConfigError(f"--nfe {text}: --times search takes one number of calls, from 2 to {MOST_SEARCHED}")
        return [(nfe, None) for nfe in calls]
    try:
        times = tuple(float(part) for part in values.times.split(","))
    except ValueError:
        raise ConfigError(f"--times {values.times}: must be numbers with commas between them, or search") from None
    if values.nfe is not None and list(calls) != [len(times)]:
        raise ConfigError(f"--times {values.times}: are {len(times)} and --nfe is {values.nfe}: leave out --nfe")
    return [(len(times), times)]


def _evaluate_images(values: argparse.Namespace) -> None:
    """Of a set of images."""
    for flag in ("n", "nfe", "times", "guidance", "conditions", "vae", "seed"):
        if getattr(values, flag) is not None:
            raise ConfigError(f"--{flag} {getattr(values, flag)}: {values.run} is images, of which none are drawn")
    if not values.reference:
        raise ConfigError(f"{values.run}: images are compared with those of --reference PATH, which is missing")

    from .evaluation import open_images
    from .training.precision import resolve_devices

    devices = resolve_devices(values.device)
    images = open_images(values.run)
    if not len(images):
        raise ConfigError(f"{values.run}: holds statistics and no images; give it as --reference")
    judge = _judge(values, images.size, devices)
    found = judge.of_images(images)
    if values.json:
        print(json.dumps({"images": values.run, **judge.about(found.images), "figures": found.values}))
    else:
        print(found.line())


def _judge(values: argparse.Namespace, size: int, devices: Any) -> "Judge":
    from .evaluation import judge_for, open_images
    from .runs.progress import Counter

    say = (lambda text: None) if values.json else partial(print, file=sys.stderr)
    reference = open_images(values.reference, flag="--reference ", size=size, say=say)
    weights: dict[str, Any] = {"inception": values.inception or "", "dinov2": values.dinov2 or ""}
    return judge_for(reference, values.metrics or "", devices, **weights, tick=Counter())


def _evaluate_flow(
    values: argparse.Namespace, n: int | None, seed: int, guidance: float | None, schedules: list[Schedule]
) -> None:
    """Of samples that are drawn."""
    from .data.dataset import LatentSpace
    from .evaluation import AgainstReference, OfDigits, finish_with
    from .runs.checkpoint import load_with_data
    from .runs.images import has_colours, to_uint8
    from .runs.latents.vae import load_vae
    from .sampling import Devices, chosen_guidance, draw_on
    from .sampling.solving import usual_calls
    from .training.precision import resolve_devices

    devices = resolve_devices(values.device)
    flow, config, data = load_with_data(values.run, devices[0])
    if config.model.kind == "policy":
        _evaluate_policy(values, n or EPISODES, seed, schedules, devices[0])
        return
    if values.gif is not None:
        raise ConfigError(f"--gif {values.gif}: {values.run} is no policy, and has no episodes")
    if n is not None and n < LEAST:
        raise ConfigError(f"--n must be a whole number from {LEAST} to {MOST}, got {values.n!r}")
    model, space = config.image_model, data.space if data is not None else None
    alike = config.data.latent or (model.in_channels, model.input_size) == DIGITS
    of_digits = config.data.of_digits and model.num_classes == 10 and alike
    if not of_digits and not values.reference:
        raise ConfigError(f"{values.run}: only labelled digits can be evaluated without --reference PATH")
    vectors = vectors_of(values.conditions, model, values.run)
    vae, side = None, model.input_size
    if config.data.latent or not has_colours(model.in_channels):
        name = values.vae or (space.vae if space is not None else "")
        if not name:
            raise ConfigError(f"{values.run}: does not say which latents it was trained on; give --vae NAME")
        vae = load_vae(name, devices[0], channels=model.in_channels)
        space = space or LatentSpace(vae.name, vae.scale, vae.shift)
        side *= vae.pixels
    elif values.vae:
        raise ConfigError(f"--vae {values.vae}: the samples of {values.run} are images")
    decode_on = partial(_decoder, vae, space)
    w = user_value(lambda: chosen_guidance(flow, guidance), "--guidance")
    schedules = schedules or [(nfe, None) for nfe in ((1, 2) if flow.solves else (usual_calls(flow),))]
    if w is not None and not values.json:
        print(f"guidance {w:g}")
    if model.condition_size and vectors is None and not values.json:
        print("without conditions: --conditions FILE gives the samples some")
    if values.reference:
        finish_on = finish_with(to_uint8, decode_on)
        judge = _judge(values, side, devices)
        shape = (model.in_channels, model.input_size, model.input_size)
        _report(values, AgainstReference(flow, judge, n or N, shape, finish_on, w, vectors), seed, schedules)
    else:
        with Devices(devices, draw_on(flow, decode_on)) as several:
            _report(values, OfDigits(flow, n or DIGITS_N, several, w), seed, schedules)


def _evaluate_policy(
    values: argparse.Namespace, episodes: int, seed: int, schedules: list[Schedule], device: Any
) -> None:
    """Of episodes of a policy in the environment of its task."""
    from .data.demonstrations.tasks import TASKS
    from .errors import storage
    from .files import write_file
    from .runs.policies import Acting, gif_place, line, policy_of
    from .sampling.solving import usual_calls

    for flag in ("times", "guidance", "conditions", "vae", "reference"):
        if getattr(values, flag) is not None:
            raise ConfigError(f"--{flag} {getattr(values, flag)}: {values.run} is a policy, which has no use for it")
    flow, config, data = policy_of(values.run, device)
    acting = Acting(flow, config, data)
    if acting.task is None:
        known = ", ".join(TASKS)
        raise ConfigError(
            f"{values.run}: was demonstrated by {config.data.path}, no task with an environment ({known})"
        )
    place, found = gif_place(Path(values.run), values.gif), {}
    if place is not None and (place.is_dir() or not place.parent.is_dir()):
        raise ConfigError(f"--gif {place}: {'is a folder' if place.is_dir() else 'its folder is not there'}")
    for nfe, _ in schedules or [(usual_calls(flow), None)]:
        found[nfe] = acting.figures(nfe, episodes, seed)
        if not values.json:
            print(line(nfe, found[nfe], episodes), flush=True)
    if values.json:
        about = {"task": acting.task.name, "episodes": episodes, "seed": seed, "nfe": found}
        print(json.dumps(about | ({} if place is None else {"gif": str(place)})), flush=True)
    if place is not None:
        with storage(f"cannot write {place}"):
            write_file(place, acting.gif(seed, max(found)), synced=False)
    if place is not None and not values.json:
        print(f"an episode: {place}")


def _decoder(vae: Any, space: Any, device: Any) -> Callable[[Any], Any] | None:
    """What makes images of latents on a device; vae: None, as the samples are images."""
    return None if vae is None else partial(vae.on(device).decoded, space=space)


def _report(values: argparse.Namespace, measure: "Measure", seed: int, schedules: list[Schedule]) -> None:
    """Measure and print."""
    out: dict[str, Any] = {**measure.about(), "seed": seed}
    if values.times == "search":
        out |= _search(values, measure, seed, schedules[0][0])
    else:
        found = {}
        for nfe, times in schedules:
            one = user_value(partial(measure.at, nfe, times, seed), f"--times {values.times}")
            found[nfe] = one.figures | ({"times": list(times)} if times else {})
            if not values.json:
                print(one.line, flush=True)
        out["nfe"] = found
    if values.json:
        print(json.dumps(out))


def _search(values: argparse.Namespace, measure: "Measure", seed: int, calls: int) -> dict[str, Any]:
    """Search for times, and measure the best with other noise: the noise of the search has chosen them."""
    from .evaluation import best_of, search_times
    from .evaluation.measurement import shown

    def tell(tried: "Tried") -> None:
        if not values.json:
            print(f"{shown(tried.times)}{measure.distance} {tried.figure:.2f}", flush=True)

    tried = search_times(lambda times: measure.distance_at(times, seed), calls, tell)
    best, again = best_of(tried), (seed + 1) % (MOST_SEED + 1)
    even, found = measure.at(calls, None, again), measure.at(calls, best.times, again)
    if not values.json:
        print(f"the least {measure.distance} is that of {shown(best.times)[:-2]}; with other noise, seed {again}:")
        print(f"{even.line}\n{found.line}")
    return {
        "distance": measure.distance,
        "tried": [{"times": list(one.times), "distance": one.figure} for one in tried],
        "best": {"times": list(best.times), "seed": again, **found.figures},
        "even": {"seed": again, **even.figures},
    }


if __name__ == "__main__":
    process.run(lambda: main(sys.argv[1:]))

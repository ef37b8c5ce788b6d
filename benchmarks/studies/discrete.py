"""`python -m benchmarks.discrete`: discrete values by continuous relaxation, as a record.

The handwritten digits at 16 levels (`benchmarks.exact.levels`): each pixel as a grey value, as usual; as four bits; as
a one-hot vector of 16 channels. The network and the recipe of the preset "digits" in each case, SoFlow with one, two
and four calls and flow matching with ten. What is drawn is read back as levels, and those are judged as digits are:
accuracy, Frechet distance, levels of each pixel against the data's. How decided the network was is seen before.

One pixel alone is a mixture of point masses, whose solution f(x_1, 1, 0) is known: nearly every noise goes to a corner,
so the map from noise to data jumps between them. A small network learns it, and is held against it: with the plain
squared error (p = 0), whose least is the mean and so the velocity, and with the preset's weight (p = 1), whose least
is not, where a sample has so few numbers that its error is not about the same for each.
`python -m benchmarks.report` makes the tables.
"""

import functools
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.exact.levels import COUNT, Code, digit_levels, to_digits
from benchmarks.harness import command
from benchmarks.report import record
from soflow_fast import sample
from soflow_fast.config.presets import preset
from soflow_fast.config.schema import Config, DiTConfig
from soflow_fast.data.digits import LEVELS, load_digits
from soflow_fast.data.memory import InMemory
from soflow_fast.data.source import Source
from soflow_fast.evaluation.digits import digit_scores
from soflow_fast.flow import SolutionFlow
from soflow_fast.rng import generator
from soflow_fast.training.state import TrainState
from soflow_fast.training.step import train_step

SAMPLES = 4000
CALLS = {"soflow": (1, 2, 4), "flow-matching": (10,)}
CODES = {"grey": Code("grey", 1.0), "bits": Code("bits", 1.0), "one-hot": Code("one-hot", 2.0)}
"""With this scale the channels of a one-hot vector vary about as much as the noise."""


class Variant(NamedTuple):
    """What is trained on the digits."""

    code: Code
    patch: int = 4
    """The preset's patches are of 4; then a token has 256 numbers of a one-hot image, twice the network's width."""
    all_seeds: bool = True
    """Whether with every seed; else SoFlow with the first alone. Flow matching on patches of 2, which takes long, has
    the first alone in any case."""


VARIANTS = (
    *(Variant(code) for code in CODES.values()),
    Variant(CODES["one-hot"], 2),
    Variant(CODES["grey"], 2, False),
    Variant(Code("one-hot", 1.0), 4, False),
    Variant(Code("one-hot", 4.0), 4, False),
)
POWERS = (0.0, 1.0)
"""Of the weight of one pixel's losses; all but the first are tried with the first seed alone."""
BINS = 24
"""Of the histogram of the largest channel, from -0.2 to 1.2."""
HELD = 1000
"""Noises that the one-pixel networks are held against."""
SOLVER_STEPS = 512
CURVE = 241
"""Noises from -3 to 3 at which the grey pixel's solution is written down."""


def histogram(levels: Tensor) -> Tensor:
    """The share of each level at each pixel, [H W, 16], of levels [B, H, W]."""
    return torch.nn.functional.one_hot(levels.flatten(1), COUNT).double().mean(0)


def variation(p: Tensor, q: Tensor) -> float:
    """The total variation between distributions [..., 16], mean over the others."""
    return float((p - q).abs().sum(-1).mean() / 2)


def decided(code: Code, x: Tensor) -> dict:
    """How far samples [B, channels, H, W] have decided: the share near a point, the largest channel and the entropy."""
    found: dict = {"near": float(code.near(x).double().mean())}
    if code.kind == "grey":
        return found
    u = (x.double() / code.scale + 1) / 2
    p = u.clamp(1e-9, 1)
    if code.kind == "bits":  # each bit by itself
        found["entropy"] = float(-(p * p.log2() + (1 - u.clamp(0, 1 - 1e-9)) * (1 - p + 1e-9).log2()).sum(1).mean())
        return found
    p = p / p.sum(1, keepdim=True)
    largest = u.amax(1)
    found |= {"entropy": float(-(p * p.log2()).sum(1).mean()), "largest": float(largest.mean())}
    edges = torch.linspace(-0.2, 1.2, BINS + 1, dtype=torch.float64)
    counts = torch.histogram(largest.flatten().clamp(-0.2, 1.2), edges).hist
    return found | {"largest_histogram": (counts / counts.sum()).tolist()}


def judged(code: Code, x: Tensor, y: Tensor) -> dict:
    """The figures of samples with labels [B]."""
    levels, (real, _) = code.decode(x), digit_levels()
    scores = digit_scores(to_digits()(levels), y)._asdict()
    scores["variation"] = variation(histogram(levels), histogram(real))
    return scores | decided(code, x)


def references() -> list[dict]:
    """The data at 16 levels against the data as they are, and one random half of their levels against the other."""
    levels, labels = digit_levels()
    order = torch.randperm(len(levels), generator=torch.Generator().manual_seed(0))
    halves = [histogram(levels[part]) for part in order.chunk(2)]
    scores = digit_scores(to_digits()(levels), labels)
    row = {"kind": "reference", "accuracy": scores.accuracy, "frechet": scores.frechet}
    return [row | {"variation of halves": variation(*halves)}]


def configuration(code: Code, patch: int, objective: str, seed: int, steps: int) -> Config:
    """The digits preset with the channels of a code."""
    fields = {"objective.kind": objective, "model.in_channels": code.channels, "model.patch_size": patch}
    fields |= {"run.check_quotient_every": 0}
    return preset("digits", seed=seed, steps=steps, precision="fp32", device="cpu", **fields)


def data(code: Code, config: Config) -> Source:
    """The digits in a code; grey ones as the preset has them, at all their 17 values."""
    levels, labels = digit_levels()
    images = load_digits()[0] if code.kind == "grey" else code.encode(levels)
    return Source(InMemory(images, labels), seed=config.seed, batch_size=config.batch_size)


def read_back(code: Code, x: Tensor) -> Tensor:
    """Samples in the scale of the code: those of grey have been learned as the pixels 0..16, of which the brightest two
    are the level 15."""
    if code.kind != "grey":
        return x
    pixels = (x + 1) * (LEVELS / 2)
    levels = torch.where(pixels > COUNT - 0.5, pixels - 1, pixels)
    return code.scale * (2 * levels / (COUNT - 1) - 1)


def digits(code: Code, patch: int, objective: str, seed: int, steps: int) -> dict:
    """Train on the digits and judge."""
    torch.set_num_threads(1)
    config = configuration(code, patch, objective, seed, steps)
    state, source, began = TrainState.build(config), data(code, config), time.process_time()
    while state.step < steps:
        train_step(state, *source.batch(state.step))
    row = {"kind": "digits", "code": code.kind, "scale": code.scale, "patch": patch, "objective": objective}
    row |= {"seed": seed, "steps": steps, "cpu_seconds": time.process_time() - began, "calls": {}}
    y = torch.arange(SAMPLES) % 10
    for nfe in CALLS[objective]:
        x = read_back(code, sample(state.ema, y, nfe=nfe, seed=0))
        row["calls"][str(nfe)] = judged(code, x, y)
    return row


def level_frequencies() -> Tensor:
    """The share of each level among the pixels of the digits, [16]."""
    return histogram(digit_levels()[0]).mean(0)


def one_pixel_configuration(code: Code, seed: int, steps: int, p: float, hidden: int) -> Config:
    """A small network for one pixel, by the preset's times."""
    fields = {"objective.guidance_scale": 1.0, "objective.label_drop": 0.0, "run.check_quotient_every": 0}
    fields |= {"optim.lr": 2e-3, "objective.p": p}
    config = preset("digits", seed=seed, steps=steps, batch_size=256, precision="fp32", device="cpu", **fields)
    return replace(config, model=DiTConfig(1, 1, code.channels, hidden, 2, 2, num_classes=0))


@functools.cache
def held(code: Code) -> tuple[Tensor, Tensor, float]:
    """Noises [HELD, channels], where the exact flow takes them, and how far twice the solver's steps are from it as a
    share of the spacing."""
    mixture = code.mixture(level_frequencies())
    noise = torch.randn(HELD, code.channels, generator=generator(0, 0, 0, "held"), dtype=torch.float64)
    ones = torch.ones(HELD, dtype=torch.float64)
    few = noise[:50]
    error = mixture.solution_error(few, ones[:50], 0 * ones[:50], steps=SOLVER_STEPS) / code.spacing
    return noise, mixture.solution(noise, ones, 0 * ones, steps=SOLVER_STEPS), error


@torch.no_grad()
def one_call(flow: SolutionFlow, noise: Tensor) -> Tensor:
    """f(noise, 1, 0) of one pixel, [B, channels]."""
    ones = torch.ones(len(noise))
    return flow.solution(noise.float()[..., None, None], ones, 0 * ones)[..., 0, 0].double()


def pixel(code: Code, seed: int, steps: int, p: float = 0.0, hidden: int = 64) -> dict:
    """Train on one pixel alone; its one-step map against the exact one after an eighth of the steps, a quarter, ..."""
    torch.set_num_threads(1)
    frequencies = level_frequencies()
    mixture = code.mixture(frequencies)
    noise, exact, error = held(code)

    def shape(x: Tensor) -> Tensor:
        return x[..., None, None]

    levels = code.decode(shape(exact))
    row = {"kind": "pixel", "code": code.kind, "scale": code.scale, "seed": seed, "p": p, "steps": steps}
    row |= {"hidden": hidden, "solver_error": error, "exact_near": float(code.near(shape(exact)).double().mean())}
    row |= {"exact_variation": variation(histogram(levels)[0], frequencies)}
    if code.kind == "one-hot":  # what the noise's own largest channel would say
        row["exact_is_largest_noise"] = float((levels == code.decode(shape(noise))).double().mean())
    state = TrainState.build(one_pixel_configuration(code, seed, steps, p, hidden))
    points, centre = [], (frequencies[:, None] * mixture.means).sum(0)
    for end in sorted({max(1, steps * k // 8) for k in (1, 2, 4, 8)}):
        while state.step < end:
            source = generator(seed, state.step, 0, "data")
            drawn = torch.multinomial(frequencies, 256, replacement=True, generator=source)
            train_step(state, code.encode(drawn[:, None, None]), None)
        x = one_call(state.ema, noise)
        found = code.decode(shape(x))
        points.append(
            {
                "step": end,
                "error": float((x - exact).norm() / (exact - centre).norm()),
                "same_level": float((found == levels).double().mean()),
                "near": float(code.near(shape(x)).double().mean()),
                "variation": variation(histogram(found)[0], frequencies),
            }
        )
    if code.kind == "grey":
        line = torch.linspace(-3, 3, CURVE, dtype=torch.float64)[:, None]
        ones = torch.ones(CURVE, dtype=torch.float64)
        row["curve"] = {
            "noise": line[:, 0].tolist(),
            "exact": mixture.solution(line, ones, 0 * ones, steps=SOLVER_STEPS)[:, 0].tolist(),
            "learned": one_call(state.ema, line)[:, 0].tolist(),
        }
    return row | {"points": points}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = command.Parser(prog="python -m benchmarks.discrete", description=__doc__)
    parser.add_argument("--seeds", type=command.seed, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--steps", type=command.count, default=1500, metavar="N", help="updates on the digits (1500)")
    about = "updates of a network of one pixel (800)"
    parser.add_argument("--pixel-steps", type=command.count, default=800, metavar="N", help=about)
    command.add_workers(parser)
    options = parser.parse(argv)
    command.distinct("--seeds", options.seeds)
    kept = record.Growing("discrete", argv)
    first = options.seeds[0]
    with command.workers(options.workers) as pool:
        rows = list(pool.submit(references).result())
        pending: dict[Future[dict], str] = {}
        for seed in options.seeds:
            for code, patch, all_seeds in VARIANTS:
                for objective in CALLS if all_seeds else ("soflow",):
                    if seed == first or (all_seeds and (patch == 4 or objective == "soflow")):
                        shape = f"{code.kind} of scale {code.scale:g}, patches of {patch}"
                        what = f"digits as {shape}, {objective}, seed {seed}"
                        pending[pool.submit(digits, code, patch, objective, seed, options.steps)] = what
            for code in CODES.values():
                for p in POWERS if seed == first else POWERS[:1]:
                    what = f"a pixel as {code.kind}, p = {p:g}, seed {seed}"
                    pending[pool.submit(pixel, code, seed, options.pixel_steps, p)] = what
        for training in [*pending]:
            row = training.result()
            rows.append(row)
            del pending[training]
            kept.keep(rows, [*pending.values()])
            print({key: value for key, value in row.items() if key not in ("curve", "calls", "points")}, flush=True)
            for nfe, found in row.get("calls", {}).items():
                print(
                    f"  {nfe}", {key: value for key, value in found.items() if key != "largest_histogram"}, flush=True
                )
            print(*(f"  {point}" for point in row.get("points", [])), sep="\n", flush=True)
    kept.finish(rows)

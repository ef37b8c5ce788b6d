"""`python -m benchmarks.scaling`: a step on several ranks beside that of one process, as a record.

Starts the ranks itself, one for each GPU, or processes of one thread on a CPU. With weak scaling each rank has the same
batch on any number of them, with strong scaling all of them have. Before any time is taken, the first step of the whole
batch must come to the same on all ranks as in one process. What ranks send is counted: every collective of a step, as
torch's dispatcher sees it; beside it stands what the sizes of the network say.

On a CPU the efficiency is that of one machine's cores: there this shows that all of it works, and counts bytes.
`python -m benchmarks.report` makes the table of docs/performance.md from the record.
"""

import multiprocessing
import signal
import socket
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import torch

from benchmarks.correctness.comparison import IncorrectResult
from benchmarks.harness import command
from benchmarks.harness.cases import Case, public, random_batch
from benchmarks.harness.collectives import Counted, ring
from benchmarks.harness.recipes import initial_weights
from benchmarks.harness.timing import Stopwatch
from benchmarks.report import record
from benchmarks.report.tables import efficiency, images_per_second, quartiles
from benchmarks.studies.sweeps import network
from soflow_fast.config.schema import Config, override
from soflow_fast.errors import UserError
from soflow_fast.launch import Launch
from soflow_fast.ranks import flow_matching_samples, share
from soflow_fast.training.parallel import join
from soflow_fast.training.state import TrainState, build_flow
from soflow_fast.training.step import train_step

START = "spawn"
"""How processes are started: CUDA does not outlive a fork."""
KINDS = ("ddp", "fsdp")
ALONE = "one process"
BEFORE_COUNT = 4
"""Steps in which DistributedDataParallel looks at the gradients' order and makes its buckets."""
BEFORE_TIME = 12
"""Further ones on a GPU, until a step is a CUDA graph."""
LEAST, MOST = 3, 200
"""Timed steps."""
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""By how much the figures of a first step may differ between numbers of ranks, as a part of them. Sums in another order
and products of other shapes round anew: in float32 by a thousand units of 6e-8 at most, in bf16 by five of 4e-3."""
COMPARED = {"fp32": ("fm_mse", "sc_mse", "grad_norm"), "bf16": ("fm_mse", "grad_norm")}
"""The quotient of a bf16 step rounds further than that, by how far its ends are apart."""


class Study(NamedTuple):
    """What is timed on some machine."""

    case: Case
    """Its batch is that of each rank with weak scaling."""
    whole: int
    """The whole batch with strong scaling."""

    def batch(self, scaling: str, ranks: int) -> int:
        return self.whole if scaling == "strong" else self.case.config.batch_size * ranks


def study() -> Study:
    """For this machine: DiT-XL/2 on GPUs, a small DiT on a CPU."""
    if torch.cuda.is_available():
        return Study(public("XL/2", 32), 256)
    config = network("cpu", batch=8, hidden=192, depth=4, heads=3, side=16)
    return Study(Case("small DiT", override(config, {"precision": "fp32"})), 32)


class Point(NamedTuple):
    """What so many ranks are to do, by one engine."""

    kind: str
    ranks: int
    config: Config
    batches: dict[str, int]
    """The whole batch of each scaling."""
    seconds: float


def launches(ranks: int) -> list[Launch | None]:
    """The places of so many ranks on this machine, which meet at a free port; None: a process alone."""
    if ranks == 1:
        return [None]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return [Launch(rank, ranks, rank, ranks, "127.0.0.1", port, socket.gethostname()) for rank in range(ranks)]


def measure(point: Point, launch: Launch | None) -> list[dict]:
    """On each rank: a row a scaling."""
    device = torch.device("cpu")
    if torch.cuda.is_available() and point.config.run.device != "cpu":
        device = torch.device("cuda", launch.local_rank if launch else 0)
    else:
        torch.set_num_threads(1)
    config = override(point.config, {"run.device": str(device)})
    parallel = None
    if launch is not None:
        config = override(config, {"run.parallel": point.kind})
        parallel = join(launch, config.run, device)
    rows = []
    for scaling, batch in point.batches.items():
        config = replace(config, batch_size=batch)
        row = {"kind": scaling, "way": f"{point.kind}, {point.ranks} ranks" if launch else ALONE}
        row |= {"parallel": point.kind, "ranks": point.ranks, "batch": batch, "seconds": []}
        weights = initial_weights(config.model, config.seed)
        try:
            state = TrainState.build(config, parallel=parallel, weights=weights)
            rows.append(row | timed(state, point.seconds))
        except torch.OutOfMemoryError:
            rows.append(row | {"why_not": "out of memory"})
            break  # the other ranks wait for this one
        del state
    return rows


def timed(state: TrainState, seconds: float) -> dict:
    """What this rank sends in a step, what its first step came to, and the time of every round."""
    config, device, rank, world = state.config, state.device, state.rank, state.world
    x0, y = random_batch(config, device)
    first = flow_matching_samples(config.batch_size, config.objective.flow_matching_fraction)
    mine = share(config.batch_size, first, rank, world).to(device)
    step = partial(train_step, state, x0[mine], y[mine])
    found = step()
    figures = {name: float(found[name]) for name in COMPARED["fp32"]}
    for _ in range(BEFORE_COUNT - 1):
        step()
    with Counted() as counted:
        step(observe=lambda name, **values: None)  # not as a CUDA graph, which says nothing to the dispatcher
    for _ in range(BEFORE_TIME if device.type == "cuda" else 0):
        step()
    stopwatch = Stopwatch(device)
    rounds = torch.tensor([seconds / max(stopwatch.seconds(step), 1e-9)], dtype=torch.float64, device=device)
    if state.parallel is not None:  # all make as many
        rounds = state.parallel.rows(rounds)[0]
    times = [stopwatch.seconds(step) for _ in range(max(LEAST, min(MOST, int(rounds))))]
    calls = Counter(collective.name for collective in counted.found)
    return {
        "precision": state.precision,
        "seconds": times,
        "figures": figures,
        "sent": sum(collective.sent for collective in counted.found),
        "collectives": dict(calls),
        "formula": predicted(state),
        "why_not": None,
    }


def predicted(state: TrainState) -> float:
    """Bytes that a rank sends in a step, by the sizes of the network, without the few of norm, flags and losses.

    DistributedDataParallel: 2 S (N - 1) / N of gradients. FSDP2: S (N - 1) / N of parameters in each pass over the
    network and once of gradients. Every rank's part of a parameter is as large as the largest, in whole rows.
    """
    config, N = state.config, state.world
    if state.parallel is None:
        return 0.0
    network = build_flow(config).network
    bf16 = state.precision != "fp32"
    low = {id(p) for layer in network.low_precision_layers() for p in layer.parameters() if bf16}
    summed = {"fp32": 4, "bf16": 2}[config.run.reduce_dtype]
    if not state.parallel.sharded:
        return ring(2, sum(summed * p.numel() for p in network.parameters()), N)
    passes = forwards(state) + 1
    total = 0
    for p in network.parameters():
        numbers = N * -(-len(p) // N) * p[0].numel()
        gathered, reduced = (2, summed) if id(p) in low else (4, 4)
        total += numbers * (passes * gathered + reduced)
    return ring(1, total, N)


def forwards(state: TrainState) -> int:
    """Forwards of the network in a step without micro-batches: behind guidance, the student's, one end of the quotient
    or both."""
    target = state.target
    own = target.kind == "increments" or (target.teacher == "student" and target.precision == state.precision)
    return int(state.objective.guided) + 1 + (1 if own else 2)


def on_ranks(work: Callable[..., Any], point: Point) -> list[Any]:
    """What `work(point, launch)` returns on each rank, in processes of their own that end with this call. Raises
    UserError for what a rank refuses, RuntimeError with the traceback of one that fails."""
    context: Any = multiprocessing.get_context(START)
    ends, processes = [], []
    try:
        for launch in launches(point.ranks):
            here, there = context.Pipe(duplex=False)
            processes.append(context.Process(target=_work, args=(there, work, point, launch), daemon=True))
            processes[-1].start()
            there.close()
            ends.append(here)
        found: dict[int, Any] = {}
        while len(found) < len(ends):
            for end in wait([end for rank, end in enumerate(ends) if rank not in found]):
                rank = ends.index(end)
                try:
                    kind, content = ends[rank].recv()
                except EOFError:
                    processes[rank].join(10)
                    raise RuntimeError(f"rank {rank} ended with {processes[rank].exitcode}") from None
                if kind != "result":
                    raise UserError(content) if kind == "refused" else RuntimeError(f"rank {rank}:\n{content}")
                found[rank] = content
                if any(row["why_not"] for row in content):  # the others wait for it
                    return [content]
        return [found[rank] for rank in range(len(ends))]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _work(end: Any, work: Callable[..., Any], point: Point, launch: Launch | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal: the first one answers it
    try:
        result = "result", work(point, launch)
    except UserError as error:
        result = "refused", str(error)
    except Exception:
        result = "failed", traceback.format_exc()
    end.send(result)
    signal.pause()  # whoever ended first would take its connections from the others


def gathered(ranks: list[list[dict]]) -> list[dict]:
    """One row a scaling from those of all ranks: times of the first, and the most that any sends."""
    rows = []
    for each in zip(*ranks, strict=True):
        rows.append(each[0] | ({} if each[0]["why_not"] else {"sent": max(row["sent"] for row in each)}))
    return rows


def check(row: dict, alone: dict) -> None:
    """Raise IncorrectResult if the first step of a whole batch is another one than in one process."""
    for name in COMPARED.get(row["precision"], COMPARED["bf16"]):
        a, b = row["figures"][name], alone["figures"][name]
        if not abs(a - b) <= TOLERANCE.get(row["precision"], TOLERANCE["bf16"]) * abs(b):
            raise IncorrectResult(f"{row['way']}: {name} of the first step is {a:.7g}, in one process {b:.7g}")


def numbers(text: str) -> list[int]:
    """Numbers of ranks, "1,2,4". One process always takes part: the others stand beside it."""
    found = [command.count(part) for part in text.split(",")]
    command.distinct("--ranks", found)
    return sorted({1, *found})


def kinds(text: str) -> list[str]:
    """Engines, "ddp,fsdp"."""
    found = text.split(",")
    for kind in found:
        if kind not in KINDS:
            raise UserError(f"--parallel {kind}: must be {' or '.join(KINDS)}")
    command.distinct("--parallel", found)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    usual = ",".join(str(n) for n in (1, 2, 4, 8, 16) if n <= max(cards, 2))
    parser = command.Parser(prog="python -m benchmarks.scaling", description=__doc__)
    about = f"how many ranks, one for each GPU ({usual})"
    parser.add_argument("--ranks", type=numbers, default=usual, metavar="N,...", help=about)
    about = f"by which engines ({','.join(KINDS)})"
    parser.add_argument("--parallel", type=kinds, default=",".join(KINDS), metavar="KIND,...", help=about)
    about = "about how long to time each number of ranks with each scaling (4)"
    parser.add_argument("--seconds", type=command.seconds, default=4.0, help=about)
    arguments = parser.parse(argv)
    what = study()
    for n in arguments.ranks:
        if cards and n > cards:
            raise UserError(f"--ranks {n}: there are {cards} GPUs")
        if what.whole % n:
            raise UserError(f"--ranks {n}: must divide the whole batch of {what.whole}")
    kept = record.Growing("scaling", argv)
    if not cards:
        print("processes on a CPU: efficiency is that of this machine's cores; it shows that the code path works")
    plan = [(ALONE, 1), *((kind, n) for n in arguments.ranks if n > 1 for kind in arguments.parallel)]
    missing = [f"{kind}, {n} ranks" for kind, n in plan]
    rows: list[dict] = []
    for kind, n in plan:
        batches = {scaling: what.batch(scaling, n) for scaling in ("weak", "strong")}
        point = Point(kind, n, what.case.config, batches, arguments.seconds)
        for row in gathered(on_ranks(measure, point)):
            alone = next((other for other in rows if other["kind"] == row["kind"]), row)
            if row["kind"] == "strong" and not (row["why_not"] or alone["why_not"]):
                check(row, alone)
            rows.append(row | {"case": what.case.at(row["batch"]).describe()})
            print(said(rows[-1], alone), flush=True)
        missing.pop(0)
        kept.keep(rows, missing)
    kept.finish(rows, missing)


def said(row: dict, alone: dict) -> str:
    """A row in a line."""
    head = f"{row['kind']}: {row['way']}, batch {row['batch']}: "
    if row["why_not"]:
        return head + row["why_not"]
    text = f"{quartiles(row['seconds'], 1e-3)} ms, {images_per_second(row):.1f} images/s"
    if row["ranks"] > 1:
        text += f", efficiency {efficiency(row, alone):.2f}" if alone["seconds"] else ""
        text += f"; sends {row['sent'] / 1e6:.3f} MB a step, by formula {row['formula'] / 1e6:.3f}"
    return head + text

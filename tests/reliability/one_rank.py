"""One rank of a run without a network: it adds up numbers with the others, step after step, and one may come to grief.

    python tests/reliability/one_rank.py FOLDER [FAULT]

FAULT is a JSON object: {"rank": 1, "step": 3, "what": "raise"}; "rank": null is every rank.
"""

import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from soflow_fast.commands import process
from soflow_fast.config.schema import RunConfig
from soflow_fast.errors import ConfigError, Diverged, Interrupted
from soflow_fast.launch import launched
from soflow_fast.runs import signals
from soflow_fast.runs.progress import Progress
from soflow_fast.runs.ranks.agreement import Agreement
from soflow_fast.runs.ranks.judge import Limits
from soflow_fast.runs.ranks.notes import of_rank
from soflow_fast.runs.ranks.watch import Watch, watched
from soflow_fast.training.parallel import join

STEPS = 30
LIMITS = (0.1, 4.0, 1.2, 60.0)
"""Those of `Limits`, for tests: short, and patient enough for a machine that has other things to do."""


def as_rank(place: dict[str, str], folder: str, fault: dict[str, Any], limits: tuple[float, ...] = LIMITS) -> NoReturn:
    """Be a rank, in a process that has been forked: to leave Python as usual takes torch seconds."""
    os.environ |= place
    try:
        process.run(lambda: main(Path(folder), fault, Limits(*limits)))
    except SystemExit as ended:
        os._exit(int(ended.code or 0))


def main(folder: Path, fault: dict[str, Any], limits: Limits) -> None:
    """Train nothing for STEPS steps, with what a training does to end well."""
    launch = launched()
    assert launch is not None
    if fault.get("what") == "arguments" and fault["rank"] in (None, launch.rank):
        raise ConfigError("--steps 0: must be positive")
    if fault.get("what") == "early" and fault["rank"] == launch.rank:
        os.chdir(folder)
        raise KeyError("pixels")
    if fault.get("what") == "late" and fault["rank"] == launch.rank:
        time.sleep(fault["seconds"])
    with watched(launch, fault.get("hang_seconds", 20), limits) as watch:
        mine = fault.get("rank", -1) in (None, launch.rank)
        if fault.get("what") == "device" and mine:
            raise ConfigError(f"--device cuda:{launch.rank}: there is none")
        join(launch, RunConfig(parallel="ddp"), torch.device("cpu"), store=watch.store)
        agreement, notes = Agreement(), of_rank(launch.rank)
        notes.keep_in(folder)
        progress = Progress(STEPS, notes=notes)
        step = stopped = 0
        with signals.collected(idle=lambda: step == 0) as pending:
            while step < STEPS and not stopped:
                watch.mark(step, "data")
                if mine and step == fault["step"]:
                    come_to_grief(fault, watch, progress)
                watch.mark(step, "step")
                stopped, _ = agreement.reach(step, pending)
                total = torch.ones(1)
                dist.all_reduce(total)
                assert total == launch.world
                time.sleep(fault.get("seconds", 0.02))
                step += 1
                (folder / f"steps-{launch.rank}").write_text(str(step))
        if stopped:
            watch.mark(step, "save")
            (folder / f"saved-{launch.rank}").write_text(str(step))
            watch.leave()
            raise Interrupted(stopped, f"stopped and saved at step {step} of {STEPS}")
        progress.say(f"trained {step} steps")


def come_to_grief(fault: dict[str, Any], watch: Watch, progress: Progress) -> None:
    """What a test wants to happen to this rank, once in the life of a run."""
    what, rank = fault["what"], int(os.environ["RANK"])
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if attempt and fault.get("once"):
        return
    if what == "raise":
        raise KeyError("pixels")
    if what == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    if what == "diverge":
        raise Diverged(f"loss not finite at step {watch.step}")
    if what == "alike":
        time.sleep(0.3 * rank)
        raise ConfigError("--data x: is not there")
    if what == "each":
        raise ConfigError(f"--data x: shard {rank} is not there")
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "hang":
        watch.mark(watch.step, fault.get("phase", "data"))
        time.sleep(3600)
    if what == "signal":
        os.kill(os.getpid(), fault.get("number", signal.SIGTERM))
    if what == "warn":
        progress.warn(f"rank {rank} says so")
        warnings.warn(f"a library of rank {rank} says so", stacklevel=1)
        print(f"soflow: warning: rank {rank} on stderr", file=sys.stderr)
        print(f"rank {rank} on stdout")


if __name__ == "__main__":
    given = [json.loads(text) for text in sys.argv[2:]]
    process.run(lambda: main(Path(sys.argv[1]), *given or [{}], Limits(*LIMITS)))

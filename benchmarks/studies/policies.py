"""`python -m benchmarks.policies`: policies by SoFlow, flow matching and behaviour cloning in their tasks, a record.

The policy preset on both tasks, in float32 on the CPU: the same network, demonstrations, batches, optimiser, averages
and seeds. SoFlow acts by one call for a chunk of actions and by two, flow matching by ten Euler steps and by one,
behaviour cloning by the mean that it learns. Each acts in the same episodes, with the same starts. The share is
(return - random) / (expert - random): 1 is the expert's return, 0 that of uniform actions. Milliseconds are those of a
policy that acts alone, one observation at a time, with the environment left out: of an action, a mean over all, and of
the draw of a chunk, a median. Runs go side by side, one thread each; when all are done, the ways to act are timed one
by one.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.baselines import behaviour_cloning
from benchmarks.harness import command
from benchmarks.report import record
from soflow_fast.config.presets import preset
from soflow_fast.config.schema import NOTHING_LEFT, Config, PolicyConfig
from soflow_fast.data import Source, fitted, open_source
from soflow_fast.data.dataset import Normalisation
from soflow_fast.data.demonstrations.tasks import TASKS, open_task
from soflow_fast.policy.rollout import Chunks, roll_out, roll_out_expert, roll_out_random, share_of_expert
from soflow_fast.runs.policies import chunks_by
from soflow_fast.training.state import TrainState
from soflow_fast.training.step import train_step

EPISODES = 100
SEED = 0
"""Of the episodes, which are the same for all."""
TIMED = 1000
"""Actions that are timed."""


class Method(NamedTuple):
    """A way to train a policy, and the ways in which it acts afterwards."""

    configuration: Callable[[Config], Config]
    step: Callable[[TrainState, Tensor, Tensor], Any]
    ways: dict[str, tuple[int, Callable[[TrainState], Chunks]]]
    """Names of ways to act, with the calls of the network for a chunk and what draws it."""


def _of_flow(nfe: int) -> tuple[int, Callable[[TrainState], Chunks]]:
    return nfe, lambda state: chunks_by(state.ema, nfe)


def _flow_matching(config: Config) -> Config:
    return replace(config, objective=replace(config.objective, kind="flow-matching"))


METHODS = {
    "SoFlow": Method(
        lambda config: config, train_step, {"SoFlow, 1 call": _of_flow(1), "SoFlow, 2 calls": _of_flow(2)}
    ),
    "flow matching": Method(
        _flow_matching,
        train_step,
        {"flow matching, 10 Euler steps": _of_flow(10), "flow matching, 1 Euler step": _of_flow(1)},
    ),
    "behaviour cloning": Method(
        behaviour_cloning.configuration,
        behaviour_cloning.step,
        {"behaviour cloning, mean squared error": (1, behaviour_cloning.chunks)},
    ),
}


def configuration(task: str, method: str, seed: int, steps: int) -> Config:
    """The policy preset for a task, by a method."""
    config = preset("policy", data=task, seed=seed, steps=steps, precision="fp32", device="cpu")
    return METHODS[method].configuration(config)


def run(task_name: str, method: str, seed: int, steps: int) -> list[dict]:
    """Train once; the returns of each way to act."""
    torch.set_num_threads(1)
    state, source, normalisation = built(task_name, method, seed, steps)
    task, model, began = open_task(task_name), state.config.model, time.perf_counter()
    assert isinstance(model, PolicyConfig)
    while state.step < steps:
        METHODS[method].step(state, *source.batch(state.step))
    seconds = time.perf_counter() - began
    expert, random = (act(task, EPISODES, SEED).mean for act in (roll_out_expert, roll_out_random))
    shape, rows = (model.action_horizon, model.action_dim), []
    for name, (nfe, make) in METHODS[method].ways.items():
        reached = roll_out(task, make(state), normalisation, shape, model.executed, EPISODES, SEED)
        row = {"task": task_name, "method": name, "seed": seed, "nfe": nfe, "steps": steps, "seconds": seconds}
        row |= {"return": reached.mean, "expert": expert, "random": random, "episodes": EPISODES}
        row["share"] = share_of_expert(reached.mean, expert, random)
        rows.append(row)
    return rows


def built(task: str, method: str, seed: int, steps: int) -> tuple[TrainState, Source, Normalisation]:
    """A policy at step 0, its demonstrations, and how these are normalised."""
    config = configuration(task, method, seed, steps)
    source = open_source(config)
    normalisation = source.dataset.contents.normalisation
    assert normalisation is not None
    return TrainState.build(fitted(config, source, NOTHING_LEFT)), source, normalisation


def timed(task: str, method: str) -> dict[str, dict[str, float]]:
    """For each way to act the milliseconds of an action, a mean, and of a chunk, a median, of one observation at a time
    on one thread; what the weights are does not matter to them."""
    torch.set_num_threads(1)
    state, _, normalisation = built(task, method, 0, 1)
    assert isinstance(state.config.model, PolicyConfig)
    return {
        name: _milliseconds(make(state), normalisation, state.config.model)
        for name, (_, make) in METHODS[method].ways.items()
    }


def _milliseconds(chunks: Chunks, normalisation: Normalisation, model: PolicyConfig) -> dict[str, float]:
    observation = torch.zeros(1, model.obs_size)
    noise = torch.randn(1, model.action_horizon, model.action_dim)
    whole, draws, ahead = 0.0, [], torch.empty(0)
    for k in range(-model.executed, TIMED):  # the first chunk prepares
        began = time.perf_counter()
        if k % model.executed == 0:
            ahead = normalisation.actions(chunks(normalisation.normalised_observations(observation), noise))
        ahead[:, k % model.executed].clone()
        took = time.perf_counter() - began
        if k >= 0:
            whole += took
            draws += [took] if k % model.executed == 0 else []
    return {"ms_per_action": 1e3 * whole / TIMED, "ms_per_chunk": 1e3 * statistics.median(draws)}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = command.Parser(prog="python -m benchmarks.policies", description=__doc__)
    parser.add_argument("--seeds", type=command.seed, nargs="+", default=[0, 1, 2], metavar="N")
    steps = preset("policy").steps
    parser.add_argument("--steps", type=command.count, default=steps, metavar="N", help=f"of each run ({steps})")
    command.add_workers(parser)
    options = parser.parse(argv)
    command.distinct("--seeds", options.seeds)
    kept = record.Growing("policies", argv)
    jobs = [(task, method, seed) for seed in options.seeds for task in TASKS for method in METHODS]
    rows: list[dict] = []
    with command.workers(options.workers) as pool:
        pending = [pool.submit(run, *job, options.steps) for job in jobs]
        for training in pending:
            for row in training.result():
                rows.append(row)
                named = f"{row['task']}, {row['method']}, seed {row['seed']}"
                print(f"{named}: {100 * row['share']:.1f} % of the expert", flush=True)
            kept.keep(rows)
    times = {task: {k: v for method in METHODS for k, v in timed(task, method).items()} for task in TASKS}
    kept.finish([row | times[row["task"]][row["method"]] for row in rows])

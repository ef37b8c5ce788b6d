"""The loop of a run: resume, step, report, sample, save; the only file that knows clocks, and signals during a run."""

import json
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from .. import errors
from ..config.schema import AUTO, Config, disagreement, from_json, to_json
from ..data import Source, open_source
from ..errors import ConfigError, Diverged, Interrupted, handled, received, storage_error
from ..evaluation import DigitScores, describe, measure_digits
from ..files import LOCK, TEXT, make_folder, read_file, refuse_second_writer, set_aside, sole_writer, write_file
from ..models.attention_autotune import choose, try_out
from ..sampling import sample
from ..training.consistency_target import resolve_target
from ..training.nonfinite import GIVE_UP
from ..training.precision import matmul_precision, resolve_device, resolve_precision
from ..training.state import TrainState
from ..training.step import train_step
from . import checkpoint, telemetry
from .async_save import Saver

GRID = 100
"""Images in a sample grid."""
EVALUATION_SAMPLES = 4000
NOTHING_TO_SAVE = "stopped before the first step; the same command begins where this one did"


def train(config: Config) -> TrainState:
    """Run `config` to its last step, from where its run directory is, and evaluate it. Returns the final state.

    Raises UserError for what the user can mend, Interrupted after SIGINT, SIGTERM or SIGHUP (outside of Python's main
    thread no signal is handled). The state is saved before that; if the disk refuses it, that is the error that is
    raised, and exit code 2 says that more was lost than time.
    """
    with enough_memory(config):
        config = resolved(config)
        run_dir = Path(config.run.run_dir)
        try:
            check_run_dir(run_dir, config)
            refuse_second_writer(run_dir)
        except OSError as error:
            raise storage_error(error, "--run-dir") from None
        source = open_source(config)
        state = TrainState.build(config)
        set_attention(state, resolve_attention(state))
        return Run(state, source, run_dir).go()


def resolved(config: Config) -> Config:
    """The configuration with every "auto" and empty default replaced by what it comes to on this machine.

    `run.attention` alone stays "auto": the backends are timed at the network's shape, once it is there
    (`resolve_attention`). A configuration that is resolved stays as it is.
    """
    device = resolve_device(config.run.device)
    run = replace(config.run, run_dir=config.run.run_dir or f"runs/{config.preset}", device=str(device))
    precision = resolve_precision(config.precision, device)
    how = resolve_target(config, precision, device)
    config = replace(config, run=run, precision=precision, quotient=how.kind, quotient_precision=how.precision)
    return config if config.micro_batch != AUTO else replace(config, micro_batch=_micro_batch(config, device))


def _micro_batch(config: Config, device: torch.device) -> int:
    """What a micro-batch of "auto" comes to with the memory that is free now. Raises ConfigError if none fits."""
    if device.type != "cuda":
        return 0
    from ..training.memory_estimate import largest_micro_batch

    return largest_micro_batch(config, torch.cuda.mem_get_info(device)[0])


def resolve_attention(state: TrainState) -> str:
    """The attention backend of a run on this machine: the one that it asks for, or the fastest one at its shape.

    Raises ConfigError if the one that it asks for cannot be used.
    """
    config, model, device = state.config, state.config.model, state.device
    name = config.run.attention
    dtype = torch.bfloat16 if state.precision in ("bf16", "fp8") else torch.float32
    compiled = config.run.compile
    B = config.batch_size // state.world
    B = min(config.micro_batch, B) or B
    T, head_dim = (model.input_size // model.patch_size) ** 2, model.hidden_size // model.num_heads
    with matmul_precision(
        "tf32" if state.precision == "tf32" else "fp32", device
    ):  # as in the DiT, which has no autocast inside
        if name == "auto":
            return choose(device, dtype, B, model.num_heads, T, head_dim, time.perf_counter, compiled=compiled)
        try_out(name, device, dtype, B, model.num_heads, T, head_dim, compiled=compiled)
        return name


def set_attention(state: TrainState, backend: str) -> None:
    """Let the network and its averages take the attention of a backend."""
    for flow in (state.flow, state.ema, state.teacher):
        if flow is not None:
            flow.network.set_attention(backend)


def check_run_dir(run_dir: Path, config: Config) -> None:
    """Raise ConfigError if `run_dir` holds another run or something else."""
    known = run_dir / "config.json"
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"--run-dir {run_dir}: is a file")
    if not known.exists():
        if run_dir.exists() and any(path.name != LOCK for path in run_dir.iterdir()):
            raise ConfigError(f"--run-dir {run_dir}: neither empty nor a run (it has no config.json)")
        return
    try:
        text = read_file(known, TEXT).decode()
        if not text.strip("\0 \n"):  # a loss of power: the checkpoints hold the configuration too, and it is compared
            return
        old = from_json(text)
    except OSError as error:
        raise storage_error(error, "cannot read the run's configuration") from None
    except ValueError as error:
        raise ConfigError(f"{known}: {error}") from None
    changed = disagreement(old, config)
    if changed:
        raise ConfigError(
            f"--run-dir {run_dir}: holds a run with another configuration ({'; '.join(changed)}); "
            "give another --run-dir or the same configuration"
        )


class Run:
    """One start of a run."""

    def __init__(self, state: TrainState, source: Source, run_dir: Path) -> None:
        self.state, self.source, self.run_dir = state, source, run_dir
        self.progress = telemetry.Progress(state.config.steps)
        self._grid_refused = False
        state.guard.limit = GIVE_UP if state.config.run.on_nonfinite == "skip" else 1

    def go(self) -> TrainState:
        """Train to the end and evaluate, while no other process writes there."""
        with ExitStack() as held:
            with self._writing():
                make_folder(self.run_dir)
                held.enter_context(sole_writer(self.run_dir, self._warn))
            check_run_dir(self.run_dir, self.state.config)  # another process may have made it meanwhile
            return self._go()

    def _go(self) -> TrainState:
        state, config = self.state, self.state.config
        say = self.progress.say
        resumed = checkpoint.resume(self.run_dir, state, self._warn)
        with self._writing():
            write_file(self.run_dir / "config.json", to_json(config).encode())
            (self.run_dir / "samples").mkdir(exist_ok=True)
            for stale in self.run_dir.rglob(".*.partial-*"):  # of a start that was killed
                if stale.is_file():
                    stale.unlink()
            log = self.run_dir / "metrics.jsonl"
            if not resumed and os.path.lexists(log) and log.stat().st_size:
                kept = set_aside(log)
                self._warn(f"{log} has lines but there is no checkpoint: from step 0 again; kept as {kept.name}")
        if resumed:
            say(f"resuming {self.run_dir} at step {state.step} of {config.steps}")
        else:
            millions = state.parameter_count() / 1e6
            say(
                f"training {config.preset} in {self.run_dir}: {millions:.2f} M parameters, {len(self.source)} images, "
                f"{config.steps} steps of {config.batch_size}, {state.precision} on {state.device}, "
                f"attention {state.flow.network.blocks[0].attn.backend}"
            )
        if state.step < config.steps:
            first = state.step
            with signals(
                lambda: state.step == first
            ) as pending:  # elsewhere they act at once: there is nothing to save
                try:
                    self._loop(pending)
                except Exception:
                    if pending and state.step == first:  # torch's compiler has made an error of its own of the signal
                        raise Interrupted(pending[0], NOTHING_TO_SAVE) from None
                    raise
            if pending:
                where = f"step {state.step} of {config.steps}"
                raise Interrupted(pending[0], f"stopped and saved at {where}; the same command resumes")
        with self._after_the_last_save():
            say(f"trained {state.step} steps; samples: {self._grid(state.step, 'final')}")
            if config.data.kind == "digits" and config.model.num_classes:
                evaluate(state, self.run_dir, say)
        return state

    def _loop(self, pending: list[int]) -> None:
        """Step until the last one or until a signal is pending, and save."""
        state, config, every = self.state, self.state.config, self.state.config.run
        began, first = time.monotonic(), state.step
        before, before_step = began, first
        with (
            closing(self.progress),
            closing(telemetry.MetricsLog(self.run_dir / "metrics.jsonl", first, self._warn)) as log,
            closing(telemetry.TensorBoard(self.run_dir / "tensorboard", first, time.time, self._warn)) as board,
            Saver(self.run_dir, every.keep, self._warn, before=log.sync) as saver,
        ):
            while state.step < config.steps:
                if every.checkpoint_every and (state.step + 1) % every.checkpoint_every == 0:
                    saver.wait()  # so that a crash never costs two intervals
                metrics = self._step(*self.source.batch(state.step, state.rank, state.world))
                step, last, stop = state.step, state.step == config.steps, bool(pending)
                # What is measured now and then has a line at its step: a resumed run would not know it any more.
                if step % every.log_every == 0 or last or "q_cosine" in metrics:
                    values = self._read(metrics)
                    now = time.monotonic()
                    images = (step - before_step) * config.batch_size / (now - before)
                    before, before_step = now, step
                    entry = {"step": step, **values, "images_per_s": images, "seconds": now - began}
                    log.write(entry)
                    board.write(entry)
                    self.progress.update(step, values, (step - first) / (now - began), images, now)
                if not last and every.sample_every and step % every.sample_every == 0:
                    self._grid_on_the_way(step, board)
                if last or stop or (every.checkpoint_every and step % every.checkpoint_every == 0):
                    self._read(metrics)
                    self._save(saver, final=last or stop)
                saver.poll()
                if stop:
                    break
            with self._after_the_last_save():
                log.finish()

    def _step(self, x0: torch.Tensor, y: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The next step, in smaller micro-batches from now on where memory runs out: it has changed nothing then."""
        state = self.state
        while True:
            parts = -(-len(x0) // (state.config.micro_batch or len(x0)))
            size = -(-len(x0) // parts)
            try:
                return train_step(state, x0, y)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
            # Outside of the handler: the exception holds on to everything that the step had made.
            state.optimizer.zero_grad(set_to_none=True)
            state.graph = None  # a recording has its micro-batches in it
            if state.device.type == "cuda":
                torch.cuda.empty_cache()
            state.config = replace(state.config, micro_batch=size - size // 2)
            self.progress.say(
                f"out of memory at step {state.step + 1}: again, in micro-batches of {state.config.micro_batch}"
            )

    def _read(self, metrics: dict[str, torch.Tensor]) -> dict[str, float]:
        """The metrics on the host; of a step that was skipped, those that are finite. Raises Diverged if the run ends
        here: the weights are those before the first number that was not finite, and the last checkpoint is older."""
        refused, skips = self.state.guard.read(), self.state.config.run.on_nonfinite == "skip"
        if refused.given_up:
            row = f", the {refused.in_row}th in a row" if skips else ""
            what = f"{refused.place} not finite at step {refused.step}{row}"
            raise Diverged(f"{what}; that step changed nothing, and the last checkpoint stands")
        values = {name: float(value) for name, value in metrics.items()}
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        if wrong and not skips:
            raise Diverged(f"{', '.join(wrong)} not finite at step {self.state.step}; the last checkpoint stands")
        values = {name: value for name, value in values.items() if name not in wrong}
        return {**values, "memory_mb": memory_mb(self.state.device)}

    def _save(self, saver: Saver, *, final: bool) -> None:
        """Begin to save the state; the final one is there when this returns."""
        if not final:
            return saver.begin(self.state)
        try:
            saver.finish(self.state)
        except OSError as error:
            what = f"--run-dir {self.run_dir}: cannot save the checkpoint of step {self.state.step}"
            raise storage_error(error, what) from None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Raise StorageError naming the run directory where the disk refuses something."""
        try:
            yield
        except OSError as error:
            raise storage_error(error, f"--run-dir {self.run_dir}") from None

    def _warn(self, text: str) -> None:
        self.progress.say(f"warning: {text}")

    @contextmanager
    def _after_the_last_save(self) -> Iterator[None]:
        """Raise StorageError for what the disk refuses inside, saying that the checkpoint is safe."""
        try:
            yield
        except OSError as error:
            what = f"--run-dir {self.run_dir}: the checkpoint of step {self.state.step} is saved, but not all else"
            raise storage_error(error, what) from None

    def _grid_on_the_way(self, step: int, board: telemetry.TensorBoard) -> None:
        """A grid that may be missing: the first one in a row that the disk refuses is a warning."""
        try:
            self._grid(step, f"step-{step:08d}", board)
        except OSError as error:
            if not self._grid_refused:
                self._warn(f"sample grid of step {step} not written: {error}")
            self._grid_refused = True
        else:
            self._grid_refused = False

    def _grid(self, step: int, name: str, board: telemetry.TensorBoard | None = None) -> Path:
        """A grid of one-step samples of the EMA weights, the same noise and labels every time."""
        model = self.state.config.model
        labels = torch.arange(GRID) % max(model.num_classes, 1) if model.num_classes else None
        shape = (GRID, model.in_channels, model.input_size, model.input_size)
        grid = telemetry.make_grid(telemetry.to_uint8(sample(self.state.ema, labels, seed=0, shape=shape)), columns=10)
        path, content = self.run_dir / "samples" / f"{name}.png", telemetry.png(grid)
        if board:
            board.image(grid, content, step)
        telemetry.replace_file(path, content)
        return path


def evaluate(state: TrainState, run_dir: Path, say: Callable[[str], None]) -> dict[int, DigitScores]:
    """Print the figures of 4000 digits drawn with 1 and with 2 network calls, and keep them in evaluation.json."""
    figures = {}
    say(f"evaluating {EVALUATION_SAMPLES} samples")
    for nfe in (1, 2):
        figures[nfe] = measure_digits(state.ema, EVALUATION_SAMPLES, nfe, seed=0)
        say(describe(nfe, figures[nfe]))
    content = {"step": state.step, "samples": EVALUATION_SAMPLES, "nfe": {k: v._asdict() for k, v in figures.items()}}
    telemetry.replace_file(run_dir / "evaluation.json", (json.dumps(content, indent=2) + "\n").encode())
    return figures


def enough_memory(config: Config) -> AbstractContextManager[None]:
    """Within it, memory that runs out is a ConfigError."""
    return errors.enough_memory(
        f"--batch-size {config.batch_size}: out of memory; give a smaller --micro-batch, --recompute block, "
        f"a smaller batch or network (model.hidden_size {config.model.hidden_size}, depth {config.model.depth})"
    )


def seconds_per_step(state: TrainState, x0: torch.Tensor, y: torch.Tensor) -> float:
    """The median time of some more steps on a batch: at least one, at most nine, until two seconds have passed."""
    times: list[float] = []
    while len(times) < 9 and sum(times) < 2:
        began = time.monotonic()
        train_step(state, x0, y)
        if state.device.type == "cuda":
            torch.cuda.synchronize(state.device)
        times.append(time.monotonic() - began)
    return sorted(times)[len(times) // 2]


def memory_mb(device: torch.device) -> float:
    """Peak memory in MB (10^6 bytes): allocated on a GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


@contextmanager
def signals(idle: Callable[[], bool] = lambda: False) -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP in the list that is yielded; a second one raises Interrupted at once, and the
    first one too while it is `idle`: nothing would be saved that is not, and the first step may compile for minutes.

    Nobody asks twice by SIGHUP: a terminal that goes sends several, and systemd one beside its SIGTERM.
    """
    pending = received()  # one whose exception was lost at start-up

    def handle(signum: int, frame: object) -> None:
        if signum != signal.SIGHUP and any(number != signal.SIGHUP for number in pending):
            raise Interrupted(signum, "stopped at once by a second signal; the last checkpoint stands", at_once=True)
        pending.append(signum)
        if idle() and len(pending) == 1:
            raise Interrupted(signum, NOTHING_TO_SAVE)

    here = threading.current_thread() is threading.main_thread()  # Python lets no other thread set a handler
    before = {number: signal.signal(number, handle) for number in (handled() if here else ())}
    try:
        yield pending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

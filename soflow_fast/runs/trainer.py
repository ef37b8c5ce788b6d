"""The loop of a run: resume, step, report, sample, save. Only this module reads clocks."""

import math
import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..config.schema import AUTO, NOTHING_LEFT, Config, DataChoices, UNetConfig
from ..data import Source, fitted, identity, open_source
from ..errors import CheckpointError, ConfigError, DataError, Diverged, ElsewhereError, Interrupted, storage
from ..files import OptionalWrites, write_file
from ..launch import launched
from ..models import mlp_autotune
from ..models.attention_autotune import choose, try_out
from ..models.official import Start, read_start
from ..models.official.one_time import silent_embedder
from ..ranks import flow_matching_samples, micro_batches
from ..training import cpu_precision
from ..training.consistency_target import resolve_target
from ..training.cuda_graph import record_graph, why_not_graphed
from ..training.nonfinite import GIVE_UP
from ..training.precision import matmul_precision, resolve_device, resolve_precision
from ..training.state import TrainState, initial_weights
from ..training.step import train_step
from . import checkpoint, run_directory, signals
from .async_save import Saver
from .batches.resident import on_device_bytes
from .batches.upload import Batches
from .metrics import Boards, MetricsLog, NoLog, TensorBoard, named_figures
from .progress import LABELS, MEANFLOW_LABELS, Progress
from .ranks.crew import ALONE, Crew, assemble
from .ranks.watch import watched
from .samples import Evaluations, Grids, check_evaluations, evaluate
from .tracking import Tracker, check_installed


def train(config: Config, choices: DataChoices = NOTHING_LEFT) -> TrainState:
    """Run `config` to its last step, from where its run directory is, and evaluate it. Returns the final state.

    choices: what is left to the data.

    Raises UserError for what the user can mend, Diverged for numbers that are not finite, Interrupted after SIGINT,
    SIGTERM or SIGHUP (outside of Python's main thread no signal is handled). The state is saved before that; if the
    disk refuses it, that is the error that is raised, and exit code 2 says that more was lost than time.
    """
    launch = launched()
    with watched(launch, config.run.hang_seconds) as watch:
        crew, config = assemble(config, launch, watch, choices.epochs)
        return _train_with(crew, config, choices)


def _train_with(crew: Crew, config: Config, choices: DataChoices) -> TrainState:
    with enough_memory(config):
        config, chosen = choose_precision(config) if crew.first else (config, "")
        config = replace(config, precision=crew.chosen(config.precision))
        config = resolved(config, crew)
        if crew.first:  # who measures and shows
            check_evaluations(config.run)
            check_installed(config.run.track)
        run_dir = Path(config.run.run_dir)
        labels = MEANFLOW_LABELS if config.objective.kind == "meanflow" else LABELS
        progress = Progress(config.steps, notes=crew.notes, at_work=crew.watch.at_work, labels=labels)
        if choices == NOTHING_LEFT:
            run_directory.check(run_dir, config)  # before what takes seconds; and again when it is taken
        if config.data.kind == "digits-latent":
            from .latents.digits import prepare

            config = crew.first_then_others(lambda: prepare(config, progress.say))
        if config.data.kind == "images":  # each is decoded once, which is remembered on a machine
            source = crew.first_then_others(lambda: open_source(config, progress.say), each_machine=True)
        else:
            source = open_source(config, progress.say)
        found = identity.identify(source.dataset)
        run_directory.check_data(run_dir, found)  # first: of other data the number of classes differs too, at times
        crew.check_same("--data", identity.to_json(found))
        config = fitted(config, source, choices)
        progress.total = config.steps
        run_directory.check(run_dir, config)
        start = beginning(config, run_dir)
        state = TrainState.build(
            config,
            parallel=crew.parallel,
            weights=start.network if start else None,
            averages=start.average if start else None,
        )
        state.data = identity.to_json(found)
        state.set_attention(crew.chosen(resolve_attention(state)))
        mlp = resolve_mlp(state)
        set_mlp(state, crew.chosen(mlp.name))
        state.guard.limit = GIVE_UP if config.run.on_nonfinite == "skip" else 1
        with run_directory.taken(run_dir, config, progress.warn) if crew.first else nullcontext():
            crew.wait()  # until the first has made the directory its own
            if crew.parallel is not None:
                run_directory.check_shared(run_dir, crew.parallel)
            crew.keep_notes(run_dir)
            if chosen:
                progress.say(chosen)
            _begin(state, source, run_dir, progress, crew, start)
            start = None
            if mlp.said:
                progress.say(mlp.said)
            grids = Grids(state, found.space, progress.say, source.dataset.conditions)
            evaluations = Evaluations(state, grids, crew.first, crew.watch.at_work, progress.say)
            with closing(_boards(state, run_dir, progress, crew)) as board:
                if state.step < config.steps:
                    listed = str(run_dir / run_directory.LEFT_OUT)
                    for line in identity.describe(source.dataset, found, config.data.path, listed):
                        progress.say(line)
                    _train(state, source, grids, evaluations, run_dir, progress, crew, board)
                _end(state, grids, evaluations, run_dir, progress, crew, board)
        return state


def _boards(state: TrainState, run_dir: Path, progress: Progress, crew: Crew) -> Boards:
    """What shows the numbers and grids of the rest of a run, beside its own files: nothing once they are all shown."""
    ended = state.step == state.config.steps and any((run_dir / "samples").glob("final.*"))
    if ended or not crew.first:
        return Boards()
    board = TensorBoard(run_dir / "tensorboard", state.step, progress.warn)
    if state.config.run.track == "none":
        return Boards(board)
    return Boards(board, Tracker(state.config, run_dir, state.step > 0, progress.warn))


def beginning(config: Config, run_dir: Path) -> Start | None:
    """What a run begins with by `run.init` or `run.resume_official`; None: what its seed gives.

    A run that goes on has no use for it. Raises CheckpointError and ConfigError.
    """
    run = config.run
    place = run.init or run.resume_official
    if run.init_kind != "soflow" and not run.init:
        raise ConfigError(f"run.init_kind {run.init_kind}: is of --init FILE, which is not given")
    if not place or checkpoint.list_checkpoints(run_dir):
        return None
    flag = "--init" if run.init else "--resume-official"
    theirs = checkpoint.official_file(Path(place))
    if theirs is None and run.resume_official:
        raise CheckpointError(f"{flag} {place}: no file of the authors' trainer")
    if theirs is not None:
        kind = None if run.init_kind == "soflow" else run.init_kind
        ranged = config.model.guidance_range is not None
        if ranged and run.resume_official:
            raise ConfigError(f"{flag} {place}: its network sees no guidance scale; with --guidance-range give --init")
        initial = initial_weights(config) if ranged or kind is not None else None
        try:
            start = read_start(str(theirs), config, kind=kind, initial=initial, with_moments=bool(run.resume_official))
        except CheckpointError as error:
            raise CheckpointError(f"{flag} {error}") from None
        if start.step >= config.steps:
            raise ConfigError(f"{flag} {place}: has made {start.step} steps; --steps {config.steps} is not more")
        return start
    if run.init_kind != "soflow":
        raise ConfigError(f"--init {place}: is a run; run.init_kind {run.init_kind} is of files")
    flow, other = checkpoint.load_with_config(config.run.init)
    for name in ("model", "flow"):
        mine, theirs = getattr(config, name), getattr(other, name)
        changed = [f.name for f in fields(mine) if getattr(mine, f.name) != getattr(theirs, f.name)]
        if config.model.guidance_range is not None and "guidance_range" in changed:
            changed.remove("guidance_range")  # an embedder that is new, or for other scales
        if changed:
            raise ConfigError(f"--init {config.run.init}: of another network: {name}.{changed[0]} differs")
    weights = flow.float().state_dict()  # which may have been given away in half precision
    if config.model.guidance_range is not None and other.model.guidance_range is None:
        weights |= silent_embedder("network.w_embedder", initial_weights(config))
    return Start(weights, weights, {})


def _begin(
    state: TrainState, source: Source, run_dir: Path, progress: Progress, crew: Crew, start: Start | None
) -> None:
    """Load the newest checkpoint, if there is one, or else what the run begins with, and say what begins."""
    config = state.config
    before = run_directory.configuration(run_dir)
    resumed = checkpoint.resume(run_dir, state, progress.warn)
    if crew.first:
        run_directory.prepare(run_dir, config, state.data, resumed, progress.warn, source.dataset.contents.bad())
    if resumed:
        if before is not None and before.steps < config.steps:
            progress.say(f"finished at step {before.steps}, goes on: all schedules now end at step {config.steps}")
        progress.say(f"resuming {run_dir} at step {state.step} of {config.steps}")
    else:
        progress.say(
            f"training {config.preset} in {run_dir}: {state.parameter_count() / 1e6:.2f} M parameters, "
            f"{len(source)} images, {config.steps} steps of {config.batch_size}, {state.precision} on "
            f"{_devices(state)}, attention {state.flow.network.attention_backend}{_graph_note(state)}"
        )
        if start is not None and config.run.resume_official:
            checkpoint.begin_with(state, start, config.run.resume_official)
            progress.say(f"going on with {config.run.resume_official} at step {state.step} of {config.steps}")
            for name in ("lr", "betas", "eps", "weight_decay"):
                theirs, ours = (start.groups[0].get(name) if start.groups else None), getattr(config.optim, name)
                if theirs is not None and (tuple(theirs) if name == "betas" else theirs) != ours:
                    progress.say(f"  {name} was {theirs} there, and is {ours} here")


def _devices(state: TrainState) -> str:
    if state.parallel is None:
        return str(state.device)
    return f"{state.world} {state.device.type} ranks by {state.parallel.kind}"


def _graph_note(state: TrainState) -> str:
    """Whether steps become a CUDA graph and why not, on a GPU."""
    if state.device.type != "cuda":
        return ""
    if state.graphed:
        return ", steps as a CUDA graph"
    why = why_not_graphed(state.config, state.precision, state.device, state.world)
    return f", no CUDA graph{f': {why}' if why else ''}"


def _train(
    state: TrainState,
    source: Source,
    grids: Grids,
    evaluations: Evaluations,
    run_dir: Path,
    progress: Progress,
    crew: Crew,
    board: Boards,
) -> None:
    """Train to the last step. Raises Interrupted once a signal has come and the state is saved."""
    first = state.step
    with signals.collected(idle=lambda: state.step == first) as pending:
        _loop(state, source, grids, evaluations, run_dir, progress, pending, crew, board)
        signal, _ = crew.told(state.step, pending, False)  # one that came as the last step was saved
    if signal:
        crew.watch.leave()  # together, before any of them goes
    if signal or pending:
        where = f"step {state.step} of {state.config.steps}"
        raise Interrupted(signal or pending[0], f"stopped and saved at {where}; the same command resumes")


def _loop(
    state: TrainState,
    source: Source,
    grids: Grids,
    evaluations: Evaluations,
    run_dir: Path,
    progress: Progress,
    pending: list[int],
    crew: Crew,
    board: Boards,
) -> None:
    """Step until the last step is done or a signal is pending; log, draw and save on the way."""
    config, every = state.config, state.config.run
    began, first = time.monotonic(), state.step
    before, before_step = began, first
    with storage(f"--run-dir {run_dir}"):
        log = MetricsLog(run_dir / "metrics.jsonl", first, progress.warn) if crew.first else NoLog()
    optional = OptionalWrites(progress.warn)
    held = bytes_to_hold(config, source, state.device, crew)
    if held:
        progress.say(f"all samples lie on the GPU, {held / 1e9:.2f} GB")
    source.dealt_first = flow_matching_samples(config.batch_size, config.objective.flow_matching_fraction)
    batches = Batches(source, state.device, state.rank, state.world, config.run.workers, resident=held > 0)
    with (
        closing(batches),
        closing(progress),
        Saver(run_dir, every.keep, progress.warn, before=log.sync, parallel=crew.parallel) as saver,
    ):
        while state.step < config.steps:
            if every.checkpoint_every and (state.step + 1) % every.checkpoint_every == 0:
                crew.watch.mark(state.step, "save")
                saver.wait()  # so that a crash never costs two intervals
            crew.watch.mark(state.step, "data")
            fault: DataError | None = None
            try:
                x0, y = batches.of(state.step)
            except DataError as error:
                fault = error
            signal, faulty = crew.told(state.step, pending, fault is not None)
            if signal and not pending:  # that another rank got
                pending.append(signal)
            if faulty:
                if state.step > first:
                    crew.watch.mark(state.step, "save")
                    with storage(f"--run-dir {run_dir}: cannot save the checkpoint of step {state.step}"):
                        saver.finish(state)
                raise fault or ElsewhereError(DataError.exit_code)
            crew.watch.mark(state.step, "step")
            metrics = step_in_memory(state, x0, y, progress.say, batches.give_up_memory)
            if state.step < config.steps:
                batches.begin(state.step)  # while the GPU is busy
            if state.graph is not None and state.graph.fault is not None:
                progress.say(f"no CUDA graph: {state.graph.fault}")
                state.graph, state.graphed = None, False
            step, last = state.step, state.step == config.steps
            stop = bool(pending) if crew.size == 1 else bool(signal)  # as all ranks know it
            # The measured quotient has a line at its own step: a resumed run would not know it any more.
            if step % every.log_every == 0 or last or "q_cosine" in metrics:
                values = read_metrics(state, metrics, crew)
                now = time.monotonic()
                images = (step - before_step) * config.batch_size / (now - before)
                before, before_step = now, step
                entry = {"step": step, **values, "images_per_s": images, "seconds": now - began}
                log.write(entry)
                board.write(entry)
                progress.update(step, values, (step - first) / (now - began), images, now)
            if not last and every.sample_every and step % every.sample_every == 0 and crew.draws:
                crew.watch.mark(step, "samples")
                kind, content, grid = grids.draw()
                if grid is not None:
                    board.image(grid, step)
                if crew.first:
                    with optional(f"sample grid of step {step}"):
                        write_file(run_dir / "samples" / f"step-{step:08d}.{kind}", content, synced=False)
            if not last and every.eval_every and step % every.eval_every == 0 and crew.draws:
                crew.watch.mark(step, "evaluation")
                paused = time.monotonic()
                line, figures = evaluations.on_the_way()
                if line:
                    progress.say(f"step {step}: {line}")
                    entry = {"step": step, **named_figures(figures)}
                    log.write(entry)
                    board.write(entry)
                before += time.monotonic() - paused  # images per second are those of training
            if last or stop or (every.checkpoint_every and step % every.checkpoint_every == 0):
                crew.watch.mark(step, "save")
                read_metrics(state, metrics, crew)  # which raises Diverged for a state that is not to be saved
                board.flush()
                if last or stop:
                    with storage(f"--run-dir {run_dir}: cannot save the checkpoint of step {step}"):
                        saver.finish(state)
                else:
                    saver.begin(state)
            saver.poll()
            if stop:
                return


def _end(
    state: TrainState,
    grids: Grids,
    evaluations: Evaluations,
    run_dir: Path,
    progress: Progress,
    crew: Crew,
    board: Boards,
) -> None:
    """Draw the last grid and evaluate. Raises StorageError where the disk refuses: all else is saved already."""
    crew.watch.mark(state.step, "evaluation")
    if not crew.draws:
        return
    with storage(f"--run-dir {run_dir}: the checkpoint of step {state.step} is saved, but not all else"):
        kind, content, grid = grids.draw()
        path = run_dir / "samples" / f"final.{kind}"
        if grid is not None:
            board.image(grid, state.step)
        if crew.first:
            write_file(path, content, synced=False)
        progress.say(f"trained {state.step} steps; samples: {path}")
        if evaluations.wanted:
            figures = evaluate(evaluations, run_dir if crew.first else None, progress.say)
            board.write({"step": state.step, **named_figures(figures)})


def step_in_memory(
    state: TrainState,
    x0: Tensor,
    y: Tensor | None,
    say: Callable[[str], None],
    give_up: Callable[[], bool] = lambda: False,
) -> dict[str, Tensor]:
    """The next step on a batch, in smaller micro-batches from now on where memory runs out.

    What `give_up` frees is given up first, which returns whether there was something, and then a recording that runs
    out of memory. The step that ran out has changed nothing.
    Raises torch.OutOfMemoryError if one image does not fit, and of several ranks at once.
    """
    while True:
        parts = micro_batches(len(x0), state.config.micro_batch)
        size = -(-len(x0) // parts)
        try:
            return train_step(state, x0, y)
        except torch.OutOfMemoryError:
            if state.parallel is not None:  # the others are in the midst of the step
                raise
            given_up = give_up()
            if size == 1 and not given_up:
                raise
        # Outside of the handler: the exception holds on to everything that the step had made.
        state.optimizer.zero_grad(set_to_none=True)
        recorded, state.graph = state.graph, None  # a recording has its micro-batches in it
        said = f"out of memory at step {state.step + 1}: again, "
        if given_up:
            say(f"{said}with the samples in the memory of the host")
        elif recorded is not None and not recorded.left:  # beside the memory of the steps before, it needs its own
            state.graphed = False
            say(f"{said}without a CUDA graph")
        else:
            state.config = replace(state.config, micro_batch=size - size // 2)
            say(f"{said}in micro-batches of {state.config.micro_batch}")
        del recorded
        if state.device.type == "cuda":
            torch.cuda.empty_cache()


def read_metrics(state: TrainState, metrics: dict[str, Tensor], crew: Crew = ALONE) -> dict[str, float]:
    """The metrics on the host, with the memory in use; of a step that was skipped, those that are finite.

    Raises Diverged if the run ends here. The weights are those before the first number that was not finite, and the
    last checkpoint is older.
    """
    refused, skips = state.guard.read(), state.config.run.on_nonfinite == "skip"
    if refused.given_up:
        row = f", the {refused.in_row}th in a row" if skips else ""
        what = f"{refused.place} not finite at step {refused.step}{crew.name(refused.rank)}{row}"
        raise Diverged(f"{what}; that step changed nothing, and the last checkpoint stands")
    values = {name: float(value) for name, value in metrics.items()}
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    if wrong and not skips:
        raise Diverged(f"{', '.join(wrong)} not finite at step {state.step}; the last checkpoint stands")
    values = {name: value for name, value in values.items() if name not in wrong}
    return {**values, "memory_mb": memory_mb(state.device)}


def choose_precision(config: Config) -> tuple[Config, str]:
    """The configuration of a run on a CPU with "auto" replaced by what is faster there, and what was measured in words.

    A run that goes on keeps the precision that it has, whatever this machine would choose.
    """
    if config.precision != "auto" or resolve_device(config.run.device).type != "cpu":
        return config, ""
    known = run_directory.configuration(Path(_run_dir(config)))
    if known is not None:
        return replace(config, precision=known.precision), ""
    found = cpu_precision.choose(config, time.perf_counter)
    seconds = f"{found.fp32:.3g} s in float32 and {found.bf16:.3g} s in bf16"
    said = f"{found.precision}: a step of {cpu_precision.BLOCKS} blocks takes {seconds} here"
    return replace(config, precision=found.precision), said if found.fp32 else ""


def _run_dir(config: Config) -> str:
    return config.run.run_dir or f"runs/{config.preset}"


def resolved(config: Config, crew: Crew = ALONE) -> Config:
    """The configuration with every "auto" and empty default replaced by what it comes to on this machine.

    `run.attention` and `run.mlp` alone stay "auto": what they choose from is timed at the network's shape, once it is
    there (`resolve_attention`, `resolve_mlp`). A configuration that is resolved stays as it is.
    """
    device = resolve_device(config.run.device)
    run = replace(config.run, run_dir=_run_dir(config), device=str(device))
    precision = resolve_precision(config.precision, device)
    how = resolve_target(config, precision, device)
    config = replace(config, run=run, precision=precision)
    if config.objective.kind != "flow-matching":  # which has no quotient
        config = replace(config, quotient=how.kind, quotient_precision=how.precision)
    mine = replace(config, batch_size=config.batch_size // crew.size)
    if config.micro_batch == AUTO:
        fits = min(size or mine.batch_size for size in crew.all(_micro_batch(mine, device, crew)))
        config = replace(config, micro_batch=0 if fits == mine.batch_size else fits)
    if config.run.recompute == "auto":
        on_gpu = device.type == "cuda"  # on a CPU memory is not what is short
        mine = replace(mine, micro_batch=config.micro_batch)
        kinds = crew.all(recompute_in(mine, torch.cuda.mem_get_info(device)[0], crew) if on_gpu else "nothing")
        config = replace(config, run=replace(config.run, recompute=kinds[0] if len(set(kinds)) == 1 else "none"))
    return config


def recompute_in(config: Config, memory: int, crew: Crew = ALONE) -> str:
    """What `--recompute auto` stands for on a GPU with so many bytes free: where a step is predicted to have room for
    all that its backward would make again, it makes nothing again. config: with the batch of one rank."""
    from ..training.memory_estimate import USABLE

    kept = replace(config, run=replace(config.run, recompute="nothing"))
    return "nothing" if _peak(kept, crew) <= USABLE * memory else "none"


def _peak(share: Config, crew: Crew) -> int:
    """Bytes in use at the peak of a step on a rank with this configuration, whose batch is the rank's, predicted."""
    if crew.parallel is None:
        from ..training.memory_estimate import estimate_memory

        return estimate_memory(share).peak
    from ..training.plan import peak_of_rank

    gpus = crew.parallel.launch.local_world
    return peak_of_rank(share, gpus, max(1, crew.size // gpus))


def bytes_to_hold(config: Config, source: Source, device: torch.device, crew: Crew = ALONE) -> int:
    """Bytes of all samples if they are to lie on the GPU, as the configuration says or where they have room beside a
    step; else 0."""
    wanted = config.run.data_on_gpu
    size = on_device_bytes(source) if device.type == "cuda" and wanted is not False else None
    if size is None or wanted:
        return size or 0
    from ..training.memory_estimate import USABLE

    free = USABLE * torch.cuda.mem_get_info(device)[0]
    if size > free:
        return 0
    share = replace(config, batch_size=config.batch_size // crew.size)
    still_to_come = _peak(share, crew) - torch.cuda.memory_allocated(device)
    return size if size <= free - max(still_to_come, 0) else 0


def _micro_batch(share: Config, device: torch.device, crew: Crew) -> int:
    """The micro-batch that "auto" stands for with the memory that is free now. Raises ConfigError if none fits."""
    if device.type != "cuda":
        return 0
    from ..training.memory_estimate import largest_micro_batch

    return largest_micro_batch(share, torch.cuda.mem_get_info(device)[0], lambda tried: _peak(tried, crew))


def resolve_attention(state: TrainState) -> str:
    """The attention backend of a run on this machine: the one that it asks for, or the fastest one at its shape.

    Raises ConfigError if the one that it asks for cannot be used.
    """
    if isinstance(state.config.model, UNetConfig):  # which has one of its own
        return state.flow.network.attention_backend
    config, model, device = state.config, state.config.dit, state.device
    name = config.run.attention
    dtype = torch.bfloat16 if state.precision in ("bf16", "fp8") else torch.float32
    compiled = config.run.compile
    (B, T), head_dim = _tokens(state), model.hidden_size // model.num_heads
    with matmul_precision(
        "tf32" if state.precision == "tf32" else "fp32", device
    ):  # as in the DiT, which has no autocast inside
        if name == "auto":
            shape = B, model.num_heads, T, head_dim
            return choose(device, dtype, *shape, time.perf_counter, compiled=compiled, apart=model.qk_norm)
        try_out(name, device, dtype, B, model.num_heads, T, head_dim, compiled=compiled, apart=model.qk_norm)
        return name


def resolve_mlp(state: TrainState) -> mlp_autotune.Choice:
    """Who makes the products of the MLPs in the steps of a run, on this machine and at their shape.

    Raises ConfigError if the one that is asked for cannot be used.
    """
    if isinstance(state.config.model, UNetConfig):
        return mlp_autotune.Choice("kernels", "")
    run, model, unfit = state.config.run, state.config.dit, None
    if state.precision != "bf16":
        unfit = f"needs a step in bf16, it is in {state.precision}"
    elif run.compile:
        unfit = "the blocks are compiled"
    B, T = _tokens(state)
    shape = mlp_autotune.Shape(B * T, model.hidden_size, int(model.hidden_size * model.mlp_ratio))
    return mlp_autotune.choose(
        run.mlp, state.device, torch.bfloat16, shape, time.perf_counter, unfit=unfit, record=_recorder(state)
    )


def _recorder(state: TrainState) -> Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]] | None:
    """What makes a function a CUDA graph on the device of a run; None: its steps are none."""
    if not state.graphed:
        return None

    def record(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        with torch.cuda.device(state.device):
            return record_graph(function, torch.cuda.Stream(state.device))

    return record


def set_mlp(state: TrainState, name: str) -> None:
    """Let the network that is trained take a way through its MLPs. The others have no backward to keep values for."""
    state.flow.network.mlp = name


def _tokens(state: TrainState) -> tuple[int, int]:
    """The samples in one forward of the student, and the tokens of each."""
    config, model = state.config, state.config.dit
    B = config.batch_size // state.world
    return min(config.micro_batch, B) or B, (model.input_size // model.patch_size) ** 2


def enough_memory(config: Config) -> AbstractContextManager[None]:
    """Within it, memory that runs out is a ConfigError with advice."""
    return errors.enough_memory(
        f"--batch-size {config.batch_size}: out of memory; give a smaller --micro-batch, --recompute block, "
        f"a smaller batch or network ({config.model.words})"
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

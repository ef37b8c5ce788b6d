"""One training step: three network calls, one update (two calls without guidance).

1. without gradient: the velocities that guidance needs; unlabelled of every sample, labelled of the consistency ones;
2. with gradient: the student on the whole batch, both losses at once, as t and s are per sample;
3. without gradient: the look-ahead (x_l, l, s) of the consistency samples.

In units of one forward of the whole batch that is 1.25 + 3 + 0.25 at the public recipe (backward: 2). Where the
consistency target is taken by increments, the third call makes the products of increments alone: their values ride
along on the second. A teacher, or another precision of the target, takes a value-and-increment pass or a pair of its
own: 0.5.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from soflow_kernels import AdamWEMA, clip_scale, on_gpu

from ..augmentation import Changes, augmented
from ..config.schema import DiTConfig
from ..flow import conditions, null_like, seen_in_training
from ..models.dit import TapedOutputs
from ..models.float8 import is_twin
from ..objective import ConsistencyPoints, LossTerm, with_null, without_guidance
from ..ranks import flow_matching_samples, micro_batches, share, share_of_first
from ._draws import Draws, draw, given, own_n_fm
from .consistency_target import CHECKED_SAMPLES, quotient_cosine, value_and_increment
from .cuda_graph import WARM_UP, WARM_UP_OF_REPLICAS, GraphedFunction
from .nonfinite import PLACES, FiniteFlags, note_finite
from .precision import backward_precision, matmul_precision
from .state import TrainState

if TYPE_CHECKING:
    from .parallel import Parallel

Observer = Callable[..., None]
"""`observe(name, **values)`, called on the way through a step; it changes nothing."""


class Samples(NamedTuple):
    """Some samples of a batch with their draws; the first `n_fm` are flow matching."""

    x_t: Tensor
    v_t: Tensor
    t: Tensor
    l: Tensor
    s: Tensor
    y: Tensor | None
    """Labels [B] or vectors [B, E], the dropped ones replaced by the null one; None: unconditional."""
    label_dropped: Tensor
    n_fm: int
    w: Tensor | None = None
    """Guidance scales [B] of a network that sees them, 1 where there is no label."""
    augmentation: Tensor | None = None
    """Labels of what was done to the images, [B, 9]; None: nothing was."""
    dropout: Tensor | None = None
    """Seeds of the dropout, int32 [B]; None: there is none."""

    @property
    def fm(self) -> slice:
        return slice(0, self.n_fm)

    @property
    def sc(self) -> slice:
        return slice(self.n_fm, len(self.x_t))


def train_step(
    state: TrainState,
    x0: Tensor,
    y: Tensor | None,
    *,
    draws: Draws | None = None,
    observe: Observer | None = None,
) -> dict[str, Tensor]:
    """One whole update of `state` on this rank's batch.

    x0: [B, C, H, W] in [-1, 1] or scaled latents; y: labels [B], or vectors [B, E] where the network has a
    `condition_size`, None: unconditional. Of several ranks each gives its share of the whole batch, all at the same
    time.
    Returns scalars of the whole batch, as tensors on the device: losses, `sc_mse` (`LossTerm`), weights, gradient norm,
    learning rate; every `run.check_quotient_every` steps `q_cosine` (`measure_quotient`); where such steps are skipped,
    `skipped`: how many so far had a number that is not finite. They change nothing but the count of steps. Nothing is
    copied to the host.

    draws: noise, times, dropped labels and, of a network with a `guidance_range`, guidance scales, on any device, such
    as those that another implementation was fed with; None: those of `draw`. Of several ranks each gives its own, with
    the `n_fm` of its `draw`. Without changes of the images or seeds of the dropout there is neither.
    observe: called for each micro-batch as `observe("micro-batch", number=)`, `observe("guidance", null=, labelled=)`,
    `observe("student", samples=, output=)`, `observe("target", points=, value=, increment=)`,
    `observe("losses", fm=, sc=)` and, just before its backward, `observe("backward", loss=)`; then, before the update,
    as `observe("update")`. A step that is observed runs as it is, not as a CUDA graph.
    Raises ValueError if x0 and y do not fit the model, draws do not fit x0, or the optimiser does not hold a parameter.
    """
    config = state.config
    _check_batch(state, x0, y)
    state.check_parameters()
    x0 = x0.to(state.device, state.flow.network.input_dtype, non_blocking=True)
    y = None if y is None or not config.model.conditional else y.to(state.device, non_blocking=True)
    if y is not None and y.is_floating_point():
        y = y.to(x0.dtype)
    draws = draw(state, x0.shape) if draws is None else given(state, x0, draws)
    _set_rates(state)
    measured = _measured_by_all(state, x0, y, draws) if _checks_quotient(state) else None
    if state.graph is None and state.graphed:
        make_graph(state)
    recorded = draws.n_fm == own_n_fm(state, len(x0))
    if state.graph is not None and observe is None and recorded and not state.watched():
        totals = state.graph(x0, y, *draws.tensors)
    else:
        totals = update(state, x0, y, draws, observe or _unobserved)
    if measured is not None:
        totals["q_cosine"] = measured
    totals["lr"] = torch.tensor(learning_rate(state))
    if config.run.on_nonfinite == "skip":
        totals["skipped"] = state.guard.skipped()
    state.step += 1
    return totals


def _unobserved(name: str, **values: Any) -> None:
    pass


def make_graph(state: TrainState) -> None:
    """Make the next steps of `state` a CUDA graph, once some have been made as they are."""
    for group in state.optimizer.param_groups:  # read from the device, as a number would be recorded
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=state.device).clone()

    def function(x0: Tensor, y: Tensor | None, *drawn: Any) -> dict[str, Tensor]:
        return update(state, x0, y, Draws.of(drawn, own_n_fm(state, len(x0))))

    warm_up = WARM_UP if state.parallel is None else WARM_UP_OF_REPLICAS
    state.graph = GraphedFunction(
        function,
        warm_up,
        release=lambda: state.optimizer.zero_grad(set_to_none=True),
        stream=None if state.engine is None else state.engine.stream,
    )


def update(
    state: TrainState, x0: Tensor, y: Tensor | None, draws: Draws, observe: Observer = _unobserved
) -> dict[str, Tensor]:
    """The part of a step that runs on the device, from its draws to the weights; nothing is copied to the host."""
    config, B = state.config, len(x0)
    state.optimizer.zero_grad(set_to_none=True)
    if state.engine is not None:
        state.engine.forget()
    parts = micro_batches(B, config.micro_batch)
    low = parts == 1 and isinstance(state.optimizer, AdamWEMA)  # the others take gradients in float32
    # Replicas add up in float32 as well, in their own way: their engine takes gradients in the dtype of parameters.
    state.sum_gradients_in(None if low or (state.engine and state.engine.sums_itself) else torch.float32)
    ranks = state.parallel.world if state.parallel is not None else 1
    whole_fm = draws.n_fm if ranks == 1 else flow_matching_samples(B * ranks, config.objective.flow_matching_fraction)
    totals: dict[str, Tensor] = {}
    flags: FiniteFlags = {}
    note_finite(flags, "input", x0, *([y] if y is not None and y.is_floating_point() else []))
    if state.parallel is not None:  # after the reduction no rank's gradient tells whose was wrong
        state.flow.network.watch_gradient = partial(note_finite, flags, "gradient")
    for k in range(parts):
        if state.engine is not None:
            state.engine.begin(last=k == parts - 1)
        observe("micro-batch", number=k)
        index, n_fm = _micro_batch(B, draws.n_fm, k, parts, x0.device)
        samples = _samples(state, x0, y, draws, index, n_fm)
        fm, sc = _losses(state, samples, flags, observe)
        observe("losses", fm=fm, sc=sc)
        n_sc = len(samples.x_t) - n_fm
        loss = (n_fm * fm.loss if n_fm else 0) + (n_sc * sc.loss if n_sc else 0)
        assert isinstance(loss, Tensor)
        loss = loss / B
        observe("backward", loss=loss)
        with backward_precision(state.precision, state.device):
            loss.backward()
        for name, term, n, whole in (("fm", fm, n_fm, whole_fm), ("sc", sc, n_sc, B * ranks - whole_fm)):
            for part, value in zip(term._fields, term, strict=True) if whole else ():
                key, value = f"{name}_{part}", value.detach() * (n / whole) if n else torch.zeros_like(value)
                totals[key] = totals.get(key, 0) + value
    observe("update")
    note_finite(flags, "loss", torch.stack(list(totals.values())))
    if state.engine is not None:
        state.engine.end()
        state.flow.network.watch_gradient = None
    return _update(state, flags, totals)


def _checks_quotient(state: TrainState) -> bool:
    every, dit = state.config.run.check_quotient_every, isinstance(state.config.model, DiTConfig)
    if not dit and state.target.precision == "fp32":  # there is nothing more exact to compare it with
        return False
    return bool(every) and (state.step + 1) % every == 0


def _check_batch(state: TrainState, x0: Tensor, y: Tensor | None) -> None:
    model = state.config.model
    if not x0.is_floating_point() or x0.dim() != 4 or not len(x0):
        raise ValueError(f"x0 must be a floating [B, C, H, W] with B >= 1, got {x0.dtype} {list(x0.shape)}")
    if y is None:
        return
    if model.condition_size:
        if not y.is_floating_point() or y.shape != (len(x0), model.condition_size):
            wanted = f"floating [{len(x0)}, {model.condition_size}], vectors of the model's condition_size"
            raise ValueError(f"y must be {wanted}, got {y.dtype} {list(y.shape)}")
        if not on_gpu(y) and not bool(torch.isfinite(y).all()):  # on a GPU the step itself refuses them
            row = int((~torch.isfinite(y)).any(1).nonzero()[0])
            raise ValueError(f"y must be finite, row {row} of it is not")
        return
    if y.dtype != torch.int64 or y.shape != x0.shape[:1]:
        raise ValueError(f"y must be int64 [{len(x0)}], got {y.dtype} {list(y.shape)}")
    most = model.num_classes - (not model.null_label)
    # Labels on a GPU are not looked at: that would wait for it.
    if not on_gpu(y) and model.num_classes and (int(y.min()) < 0 or int(y.max()) > most):
        raise ValueError(f"y must be labels in 0..{most}, got {int(y.min())} to {int(y.max())}")


def _micro_batch(B: int, n_fm: int, k: int, parts: int, device: torch.device) -> tuple[Tensor | None, int]:
    """Which samples are micro-batch k of `parts`, and how many of them (the first ones) are flow matching.

    Each takes its share of both losses. None: all samples, in order.
    """
    if parts == 1:
        return None, n_fm
    return share(B, n_fm, k, parts).to(device), share_of_first(B, n_fm, k, parts)


def _samples(state: TrainState, x0: Tensor, y: Tensor | None, draws: Draws, index: Tensor | None, n_fm: int) -> Samples:
    """The samples of a micro-batch at their times. index: which they are; None: all of the batch."""
    x1, t, l, s, dropped = draws[:5]
    optional = y, draws.w, draws.augmentation, draws.dropout
    if index is not None:
        x0, x1, t, l, s, dropped = (value[index] for value in (x0, x1, t, l, s, dropped))
        optional = (None if value is None else value[index] for value in optional)
    y, w, changes, seeds = optional
    labels = None
    if changes is not None:
        made = Changes.of(changes)
        x0, labels = augmented(x0, made), made.labels
    x_t, v_t = state.flow.point(x0, x1, t)
    w = without_guidance(w, y, dropped)
    return Samples(x_t, v_t, t, l, s, with_null(state.flow, y, dropped), dropped, n_fm, w, labels, seeds)


def _losses(
    state: TrainState,
    samples: Samples,
    flags: FiniteFlags,
    observe: Observer,
) -> tuple[LossTerm, LossTerm]:
    """Both losses of some samples, from the three network calls. A loss without samples is NaN without gradient.

    flags: told whether the numbers on the way are finite.
    """
    v_null, v_label = _guidance(state, samples, flags)
    observe("guidance", null=v_null, labelled=v_label)
    output, tape = _student(state, samples, flags)
    observe("student", samples=samples, output=output)
    fm_term = sc_term = LossTerm(*[samples.x_t.new_full((), math.nan)] * 3)
    if samples.n_fm:
        fm = samples.fm
        null = None if v_null is None else v_null[fm]
        fm_term = state.objective.flow_matching_term(
            state.flow,
            output[fm],
            samples.v_t[fm],
            samples.t[fm],
            null,
            samples.label_dropped[fm],
            None if samples.w is None else samples.w[fm],
        )
    if samples.n_fm < len(samples.x_t):
        sc = samples.sc
        null = None if v_null is None else v_null[sc]
        points, value, increment = _target(state, samples, null, v_label, output[sc], tape, flags)
        observe("target", points=points, value=value, increment=increment)
        sc_term = state.objective.consistency_term(state.flow, output[sc], points, value, increment)
    return fm_term, sc_term


def _guidance(state: TrainState, samples: Samples, flags: FiniteFlags) -> tuple[Tensor | None, Tensor | None]:
    """The velocities of all samples without a label, and of the consistency samples with theirs; None: not needed."""
    flow, y, w = state.guide or state.flow, samples.y, samples.w
    network = flow.network
    if not state.objective.guided or y is None:
        return None, None
    if state.guide is not None and not is_twin(network, state.flow.network):
        raise ValueError(
            "state.guide: its parameters are no longer the network's; set it to None, or build a new state"
        )
    B, sc = len(samples.x_t), samples.sc
    null = null_like(network, y)
    mixed = state.objective.mixed and samples.n_fm < B
    x, t = (torch.cat([v, v[sc]]) if mixed else v for v in (samples.x_t, samples.t))
    labels = torch.cat([null, y[sc]]) if mixed else null
    if w is not None:  # without a label at 1, as samples that have lost theirs are
        w = torch.cat([torch.ones_like(w), w[sc]]) if mixed else torch.ones_like(w)
    with torch.no_grad(), matmul_precision(state.precision, state.device):
        velocities = flow.to_velocity(network(x, t, t, *conditions(labels, w)).float())
    note_finite(flags, "guidance", velocities)
    return velocities[:B], velocities[B:] if mixed else None


def _student(state: TrainState, samples: Samples, flags: FiniteFlags) -> tuple[Tensor, TapedOutputs | None]:
    """N(x_t, t, s) of all samples, in float32, and the outputs on which the consistency target rides along."""
    network, (x_t, _, t, _, s, y, _, n_fm, w, labels, seeds) = state.flow.network, samples
    given, more = conditions(y, w), seen_in_training(labels, seeds)
    # Without consistency samples there is nothing to ride along for.
    tape = TapedOutputs(samples.sc) if n_fm < len(x_t) and state.rides_along() else None
    call: Any = network if state.engine is None or not torch.is_grad_enabled() else state.engine.module
    with matmul_precision(state.precision, state.device):
        more |= {} if tape is None else {"tape": tape}
        output = call(x_t, t, s, *given, **more).float()
    note_finite(flags, "network", output)
    return output, tape


@torch.no_grad()
def _target(
    state: TrainState,
    samples: Samples,
    v_null: Tensor | None,
    v_label: Tensor | None,
    output: Tensor,
    tape: TapedOutputs | None,
    flags: FiniteFlags,
) -> tuple[ConsistencyPoints, Tensor, Tensor]:
    """The points of the consistency samples, and value and increment between them.

    v_null, v_label, output: of the consistency samples alone.
    """
    flow, objective, sc = state.flow, state.objective, samples.sc
    x, v_t, t, l, s, dropped = (
        v[sc] for v in (samples.x_t, samples.v_t, samples.t, samples.l, samples.s, samples.label_dropped)
    )
    optional = samples.y, samples.w, samples.augmentation, samples.dropout
    y, w, labels, seeds = (None if value is None else value[sc] for value in optional)
    velocity, dx, x_l = objective.look_ahead(x, v_t, t, l, v_null, v_label, dropped, w)
    points = ConsistencyPoints(x, velocity, dx, x_l, t, l, s, y, w, labels, seeds)
    own = state.precision == state.target.precision or state.target.teacher == "ema"
    given = output if own else None
    value, increment = value_and_increment(state.target, flow, state.teacher, points, given, tape)
    note_finite(flags, "teacher", value, increment)
    return points, value, increment


@torch.no_grad()
def measure_quotient(state: TrainState, x0: Tensor, y: Tensor | None, draws: Draws) -> Tensor | None:
    """The cosine of the quotients of the batch's first consistency samples, made as in the step, with a float32
    evaluation of them; None: there are no such samples.

    In forwards of their own, of a few samples: the step itself stays what it always is, a recorded one included.
    """
    n = min(CHECKED_SAMPLES, len(x0) - draws.n_fm)
    if not n:
        return None
    samples = _samples(state, x0, y, draws, torch.arange(draws.n_fm, draws.n_fm + n, device=x0.device), 0)
    flags: FiniteFlags = {}
    v_null, v_label = _guidance(state, samples, flags)
    output, tape = _student(state, samples, flags)
    points, value, increment = _target(state, samples, v_null, v_label, output, tape, flags)
    q = state.objective.quotient(state.flow, points, value, increment)
    return quotient_cosine(state.target, state.objective, state.flow, state.teacher, points, q)


def _measured_by_all(state: TrainState, x0: Tensor, y: Tensor | None, draws: Draws) -> Tensor | None:
    """`measure_quotient`, of several ranks the mean over those that have consistency samples."""
    measured = measure_quotient(state, x0, y, draws)
    if state.parallel is None:
        return measured
    nothing = torch.zeros((), device=state.device)
    mine = [nothing, nothing] if measured is None else [measured.float(), nothing + 1]
    total, ranks = state.parallel.rows(torch.stack(mine)).sum(0)
    B, fraction = len(x0) * state.world, state.config.objective.flow_matching_fraction
    return total / ranks if flow_matching_samples(B, fraction) < B else None


def learning_rate(state: TrainState) -> float:
    """The learning rate of the next update."""
    optim, k, K = state.config.optim, state.step, state.config.steps
    rate = optim.lr * min(1.0, (k + 1) / optim.warmup_steps if optim.warmup_steps else 1.0)
    return rate * (1 + math.cos(math.pi * k / K)) / 2 if optim.lr_schedule == "cosine" else rate


def ema_decay(state: TrainState) -> float:
    """The decay of the EMA in the next update: 1 where it accumulates nothing, else that of all updates since."""
    optim, every = state.config.optim, state.config.optim.ema_every
    if (state.step + 1) % every:
        return 1.0
    decay = optim.ema_decay**every
    return min(decay, (1 + state.step) / (10 + state.step)) if optim.ema_warmup else decay


def teacher_decay(state: TrainState) -> float:
    """The decay of the teacher in the next update. It rises to the configured one as (1 + step) / (10 + step): an
    average that still holds the initial weights would teach them."""
    return min(state.config.objective.teacher_decay, (1 + state.step) / (10 + state.step))


@torch.no_grad()
def _set_rates(state: TrainState) -> None:
    """The learning rate and the decays of the next update, to where the optimiser reads them."""
    optimizer = state.optimizer
    state.guard.step.fill_(state.step + 1)
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(learning_rate(state))
        else:
            group["lr"] = learning_rate(state)
    decays = [ema_decay(state)] if state.teacher is None else [ema_decay(state), teacher_decay(state)]
    for place, decay in zip(optimizer.ema_decays, decays, strict=True):
        place.fill_(decay)


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients, float32 []. Those of each dtype go together: torch takes a mixed list one by one."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    norms = [norm for each in by_dtype.values() for norm in torch._foreach_norm(each, 2, dtype=torch.float32)]
    return torch.stack(norms).norm()


@torch.no_grad()
def _update(state: TrainState, flags: FiniteFlags, totals: dict[str, Tensor]) -> dict[str, Tensor]:
    """Clip, AdamW and the averages; nothing moves if a number is not finite, on whatever rank.

    totals: of this rank's share, to be added up over the ranks. Returns them, and the norm before clipping.
    """
    optimizer, optim = state.optimizer, state.config.optim
    gradients = [p.grad for p in state.flow.parameters() if p.grad is not None]
    first_ranks = None
    if state.parallel is not None:
        norm = gradient_norm(state.parallel.local_parts(gradients))
        norm, flags, totals, first_ranks = _agreed(state.parallel, norm, flags, totals)
    else:
        norm = gradient_norm(gradients)
    note_finite(flags, "gradient", norm)
    scale, _ = clip_scale(norm, optim.grad_clip)
    finite = state.guard.should_update(flags, first_ranks)
    try:
        optimizer.step(grad_scale=scale if optim.grad_clip else None, finite=finite)
    except torch.OutOfMemoryError as error:  # some weights may have moved: not to be repeated
        raise MemoryError(str(error)) from error
    return {**totals, "grad_norm": norm}


def _agreed(
    parallel: "Parallel", norm: Tensor, flags: FiniteFlags, totals: dict[str, Tensor]
) -> tuple[Tensor, FiniteFlags, dict[str, Tensor], Tensor]:
    """The norm of the whole gradient, what is finite on every rank, and sums over ranks, by one exchange of a few
    numbers; and for each place the first rank on which it is not finite, -1 where it is not on any. flags: of what is
    this rank's own; a gradient that is wrong after the reduction alone is no rank's.

    Every rank adds up the same rows in the same order, so that all do the same.
    """
    fine = torch.ones_like(norm, dtype=torch.bool)
    wrong = torch.stack([~flags.get(place, fine) for place in PLACES]).double()
    # Where several ranks hold the same gradient, each gives its part of the square.
    square = norm.double().square() / parallel.replicas
    rows = parallel.rows(torch.cat([square.view(1), wrong, torch.stack([*totals.values()]).double()]))
    bad, sums = rows[:, 1 : 1 + len(PLACES)] > 0, rows[:, 1 + len(PLACES) :].sum(0).float()
    agreed = {place: ~bad[:, k].any() for k, place in enumerate(PLACES)}
    first_ranks = torch.where(bad.any(0) & ~bad.all(0), bad.int().argmax(0), -1)
    return rows[:, 0].sum().sqrt().float(), agreed, dict(zip(totals, sums.unbind(), strict=True)), first_ranks

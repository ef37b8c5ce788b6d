"""One training step: three network calls, one update (two calls without guidance).

1. without gradient: the velocities that guidance needs; unlabelled of every sample, labelled of the consistency ones;
2. with gradient: the student on the whole batch, both losses at once, as t and s are per sample;
3. without gradient: the look-ahead (x_l, l, s) of the consistency samples.

In units of one forward of the whole batch that is 1.25 + 3 + 0.25 at the public recipe (backward: 2). Where the
quotient is taken by increments, the third call makes the products of increments alone: their values ride along on the
second. A teacher, or another precision of the quotient, takes a value-and-increment pass or a pair of its own: 0.5.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from soflow_kernels import AdamWEMA, clip_scale

from ..models.dit import Tape
from ..objective import LossTerm, with_null
from ..rng import generator
from .consistency_target import Ends, comparable, cosine, products, value_and_increment
from .cuda_graph import Captured
from .nonfinite import Seen, look
from .state import TrainState


class Draws(NamedTuple):
    """Everything random in one step's batch. The first `n_fm` samples are flow matching, where l = s = t."""

    x1: Tensor
    t: Tensor
    l: Tensor
    s: Tensor
    label_dropped: Tensor
    n_fm: int


def split(batch_size: int, fraction: float, start: int, stop: int) -> int:
    """How many of the samples [start, stop) of a global batch take the flow-matching loss.

    Over any partition of the batch into ranges the counts add up to exactly round(fraction * batch_size).
    """
    total = math.floor(fraction * batch_size + 0.5)
    return total * stop // batch_size - total * start // batch_size


def _n_fm(state: TrainState, B: int) -> int:
    """How many of this rank's B samples take the flow-matching loss."""
    first = B * state.rank
    return split(B * state.world, state.config.objective.fm_fraction, first, first + B)


def draw(state: TrainState, shape: torch.Size) -> Draws:
    """The noise, times and dropped labels of the next step on this rank, for a batch of `shape` [B, C, H, W]."""
    config, objective, B = state.config, state.objective, shape[0]

    def source(purpose: str) -> torch.Generator:
        return generator(config.seed, state.step, state.rank, purpose, state.device)

    n_fm = _n_fm(state, B)
    x1 = torch.randn(shape, generator=source("noise"), device=state.device)
    times = source("time")
    t_fm = objective.flow_matching_times(n_fm, times)
    t_sc, s_sc = objective.consistency_times(B - n_fm, times)
    l_sc = objective.middle_time(t_sc, s_sc, state.step, config.steps)
    dropped = torch.rand(B, generator=source("label drop"), device=state.device) < config.objective.label_drop
    return Draws(x1, torch.cat([t_fm, t_sc]), torch.cat([t_fm, l_sc]), torch.cat([t_fm, s_sc]), dropped, n_fm)


def train_step(state: TrainState, x0: Tensor, y: Tensor | None) -> dict[str, Tensor]:
    """One whole update of `state` on this rank's batch.

    x0: [B, C, H, W] in [-1, 1] or scaled latents; y: labels [B], None: unconditional. Returns scalars as tensors on the
    device: losses, `sc_mse` (mean q^2), weights, gradient norm, learning rate; every `run.check_quotient_every` steps
    `q_cosine`, of the quotient with its float32 value; where such steps are skipped, `skipped`: how many so far had a
    number that is not finite. They change nothing but the count of steps. Nothing is copied to the host.
    Raises ValueError if x0 and y do not fit the model.
    """
    config = state.config
    _check_batch(state, x0, y)
    x0 = x0.to(state.device, state.flow.network.pos_embed.dtype, non_blocking=True)
    y = None if y is None or config.model.num_classes == 0 else y.to(state.device, non_blocking=True)
    draws = draw(state, x0.shape)
    _set_rates(state)
    if state.captured is None and config.run.cuda_graph:
        capture(state)
    if state.captured is not None and not _checks_quotient(state):
        state.flow.network.refresh_copies()
        totals = state.captured(x0, y, *draws[:-1])
        if not isinstance(state.optimizer, AdamWEMA):  # a replay runs no line of `_update`
            state.flow.network.forget_copies()
    else:
        totals = update(state, x0, y, draws)
    totals["lr"] = torch.tensor(learning_rate(state))
    if config.run.on_nonfinite == "skip":
        totals["skipped"] = state.guard.skipped()
    state.step += 1
    return totals


def capture(state: TrainState) -> None:
    """Make the next steps of `state` a CUDA graph, once some have been made as they are."""
    for group in state.optimizer.param_groups:  # read from the device, as a number would be recorded
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=state.device).clone()

    def function(x0: Tensor, y: Tensor | None, *drawn: Any) -> dict[str, Tensor]:
        return update(state, x0, y, Draws._make([*drawn, _n_fm(state, len(x0))]))

    state.captured = Captured(function)


def update(state: TrainState, x0: Tensor, y: Tensor | None, draws: Draws) -> dict[str, Tensor]:
    """What a step does on the device, from its draws to the weights; nothing of it is copied to the host."""
    config, B = state.config, len(x0)
    state.optimizer.zero_grad(set_to_none=True)
    micro = config.micro_batch if config.micro_batch > 0 else B
    parts = -(-B // micro)
    low = parts == 1 and isinstance(state.optimizer, AdamWEMA)  # the others take gradients of the weights' dtype
    state.sum_gradients_in(None if low else torch.float32)
    totals: dict[str, Tensor] = {}
    seen: Seen = {}
    look(seen, "input", x0)
    for k in range(parts):
        index, n_fm = _micro_batch(B, draws.n_fm, k, parts, x0.device)
        checked = totals if k == 0 and _checks_quotient(state) else None
        fm, sc = _losses(state, x0, y, draws, index, n_fm, seen, checked)
        n_sc = (B // parts if index is None else len(index)) - n_fm
        loss = (n_fm * fm.loss if n_fm else 0) + (n_sc * sc.loss if n_sc else 0)
        assert isinstance(loss, Tensor)
        with products(state.precision, state.device):
            (loss / B).backward()
        for name, term, n, whole in (("fm", fm, n_fm, draws.n_fm), ("sc", sc, n_sc, B - draws.n_fm)):
            for part, value in zip(term._fields, term, strict=True) if n else ():
                totals[f"{name}_{part}"] = totals.get(f"{name}_{part}", 0) + value.detach() * (n / whole)
    look(seen, "loss", torch.stack([value for name, value in totals.items() if name != "q_cosine"]))
    totals["grad_norm"] = _update(state, seen)
    return totals


def _checks_quotient(state: TrainState) -> bool:
    every = state.config.run.check_quotient_every
    return bool(every) and comparable(state.quotient) and (state.step + 1) % every == 0


def _check_batch(state: TrainState, x0: Tensor, y: Tensor | None) -> None:
    model = state.config.model
    if not x0.is_floating_point() or x0.dim() != 4 or not len(x0):
        raise ValueError(f"x0 must be a floating [B, C, H, W] with B >= 1, got {x0.dtype} {list(x0.shape)}")
    if y is None:
        return
    if y.dtype != torch.int64 or y.shape != x0.shape[:1]:
        raise ValueError(f"y must be int64 [{len(x0)}], got {y.dtype} {list(y.shape)}")
    # Labels on a GPU are not looked at: that would wait for it.
    if not y.is_cuda and model.num_classes and (int(y.min()) < 0 or int(y.max()) > model.num_classes):
        raise ValueError(f"y must be labels in 0..{model.num_classes}, got {int(y.min())} to {int(y.max())}")


def _micro_batch(B: int, n_fm: int, k: int, parts: int, device: torch.device) -> tuple[Tensor | None, int]:
    """Which samples are micro-batch k of `parts`, and how many of them (the first ones) are flow matching.

    Each takes its share of both losses. None: all samples, in order.
    """
    if parts == 1:
        return None, n_fm
    start, stop = B * k // parts, B * (k + 1) // parts
    a, b = n_fm * start // B, n_fm * stop // B
    flow_matching = torch.arange(a, b, device=device)
    return torch.cat([flow_matching, torch.arange(n_fm + start - a, n_fm + stop - b, device=device)]), b - a


def _losses(
    state: TrainState,
    x0: Tensor,
    y: Tensor | None,
    draws: Draws,
    index: Tensor | None,
    n_fm: int,
    seen: Seen,
    checked: dict[str, Tensor] | None,
) -> tuple[LossTerm, LossTerm]:
    """Both losses of some samples, from the three network calls. A loss without samples is NaN without gradient.

    seen: is told whether the numbers on the way are finite.
    checked: where the measured cosine of the quotient goes, None: it is not measured.
    """
    flow, objective, network = state.flow, state.objective, state.flow.network
    x1, t, l, s, dropped = draws[:5]
    if index is not None:
        x0, x1, t, l, s, dropped = (value[index] for value in (x0, x1, t, l, s, dropped))
        y = None if y is None else y[index]
    label = with_null(flow, y, dropped)
    x_t, v_t = flow.point(x0, x1, t)
    fm, sc = slice(0, n_fm), slice(n_fm, len(x0))

    v_null = v_sc = None
    if objective.guided and y is not None:
        null = torch.full_like(y, network.num_classes)
        mixed = objective.mixed and n_fm < len(x0)
        x, times = (torch.cat([v, v[sc]]) if mixed else v for v in (x_t, t))
        labels = torch.cat([null, label[sc]]) if mixed and label is not None else null
        with torch.no_grad(), products(state.precision, state.device):
            guidance = flow.to_velocity(network(x, times, times, labels).float())
        look(seen, "guidance", guidance)
        v_null, v_sc = guidance[: len(x0)], guidance[len(x0) :] if mixed else None

    # Without consistency samples there is nothing to ride along for.
    tape = Tape(sc) if n_fm < len(x0) and state.rides_along() else None
    with products(state.precision, state.device):
        output = (network(x_t, t, s, label) if tape is None else network(x_t, t, s, label, tape=tape)).float()
    look(seen, "network", output)

    fm_term = sc_term = LossTerm(*[x_t.new_full((), math.nan)] * 3)
    if n_fm:
        null_fm = None if v_null is None else v_null[fm]
        fm_term = objective.flow_matching_term(flow, output[fm], v_t[fm], t[fm], null_fm, dropped[fm])
    if n_fm < len(x0):
        x, t, l, s = x_t[sc], t[sc], l[sc], s[sc]
        null_sc = None if v_null is None else v_null[sc]
        labels = None if label is None else label[sc]
        with torch.no_grad():
            target, dx, x_l = objective.look_ahead(x, v_t[sc], t, l, null_sc, v_sc, dropped[sc])
            at = Ends(x, target, dx, x_l, t, l, s, labels)
            own = state.precision == state.quotient.precision or state.quotient.teacher == "ema"
            given = output[sc] if own else None
            value, increment = value_and_increment(state.quotient, flow, state.teacher, at, given, tape)
            look(seen, "teacher", value, increment)
            if checked is not None:
                q = objective.quotient(flow, value, increment, x, target, t, l, s)
                checked["q_cosine"] = cosine(state.quotient, objective, flow, state.teacher, at, q)
        sc_term = objective.consistency_term(flow, output[sc], value, increment, x, target, t, l, s)
    return fm_term, sc_term


def learning_rate(state: TrainState) -> float:
    """The learning rate of the next update."""
    optim, k, K = state.config.optim, state.step, state.config.steps
    rate = optim.lr * min(1.0, (k + 1) / optim.warmup_steps if optim.warmup_steps else 1.0)
    return rate * (1 + math.cos(math.pi * k / K)) / 2 if optim.lr_schedule == "cosine" else rate


def ema_decay(state: TrainState) -> float:
    """The decay of the EMA in the next update."""
    decay = state.config.optim.ema_decay
    return min(decay, (1 + state.step) / (10 + state.step)) if state.config.optim.ema_warmup else decay


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


@torch.no_grad()
def _update(state: TrainState, seen: Seen) -> Tensor:
    """Clip, AdamW and the averages; nothing moves if a number is not finite. Returns the norm before clipping."""
    optimizer, optim = state.optimizer, state.config.optim
    gradients = [p.grad for p in state.flow.parameters() if p.grad is not None]
    norm = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).norm()
    scale, _ = clip_scale(norm, optim.grad_clip)
    look(seen, "gradient", norm)
    finite = state.guard.allows(seen)
    try:
        optimizer.step(grad_scale=scale if optim.grad_clip else None, finite=finite)
    except torch.OutOfMemoryError as error:  # some weights may have moved: not to be repeated
        raise MemoryError(str(error)) from error
    for layer in state.flow.network.copied_layers():
        if isinstance(optimizer, AdamWEMA):
            layer.copy.trust(layer)
        else:
            layer.copy.forget()
    return norm

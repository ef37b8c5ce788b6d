"""Everything random in a training step: noise, times, dropped labels, guidance scales, changes of images, dropout."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from soflow_kernels import on_gpu

from ..augmentation import Changes
from ..config.schema import UNetConfig
from ..ranks import flow_matching_samples, share, share_of_first
from ..rng import generator
from .state import TrainState


class Draws(NamedTuple):
    """Everything random in one step's batch. The first `n_fm` samples are flow matching, where l = s = t."""

    x1: Tensor
    """Noise [B, C, H, W]."""
    t: Tensor
    """Times [B], float32; of consistency samples s <= l < t, though MeanFlow's l may be below s."""
    l: Tensor
    s: Tensor
    label_dropped: Tensor
    """bool [B]: the labels that become the null label."""
    n_fm: int
    w: Tensor | None = None
    """Guidance scales [B] where each sample has its own; None: it does not."""
    augmentation: Tensor | None = None
    """What is done to the images, [B, 8] as of `augmentation.Changes`; None: nothing."""
    dropout: Tensor | None = None
    """A seed of each sample's dropout, int32 [B]; None: nothing is left out."""

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All but `n_fm`."""
        return *self[:5], *self[6:]

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None], n_fm: int) -> "Draws":
        """The inverse of `tensors`."""
        return cls(*tensors[:5], n_fm, *tensors[5:])  # pyright: ignore[reportArgumentType, reportCallIssue]


def own_n_fm(state: TrainState, B: int) -> int:
    """The number of this rank's B samples that take the flow-matching loss."""
    whole = B * state.world
    first = flow_matching_samples(whole, state.config.objective.flow_matching_fraction)
    return share_of_first(whole, first, state.rank, state.world)


def draw(state: TrainState, shape: Sequence[int]) -> Draws:
    """The noise, times, dropped labels, guidance scales, changes of the images and seeds of the dropout of the next
    step on this rank, for a batch of `shape` [B, C, H, W].

    A function of the seed, the step and the shape: it changes nothing, and gives the same until the next `train_step`.
    They are drawn for the whole batch of all ranks, of which this one takes its share (`ranks.share`).
    """
    config, objective, whole = state.config, state.objective, shape[0] * state.world

    def source(purpose: str) -> torch.Generator:
        return generator(config.seed, state.step, 0, purpose, state.device)

    n_fm = flow_matching_samples(whole, config.objective.flow_matching_fraction)
    x1 = torch.randn(whole, *shape[1:], generator=source("noise"), device=state.device)
    times = source("time")
    t_fm = objective.flow_matching_times(n_fm, times)
    t_sc, s_sc = objective.consistency_times(whole - n_fm, times)
    l_sc = objective.middle_time(t_sc, s_sc, state.step, config.steps)
    dropped = torch.rand(whole, generator=source("label drop"), device=state.device) < config.objective.label_drop
    w = None if objective.guidance_range is None else objective.guidance_scales(whole, source("guidance scale"))
    changes = seeds = None
    if config.data.augment:
        changes = Changes.drawn(whole, config.data.augment, source("augmentation")).stacked
    if isinstance(config.model, UNetConfig) and config.model.dropout:
        seeds = torch.empty(whole, dtype=torch.int32, device=state.device)
        seeds.random_(-(2**31), 2**31, generator=source("dropout"))
    times_of = torch.cat([t_fm, t_sc]), torch.cat([t_fm, l_sc]), torch.cat([t_fm, s_sc])
    drawn = x1, *times_of, dropped, w, changes, seeds
    if state.world == 1:
        return Draws.of(drawn, n_fm)
    mine = share(whole, n_fm, state.rank, state.world).to(state.device)
    return Draws.of([None if values is None else values[mine] for values in drawn], own_n_fm(state, shape[0]))


def given(state: TrainState, x0: Tensor, draws: Draws) -> Draws:
    """Draws from outside, where x0 is. Raises ValueError for what does not fit; values on a GPU are not looked at."""
    B = len(x0)
    if not isinstance(draws, Draws):
        raise ValueError(f"draws must be Draws, got {type(draws).__name__}")
    for name, value in zip(draws._fields, draws, strict=True):
        if name == "n_fm" or (name in ("w", "augmentation", "dropout") and value is None):
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"draws.{name} must be a tensor, got {type(value).__name__}")
        kind = {"label_dropped": "bool", "dropout": "int32"}.get(name, "floating")
        shape = {"x1": x0.shape, "augmentation": (B, len(Changes._fields))}.get(name, (B,))
        fits = value.is_floating_point() if kind == "floating" else value.dtype == getattr(torch, kind)
        if value.shape != shape or not fits:
            raise ValueError(f"draws.{name} must be {kind} {list(shape)}, got {value.dtype} {list(value.shape)}")
    scales = state.objective.guidance_range
    if draws.w is None and scales is not None:
        raise ValueError("draws.w must be given: the network sees a guidance scale of each sample")
    if draws.w is not None and scales is None:
        raise ValueError("draws.w: the network sees no guidance scale")
    model = state.config.model
    if draws.dropout is not None and not isinstance(model, UNetConfig):
        raise ValueError("draws.dropout: the network has none")
    if draws.augmentation is not None and not (isinstance(model, UNetConfig) and model.augmentation_labels):
        raise ValueError("draws.augmentation: the network does not see how images were changed")
    if type(draws.n_fm) is not int or not 0 <= draws.n_fm <= B:
        raise ValueError(f"draws.n_fm must be a whole number from 0 to {B}, got {draws.n_fm!r}")
    sc = slice(draws.n_fm, B)
    if not on_gpu(draws.l) and not on_gpu(draws.t) and not bool((draws.l[sc] < draws.t[sc]).all()):
        raise ValueError("draws.l must be below draws.t for consistency samples, those from draws.n_fm on")
    if draws.w is not None and scales is not None and not on_gpu(draws.w):
        low, high = scales
        if not bool(((draws.w >= low) & (draws.w <= high)).all()):
            raise ValueError(f"draws.w must be from {low:g} to {high:g}, as the network is trained")
    if state.parallel is not None and draws.n_fm != own_n_fm(state, B):
        raise ValueError(f"draws.n_fm must be {own_n_fm(state, B)} on this rank, as of draw(state, x0.shape)")
    return Draws._make(value.to(x0.device) if isinstance(value, Tensor) else value for value in draws)

"""The guidance scale that samples are asked for, of a network that was trained for a range of them."""

import math
from numbers import Real

import torch
from torch import Tensor

from ..config.schema import shown
from ..flow import SolutionFlow, is_null


def chosen_guidance(flow: SolutionFlow, guidance: float | None) -> float | None:
    """w for a network that sees it; None: the network does not.

    guidance: None: the middle of what the network was trained for, the geometric mean of its range. Raises ValueError
    for one that it was not trained for.
    """
    trained = getattr(getattr(flow.network, "config", None), "guidance_range", None)
    if isinstance(guidance, Tensor) and guidance.numel() == 1:
        guidance = guidance.item()
    if guidance is not None and (isinstance(guidance, bool) or not isinstance(guidance, Real)):
        raise ValueError(f"guidance must be a number, got {shown(guidance)}")
    if trained is None:
        if guidance is not None:
            raise ValueError(f"guidance must be left out, got {guidance:g}: the network was trained for one scale")
        return None
    low, high = trained
    if guidance is None:
        return math.sqrt(low * high)
    if not low <= guidance <= high:
        raise ValueError(f"guidance must be from {low:g} to {high:g}, as the network was trained, got {guidance:g}")
    return float(guidance)


def scales(flow: SolutionFlow, guidance: float | None, y: Tensor | None, like: Tensor) -> Tensor | None:
    """w [B] in float32 for samples `like` [B, ...] of labels y [B] or vectors [B, E]: 1 where there is none, which
    nothing guides.

    guidance: as `chosen_guidance` gives it. Raises ValueError for y of another shape.
    """
    if guidance is None:
        return None
    if y is not None and (len(y) != len(like) or y.dim() != (2 if y.is_floating_point() else 1)):
        raise ValueError(f"y must be [{len(like)}], got {list(y.shape)}")
    w = torch.full((len(like),), 1.0 if y is None else guidance, device=like.device)
    return w if y is None else torch.where(is_null(flow.network, y), torch.ones_like(w), w)

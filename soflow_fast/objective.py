"""The objectives: times, guidance and losses of SoFlow (arXiv 2512.15657), of flow matching alone, and of MeanFlow.

SoFlow is flow matching beside solution consistency. MeanFlow (`average_velocity`) puts another loss in the place of
consistency, between points as close as its derivative wants them; flow matching puts none.

It takes a flow, any object with SolutionFlow's methods, and imports no model. `flow_matching` and `consistency` call
the network themselves, one loss at a time; the training step batches the same calls over both losses and puts their
outputs into `look_ahead`, `flow_matching_term` and `consistency_term`. Times are [B], images [B, C, H, W].
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from soflow_kernels import consistency_loss, euler_lookahead, flow_matching_loss
from soflow_kernels.lookahead import Lookahead, guidance_decay
from soflow_kernels.losses import quotient

from . import average_velocity
from .config.schema import ObjectiveConfig
from .config.validation import validate_guidance_range, validate_objective
from .flow import SolutionFlow, conditions, null_like

TIME_GAP = 1e-4
"""The least distance kept between t, l and s."""


class LossTerm(NamedTuple):
    """One loss over its samples: what is minimised, and what is worth reporting. All scalars."""

    loss: Tensor
    mse: Tensor
    """Mean of delta^2 (flow matching), of q^2 (consistency) or of |u - u_tgt|^2 (MeanFlow), detached."""
    weight: Tensor
    """Mean of the per-sample weights w_i, detached."""


class ConsistencyPoints(NamedTuple):
    """Consistency samples [B, C, H, W] between the two points of a quotient, and their times [B]."""

    x: Tensor
    """x_t."""
    target: Tensor
    """The velocity along which the look-ahead goes."""
    dx: Tensor
    """x_l - x_t = (l - t) target."""
    x_l: Tensor
    t: Tensor
    l: Tensor
    s: Tensor
    y: Tensor | None
    """Labels [B] or vectors [B, E], the dropped ones replaced by the null one; None: all null."""
    w: Tensor | None = None
    """Guidance scales [B] of a network that sees them, 1 where there is no label; None: of another network."""
    augmentation: Tensor | None = None
    """Labels of the augmentation [B, 9] of a network that sees them, and of an image that was changed."""
    dropout: Tensor | None = None
    """Seeds of the dropout [B] of a network that has it; the same at both points."""


class Objective:
    """The two losses of an objective under one configuration; holds no state.

    The second one is called consistency, of MeanFlow too, and has no samples in flow matching. Raises ValueError for a
    wrong configuration.
    """

    def __init__(
        self, config: ObjectiveConfig | None = None, guidance_range: tuple[float, float] | None = None
    ) -> None:
        """guidance_range: `DiTConfig.guidance_range` of a network that sees w; None: `config.guidance_scale` is w."""
        self.config = config or ObjectiveConfig()
        self.guidance_range = guidance_range
        validate_objective(self.config)
        validate_guidance_range(guidance_range)

    @property
    def is_meanflow(self) -> bool:
        """Whether the second loss is MeanFlow's."""
        return self.config.kind == "meanflow"

    def eps(self, like: Tensor) -> float:
        """eps beside the mean of a sample's squares, `like` [B, ...] being the samples: MeanFlow adds it to the sum."""
        return self.config.eps / (like[0].numel() if self.is_meanflow else 1)

    # Times

    def r(self, step: float, total_steps: float) -> float:
        """r(k, K), the relative distance of the look-ahead, at step k of K."""
        c, progress = self.config, step / total_steps
        if c.r_schedule == "exponent":
            return c.r_init * (c.r_end / c.r_init) ** progress
        if c.r_schedule == "cosine":
            return c.r_end + (c.r_init - c.r_end) * (1 + math.cos(math.pi * progress)) / 2
        if c.r_schedule == "linear":
            return c.r_init + (c.r_end - c.r_init) * progress
        return c.r_end

    def middle_time(self, t: Tensor, s: Tensor, step: float, total_steps: float) -> Tensor:
        """l = min(t + r (s - t), t - 1e-4), [B]: where the consistency loss looks ahead to; of MeanFlow near t."""
        if self.is_meanflow:
            return t - average_velocity.STEP
        return torch.minimum(t + self.r(step, total_steps) * (s - t), t - TIME_GAP)

    def flow_matching_times(self, n: int, source: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """t [n], logit-normal; of MeanFlow the larger of two."""
        if self.is_meanflow:
            return average_velocity.ordered_times(n, self.config.mf_time, source, dtype)[0]
        return _logit_normal(n, self.config.fm_time, source, dtype)

    def consistency_times(
        self, n: int, source: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """t and s [n], logit-normal each, with s <= t - 1e-4; of MeanFlow the larger and the smaller of two."""
        if self.is_meanflow:
            return average_velocity.ordered_times(n, self.config.mf_time, source, dtype)
        t = _logit_normal(n, self.config.sc_time, source, dtype).clamp_min(TIME_GAP)
        s = _logit_normal(n, self.config.sc_end_time, source, dtype)
        return t, torch.minimum(s, t - TIME_GAP)

    # Guidance

    def guidance_decay(self, t: Tensor) -> Tensor:
        """c(t) [B]: 1 up to t_d, then falling to almost 0 at t = 1."""
        return guidance_decay(t, self.config.guidance_decay_time)

    def guidance_scales(self, n: int, source: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """w [n], log-uniform in the range, as in iMF (arXiv 2512.02012): half of them lie below its geometric mean."""
        assert self.guidance_range is not None
        low, high = self.guidance_range
        return low * (high / low) ** torch.rand(n, generator=source, device=source.device, dtype=dtype)

    @property
    def guided(self) -> bool:
        """Whether the target needs the network's own velocity without a label (w > 1)."""
        return self.guidance_range is not None or self.config.guidance_scale > 1

    @property
    def mixed(self) -> bool:
        """Whether the target needs the network's own velocity with a label as well (w > 1 and m < 1)."""
        return self.guided and self.config.mix_ratio < 1

    @property
    def guidance(self) -> dict[str, Any]:
        """The settings of the velocity target, as the kernels take them."""
        c = self.config
        return {
            "guidance_scale": c.guidance_scale,
            "guidance_decay_time": c.guidance_decay_time,
            "mix_ratio": c.mix_ratio,
        }

    def _guidance_at(self, w: Tensor | None) -> dict[str, Any]:
        """`guidance` with scales [B] in place of the one of all, where there are some."""
        return self.guidance if w is None else {**self.guidance, "guidance_scale": w}

    def look_ahead(
        self,
        x_t: Tensor,
        v_t: Tensor,
        t: Tensor,
        l: Tensor,
        v_null: Tensor | None,
        v_label: Tensor | None,
        label_dropped: Tensor | None,
        w: Tensor | None = None,
    ) -> Lookahead:
        """The velocity target and the Euler step along it, without gradient: target, dx = (l - t) target, x_l.

        v_g = v_t + c(t) (w - 1) (v_t - v_null), target = m v_g + (1 - m) v_label; v_t where the label was dropped.

        v_null, v_label: the network's velocity without and with the label; v_null None: no guidance, the target is v_t;
        v_label None: m is 1. label_dropped [B] bool; None: none was. w [B]: None: the one scale of all.
        """
        return euler_lookahead(x_t, v_t, t, l, v_null, v_label, label_dropped, **self._guidance_at(w))

    # Losses from the network's outputs

    def flow_matching_term(
        self,
        flow: SolutionFlow,
        output: Tensor,
        v_t: Tensor,
        t: Tensor,
        v_null: Tensor | None,
        label_dropped: Tensor | None,
        w: Tensor | None = None,
    ) -> LossTerm:
        """mean_i w_i mean(delta_i^2) for delta = v - target, with w_i = 1 / (|db/ds(t, t)| (mean(delta_i^2) + eps)^p)
        detached; the target is `look_ahead`'s, mixed with the student's own velocity."""
        settings = {"p": self.config.p, "eps": self.eps(output), "velocity_slope": flow.velocity_slope}
        settings |= self._guidance_at(w)
        return LossTerm(*flow_matching_loss(output, v_t, t, v_null, label_dropped, **settings))

    def quotient(self, flow: SolutionFlow, at: ConsistencyPoints, value: Tensor, increment: Tensor) -> Tensor:
        """q = (f(x_t, t, s) - f(x_l, l, s)) / (t - l) for x_l = x_t + target (l - t), [B, C, H, W], without gradient.

        value is N_t = N(x_t, t, s), increment is N_l - N_t with N_l = N(x_l, l, s). Of MeanFlow it is du/dt.
        """
        if self.is_meanflow:
            return average_velocity.derivative(increment, at.t, at.l)
        return quotient(value, increment, at.x, at.target, at.t, at.l, at.s, flow.coefficients)

    def consistency_term(
        self, flow: SolutionFlow, output: Tensor, at: ConsistencyPoints, value: Tensor, increment: Tensor
    ) -> LossTerm:
        """The surrogate mean_i mean(sign(b(t, s)) N_t w_i q), w_i = (mean(q_i^2) + eps)^-p, with q and w_i detached.

        output is the student's N_t, the only one with a gradient; value and increment are `quotient`'s. Its gradient is
        that of the weighted squared error without the division by |b|. Its value means nothing.

        Of MeanFlow it is mean_i w_i mean(delta_i^2) with delta = N_t - u_tgt (`average_velocity`), a sample's w_i being
        (mean(delta_i^2) + eps / numbers)^-p: as published, but for a factor numbers^(p - 1), which is 1 with p = 1.
        """
        c = self.config
        if self.is_meanflow:
            du = self.quotient(flow, at, value, increment)
            target = average_velocity.average_velocity_target(at.target, at.t, at.s, du)
            return LossTerm(*flow_matching_loss(output, target, at.t, p=c.p, eps=self.eps(output)))
        times = at.t, at.l, at.s
        settings = {"p": c.p, "eps": c.eps, "coefficients": flow.coefficients}
        return LossTerm(*consistency_loss(output, increment, at.x, at.target, *times, value=value, **settings))

    # Losses with their own network calls

    def flow_matching(
        self,
        flow: SolutionFlow,
        x0: Tensor,
        x1: Tensor,
        t: Tensor,
        y: Tensor | None,
        label_dropped: Tensor | None = None,
        w: Tensor | None = None,
    ) -> LossTerm:
        """The flow-matching loss of data x0 and noise x1 [B, C, H, W] at times t [B].

        y: labels [B] or vectors [B, E], None: unconditional (no guidance); label_dropped [B] bool: those that become
        the null one; w [B]: guidance scales, of a network that sees them.
        """
        w = without_guidance(w, y, label_dropped)
        x_t, v_t = flow.point(x0, x1, t)
        output = flow.network(x_t, t, t, *conditions(with_null(flow, y, label_dropped), w))
        v_null = None
        if y is not None and (self.guided or w is not None):
            with torch.no_grad():
                v_null = flow.velocity(x_t, t, None, ones_like(w))
        return self.flow_matching_term(flow, output, v_t, t, v_null, label_dropped, w)

    def consistency(
        self,
        flow: SolutionFlow,
        x0: Tensor,
        x1: Tensor,
        t: Tensor,
        l: Tensor,
        s: Tensor,
        y: Tensor | None,
        label_dropped: Tensor | None = None,
        teacher: SolutionFlow | None = None,
        w: Tensor | None = None,
    ) -> LossTerm:
        """The solution-consistency loss at times s < l < t [B]; no Jacobian-vector product. y, label_dropped, w: as for
        `flow_matching`.

        teacher None: the published target, the stop-gradient student at (x_l, l). With a teacher (an EMA of the
        student) the difference between the two ends is the teacher's at both and the value is the student's:
        `N_ema(x_l, l, s) - N_ema(x_t, t, s)` takes the increment's place, which keeps the quotient bounded as l -> t.
        Raises ValueError if `config.teacher` asks for a teacher and none is given.
        """
        if teacher is None and self.config.teacher != "student":
            raise ValueError(f"teacher must be given: config.teacher is {self.config.teacher!r}")
        w = without_guidance(w, y, label_dropped)
        x_t, v_t = flow.point(x0, x1, t)
        label = with_null(flow, y, label_dropped)
        given = conditions(label, w)
        v_null = v_label = None
        with torch.no_grad():
            if y is not None and (self.guided or w is not None):
                v_null = flow.velocity(x_t, t, None, ones_like(w))
                v_label = flow.velocity(x_t, t, label, w) if self.config.mix_ratio < 1 else None
            target, dx, x_l = self.look_ahead(x_t, v_t, t, l, v_null, v_label, label_dropped, w)
        output = flow.network(x_t, t, s, *given)
        with torch.no_grad():
            start = output.detach() if teacher is None else teacher.network(x_t, t, s, *given)
            increment = (flow if teacher is None else teacher).network(x_l, l, s, *given) - start
        at = ConsistencyPoints(x_t, target, dx, x_l, t, l, s, label, w)
        return self.consistency_term(flow, output, at, output, increment)


def with_null(flow: SolutionFlow, y: Tensor | None, label_dropped: Tensor | None) -> Tensor | None:
    """Labels [B] or vectors [B, E] with the dropped ones replaced by the null one; None stays None (all null)."""
    if y is None or label_dropped is None:
        return y
    return torch.where(label_dropped if y.dim() == 1 else label_dropped[:, None], null_like(flow.network, y), y)


def without_guidance(w: Tensor | None, y: Tensor | None, label_dropped: Tensor | None) -> Tensor | None:
    """Guidance scales w [B], 1 where the label was dropped: such a sample's target is not guided, and the network is
    asked for its velocity without a label at 1 (TVM, arXiv 2511.19797). None stays None."""
    if w is None or y is None:
        return ones_like(w)
    return w if label_dropped is None else torch.where(label_dropped, torch.ones_like(w), w)


def ones_like(w: Tensor | None) -> Tensor | None:
    """No guidance: scales of 1, [B]; None stays None."""
    return None if w is None else torch.ones_like(w)


def _logit_normal(n: int, law: tuple[float, float], source: torch.Generator, dtype: torch.dtype) -> Tensor:
    mean, deviation = law
    return torch.sigmoid(mean + deviation * torch.randn(n, generator=source, device=source.device, dtype=dtype))

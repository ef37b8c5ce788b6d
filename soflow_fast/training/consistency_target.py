"""The consistency target: the value N(x_t, t, s) and its increment N(x_l, l, s) - N(x_t, t, s) to the look-ahead.

The increment is divided by t - l, down to a thousandth of the interval, so what rounding makes of it decides whether
the consistency loss learns anything. Two ways to it:

* "increments": value and increment propagated side by side (`models.paired_forward`): the error is relative to the
  increment, whatever the precision of the products;
* "pair": two forwards and their difference, whose error is relative to the value. Fit for float32.

Increments are made from the parameters, without calling the layers. Where a part of the network was replaced, wrapped
or hooked, so that calling it matters, a float32 pair takes their place: whatever acts there acts at both ends.

MeanFlow (`average_velocity`) takes its derivative du/dt by the same increments, over a shorter interval.

Whose increment: "student" is the published stop-gradient target (arXiv 2512.15657); "ema" takes both ends from an
average of the student's weights and the value from the student, which stays bounded as l -> t.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..config.schema import Config, DiTConfig
from ..errors import ConfigError
from ..flow import SolutionFlow, conditions, seen_in_training
from ..models.dit import DiT, TapedOutputs
from ..models.paired_forward import missed_part, paired_forward
from ..objective import ConsistencyPoints, Objective
from .precision import OPERAND, has_float16, matmul_precision

CHECKED_SAMPLES = 8
"""Consistency samples that `quotient_cosine` looks at."""


class ConsistencyTarget(NamedTuple):
    """The way in which a run takes the increments behind its consistency loss."""

    kind: str
    """"increments" or "pair"."""
    precision: str
    """The precision of the products behind it: "bf16", "fp16", "tf32" or "fp32"."""
    teacher: str
    """"student" or "ema"."""

    @property
    def rounds_weights(self) -> bool:
        """Whether it multiplies with weights rounded to bf16, whatever they are given in."""
        return (self.kind, self.precision) == ("increments", "bf16")

    def rides_along(self, precision: str) -> bool:
        """Whether a student's forward in `precision` computes the values that the increments need."""
        return self.kind == "increments" and self.teacher == "student" and self.precision == precision


def resolve_target(config: Config, precision: str, device: torch.device) -> ConsistencyTarget:
    """The target of a step of `precision`, with "auto" resolved. Raises ConfigError for what makes no sense here."""
    kind, matmul, teacher = config.quotient, config.quotient_precision, config.objective.teacher
    if kind == "auto" and not isinstance(config.model, DiTConfig):  # of which alone there are increments
        kind = "pair"
    if kind == "auto":
        kind = "pair" if (precision if matmul == "auto" else matmul) == "fp32" else "increments"
    if matmul == "auto":
        matmul = ("bf16" if precision == "fp8" else precision) if kind == "increments" else "fp32"
    if matmul == "fp16" and not has_float16(device):
        raise ConfigError(f"--quotient-precision fp16: this {device.type} has no float16 products")
    if matmul == "tf32" and device.type != "cuda":
        raise ConfigError(f"--quotient-precision tf32: only NVIDIA GPUs have it, the device is {device.type}")
    if kind == "pair" and precision == "fp8" and matmul in ("bf16", "fp16"):
        raise ConfigError(f"--quotient-precision {matmul}: a pair in a step of fp8 is fp32 or tf32")
    if kind == "pair" and matmul != "fp32" and config.objective.kind == "meanflow":
        raise ConfigError(
            f"--quotient pair: of {matmul} forwards MeanFlow's derivative is rounding error; fp32 is right"
        )
    return ConsistencyTarget(kind, matmul, teacher)


@torch.no_grad()
def value_and_increment(
    target: ConsistencyTarget,
    flow: SolutionFlow,
    teacher: SolutionFlow | None,
    at: ConsistencyPoints,
    output: Tensor | None,
    tape: TapedOutputs | None = None,
) -> tuple[Tensor, Tensor]:
    """The value and the increment of the samples `at`, [B, C, H, W] each, in float32 or float64.

    output: the student's N(x_t, t, s) in the precision of the target, where the step has it; None: it is computed.
    tape: of the forward that made this output, on which the student's increments ride along; None: a pass of their own.
    """
    student, given, more = flow.network, conditions(at.y, at.w), seen_in_training(at.augmentation, at.dropout)
    network = student if target.teacher == "student" or teacher is None else teacher.network
    kind, precision = target.kind, target.precision
    taken_apart = kind == "increments" and tape is None and isinstance(network, DiT)
    if taken_apart and missed_part(network) is not None:
        kind, precision, output = "pair", "fp32", None if network is student else output
    with matmul_precision(precision, at.x.device):
        if kind == "increments":
            start, increment = paired_forward(
                network, at.x, at.dx, at.t, at.l - at.t, at.s, at.y, OPERAND[target.precision], w=at.w, tape=tape
            )
        else:
            end = network(at.x_l, at.l, at.s, *given, **more).to(at.x.dtype)
            if output is not None and network is student:
                start = output.detach()
            else:
                start = network(at.x, at.t, at.s, *given, **more).to(at.x.dtype)
            increment = end - start
        if network is student:
            return start, increment
        value = student(at.x, at.t, at.s, *given, **more).to(at.x.dtype) if output is None else output.detach()
        return value, increment


@torch.no_grad()
def quotient_cosine(
    target: ConsistencyTarget,
    objective: Objective,
    flow: SolutionFlow,
    teacher: SolutionFlow | None,
    at: ConsistencyPoints,
    q: Tensor,
) -> Tensor:
    """The cosine of the first quotients in `q` with a float32 evaluation of them by the same weights, by the other of
    the two ways where the target is a float32 pair itself."""
    n = min(CHECKED_SAMPLES, len(q))
    at = ConsistencyPoints(*(None if v is None else v[:n] for v in at))  # pyright: ignore[reportArgumentType]
    other = "increments" if (target.kind, target.precision) == ("pair", "fp32") else "pair"
    exact = ConsistencyTarget(other, "fp32", target.teacher)
    value, increment = value_and_increment(exact, flow, teacher, at, None)
    wanted = objective.quotient(flow, at, value, increment)
    return torch.nn.functional.cosine_similarity(q[:n].flatten(), wanted.flatten(), dim=0)

"""What is behind the consistency quotient: the value N(x_t, t, s) and its increment to the look-ahead (x_l, l, s).

The increment is divided by t - l, down to a thousandth of the interval, so what rounding makes of it decides whether
the consistency loss learns anything. Two ways to it:

* "increments": value and increment propagated side by side (`increments.paired_forward`): the error is relative to the
  increment, whatever the precision of the products;
* "pair": two forwards and their difference, whose error is relative to the value. Fit for float32.

Whose increment: "student" is the published stop-gradient target; "ema" takes both ends from an average of the student's
weights and the value from the student, which stays bounded as l -> t; "ema-literal" takes one end from each, so that
the difference between the two networks is divided by t - l as well.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..config.schema import Config
from ..errors import ConfigError
from ..flow import SolutionFlow
from ..models.dit import Tape
from ..models.float8 import float8_products
from ..models.paired_forward import paired_forward
from ..objective import Objective

OPERAND = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
CHECKED_SAMPLES = 8
"""How many consistency samples `cosine` looks at."""


class Quotient(NamedTuple):
    """How a run comes to its quotients."""

    kind: str
    """"increments" or "pair"."""
    precision: str
    """Of the products behind it: "bf16", "fp16", "tf32" or "fp32"."""
    teacher: str
    """"student", "ema" or "ema-literal"."""

    def rides_along(self, precision: str) -> bool:
        """Whether a student's forward in `precision` computes the values that the increments need."""
        return self.kind == "increments" and self.teacher == "student" and self.precision == precision


class Ends(NamedTuple):
    """Where a quotient is taken: consistency samples [B, C, H, W] and their times [B]."""

    x: Tensor
    target: Tensor
    dx: Tensor
    x_l: Tensor
    t: Tensor
    l: Tensor
    s: Tensor
    y: Tensor | None


def resolve_quotient(config: Config, precision: str, device: torch.device) -> Quotient:
    """What "auto" comes to in a step of `precision`. Raises ConfigError for a combination that makes no sense here."""
    kind, products, teacher = config.quotient, config.quotient_precision, config.objective.teacher
    if teacher == "ema-literal" and kind == "increments":
        raise ConfigError(
            "--quotient increments: both ends must have the same weights, and --teacher ema-literal takes one from each"
        )
    if kind == "auto":
        exact = (precision if products == "auto" else products) == "fp32"
        kind = "pair" if teacher == "ema-literal" or exact else "increments"
    if products == "auto":
        products = ("bf16" if precision == "fp8" else precision) if kind == "increments" else "fp32"
    if products == "fp16" and not has_float16(device):
        raise ConfigError(f"--quotient-precision fp16: this {device.type} has no float16 products")
    if products == "tf32" and device.type != "cuda":
        raise ConfigError(f"--quotient-precision tf32: only NVIDIA GPUs have it, the device is {device.type}")
    return Quotient(kind, products, teacher)


def has_float16(device: torch.device) -> bool:
    """Whether the hardware multiplies matrices in float16."""
    if device.type == "cpu":
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return device.type == "cuda"


@contextlib.contextmanager
def products(precision: str, device: torch.device) -> Iterator[None]:
    """The precision of the products inside: "bf16", "fp16" (autocast), "fp8" (in blocks, else bf16), "tf32", "fp32"."""
    if precision in ("bf16", "fp16", "fp8"):
        low = float8_products() if precision == "fp8" else contextlib.nullcontext()
        with torch.autocast(device.type, OPERAND.get(precision, torch.bfloat16)), low:
            yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.fp32_precision = before


@torch.no_grad()
def value_and_increment(
    how: Quotient,
    flow: SolutionFlow,
    teacher: SolutionFlow | None,
    at: Ends,
    output: Tensor | None,
    tape: Tape | None = None,
) -> tuple[Tensor, Tensor]:
    """The value and the increment of the samples `at`, [B, C, H, W] each, in float32 or float64.

    output: the student's N(x_t, t, s) in the precision of the quotient, where the step has it; None: it is computed.
    tape: of the forward that made this output, on which the student's increments ride along; None: a pass of their own.
    """
    student = flow.network
    network = student if how.teacher == "student" or teacher is None else teacher.network
    with products(how.precision, at.x.device):
        if how.kind == "increments":
            dt = at.l - at.t
            start, increment = paired_forward(
                network, at.x, at.dx, at.t, dt, at.s, at.y, dtype=OPERAND[how.precision], tape=tape
            )
        else:
            end = network(at.x_l, at.l, at.s, at.y).to(at.x.dtype)
            first = network if how.teacher == "ema" else student
            if first is student and output is not None:
                start = output.detach()
            else:
                start = first(at.x, at.t, at.s, at.y).to(at.x.dtype)
            increment = end - start
        if how.teacher != "ema":
            return start, increment
        value = student(at.x, at.t, at.s, at.y).to(at.x.dtype) if output is None else output.detach()
        return value, increment


def comparable(how: Quotient) -> bool:
    """Whether there is a float32 evaluation of a quotient that is not the same once more."""
    return how.teacher != "ema-literal" or how.precision != "fp32"


@torch.no_grad()
def cosine(
    how: Quotient, objective: Objective, flow: SolutionFlow, teacher: SolutionFlow | None, at: Ends, q: Tensor
) -> Tensor:
    """The cosine of the first quotients in `q` with a float32 evaluation of them, by the other of the two ways where
    there are two: the literal EMA has a pair only, and a float32 pair of it is compared with nothing (`comparable`)."""
    n = min(CHECKED_SAMPLES, len(q))
    at = Ends(*(None if v is None else v[:n] for v in at))  # pyright: ignore[reportArgumentType]
    other = "increments" if how.kind == "pair" and how.precision == "fp32" and how.teacher != "ema-literal" else "pair"
    ends = value_and_increment(Quotient(other, "fp32", how.teacher), flow, teacher, at, None)
    exact = objective.quotient(flow, *ends, at.x, at.target, at.t, at.l, at.s)
    return torch.nn.functional.cosine_similarity(q[:n].flatten(), exact.flatten(), dim=0)

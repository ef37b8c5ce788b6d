"""The check of an operation of soflow_kernels: at the shape that is timed, every way is held against float64.

Results and gradients, as a whole and row by row (a row is a sample, where there are samples); the tolerance comes from
the error of eager PyTorch in the same dtype.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.correctness.comparison import IncorrectResult, relative
from benchmarks.harness.operations import OURS, Inputs, Operation
from soflow_fast.training.precision import matmul_precision
from soflow_kernels import testing

TIMES = {OURS: 1.5}
"""How many times the error of eager PyTorch is allowed, by way."""
OTHERS_TIMES = 4.0
"""The same for other people's ways: where eager rounds three intermediate results, theirs may round as many again, all
to one side."""
SMALL_ROW = 0.01
SUMS = 256 * torch.finfo(torch.float32).eps
"""A float32 sum of 65 536 terms in another order differs by some sqrt(65 536) units."""


def prepare(
    operation: Operation, way: Callable[..., Any], inputs: Inputs, backward: bool
) -> tuple[Callable[[], object], dict[str, Tensor]]:
    """The call that is timed, without arguments, and its results by name."""
    with quiet():
        if not backward:
            call = torch.no_grad()(partial(way, **inputs))
            return call, named(operation, inputs, call(), [])
        inputs = inputs | {name: tree_map(_leaf, inputs[name]) for name in operation.trains}
        leaves = tree_leaves([inputs[name] for name in operation.trains])
        weights: list[Tensor] = []

        def both() -> tuple[Any, tuple[Tensor, ...]]:
            outputs = way(**inputs)
            used = [out for out in _tensors(outputs) if out.requires_grad]
            if not weights:  # of the sum of outputs that is differentiated: neither random nor all alike
                ramps = (torch.linspace(-1, 2, out.numel(), device=out.device).bfloat16() for out in used)
                weights.extend(ramp.to(out.dtype) for ramp, out in zip(ramps, used, strict=True))  # the same in all
            shaped = [weight.view(out.shape) for weight, out in zip(weights, used, strict=True)]
            return outputs, torch.autograd.grad(used, leaves, shaped)

        outputs, gradients = both()
        return both, named(operation, inputs, outputs, gradients)


def named(operation: Operation, inputs: Inputs, outputs: Any, gradients: Any) -> dict[str, Tensor]:
    """Results under names for the check; parameters in one piece, a pair as value and increment."""
    if operation.writes:
        # copies: the next call goes on from where this one ended
        return {name: torch.cat([t.flatten() for t in tree_leaves(inputs[name])]) for name in operation.writes}
    found = {f"output {i}": out.detach() for i, out in enumerate(_tensors(outputs))}
    if operation.pair:
        found = {f"{part} of {n}": out[i] for n, out in found.items() for i, part in enumerate(("value", "increment"))}
    names = [f"{name}[{i}]" for name in operation.trains for i, _ in enumerate(tree_leaves(inputs[name]))]
    return found | {f"gradient of {n}": g for n, g in zip(names, gradients, strict=True)} if gradients else found


class Error(NamedTuple):
    """Error of a result relative to the right one; 0 where both are zero."""

    whole: float
    """|a - b| / |b|, over all elements."""
    worst: float
    """The worst row's largest |a - b| over the same row's largest |b|: one garbled sample among many shows. A row that
    is next to nothing beside the others, as what is left of a sum that cancels, counts as SMALL_ROW of their mean."""


def error_of(result: Tensor, exact: Tensor) -> Error:
    """Rows are along the first of two or more dimensions: samples, or the outputs of a weight. In float64."""
    rows = len(exact) if exact.dim() > 1 else 1
    b = exact.double().reshape(rows, -1)
    off, size = (x.abs().amax(1) for x in (result.double().reshape(rows, -1) - b, b))
    each = torch.where(off == 0, off, off / torch.maximum(size, SMALL_ROW * size.mean()))
    return Error(relative([result], [exact]), float(each.max()))


def exactly(operation: Operation, inputs: Inputs, backward: bool) -> dict[str, Tensor]:
    """The results of the same inputs in float64; of bfloat16, where memory does not hold that, in float32, whose units
    are 65 536 times as small."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    low = not operation.single and any(leaf.dtype == torch.bfloat16 for leaf in tensors)
    for dtype in (torch.float64, torch.float32):
        wide = {
            name: _copied_value(v) if name in operation.kept else tree_map(partial(_widened, dtype), v)
            for name, v in inputs.items()
        }
        try:
            with matmul_precision("fp32", tensors[0].device):
                return prepare(operation, operation.reference, wide, backward)[1]
        except torch.OutOfMemoryError:
            if not low or dtype == torch.float32:
                raise
    raise AssertionError("one of them returns or raises")


def errors_of(
    way: str,
    operation: Operation,
    results: dict[str, Tensor],
    exact: dict[str, Tensor],
    eager: dict[str, Error] | None,
) -> dict[str, Error]:
    """The errors of a way's results. Raises IncorrectResult naming all that is off.

    Allowed are so many times the error of eager PyTorch in the same dtype, the whole's for the whole and the worst
    row's for a row, one unit in the last place for each rounding, and SUMS. Eager PyTorch itself (eager: None) computes
    `exact` in fewer digits: it may have lost half of those that its dtype has.
    """
    who = operation.name if way == OURS else way
    faults, found = [], {}
    for name, wanted in exact.items():
        result = results.get(name)
        if result is None or result.shape != wanted.shape:
            faults.append(f"{name}: {'is missing' if result is None else f'has shape {list(result.shape)}'}")
            continue
        found[name] = error_of(result, wanted)
        eps = torch.finfo(result.dtype).eps
        for what, error in zip(("", ", worst row"), found[name], strict=True):
            if eager is None:
                allowed = eps**0.5
            else:
                base = eager[name].worst if what else eager[name].whole
                allowed = TIMES.get(way, OTHERS_TIMES) * base + operation.roundings * eps + SUMS
            if not error <= allowed:  # also when it is NaN
                faults.append(f"{name}{what}: relative error {error:.1e} above {allowed:.0e}")
    if faults:
        raise IncorrectResult(f"{who} against float64: " + "; ".join(faults))
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Within the context nobody's warnings show, or fail a test; interpreted kernels, which say nothing about time,
    are off."""
    references = testing.mode("reference") if testing.INTERPRETED else nullcontext()
    with warnings.catch_warnings(), references:
        warnings.simplefilter("ignore")
        yield


def _tensors(outputs: Any) -> list[Tensor]:
    return [out for out in tree_leaves(outputs) if isinstance(out, Tensor)]


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_() if isinstance(value, Tensor) else value


def _widened(dtype: torch.dtype, value: Any) -> Any:
    """A copy, floating-point numbers in another dtype."""
    if not isinstance(value, Tensor):
        return value
    return value.to(dtype, copy=True) if value.is_floating_point() else value.clone()


def _copied_value(value: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)


def copied(inputs: Inputs) -> Inputs:
    """Inputs with tensors of their own."""
    return {name: _copied_value(value) for name, value in inputs.items()}

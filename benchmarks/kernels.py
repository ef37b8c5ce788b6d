"""The race of one operation of soflow_kernels: gate, then every way of computing it in turn within one run.

Gate: at the shape that is timed, results and gradients of every way are held against float64, as a whole and row by row
(a row is a sample, where there are samples); what is allowed comes from the error of eager PyTorch in the same dtype.
Ours must pass (RedGate); another way that fails, or raises, is not timed and says why.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import soflow_kernels
from benchmarks import command
from benchmarks.bandwidth import Stopwatch
from benchmarks.gates import RedGate, relative
from benchmarks.operations import Inputs, Operation, Sizes
from soflow_fast.commands import process
from soflow_fast.training.consistency_target import products
from soflow_kernels import testing

OURS, EAGER, COMPILED = "soflow_kernels", "eager PyTorch", "torch.compile"
TIMES = {OURS: 1.5}
"""By way, how many times the error of eager PyTorch is allowed."""
OTHERS_TIMES = 4.0
"""Other people's: where eager rounds three intermediate results, theirs may round as many again, all to one side."""
WARM_UP = 2
MOST_ROUNDS = 200
SMALL_ROW = 0.01
SUMS = 256 * torch.finfo(torch.float32).eps
"""A float32 sum of 65 536 terms in another order differs by some sqrt(65 536) units."""


class KernelRace:
    """The ways of one operation, forward or forward and backward. Raises RedGate if ours computes something else."""

    def __init__(
        self,
        operation: Operation,
        backward: bool,
        sizes: Sizes,
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> None:
        assert operation.trains or not backward, f"{operation.name} has no backward"
        self.operation, self.backward, self.device = operation, backward, device
        usual = torch.float32 if operation.single or device.type == "cpu" else torch.bfloat16
        self.dtype = dtype or usual
        self.errors: dict[str, Error] = {}
        """Of ours."""
        self.watch = Stopwatch(device)
        inputs = operation.inputs(sizes, device, self.dtype)
        self.steps: dict[str, Callable[[], None]] = {}
        self.rows: list[dict] = []
        with quiet():
            self._prepare(inputs, operation.traffic(sizes, self.dtype, backward))

    def _prepare(self, inputs: Inputs, traffic: int | None) -> None:
        operation, backward = self.operation, self.backward
        exact, eager = exactly(operation, inputs, backward), None
        for name, way in self._ways().items():
            row = {
                "operation": operation.name,
                "pass": "forward + backward" if backward else "forward",
                "way": name,
                "shape": describe(operation, inputs),
                "dtype": str(self.dtype).removeprefix("torch."),
                "bytes": traffic,
                "runs": runs(operation) if name == OURS else None,
                "why_not": way if isinstance(way, str) else None,
                "seconds": [],
            }
            self.rows.append(row)
            if isinstance(way, str):
                continue
            fresh = _copied(inputs) if operation.writes else inputs
            try:
                call, results = prepare(operation, way, fresh, backward)
                found = judge(name, operation, results, exact, eager)
                del results
                eager = found if name == EAGER else eager
                self.errors = found if name == OURS else self.errors
                row["gate"] = {part: [*error] for part, error in found.items()}
                for _ in range(WARM_UP):
                    call()
            except torch.OutOfMemoryError:
                row["why_not"] = "out of memory"
            except RedGate as error:
                if name in (OURS, EAGER):
                    raise
                row["why_not"] = str(error)
            except Exception as error:
                if name in (OURS, EAGER):
                    raise
                row["why_not"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            else:
                self.steps[name] = partial(self._step, call, row["seconds"])

    def _ways(self) -> dict[str, Callable[..., Any] | str]:
        """By name, eager PyTorch first: its errors are what the others may err by."""
        compiled: Callable[..., Any] | str = "no GPU: ours is not here to be compared with"
        if self.device.type == "cuda":
            torch.compiler.reset()
            compiled = torch.compile(self.operation.reference, fullgraph=True, dynamic=False)
        return {EAGER: self.operation.reference, OURS: self.operation.ours, COMPILED: compiled, **self.operation.others}

    def _step(self, call: Callable[[], object], seconds: list[float]) -> None:
        seconds.append(self.watch.seconds(call))

    def rounds(self, seconds: float, least: int = 7) -> int:
        """How many rounds fit into about so many seconds, judged by three that do not count."""
        for _ in range(3):
            self.run()
        took = sum(row["seconds"][-1] for row in self.rows if row["seconds"])
        for row in self.rows:
            row["seconds"].clear()
        return max(least, min(MOST_ROUNDS, int(seconds / max(took, 1e-9))))

    def run(self, *, all_but: str = "") -> None:
        """One round."""
        with quiet():
            for name, step in self.steps.items():
                if name != all_but:
                    step()


def runs(operation: Operation) -> str:
    """Whether the operation's calls go to its kernel, in words."""
    status = soflow_kernels.status()[operation.name.split(",")[0]]
    return "kernel" if status.kernel else f"reference: {status.why}"


def describe(operation: Operation, inputs: Inputs) -> str:
    """The size, in words: the shape of the first input, or the number of parameters."""
    first = next(iter(inputs.values()))
    if operation.writes:
        return f"{sum(p.numel() for p in first)} parameters"
    return " x ".join(map(str, first.shape))


def prepare(
    operation: Operation, way: Callable[..., Any], inputs: Inputs, backward: bool
) -> tuple[Callable[[], object], dict[str, Tensor]]:
    """What is timed, a call without arguments, and its results by name."""
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
    """Results under names for the gate; parameters in one piece, a pair as value and increment."""
    if operation.writes:
        # copies: the next call goes on from where this one ended
        return {name: torch.cat([t.flatten() for t in tree_leaves(inputs[name])]) for name in operation.writes}
    found = {f"output {i}": out.detach() for i, out in enumerate(_tensors(outputs))}
    if operation.pair:
        found = {f"{part} of {n}": out[i] for n, out in found.items() for i, part in enumerate(("value", "increment"))}
    names = [f"{name}[{i}]" for name in operation.trains for i, _ in enumerate(tree_leaves(inputs[name]))]
    return found | {f"gradient of {n}": g for n, g in zip(names, gradients, strict=True)} if gradients else found


class Error(NamedTuple):
    """How far off a result is, relative to what it should be; 0 where both are zero."""

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
            with products("fp32", tensors[0].device):
                return prepare(operation, operation.reference, wide, backward)[1]
        except torch.OutOfMemoryError:
            if not low or dtype == torch.float32:
                raise
    raise AssertionError("one of them returns or raises")


def judge(
    way: str,
    operation: Operation,
    results: dict[str, Tensor],
    exact: dict[str, Tensor],
    eager: dict[str, Error] | None,
) -> dict[str, Error]:
    """The errors of a way's results. Raises RedGate naming all that is off.

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
        raise RedGate(f"{who} against float64: " + "; ".join(faults))
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


def _copied(inputs: Inputs) -> Inputs:
    return {name: _copied_value(value) for name, value in inputs.items()}


if __name__ == "__main__":
    process.run(lambda: command.no_command("benchmarks.kernels", "pytest benchmarks/test_kernels.py --record"))

"""The race of one operation of soflow_kernels: gate, then every way of computing it in turn within one run.

Gate: on a few samples, results and gradients are held against float64; at the full shape every way is held against
eager PyTorch, coarsely. Ours must pass (RedGate); another way that fails, or raises, is not timed and says why.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import soflow_kernels
from benchmarks.bandwidth import Stopwatch
from benchmarks.gates import RedGate, relative
from benchmarks.operations import Inputs, Operation, Sizes
from soflow_kernels import testing

OURS, EAGER, COMPILED = "soflow_kernels", "eager PyTorch", "torch.compile"
GATE_SAMPLES = 8
WARM_UP = 2
MOST_ROUNDS = 200
SUMS = 256 * torch.finfo(torch.float32).eps
"""A float32 sum of 65 536 terms in another order differs by some sqrt(65 536) units."""


class KernelRace:
    """The ways of one operation, forward or forward and backward. Raises RedGate if ours computes something else."""

    def __init__(self, operation: Operation, backward: bool, sizes: Sizes, device: torch.device) -> None:
        assert operation.trains or not backward, f"{operation.name} has no backward"
        self.operation, self.backward, self.device = operation, backward, device
        self.dtype = torch.float32 if operation.single or device.type == "cpu" else torch.bfloat16
        self.errors = gate(operation, backward, sizes, device, self.dtype)
        self.watch = Stopwatch(device)
        inputs = operation.inputs(sizes, device, self.dtype)
        self.steps: dict[str, Callable[[], None]] = {}
        self.rows: list[dict] = []
        with quiet():
            self._prepare(inputs, operation.traffic(sizes, self.dtype, backward))

    def _prepare(self, inputs: Inputs, traffic: int | None) -> None:
        operation, backward, wanted = self.operation, self.backward, None
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
                wanted = results if wanted is None else wanted
                _compare(name, results, wanted)
                for _ in range(WARM_UP):
                    call()
            except torch.OutOfMemoryError:
                row["why_not"] = "out of memory"
            except RedGate as error:
                if name == OURS:
                    raise
                row["why_not"] = str(error)
            except Exception as error:
                if name in (OURS, EAGER):
                    raise
                row["why_not"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            else:
                self.steps[name] = partial(self._step, call, row["seconds"])

    def _ways(self) -> dict[str, Callable[..., Any] | str]:
        """By name, eager PyTorch first: the others are compared with it."""
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
                weights.extend(torch.linspace(-1, 2, out.numel(), device=out.device).to(out.dtype) for out in used)
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


def gate(
    operation: Operation, backward: bool, sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Relative errors of ours against float64, on a few samples. Raises RedGate naming all that is off.

    Allowed is 1.5 times the error of eager PyTorch, one unit in the last place for each rounding, and SUMS.
    """
    small = sizes._replace(samples=min(GATE_SAMPLES, sizes.samples), blocks=1)
    inputs = operation.inputs(small, device, dtype)
    wide = {name: v if name in operation.kept else tree_map(_double, v) for name, v in inputs.items()}
    results = [
        prepare(operation, way, _copied(given) if operation.writes else given, backward)[1]
        for way, given in ((operation.ours, inputs), (operation.reference, inputs), (operation.reference, wide))
    ]
    ours, eager, exact = results
    errors = {name: relative([ours[name]], [exact[name]]) for name in exact}
    faults = []
    for name, error in errors.items():
        rounding = operation.roundings * torch.finfo(ours[name].dtype).eps
        allowed = 1.5 * relative([eager[name]], [exact[name]]) + rounding + SUMS
        if not error <= allowed:  # also when it is NaN
            faults.append(f"{name}: relative error {error:.1e} above {allowed:.0e}")
    if faults:
        raise RedGate(f"{operation.name} against float64: " + "; ".join(faults))
    return errors


def _compare(way: str, results: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """At the full shape: a wrong address or formula is off by far more than the square root of a unit, rounding by
    far less."""
    for name, want in wanted.items():
        error, allowed = relative([results[name]], [want]), torch.finfo(want.dtype).eps ** 0.5
        if not error <= allowed:
            raise RedGate(f"{way} against {EAGER}: {name}: relative error {error:.1e} above {allowed:.0e}")


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


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _copied(inputs: Inputs) -> Inputs:
    return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, inputs)

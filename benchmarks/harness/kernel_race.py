"""The race of one operation of soflow_kernels: a check first, then every way of computing it in turn within one run.

Ours must compute the right thing (IncorrectResult); another way that does not, or raises, is not timed and says why.
"""

from collections.abc import Callable
from typing import Any

import torch

import soflow_kernels
from benchmarks.correctness.comparison import IncorrectResult
from benchmarks.correctness.kernels import Error, copied, errors_of, exactly, prepare, quiet
from benchmarks.harness.operations import COMPILED, EAGER, OURS, Inputs, Operation, Sizes
from benchmarks.harness.timing import InTurn, recorded

WARM_UP = 2
LEAST_ROUNDS, MOST_ROUNDS = 7, 200


class KernelRace:
    """The ways of one operation, forward or forward and backward. Raises IncorrectResult if ours computes
    something else."""

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
        """The errors of ours."""
        self.timer = InTurn(device, cold=True)
        inputs = operation.inputs(sizes, device, self.dtype)
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
                "timed": None,
                "seconds": [],
            }
            self.rows.append(row)
            if isinstance(way, str):
                continue
            fresh = copied(inputs) if operation.writes else inputs
            try:
                call, results = prepare(operation, way, fresh, backward)
                found = errors_of(name, operation, results, exact, eager)
                del results
                eager = found if name == EAGER else eager
                self.errors = found if name == OURS else self.errors
                row["errors"] = {part: [*error] for part, error in found.items()}
                for _ in range(WARM_UP):
                    call()
                call, row["timed"] = self._recorded(call)
            except torch.OutOfMemoryError:
                row["why_not"] = "out of memory"
            except IncorrectResult as error:
                if name in (OURS, EAGER):
                    raise
                row["why_not"] = str(error)
            except Exception as error:
                if name in (OURS, EAGER):
                    raise
                row["why_not"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            else:
                self.timer.add(name, call, row["seconds"])

    def _recorded(self, call: Callable[[], object]) -> tuple[Callable[[], object], str]:
        """The call as it is timed, and in words how: as a CUDA graph, which leaves the host out. One that works in
        place is long, and reads what only the host knows."""
        if self.device.type != "cuda" or self.operation.writes:
            return call, "as called"
        try:
            return recorded(call, self.device), "as a CUDA graph"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # what was checked above is right; it has launches that cannot be recorded
            torch.cuda.synchronize(self.device)
            return call, f"as called, host included: no CUDA graph ({' '.join(str(error).split())[:120]})"

    def _ways(self) -> dict[str, Callable[..., Any] | str]:
        """The ways by name, eager PyTorch first: the tolerance of the others comes from its errors."""
        compiled: Callable[..., Any] | str = "no GPU: ours is not here to be compared with"
        if self.device.type == "cuda":
            torch.compiler.reset()
            compiled = torch.compile(self.operation.reference, fullgraph=True, dynamic=False)
        return {EAGER: self.operation.reference, OURS: self.operation.ours, COMPILED: compiled, **self.operation.others}

    def rounds(self, seconds: float) -> int:
        """How many rounds fit into about so many seconds."""
        with quiet():
            return self.timer.rounds_within(seconds, least=LEAST_ROUNDS, most=MOST_ROUNDS, trials=3)

    def run(self, *, but: str | None = None) -> None:
        """One round, except one way that is timed by others."""
        with quiet():
            self.timer.round(but=but)


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

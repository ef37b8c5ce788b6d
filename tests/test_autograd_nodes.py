"""Every autograd.Function and every library operation of both packages returns tensors of its own.

No output is an argument or lies in the memory of one, as torch asks of library operations. And no output of a Function
went through a call that gives back the tensor it is given (`.to` of the same dtype, `.contiguous()`, in place): under
torch.compile torch 2.11 then gives the gradient of one output to another, in silence (pytorch#180642). Whether a call
does so may depend on a dtype or a layout, so each Function is run in several.
"""

import ast
import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import soflow_fast
import soflow_kernels
from soflow_fast.models import attention, fused_layers
from soflow_kernels import _dispatch, testing
from tests.versions import OPTIONAL

PACKAGES = (soflow_fast, soflow_kernels)
for package in PACKAGES:
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            if error.name not in OPTIONAL:
                raise

B, T, D, H = 2, 3, 8, 16
LOW = torch.bfloat16
Arguments = tuple[Any, ...]


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def residuals() -> Iterator[tuple[torch.dtype, Arguments]]:
    """The dtype of the products, and (x, branch, gate, bias, shift, scale) of a block: without and with a branch, its
    bias deferred or not, the residual as wide as the products or wider."""
    for wide, low in ((torch.float32, torch.float32), (torch.float32, LOW), (LOW, LOW)):
        x, m = ones(B, T, D, dtype=wide), ones(B, D, dtype=low)
        yield low, (x, None, None, None, m, m)
        for bias in (None, ones(D, dtype=low)):
            yield low, (x, ones(B, T, D, dtype=low), m, bias, m, m)


def normed_linear() -> Iterator[Arguments]:
    for dtype, residual in residuals():
        for parts, keep in ((1, False), (2, True)):
            yield (*residual, ones(H, D, dtype=dtype), ones(H, dtype=dtype), parts, keep)


def normed_mlp() -> Iterator[Arguments]:
    for dtype, residual in residuals():
        if residual[1] is None:  # the MLP follows attention, whose result is its branch
            continue
        weights = (ones(H, D, dtype=dtype), ones(H, dtype=dtype), ones(D, H, dtype=dtype), ones(D, dtype=dtype))
        for defer_bias, keep_inner, keep_norm in ((False, False, False), (True, True, False), (True, True, True)):
            yield (*residual, *weights, "kernels", defer_bias, keep_inner, keep_norm)


def stacked_linear() -> Iterator[Arguments]:
    for dtype in (torch.float32, LOW):
        together = ones(2, H, D, dtype=dtype), ones(2, H, dtype=dtype)
        for weights, biases in (together, ([ones(H, D, dtype=dtype)], [ones(H, dtype=dtype)])):
            yield (ones(B, D, dtype=dtype), *(v for pair in zip(weights, biases, strict=True) for v in pair))


def attention_products() -> Iterator[Arguments]:
    packed = ones(B, T, 3, 2, D, dtype=LOW)
    yield packed.permute(2, 0, 3, 1, 4).unbind()
    yield tuple(ones(B, 2, T, D, dtype=LOW) for _ in range(3))


def rounded() -> Iterator[Arguments]:
    for wide, low in ((torch.float32, LOW), (LOW, torch.float32)):
        yield ones(B, T, D, dtype=wide), ones(1, T, D, dtype=wide), low


FUNCTIONS: dict[type[Function], Callable[[], Iterator[Arguments]]] = {
    attention._Products: attention_products,
    fused_layers._NormedLinear: normed_linear,
    fused_layers._NormedMLP: normed_mlp,
    fused_layers._Rounded: rounded,
    fused_layers._StackedLinear: stacked_linear,
}


NEVER_TRACED = {fused_layers._Rounded}
"""What the compiler is kept from, by whom they are called: it gets plain operations."""


def operations(dtype: torch.dtype) -> dict[str, list[Arguments]]:
    """{name of a library operation: arguments}, tokens and images of `dtype`."""
    x, m, b, image = (ones(*shape, dtype=dtype) for shape in ((B, T, D), (B, D), (D,), (B, 1, T, D)))
    t, stats, flat, wide = ones(B), ones(B, T), ones(B, D, dtype=dtype), ones(B, 2 * D, dtype=dtype)
    y, dropped, heads = torch.zeros(B, dtype=torch.int64), torch.zeros(B, dtype=torch.bool), ones(2, B, 2, T, D)
    p, g, one, eps = ones(D), ones(D, dtype=dtype), ones(), 1e-6
    heads, table = heads.to(dtype), ones(4, D, dtype=dtype)
    four = heads[0], heads[1].transpose(1, 2).contiguous().transpose(1, 2)
    guidance = (3.0, 0.8, 0.25)
    return {
        "adamw_ema": [([p], [g], [p], [p], [], [], [one], one, None, None, None, 0.9, 0.99, 1e-8, 0.0, 0)],
        "attention_increment": [(*heads, *heads, *heads, 1.0)],
        "bias_gelu": [(x, b)],
        "bias_gelu_backward": [(x, x, b, False), (x, x, b, True)],
        "bias_gelu_increment": [(x, x, None, dtype), (x, x, b, dtype)],
        "consistency_loss": [(image, v, image, image, image, t, t, t, 1.0, 0.01, False) for v in (None, image)],
        "dual_bias_silu": [(flat, flat, b, b)],
        "dual_bias_silu_backward": [(wide, flat, flat, b, b)],
        "euler_lookahead": [
            (image, image, t, t, None, None, None, *guidance),
            (image, image, t, t, image, image, dropped, *guidance),
        ],
        "flow_matching_loss": [
            (image, image, t, None, None, *guidance, 1.0, 0.01, 1.0),
            (image, image, t, image, dropped, *guidance, 1.0, 0.01, 1.0),
        ],
        "gate_residual": [(x, x, m, None), (x, x, m, b)],
        "gate_residual_backward": [(x, x, m, None), (x, x, m, b)],
        "gate_residual_layernorm_modulate": [
            (x, x, m, m, m, bias, eps, dtype, stats) for bias in (None, b) for stats in (False, True)
        ],
        "gate_residual_layernorm_modulate_backward": [
            (x, dsum, x, x, m, m, bias, stats, stats, shift)
            for shift in (None, m)
            for dsum in (None, x)
            for bias in (None, b)
        ],
        "gate_residual_layernorm_modulate_increment": [
            (x, x, x, x, m, m, bias, m, m, m, eps, dtype) for bias in (None, b)
        ],
        "gate_residual_rmsnorm_modulate": [
            (x, x, m, m, m, weight, eps, dtype, stats) for weight in (None, b) for stats in (False, True)
        ],
        "gate_residual_rmsnorm_modulate_backward": [
            (x, dsum, x, x, m, m, weight, stats) for dsum in (None, x) for weight in (None, b)
        ],
        "label_bias_silu": [(flat, b, b, table, labels) for labels in (None, y)],
        "label_bias_silu_backward": [(flat, flat, b, b, table, labels) for labels in (None, y)],
        "layernorm_modulate": [(x, m, m, eps, dtype, stats) for stats in (False, True)],
        "layernorm_modulate_backward": [(x, x, m, stats, stats)],
        "layernorm_modulate_increment": [(x, x, m, m, m, eps, dtype)],
        "path_point": [(image, image, t, False), (image, image, t, True)],
        "qk_rms_norm": [(*four, b, b, eps)],
        "qk_rms_norm_backward": [(*four, *four, b, b, eps)],
        "qk_rms_norm_increment": [(*four, *four, b, b, eps, dtype, dtype)],
        "qkv_gradient": [(x, x, x)],
        "rmsnorm_modulate": [(x, m, m, weight, eps, dtype, stats) for weight in (None, b) for stats in (False, True)],
        "rmsnorm_modulate_backward": [(x, x, m, weight, stats) for weight in (None, b)],
        "scaled_direction": [(image, image, one)],
        "silu_increment": [(x, x, dtype)],
        "token_sum": [(x,)],
        "time_embedding_increment": [(t, t, t, 8, 1e4, torch.float32)],
        "time_sinusoids": [(t, t, 8, 1e4, dtype)],
    }


class Unchanged(TorchFunctionMode):
    """Notes each tensor that a call gave back as it was given, and the call."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, str]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = tensors((args, kwargs))
        self.found += [(v, getattr(func, "__name__", str(func))) for v in tensors(result) if is_in(v, given)]
        return result


def tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def is_in(tensor: Tensor, others: list[Tensor]) -> bool:
    return any(tensor is other for other in others)


def shared(outputs: object, arguments: Arguments) -> list[str]:
    """What is wrong with outputs that are arguments or lie in the memory of one."""
    given = tensors(arguments)
    places = {v.untyped_storage()._cdata for v in given}
    problems = []
    for i, out in enumerate(tensors(outputs)):
        if is_in(out, given):
            problems.append(f"output {i} is an argument")
        elif out.untyped_storage()._cdata in places:
            problems.append(f"output {i} is a view of an argument")
    return problems


def problems_of(function: type[Function], arguments: Arguments) -> list[str]:
    """What is wrong with the outputs of a Function's forward, as `apply` calls it."""
    problems = []

    class Watched(function):
        @staticmethod
        def forward(*given):
            with Unchanged() as unchanged:
                outputs = function.forward(*given)
            problems.extend(shared(outputs, arguments))
            for i, out in enumerate(tensors(outputs)):
                if function not in NEVER_TRACED:
                    problems.extend(f"output {i} went through {call}" for v, call in unchanged.found if v is out)
            return outputs

    Watched.apply(*arguments)
    return problems


def functions() -> set[type[Function]]:
    """The Functions that are there once every module of both packages is imported."""
    found, left = set(), [Function]
    while left:
        kinds = left.pop().__subclasses__()
        left += kinds
        found |= {kind for kind in kinds if kind.__module__.partition(".")[0] in ("soflow_fast", "soflow_kernels")}
    return found


def test_every_function_is_here():
    assert functions() == FUNCTIONS.keys()


def test_no_function_is_made_later():
    """A class inside a function is not there when the modules are imported, and would escape."""
    names = {kind.__name__ for kind in functions()}
    for package in PACKAGES:
        for path in Path(package.__path__[0]).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
                    assert "Function" not in bases or node.name in names, f"{path.name}: {node.name}"


def test_every_operation_is_here():
    registered = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "soflow::" in name}
    assert registered == operations(LOW).keys()


@pytest.mark.parametrize("way", ["reference", "kernel"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_function(function: type[Function], way: str):
    """By the references, and by the fakes of the kernels, which tell as much of who owns what."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(testing.mode("reference" if way == "reference" else "auto"))
        if way == "kernel":
            stack.enter_context(testing.as_on_gpu())
        found = [problem for arguments in FUNCTIONS[function]() for problem in problems_of(function, arguments)]
    assert found == []


@pytest.mark.parametrize("dtype", [torch.float32, LOW], ids=str)
@pytest.mark.parametrize("name", sorted(operations(LOW)))
def test_operation(name: str, dtype: torch.dtype):
    """The kernels' launches are left out: what they would write into is all that matters."""
    operation = getattr(torch.ops.soflow, name)
    for arguments in operations(dtype)[name]:
        with _dispatch.recording() as launches:
            outputs = operation(*arguments)
        assert shared(outputs, arguments) == [] and (launches or name == "scaled_direction")


def output_of(change: Callable[[Tensor, Tensor], Tensor]) -> list[str]:
    """The problems of a Function whose first output is change(argument, sum)."""

    class Example(Function):
        @staticmethod
        def forward(ctx, x, y):
            total = x + y
            out = change(x, total)
            return out, total * y

        @staticmethod
        def backward(ctx, *douts):
            raise AssertionError

    return problems_of(Example, (ones(B, D), ones(B, D)))


def test_what_is_wrong_is_found():
    assert output_of(lambda x, total: x) == ["output 0 is an argument"]
    assert output_of(lambda x, total: x.view(-1)) == ["output 0 is a view of an argument"]
    assert output_of(lambda x, total: x.to(x.dtype)) == ["output 0 is an argument", "output 0 went through to"]
    assert output_of(lambda x, total: total.to(x.dtype)) == ["output 0 went through to"]
    assert output_of(lambda x, total: total.contiguous()) == ["output 0 went through contiguous"]
    assert output_of(lambda x, total: total.float()) == ["output 0 went through float"]
    assert output_of(lambda x, total: total.add_(1)) == ["output 0 went through add_"]


def test_a_cast_whose_result_is_not_used_counts():
    """torch 2.11 mistakes such an output as well."""

    def change(_: Tensor, total: Tensor) -> Tensor:
        total.contiguous().sum()
        return total

    assert output_of(change) == ["output 0 went through contiguous"]


def test_what_is_right_is_not_found():
    for change in (
        lambda x, total: total,
        lambda x, total: total.to(torch.float64),
        lambda x, total: total.view(-1),
        lambda x, total: total.t().contiguous(),
        lambda x, total: x.contiguous() + total,
    ):
        assert output_of(change) == []

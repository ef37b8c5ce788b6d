"""What a GPU would run for a piece of code: each operation with its launches, bytes and FLOPs, on tensors without data.

Counted by the rules of torch's CUDA kernels and by our own operations' code. A tensor is read once and written once
however often a kernel comes back to it: what stays in a cache is not told from what does not. Views, allocations and
scalars that the host reads launch nothing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from soflow_kernels.testing import launches_of

from .memory_estimate import number_on_host

aten = torch.ops.aten


@dataclass(frozen=True)
class Operation:
    """One operation of torch, or one kernel of ours."""

    name: str
    """As "mm" or "cast float32 to bfloat16"; of ours, the operation and its kernel: "bias_gelu/_forward_kernel"."""
    phase: str
    kind: str
    """"product", "attention", "attention backward" or "other"."""
    launches: int
    bytes: int
    flops: int
    precision: str
    """Of a product's or an attention's operands: "bf16", "fp16", "fp8", "tf32" or "fp32"; else empty."""
    shape: tuple[int, ...]
    """Of its largest result; of a kernel of ours, of its largest tensor."""
    result: int
    """Bytes of that."""
    host: str
    """Who dispatches it: "torch"; "kernel" for the first kernel of an operation of ours, "" for what follows in it."""


class Operations(TorchDispatchMode):
    """Within the context, records every operation, in order. `phase` names the part of the work that it belongs to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Operation] = []
        self.phase = ""
        self._host = "torch"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return number_on_host(args[0])
        if func.namespace == "prim":  # a question about a tensor
            return func(*args, **kwargs)
        if not self._host and func.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd):
            with self:  # inside an operation of ours, below autograd, which would have taken it apart
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if func.namespace == "soflow" and func is not torch.ops.soflow.adamw_ema.default:
            self._count_ours(func, args, kwargs)
        else:
            self._count(func, args, kwargs, out)
        return out

    def _count(self, func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        read, written = _traffic(func, args, kwargs, out)
        launches = _launches(func, args, kwargs, out, written)
        name = func._overloadpacket.__name__
        result = max(written, key=_extent, default=None)
        kind = precision = ""
        flops = 0
        if launches:
            kind, flops, precision = _products(func, args, kwargs, out)
            name = _copy_name(name, args, result) if name in COPIES else name
        size = sum(map(_extent, _distinct(read))) + sum(map(_extent, _distinct(written))) if launches else 0
        self._note(name, kind or "other", launches, size, flops, precision, result, self._host)

    def _count_ours(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        name = func._overloadpacket.__name__
        self._host = ""
        with self:  # copies that it makes on the way count as well
            kernels = launches_of(f"soflow::{name}", *args, **kwargs)
        self._host = "torch"
        for k, (kernel, tensors) in enumerate(kernels):
            kind, flops, precision = "other", 0, ""
            if name in ATTENTION:
                kind, flops, precision = "attention", ATTENTION[name](*args), _precision(args[0])
            tensors = _distinct(tensors)
            size = sum(map(_extent, tensors))
            largest = max(tensors, key=_extent)
            host = "kernel" if k == 0 else ""
            self._note(f"{name}/{kernel}", kind, 1, size, flops, precision, largest, host)

    def _note(
        self, name: str, kind: str, launches: int, size: int, flops: int, precision: str, largest: Any, host: str
    ) -> None:
        shape, result = ((), 0) if largest is None else (tuple(largest.shape), _extent(largest))
        self.found.append(Operation(name, self.phase, kind, launches, size, flops, precision, shape, result, host))


def _six_products(q: Tensor, *_: Any) -> int:
    B, H, T, d = q.shape[-4:]
    return 6 * 2 * B * H * T * T * d


ATTENTION: dict[str, Callable[..., int]] = {"attention_increment": _six_products}
"""Our operations that multiply matrices: their FLOPs."""


# Bytes


def _extent(tensor: Tensor) -> int:
    """The bytes of a tensor's elements; those that it repeats, as an expanded one does, count once."""
    numbers = math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or n == 0)
    return numbers * tensor.element_size()


def _distinct(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors without those that are the same part of the same storage, transposed or not."""
    return list({(t.untyped_storage()._cdata, t.storage_offset(), t.numel()): t for t in tensors}.values())


WRITES_ONLY = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_", "normal_", "uniform_", "random_"}
"""Operations that do not read what they write in place."""
READS_NONE = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "rand_like", "randn_like"}
"""Operations that take of a tensor its shape alone."""
GATHERS = {"embedding", "index", "gather", "index_select"}
"""Operations that read of their first argument what they return."""


def _traffic(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that an operation reads, and those that it writes."""
    read: list[Tensor] = []
    written: list[Tensor] = []
    name = func._overloadpacket.__name__
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        tensors = [v for v in tree_leaves(value) if isinstance(v, Tensor)]
        if argument.is_write:
            written += tensors
        if name not in READS_NONE and not (argument.is_write and (argument.is_out or name in WRITES_ONLY)):
            read += tensors
    results = [v for v in tree_leaves(out) if isinstance(v, Tensor)]
    inputs = {t.untyped_storage()._cdata for t in (*read, *written)}
    written += [t for t in results if t.untyped_storage()._cdata not in inputs]
    if name in GATHERS:
        read[0] = results[0]
    return read, written


COPIES = ("_to_copy", "copy_", "clone")


def _copy_name(name: str, args: tuple, result: Tensor | None) -> str:
    """A cast by the dtypes that it is between, another copy by its own name."""
    assert result is not None
    source = args[1] if name == "copy_" else args[0]
    if source.dtype == result.dtype:
        return "clone" if name == "_to_copy" else name
    return f"cast {str(source.dtype)[6:]} to {str(result.dtype)[6:]}"


# Launches

FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "record_stream"}
"""Operations that make a tensor and launch nothing."""
SEVERAL = {
    # The product of dO and O, the gradients, and dQ from its float32 sums.
    "_scaled_dot_product_flash_attention_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 2,
    "embedding_dense_backward": 2,  # zeros, then the sums of at most 3072 rows
    "slice_backward": 2,  # zeros, then a copy
    "select_backward": 2,
}
REDUCTIONS = {"sum", "mean", "amax", "amin", "any", "all", "linalg_vector_norm", "norm", "var", "var_mean"}
WIDE_REDUCTION = 8192
"""Elements of one result from which torch lets several blocks sum it up; their counters are set to zero before."""
CAT_INPUTS = 128
"""Tensors that one launch puts together."""

MULTI_TENSOR_CHUNK = 65536
MULTI_TENSOR_BLOCKS = 320
MULTI_TENSOR_TENSORS = (110, 64, 48, 36, 30)
"""The most tensors of one launch, by the number of lists less one (ATen/native/cuda/MultiTensorApply.cuh)."""
NORMS_AT_ONCE = 400
"""Norms that one launch finishes (ATen/native/cuda/ForeachReduceOp.cu)."""


def _launches(func: Any, args: tuple, kwargs: dict[str, Any], out: Any, written: list[Tensor]) -> int:
    name = func._overloadpacket.__name__
    if name == "adamw_ema":
        return 1 if all(p.numel() % 8 == 0 for p in args[0]) else 2
    if name.startswith("_foreach_"):
        return _foreach_launches(name, args)
    if name in FREE or not any(t.numel() for t in written):
        return 0
    if name in SEVERAL:
        return SEVERAL[name]
    if name in ("cat", "stack"):
        return -(-len(args[0]) // CAT_INPUTS)
    if name in REDUCTIONS:
        return 2 if args[0].numel() >= WIDE_REDUCTION * max(written[0].numel(), 1) else 1
    if name.startswith("_fused_adam"):
        return multi_tensor_launches([t.numel() for t in args[0]], 4) + 1  # and the steps' own addition
    return 1


def _foreach_launches(name: str, args: tuple) -> int:
    """Launches of an operation on lists of tensors: by chunks of many at once if all are alike, else one by one."""
    lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
    sizes = [t.numel() for t in lists[0]]
    alike = all(len({(t.dtype, t.device) for t in tensors}) == 1 for tensors in lists)
    if name == "_foreach_norm":
        if not alike:
            return sum(2 if n >= WIDE_REDUCTION else 1 for n in sizes)
        return 1 + multi_tensor_launches(sizes, 1) + -(-len(sizes) // NORMS_AT_ONCE)
    if not alike or (name != "_foreach_copy_" and len({tensors[0].dtype for tensors in lists}) > 1):
        return sum(1 for n in sizes if n)
    depth = len(lists) + (0 if name.endswith("_") else 1)
    return multi_tensor_launches(sizes, depth)


def multi_tensor_launches(sizes: Sequence[int], depth: int) -> int:
    """The launches in which torch goes through tensors of these sizes in `depth` lists at once: as many tensors and
    chunks of them in one launch as its arguments hold."""
    most = MULTI_TENSOR_TENSORS[depth - 1]
    launches = blocks = tensors = 0
    for size in sizes:
        if not size:
            continue
        tensors += 1
        chunks = -(-size // MULTI_TENSOR_CHUNK)
        for chunk in range(chunks):
            blocks += 1
            last = chunk == chunks - 1
            if blocks == MULTI_TENSOR_BLOCKS or (tensors == most and last):
                launches += 1
                blocks, tensors = 0, 0 if last else 1
    return launches + (1 if blocks else 0)


# Products

PRODUCTS = {"_addmm_activation": aten.addmm}
"""Products that torch's counter lacks, by one with the same formula."""


def _products(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> tuple[str, int, str]:
    """The kind of an operation that multiplies matrices, its FLOPs and the precision of its operands."""
    packet = func._overloadpacket
    name = packet.__name__
    formula: Any = flop_registry.get(PRODUCTS.get(name, packet))
    if formula is None:
        return "other", 0, ""
    operands = [t for t in args if isinstance(t, Tensor)]
    kind = "product"
    if "attention" in name:
        kind = "attention backward" if name.endswith("_backward") else "attention"
    return kind, formula(*args, **kwargs, out_val=out), _precision(operands[:2][-1])


def _precision(operand: Tensor) -> str:
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8", torch.float8_e5m2: "fp8"}
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return names.get(operand.dtype, "tf32" if tf32 else "fp32")

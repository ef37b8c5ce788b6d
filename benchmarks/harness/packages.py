"""Stand-ins for optional packages, by which their operations are counted on tensors without data.

`counted_packages()` lets the engine find quack-kernels' products and flash-attn's packed attention. They compute
nothing: they have the shapes of their results, and FLOPs as of the products and attention that they are. What they read
and write is what their arguments and results are; their epilogues are taken to cost no time of their own.
"""

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = "counted"
"""Of the operations here."""


@torch.library.custom_op(f"{NAMESPACE}::gemm_act", mutates_args=())
def _gemm_act(a: Tensor, b: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("a stand-in is counted, not run")


@torch.library.custom_op(f"{NAMESPACE}::gemm_dact", mutates_args=())
def _gemm_dact(a: Tensor, b: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("a stand-in is counted, not run")


@torch.library.custom_op(f"{NAMESPACE}::packed_attention", mutates_args=())
def _packed_attention(qkv: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("a stand-in is counted, not run")


@torch.library.custom_op(f"{NAMESPACE}::packed_attention_backward", mutates_args=())
def _packed_attention_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    raise NotImplementedError("a stand-in is counted, not run")


@_gemm_act.register_fake
@_gemm_dact.register_fake
def _two_products(a: Tensor, b: Tensor, third: Tensor) -> tuple[Tensor, Tensor]:
    shape = len(a), b.shape[1]
    return a.new_empty(shape), a.new_empty(shape)


@_packed_attention.register_fake
def _attention(qkv: Tensor) -> tuple[Tensor, Tensor]:
    B, T, _, heads, d = qkv.shape
    return qkv.new_empty(B, T, heads, d), qkv.new_empty(B, heads, T, dtype=torch.float32)


@_packed_attention_backward.register_fake
def _attention_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    return torch.empty_like(qkv)


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _lead_back(ctx: Any, dout: Tensor, _: Tensor) -> Tensor:
    return _packed_attention_backward(dout, *ctx.saved_tensors)


_packed_attention.register_autograd(_lead_back, setup_context=_keep)

_operations = getattr(torch.ops, NAMESPACE)


@register_flop_formula([_operations.gemm_act, _operations.gemm_dact])
def _product_flops(a_shape: Any, b_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


def _of_attention(qkv_shape: Any, products: int) -> int:
    B, T, _, heads, d = qkv_shape
    return products * 2 * B * heads * T * T * d


@register_flop_formula(_operations.packed_attention)
def _forward_flops(qkv_shape: Any, *_: Any, **__: Any) -> int:
    return _of_attention(qkv_shape, 2)


@register_flop_formula(_operations.packed_attention_backward)
def _backward_flops(dout_shape: Any, qkv_shape: Any, *_: Any, **__: Any) -> int:
    return _of_attention(qkv_shape, 5)


def _gemm_act_of_quack(A: Tensor, B: Tensor, bias: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return _gemm_act(A, B, bias)


def _gemm_dact_of_quack(A: Tensor, B: Tensor, PreAct: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return _gemm_dact(A, B, PreAct)


def _flash_attn_qkvpacked_func(qkv: Tensor, **options: Any) -> Tensor:
    return _packed_attention(qkv)[0]


@contextlib.contextmanager
def counted_packages() -> Iterator[None]:
    """Within the context, `import quack.gemm_interface` and `import flash_attn` find the stand-ins."""
    gemms, flash = ModuleType("quack.gemm_interface"), ModuleType("flash_attn")
    vars(gemms).update(gemm_act=_gemm_act_of_quack, gemm_dact=_gemm_dact_of_quack)
    vars(flash).update(flash_attn_qkvpacked_func=_flash_attn_qkvpacked_func)
    made = {"quack": ModuleType("quack"), "quack.gemm_interface": gemms, "flash_attn": flash}
    kept = {name: sys.modules.pop(name) for name in made if name in sys.modules}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]
        sys.modules.update(kept)

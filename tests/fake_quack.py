"""A stand-in for quack-kernels: `quack.gemm_interface` in plain PyTorch, by what its functions promise.

gemm_act: (A B + bias, rounded; the activation of it, from before it was rounded). gemm_dact: (A B times the slope of
the activation at PreAct; the activation of PreAct). Accumulated in float32.
"""

import math
import sys
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """One call of a function: its name, its tensors and the other arguments."""

    name: str
    tensors: tuple[Tensor, ...]
    options: dict[str, Any]


class FakeQuack:
    """What is called, and what the next results are multiplied by, in place of 1."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.factors: dict[str, float] = {}
        self.error: Exception | None = None

    def gemm_act(self, A, B, C=None, bias=None, activation=None, *, store_preact=True, **options):
        assert C is None and store_preact
        self._note("gemm_act", (A, B, bias), activation, options)
        u = A.float() @ B.float() + bias.float()
        return self._scaled("u", u).to(A.dtype), self._scaled("inner", _gelu(u)).to(A.dtype)

    def gemm_dact(self, A, B, PreAct, activation=None, **options):
        self._note("gemm_dact", (A, B, PreAct), activation, options)
        u = PreAct.float()
        du = A.float() @ B.float() * _slope(u)
        return self._scaled("du", du).to(A.dtype), self._scaled("again", _gelu(u)).to(A.dtype)

    def _scaled(self, name: str, value: Tensor) -> Tensor:
        return value * self.factors.get(name, 1.0)

    def _note(self, name: str, tensors: tuple[Tensor, ...], activation: str, options: dict[str, Any]) -> None:
        self.calls.append(Call(name, tensors, options))
        if self.error is not None:
            raise self.error
        assert activation == "gelu_tanh_approx"
        a, b, third = tensors
        assert a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0] and third.shape[-1] == b.shape[1]
        assert a.stride(1) == 1 and 1 in b.stride() and third.stride(-1) == 1
        assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


def _tanh(u: Tensor) -> Tensor:
    return torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))


def _gelu(u: Tensor) -> Tensor:
    return 0.5 * u * (1 + _tanh(u))


def _slope(u: Tensor) -> Tensor:
    tanh = _tanh(u)
    return 0.5 * (1 + tanh) + 0.5 * u * (1 - tanh**2) * math.sqrt(2 / math.pi) * (1 + 0.134145 * u**2)


def put_in_place(monkeypatch: Any) -> FakeQuack:
    """Let `import quack.gemm_interface` find a stand-in."""
    fake, module = FakeQuack(), ModuleType("quack.gemm_interface")
    module.gemm_act, module.gemm_dact = fake.gemm_act, fake.gemm_dact
    monkeypatch.setitem(sys.modules, "quack", ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", module)
    return fake

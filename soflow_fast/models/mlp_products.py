"""The first product of a DiT block's MLP with its tanh GELU, and what leads back through both, in two ways.

    u = h W1' + b1,  inner = gelu(u)                                        forward
    du = (dout W2) gelu'(u),  db1 = sum of du over rows,  inner once more   backward

h: [..., D]; W1: [I, D]; b1: [I]; dout: [..., D]; W2: [D, I]; u, inner, du: [..., I].

"kernels": products of torch, and the GELU as an operation of its own after them (`soflow_kernels.bias_gelu`, or torch
where kernels are off). "quack": Dao-AILab's quack-kernels, whose products take the GELU into their epilogues. Of passes
over [..., I], each a read or a write, that saves the forward one (u is not read again) and the backward one: the
gradient of inner is neither written nor read, but the sum over rows reads du.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from soflow_kernels import bias_gelu, use_kernel
from soflow_kernels.gelu import bias_gelu_backward

from .attention import in_short, version

PACKAGE = "quack-kernels"
GELU = "gelu_tanh_approx"
"""The tanh GELU by quack's name."""
CAPABILITY = (9, 0)
"""The least compute capability for which quack's epilogues are written."""


class MLPProducts(NamedTuple):
    """One way to compute them."""

    defers_bias: bool
    """Whether u lacks its bias, which then goes with the GELU."""
    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(h, W1, b1) -> (u, inner)."""
    backward: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    """(dout, W2, u, b1) -> (du, db1, inner)."""

    def product(self, h: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
        """u alone."""
        return F.linear(h, w1, None if self.defers_bias else b1)


def _forward(h: Tensor, w1: Tensor, b1: Tensor) -> tuple[Tensor, Tensor]:
    u = F.linear(h, w1, b1)
    return u, F.gelu(u, approximate="tanh")


def _backward(dout: Tensor, w2: Tensor, u: Tensor, b1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    du = torch.ops.aten.gelu_backward(dout @ w2, u, approximate="tanh")
    return du, du.flatten(0, -2).sum(0), F.gelu(u, approximate="tanh")


def _kernel_forward(h: Tensor, w1: Tensor, b1: Tensor) -> tuple[Tensor, Tensor]:
    u = F.linear(h, w1)
    return u, bias_gelu(u, b1)


def _kernel_backward(dout: Tensor, w2: Tensor, u: Tensor, b1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return bias_gelu_backward(dout @ w2, u, b1)


def _quack() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Its two functions. They work out dtypes and shapes from tensors of rows, and take the second matrix as [K, N]."""
    from quack.gemm_interface import gemm_act, gemm_dact  # pyright: ignore[reportMissingImports]

    return gemm_act, gemm_dact


# tuned=False: tiles by quack's rule for the GPU. Its search would be made anew at every start and for every number of
# rows, in the middle of a step, and could end at other tiles, and so at other roundings, than before a run was resumed.
def _quack_forward(h: Tensor, w1: Tensor, b1: Tensor) -> tuple[Tensor, Tensor]:
    gemm_act, _ = _quack()
    u, inner = gemm_act(_rows(h), w1.t(), bias=b1, activation=GELU, store_preact=True, tuned=False)
    shape = (*h.shape[:-1], len(w1))
    return u.view(shape), inner.view(shape)


def _quack_backward(dout: Tensor, w2: Tensor, u: Tensor, b1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _, gemm_dact = _quack()
    du, inner = gemm_dact(_rows(dout), w2, _rows(u), activation=GELU, tuned=False)
    return du.view(u.shape), du.sum(0), inner.view(u.shape)


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2).contiguous()


PLAIN = MLPProducts(False, _forward, _backward)
KERNELS = MLPProducts(True, _kernel_forward, _kernel_backward)
QUACK = MLPProducts(False, _quack_forward, _quack_backward)


def mlp_products(name: str, x: Tensor, dtype: torch.dtype) -> MLPProducts:
    """Those that go by a name, for tokens like x and weights of a dtype. Other dtypes than bf16 are not for quack:
    samples and checks of a bf16 run are in float32."""
    if name == "quack" and dtype == torch.bfloat16:
        return QUACK
    return KERNELS if use_kernel(x) else PLAIN


def why_not(device: torch.device, dtype: torch.dtype, *widths: int) -> str | None:
    """Why quack cannot compute products of a dtype and of these widths (D and I) on a device; None: it can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    here = torch.cuda.get_device_capability(device)
    if here < CAPABILITY:
        return f"needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or more, the GPU has {here[0]}.{here[1]}"
    if dtype != torch.bfloat16:
        return "needs bf16"
    if any(width % 8 for width in widths):  # rows of 16 bytes
        return f"widths {' and '.join(map(str, widths))}: it takes multiples of 8"
    return _not_importable()


def _not_importable() -> str | None:
    try:
        _quack()
    except Exception as error:  # whatever a package raises that was built for another torch or CUDA
        if isinstance(error, ImportError) and version(PACKAGE) is None:
            return f"{PACKAGE} is not installed (pip install {PACKAGE})"
        return f"{PACKAGE} cannot be imported: {in_short(error)}"
    return None

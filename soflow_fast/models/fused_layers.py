"""The DiT block of plain layers, fused across the borders of its modules, keeping little for the backward.

A gated residual, the norm after it and the product after that are one autograd node. A product keeps its input for the
backward, which here is a modulated norm or a GELU: cheap to make again from what the norm or the GELU itself keeps. So
each node covers both. Per token and block there remain, in units of the hidden size D: the residual before attention
(1), q, k and v (3), attention's result (1), its projection (1), the residual before the MLP (1), the MLP's inner values
before the GELU (4) and its result (1): 12 D, and the statistics of the norms. Where q and k are normalised over their
heads, what comes of that as well (2).

A residual whose last branch is still to be gated and added (`PendingResidual`) goes from block to block, so that the
addition is fused with the next block's norm. Without gradient, and under forward-mode AD or torch.func, the plain
composition of the same operations runs instead.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from soflow_kernels import (
    gate_residual,
    gate_residual_layernorm_modulate,
    layernorm_modulate,
    linear_gelu,
    qk_rms_norm,
    transformed,
    use_kernel,
)
from soflow_kernels.adaln import adaln_bwd, adaln_fwd
from soflow_kernels.packed_gradient import qkv_gradient, token_sum

from .mlp_products import QUACK, mlp_products

EPS = 1e-6
"""Epsilon of every norm."""


class SavePolicy(NamedTuple):
    """The values that a block keeps for its backward and could make again."""

    norms: bool
    """The modulated norms and GELUs, which are the inputs of products, as autograd would."""
    inner: bool
    """The MLP's values before the GELU, 4 D numbers a token; else their product is made again."""


class LinearWeights(NamedTuple):
    """Weight [N, K] and bias [N] of a linear layer, in the dtype in which they are multiplied."""

    weight: Tensor
    bias: Tensor


class HeadNorms(NamedTuple):
    """The weights [head_dim] of the RMSNorms of q and of k."""

    q: Tensor
    k: Tensor


class BlockWeights(NamedTuple):
    """The four linear layers of a block on tokens, and its norms of q and k, where it has some."""

    qkv: LinearWeights
    proj: LinearWeights
    fc1: LinearWeights
    fc2: LinearWeights
    heads: HeadNorms | None = None


class BlockModulation(NamedTuple):
    """Shift, scale and gate of attention and of the MLP, [B, D] each (arXiv 2212.09748, section 3.2: adaLN-Zero)."""

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor


class PendingResidual(NamedTuple):
    """The residual stream x + gate (branch + bias), whose last branch is not yet added; branch None: x as it is."""

    x: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None
    bias: Tensor | None = None

    def added(self) -> Tensor:
        """The residual [B, T, D] with its branch."""
        x, branch, gate, bias = self
        return x if branch is None or gate is None else gate_residual(x, branch, gate, bias)


class DeferredBiases(NamedTuple):
    """Which linear layers' outputs lack their biases, as the operation after them takes these along."""

    branches: bool
    """proj and fc2."""
    fc1: bool


class BlockOutputs(NamedTuple):
    """What a block came to, for a `TapedOutputs`: its residuals, and the outputs of its linear layers."""

    x1: Tensor
    """The residual at the norm before attention, [B, T, D]."""
    q: Tensor
    k: Tensor
    v: Tensor
    """[B, T, D] each, views of one tensor [B, T, 3 D]: as attention takes them, but for norms of their heads."""
    proj: Tensor
    x2: Tensor
    """The residual at the norm before the MLP."""
    fc1: Tensor | None
    """[B, T, 4 D], without gradient; None: not asked for."""
    fc2: Tensor
    deferred: DeferredBiases
    normed_q: Tensor | None = None
    normed_k: Tensor | None = None
    """q and k after these norms, [B, T, D]; None: there are none."""


def weights_of(layer: nn.Linear, dtype: torch.dtype) -> LinearWeights:
    """The parameters of a layer in a dtype: themselves, or a cast that autograd follows."""
    return LinearWeights(layer.weight.to(dtype), layer.bias.to(dtype))


def _side_by_side(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """The products of one x [B, K] with several layers, [B, sum of N].

    One by one, each into its columns: as one product, the weights would first be copied to one matrix, which takes
    longer than they take to be multiplied.
    """
    pairs = zip(weights, biases, strict=True)
    if torch.compiler.is_compiling() or transformed():  # no result is given to write to
        return F.linear(x, torch.cat(list(weights)), torch.cat(list(biases)))
    out = x.new_empty(len(x), sum(map(len, weights)))
    for (weight, bias), columns in zip(pairs, out.split([len(weight) for weight in weights], 1), strict=True):
        torch.addmm(bias, x, weight.t(), out=columns)
    return out


class _Rounded(torch.autograd.Function):
    """x + y in another dtype, in one pass; y has no gradient."""

    @staticmethod
    def forward(ctx: Any, x, y, dtype):
        ctx.dtype = x.dtype
        return torch.add(x, y, out=torch.empty(x.shape, dtype=dtype, device=x.device))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        return dout.to(ctx.dtype), None, None


def rounded_sum(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """x + y, which has no gradient, added in the dtype of x and rounded to another."""
    if dtype == x.dtype or transformed() or torch.compiler.is_compiling():
        return (x + y).to(dtype)
    return _Rounded.apply(x, y, dtype)  # pyright: ignore[reportReturnType]


class _StackedLinear(torch.autograd.Function):
    """The products of one x with several layers; keeps their weights, not a copy of all."""

    @staticmethod
    def forward(ctx: Any, x, *parameters):
        weights, biases = parameters[0::2], parameters[1::2]
        ctx.save_for_backward(x, *weights)
        return _side_by_side(x, weights, biases)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *weights = ctx.saved_tensors
        rows = [len(weight) for weight in weights]
        parts = [part @ weight for part, weight in zip(dout.split(rows, 1), weights, strict=True)]
        dx = torch.stack(parts).sum(0)
        dweight, dbias = dout.t() @ x, dout.sum(0)
        each = zip(dweight.split(rows), dbias.split(rows), strict=True)
        return dx, *[gradient for pair in each for gradient in pair]


class _NormedLinear(torch.autograd.Function):
    """x', LN(x') modulated and multiplied; keeps x', the branch and the statistics, and the norm if it is to (`keep`).

    The product is returned in `parts` of equal width, so that the gradients of q, k and v come back one by one, and are
    put together once.
    """

    @staticmethod
    def forward(ctx: Any, x, branch, gate, branch_bias, shift, scale, weight, bias, parts, keep):
        x, h, mean, rstd = adaln_fwd(x, branch, gate, shift, scale, EPS, branch_bias, weight.dtype)
        ctx.save_for_backward(x, branch, gate, branch_bias, shift, scale, mean, rstd, weight, h if keep else None)
        out = F.linear(h, weight, bias).chunk(parts, -1)
        ctx.set_materialize_grads(False)  # nobody takes x' on from the last norm
        return out if branch is None else (x, *out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *douts):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, branch, gate, branch_bias, shift, scale, mean, rstd, weight, h = ctx.saved_tensors
        dsum, douts = (None, douts) if branch is None else (douts[0], douts[1:])
        width = len(weight) // len(douts)
        douts = [x.new_zeros(*x.shape[:-1], width, dtype=weight.dtype) if d is None else d for d in douts]
        if len(douts) == 3:
            dout, dbias = qkv_gradient(*douts)
        else:
            dout = douts[0] if len(douts) == 1 else torch.cat(douts, -1)
            dbias = token_sum(dout)
        del douts
        again = shift if h is None else None
        d = adaln_bwd(dout @ weight, dsum, x, branch, gate, scale, branch_bias, mean, rstd, EPS, again)
        h = d.out if h is None else h
        assert h is not None
        dweight = dout.flatten(0, -2).t() @ h.flatten(0, -2)
        return d.x, d.y, d.gate, d.bias, d.shift, d.scale, dweight, dbias, None, None


class _NormedMLP(torch.autograd.Function):
    """x', LN(x') modulated, and the MLP; keeps x', the branch, the statistics and, as told, inner values and norm.

    mlp: who makes the products around the GELU (`mlp_products`). defer_bias: the last bias is left out. The inner
    values are returned as well, as the product left them and without gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x, branch, gate, branch_bias, shift, scale, w1, b1, w2, b2, mlp, defer_bias, keep_inner, keep_norm
    ):
        x, h, mean, rstd = adaln_fwd(x, branch, gate, shift, scale, EPS, branch_bias, w1.dtype)
        u, inner = mlp_products(mlp, x, w1.dtype).forward(h, w1, b1)
        out = F.linear(inner, w2, None if defer_bias else b2)
        ctx.save_for_backward(
            *(x, branch, gate, branch_bias, shift, scale, mean, rstd, w1, b1, w2),
            *(u if keep_inner else None, h if keep_norm else None),
        )
        ctx.mlp, ctx.defer_bias = mlp, defer_bias
        ctx.mark_non_differentiable(u)
        ctx.set_materialize_grads(False)  # autograd would fill a gradient of zeros for u at every call
        return x, out, u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsum, dout, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, branch, gate, branch_bias, shift, scale, mean, rstd, w1, b1, w2, u, h = ctx.saved_tensors
        if dout is None:
            dout = x.new_zeros(*x.shape[:-1], len(w2), dtype=w2.dtype)
        products = mlp_products(ctx.mlp, x, w1.dtype)
        if u is None:
            u = products.product(layernorm_modulate(x, shift, scale, EPS, w1.dtype) if h is None else h, w1, b1)
        du, db1, inner = products.backward(dout, w2, u, b1)
        del u
        dout = dout.flatten(0, -2)
        dw2, db2 = dout.t() @ inner.flatten(0, -2), None if ctx.defer_bias else dout.sum(0)
        del inner
        again = shift if h is None else None
        d = adaln_bwd(du @ w1, dsum, x, branch, gate, scale, branch_bias, mean, rstd, EPS, again)
        h = d.out if h is None else h
        assert h is not None
        dw1 = du.flatten(0, -2).t() @ h.flatten(0, -2)
        return d.x, d.y, d.gate, d.bias, d.shift, d.scale, dw1, db1, dw2, db2, *[None] * 4


def _composed() -> bool:
    """Whether operations are composed one by one: nothing is kept, or a derivative of another kind is taken."""
    return not torch.is_grad_enabled() or transformed()


def defers_bias(x: Tensor) -> bool:
    """Whether the operation after a product of x takes the product's bias along: where it is a kernel."""
    return use_kernel(x)


def linear(x: Tensor, layer: LinearWeights, *, bias: bool = True) -> Tensor:
    """x W' + b (or without b), [..., K] -> [..., N]."""
    return F.linear(x, layer.weight, layer.bias if bias else None)


def stacked_linear(x: Tensor, layers: list[LinearWeights]) -> Tensor:
    """The products of one x [B, K] with several layers side by side, [B, sum of N]."""
    if _composed():
        weights, biases = zip(*layers, strict=True)
        return _side_by_side(x, weights, biases)
    return _StackedLinear.apply(x, *[value for layer in layers for value in layer])  # pyright: ignore[reportReturnType]


def _norm(residual: PendingResidual, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, branch, gate, bias = residual
    if branch is None or gate is None:
        return x, layernorm_modulate(x, shift, scale, EPS, dtype)
    return gate_residual_layernorm_modulate(x, branch, gate, shift, scale, EPS, bias, dtype)


def normed_linear(
    residual: PendingResidual, shift: Tensor, scale: Tensor, layer: LinearWeights, *, keep_norm: bool, parts: int = 1
) -> tuple[Tensor, ...]:
    """The residual x' [B, T, D] with its branch added, and the product of its modulated norm, [B, T, N], in `parts`
    side by side."""
    if _composed() or (keep_norm and not defers_bias(residual.x)):
        x, h = _norm(residual, shift, scale, layer.weight.dtype)
        out = linear(h, layer)
        return (x, out) if parts == 1 else (x, *out.chunk(parts, -1))  # one chunk would be copied in the backward
    out: Any = _NormedLinear.apply(*residual, shift, scale, *layer, parts, keep_norm)
    return (residual.x, *out) if residual.branch is None else out


def normed_mlp(
    residual: PendingResidual,
    shift: Tensor,
    scale: Tensor,
    fc1: LinearWeights,
    fc2: LinearWeights,
    *,
    save: SavePolicy,
    taped: bool = False,
    mlp: str = "kernels",
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """The residual x' with its branch added, the MLP (linear, tanh GELU, linear) of its modulated norm, the values
    before the GELU, and whether these lack the first bias.

    Where `defers_bias`, the last bias is left out of the MLP. The values before the GELU come without gradient, None
    unless they are at hand (`taped`: they are). mlp: who makes the products around the GELU where there is a backward.
    """
    defer_bias = defers_bias(residual.x)
    products = mlp_products(mlp, residual.x, fc1.weight.dtype)
    # Where norms and GELUs are kept, operations one by one keep them; quack's products have their GELU in themselves.
    if not _composed() and (products is QUACK or not save.norms):
        out: Any = _NormedMLP.apply(*residual, shift, scale, *fc1, *fc2, mlp, defer_bias, save.inner, save.norms)
        return *out, products.defers_bias
    x, h = _norm(residual, shift, scale, fc1.weight.dtype)
    if taped or (torch.is_grad_enabled() and (defer_bias or h.dtype != torch.float32)):
        u, inner = mlp_products("kernels", residual.x, fc1.weight.dtype).forward(h, *fc1)
        return x, linear(inner, fc2, bias=not defer_bias), u.detach(), defer_bias
    return x, linear(linear_gelu(h, fc1.weight, fc1.bias), fc2, bias=not defer_bias), None, defer_bias


def normed_heads(q: Tensor, k: Tensor, norms: HeadNorms) -> tuple[Tensor, Tensor]:
    """q and k [B, T, D] with each of their heads normalised."""
    head_dim = len(norms.q)
    q, k = qk_rms_norm(q.unflatten(-1, (-1, head_dim)), k.unflatten(-1, (-1, head_dim)), norms.q, norms.k, EPS)
    return q.flatten(2), k.flatten(2)


def fused_block(
    residual: PendingResidual,
    modulation: BlockModulation,
    weights: BlockWeights,
    attend: Callable[..., Tensor],
    save: SavePolicy,
    taped: bool = False,
    parts: int = 3,
    mlp: str = "kernels",
) -> tuple[PendingResidual, BlockOutputs]:
    """One DiT block, from the pending residual that enters it to the one that leaves it, and what its layers came to.

    attend: attention proper, from q, k and v [B, T, D] to [B, T, D]; parts 1: from one tensor of them, [B, T, 3 D],
    where their heads are not normalised; mlp: as for `normed_mlp`.
    """
    m = modulation
    x1, *qkv = normed_linear(residual, m.shift1, m.scale1, weights.qkv, keep_norm=save.norms, parts=parts)
    later = defers_bias(x1)
    q, k, v = qkv if parts == 3 else qkv[0].detach().chunk(3, -1)
    normed = (None, None)
    if weights.heads is not None:
        normed = normed_heads(q, k, weights.heads)
        qkv = [*normed, v]
    branch = linear(attend(*qkv), weights.proj, bias=not later)
    residual = PendingResidual(x1, branch, m.gate1, weights.proj.bias if later else None)
    x2, out, inner, inner_later = normed_mlp(
        residual, m.shift2, m.scale2, weights.fc1, weights.fc2, save=save, taped=taped, mlp=mlp
    )
    leaving = PendingResidual(x2, out, m.gate2, weights.fc2.bias if later else None)
    return leaving, BlockOutputs(x1, q, k, v, branch, x2, inner, out, DeferredBiases(later, inner_later), *normed)

"""The DiT's forward on a value and its increment side by side, so that a difference of two forwards does not cancel.

The consistency quotient divides N(x_l, l, s) - N(x_t, t, s) by t - l, down to 0.002 of the interval. Of two separate
forwards in bf16 that difference is rounding error. Here every activation h travels with dh = h(end) - h(start) as a
tensor of its own:

* a product: d(W h) = W dh, so that its error is relative to dh, not to h;
* a product of two varying things (modulation, gate, attention scores): expanded, d(a b) = da (b + db) + a db;
* everything else: g(h + dh) - g(h) by an identity without cancellation, in float32 (`soflow_kernels.increment`).

Only the products of the blocks run in the low precision. Nothing here has a gradient. The value and the increment cost
two forwards, or one if the values ride along on a forward that is made anyway (`tape`).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from soflow_kernels import (
    attention_increment,
    bias_gelu_increment,
    gate_residual_layernorm_modulate_increment,
    layernorm_modulate_increment,
    on_gpu,
    silu_increment,
    time_embedding_increment,
)

from .dit import FREQUENCIES, MAX_PERIOD, Attention, DiT, TapedOutputs
from .plain_layers import watched_everywhere

_FORWARD = DiT.forward


@torch.no_grad()
def paired_forward(
    net: DiT,
    x: Tensor,
    dx: Tensor,
    t: Tensor,
    dt: Tensor,
    s: Tensor,
    y: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    tape: TapedOutputs | None = None,
) -> tuple[Tensor, Tensor]:
    """(N(x, t, s; y), N(x + dx, t + dt, s; y) - N(x, t, s; y)), both [B, C, H, W], without gradient.

    Args:
        net: a DiT, any size; the parameters of its ends in float32 or float64, those of its blocks in any dtype. All
            its layers must be as `DiT` makes them: what acts when they are called would be missed here.
        x, dx: [B, C, H, W]; t, dt, s: [B], dt of either sign; y: labels [B], None: the null label.
        dtype: of the operands of the products (accumulated in float32): bfloat16, float16, float32 or float64. The
            conditioning, the patches and the last product, which cost next to nothing, stay in float32.
        tape: of a forward at (x, t, s, y). Its values are taken for those of this pass, which then makes the products
            of increments alone and costs one forward; the value that is returned is that forward's output.

    The relative error of the increment does not grow as dx and dt go to 0.

    Raises:
        ValueError: for shapes that do not fit the network, another dtype, a network that is no DiT, or a layer of it
            that was replaced, wrapped, hooked, pruned, quantised or sharded, which is named.
    """
    if not isinstance(net, DiT):
        raise ValueError(f"net must be a DiT, got {type(net).__name__}: it has no value-and-increment forward")
    changed = missed_part(net) if tape is None else None  # a tape is of plain layers
    if changed is not None:
        raise ValueError(
            f"{changed} was replaced, wrapped or hooked, which the value-and-increment forward would miss; "
            "take a pair of forwards (--quotient pair)"
        )
    if dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"dtype must be bfloat16, float16, float32 or float64, got {dtype}")
    net.check_input(x, t, s, y)
    if dx.shape != x.shape or dt.shape != t.shape:
        raise ValueError(f"dx and dt must have the shapes of x and t, got {list(dx.shape)} and {list(dt.shape)}")
    work = net.x_embedder.proj.weight.dtype
    work = torch.float64 if dtype == torch.float64 or work == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        x, dx, t, dt, s = (v.to(work) for v in (x, dx, t, dt, s))
        both = _PairedPass(work, dtype, {} if tape is None else tape.outputs)
        value, increment = both.network(net, x, dx, t, dt, s, y).unbind()
        return value, increment


def missed_part(net: DiT, *, float8: bool = True) -> str | None:
    """The first module whose change a value-and-increment forward would miss, as it calls none; None: all are plain.
    float8: linear layers of torchao's float8 recipe pass too."""
    if watched_everywhere():
        return "every module"
    if net._forward_hooks or net._forward_pre_hooks or "forward" in net.__dict__ or type(net).forward is not _FORWARD:
        return "net"
    for k, block in enumerate(net.blocks):
        if "attend" in getattr(block, "attn", block).__dict__:
            return f"net.blocks.{k}.attn"
    changed = net.changed_part(float8=float8)
    return None if changed is None else f"net.{changed}"


class _PairedPass:
    """One pass over pairs [2, ...]: `work` is the dtype of all but the operands of products, which are `operand`.

    known: layers whose value another forward has computed already, with the bias that this value lacks or None.
    """

    def __init__(self, work: torch.dtype, operand: torch.dtype, known: Mapping[nn.Module, tuple]) -> None:
        self.work, self.operand, self.known = work, operand, known

    def network(self, net: DiT, x: Tensor, dx: Tensor, t: Tensor, dt: Tensor, s: Tensor, y: Tensor | None) -> Tensor:
        c = self.conditioning(net, t, dt, s, y)
        # The patch embedding is linear: the increment takes no bias and no positions.
        patches = torch.stack([net.x_embedder.patches(x), net.x_embedder.patches(dx)])
        h = _plus(self.affine(patches, net.x_embedder.proj, self.work), net.pos_embed)
        final = self.affine(c, net.final_layer.adaLN_modulation[1]).chunk(2, -1)
        chunks = [self.affine(c, block.adaLN_modulation[1]).chunk(6, -1) for block in net.blocks]
        entries = [m[:2] for m in chunks[1:]] + [final]
        n = layernorm_modulate_increment(h, chunks[0][0], chunks[0][1])
        for block, m, entry in zip(net.blocks, chunks, entries, strict=True):
            a = self.attention(n, block.attn)
            h, n = gate_residual_layernorm_modulate_increment(h, a, m[2], m[3], m[4])
            inner = bias_gelu_increment(self.affine(n, block.mlp.fc1))
            h, n = gate_residual_layernorm_modulate_increment(h, self.affine(inner, block.mlp.fc2), m[5], *entry)
        out = self.affine(n, net.final_layer.linear, self.work)
        return torch.stack([net.unpatchify(part) for part in out])

    def conditioning(self, net: DiT, t: Tensor, dt: Tensor, s: Tensor, y: Tensor | None) -> Tensor:
        """SiLU(c) as a pair; t - s changes by dt as t does."""
        labels = torch.full(t.shape, net.num_classes, device=t.device) if y is None else y
        c: Any = 0
        times = time_embedding_increment(t, dt, s, frequencies=FREQUENCIES, max_period=MAX_PERIOD)
        for phi, embedder in zip(times.unbind(1), (net.t_embedder, net.s_embedder), strict=True):
            hidden = silu_increment(self.affine(phi, embedder.mlp[0], self.work))
            c = c + self.affine(hidden, embedder.mlp[2], self.work)
        return silu_increment(_plus(c, net.y_embedder(labels)))

    def affine(self, h: Tensor, layer: nn.Linear | nn.Conv2d, operand: torch.dtype | None = None) -> Tensor:
        """W h + b and W dh, with operands of a dtype (None: the low precision)."""
        operand = operand or self.operand
        weight, bias = layer.weight.flatten(1), layer.bias
        assert bias is not None
        if layer in self.known:
            value, missing = self.known[layer]
            value = value.to(self.work)
            value = value if missing is None else value + missing.to(self.work)
            return torch.stack([value, self.product(h[1], weight.t(), operand)])
        return _plus(self.product(h, weight.t(), operand), bias)

    def product(self, a: Tensor, b: Tensor, operand: torch.dtype | None = None) -> Tensor:
        """a @ b with both rounded to the operand dtype, accumulated and returned in the working dtype."""
        operand = operand or self.operand
        if operand == self.work:
            return a.to(self.work) @ b.to(self.work)
        if operand == torch.float16:  # increments lie below its range: matrices are scaled by powers of two
            (a, by_a), (b, by_b) = _scaled(a), _scaled(b)
            return self._rounded_product(a, b, operand) * (by_a * by_b)
        return self._rounded_product(a, b, operand)

    def _rounded_product(self, a: Tensor, b: Tensor, operand: torch.dtype) -> Tensor:
        a, b = a.to(operand), b.to(operand)
        if on_gpu(a) and b.dim() == 2:
            return torch.mm(a.flatten(0, -2), b, out_dtype=self.work).unflatten(0, a.shape[:-1])
        return a.to(self.work) @ b.to(self.work)  # the products of rounded operands are exact in float32

    def attention(self, n: Tensor, layer: Attention) -> Tensor:
        """softmax(q k' / sqrt(d)) v and its increment, then the output projection."""
        qkv = self.affine(n, layer.qkv).unflatten(-1, (3, layer.num_heads, -1))  # [2, B, T, 3, heads, d]
        if self.operand == torch.bfloat16:  # increments lie below the range of float16
            qkv = qkv.to(self.operand)
        q, k, v = (part.transpose(2, 3) for part in qkv.unbind(3))
        return self.affine(attention_increment(q, k, v).transpose(2, 3).flatten(3), layer.proj)


def _plus(pair: Tensor, constant: Tensor) -> Tensor:
    """A pair whose value grows by something that does not change."""
    return torch.stack([pair[0] + constant.to(pair.dtype), pair[1]])


def _scaled(a: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices [..., M, K] with a largest element in [1, 2), and what to multiply them by, [..., 1, 1]."""
    largest = a.abs().amax((-2, -1), keepdim=True)
    by = torch.exp2(torch.where(largest > 0, largest, 1).log2().floor())
    return a / by, by

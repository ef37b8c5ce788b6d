"""The DiT's forward on a value and its increment side by side, so that a difference of two forwards does not cancel.

The consistency quotient divides N(x_l, l, s) - N(x_t, t, s) by t - l, down to 0.002 of the interval. Of two separate
forwards in bf16 that difference is rounding error. Here every activation h travels with dh = h(end) - h(start) as a
tensor of its own:

* a product: d(W h) = W dh, so that its error is relative to dh, not to h;
* a product of two varying things (modulation, gate, attention scores): expanded, d(a b) = da (b + db) + a db;
* everything else: g(h + dh) - g(h) by an identity without cancellation, in float32 (`silu`, `gelu`, `layernorm`, ...).

Only products run in the low precision. Nothing here has a gradient. The value and the increment cost two forwards, or
one if the values ride along on a forward that is made anyway (`tape`).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import FREQUENCIES, MAX_PERIOD, Attention, DiT, Tape

Pair = tuple[Tensor, Tensor]
"""A value and its increment."""

LARGE = 0.5
"""Increments of an exponent above this are differenced directly: the identities would overflow, and nothing cancels."""


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
    tape: Tape | None = None,
) -> Pair:
    """(N(x, t, s; y), N(x + dx, t + dt, s; y) - N(x, t, s; y)), both [B, C, H, W], without gradient.

    Args:
        net: a DiT, any size; its weights in float32 or float64.
        x, dx: [B, C, H, W]; t, dt, s: [B], dt of either sign; y: labels [B], None: the null label.
        dtype: of the operands of every product (accumulated in float32): bfloat16, float16, float32 or float64.
        tape: of a forward at (x, t, s, y). Its values are taken for those of this pass, which then makes the products
            of increments alone and costs one forward; the value that is returned is that forward's output.

    The relative error of the increment does not grow as dx and dt go to 0.

    Raises:
        ValueError: for shapes that do not fit the network, another dtype, or a network that is no DiT.
    """
    if not isinstance(net, DiT):
        raise ValueError(f"net must be a DiT, got {type(net).__name__}: it has no value-and-increment forward")
    if dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"dtype must be bfloat16, float16, float32 or float64, got {dtype}")
    net.check_input(x, t, s, y)
    if dx.shape != x.shape or dt.shape != t.shape:
        raise ValueError(f"dx and dt must have the shapes of x and t, got {list(dx.shape)} and {list(dt.shape)}")
    work = net.x_embedder.proj.weight.dtype
    work = torch.float64 if dtype == torch.float64 or work == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        x, dx, t, dt, s = (v.to(work) for v in (x, dx, t, dt, s))
        return _Walk(work, dtype, {} if tape is None else tape.outputs).network(net, x, dx, t, dt, s, y)


class _Walk:
    """One pass: `work` is the dtype of everything but the operands of products, which are `operand`.

    known: layers whose value another forward has computed already, with the bias that this value lacks or None.
    """

    def __init__(self, work: torch.dtype, operand: torch.dtype, known: Mapping[nn.Module, tuple]) -> None:
        self.work, self.operand, self.known = work, operand, known

    def network(self, net: DiT, x: Tensor, dx: Tensor, t: Tensor, dt: Tensor, s: Tensor, y: Tensor | None) -> Pair:
        c = silu(*self.conditioning(net, t, dt, s, y))
        # The patch embedding is linear: the increment takes no bias and no positions.
        h, dh = self.affine(net.x_embedder.patches(x), net.x_embedder.patches(dx), net.x_embedder.proj)
        h = h + net.pos_embed.to(self.work)
        final = self._modulation(net.final_layer.adaLN_modulation, c, 2)
        chunks = [self._modulation(block.adaLN_modulation, c, 6) for block in net.blocks]
        entries = [m[:2] for m in chunks[1:]] + [final]
        n = modulate(layernorm(h, dh), *chunks[0][:2])
        for block, m, entry in zip(net.blocks, chunks, entries, strict=True):
            h, dh = gate_residual((h, dh), self.attention(n, block.attn), m[2])
            n = modulate(layernorm(h, dh), m[3], m[4])
            inner = gelu(*self.affine(*n, block.mlp.fc1))
            h, dh = gate_residual((h, dh), self.affine(*inner, block.mlp.fc2), m[5])
            n = modulate(layernorm(h, dh), *entry)
        out, dout = self.affine(*n, net.final_layer.linear)
        return net.unpatchify(out), net.unpatchify(dout)

    def conditioning(self, net: DiT, t: Tensor, dt: Tensor, s: Tensor, y: Tensor | None) -> Pair:
        """c and its increment; t - s changes by dt as t does."""
        labels = torch.full(t.shape, net.num_classes, device=t.device) if y is None else y
        c = net.y_embedder(labels).to(self.work)
        dc = torch.zeros_like(c)
        for time, embedder in ((t, net.t_embedder), (t - s, net.s_embedder)):
            hidden = silu(*self.affine(*sinusoids(time, dt), embedder.mlp[0]))
            e, de = self.affine(*hidden, embedder.mlp[2])
            c, dc = c + e, dc + de
        return c, dc

    def affine(self, h: Tensor, dh: Tensor, layer: nn.Linear | nn.Conv2d) -> Pair:
        """W h + b and W dh, in one product."""
        weight, bias = layer.weight.flatten(1), layer.bias
        assert bias is not None
        if layer in self.known:
            value, missing = self.known[layer]
            value = value.to(self.work)
            return value if missing is None else value + missing.to(self.work), self.product(dh, weight.t())
        out, dout = self.product(torch.stack([h, dh]), weight.t()).unbind()
        return out + bias.to(self.work), dout

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b with both rounded to the operand dtype, accumulated and returned in the working dtype."""
        if self.operand == self.work:
            return a @ b
        if self.operand == torch.float16:  # increments lie below its range: matrices are scaled by powers of two
            (a, by_a), (b, by_b) = _scaled(a), _scaled(b)
            return self._rounded_product(a, b) * (by_a * by_b)
        return self._rounded_product(a, b)

    def _rounded_product(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = a.to(self.operand), b.to(self.operand)
        if a.is_cuda and b.dim() == 2:
            return torch.mm(a.flatten(0, -2), b, out_dtype=self.work).unflatten(0, a.shape[:-1])
        if a.is_cuda and a.dim() == b.dim() == 4:
            out = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=self.work)
            return out.unflatten(0, a.shape[:2])
        return a.to(self.work) @ b.to(self.work)  # the products of rounded operands are exact in float32

    def attention(self, n: Pair, layer: Attention) -> Pair:
        """softmax(q k' / sqrt(d)) v and its increment, then the output projection."""
        q, k, v = self._heads(self.affine(*n, layer.qkv), layer.num_heads)
        scale = q[0].shape[-1] ** -0.5
        q = (q[0] * scale, q[1] * scale)
        k_end = (k[0] + k[1]).transpose(-1, -2)
        scores = self.product(q[0], k[0].transpose(-1, -2))
        dscores = self.product(q[1], k_end) + self.product(q[0], k[1].transpose(-1, -2))
        p, dp = softmax(scores, dscores)
        # Where the output projection's value is known, nobody asks for what goes into it.
        out = torch.zeros_like(v[0]) if layer.proj in self.known else self.product(p, v[0])
        dout = self.product(dp, v[0]) + self.product(p + dp, v[1])
        out, dout = (value.transpose(1, 2).flatten(2) for value in (out, dout))
        return self.affine(out, dout, layer.proj)

    @staticmethod
    def _heads(pair: Pair, heads: int) -> tuple[Pair, Pair, Pair]:
        parts = [value.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4) for value in pair]
        q, k, v = zip(*parts, strict=True)
        return q, k, v

    def _modulation(self, layer: Any, c: Pair, parts: int) -> list[Pair]:
        m, dm = self.affine(*c, layer[1])
        return list(zip(m.chunk(parts, 1), dm.chunk(parts, 1), strict=True))


def _scaled(a: Tensor) -> Pair:
    """Matrices [..., M, K] with a largest element in [1, 2), and what to multiply them by, [..., 1, 1]."""
    largest = a.abs().amax((-2, -1), keepdim=True)
    by = torch.exp2(torch.where(largest > 0, largest, 1).log2().floor())
    return a / by, by


def sinusoids(t: Tensor, dt: Tensor) -> Pair:
    """[cos, sin] of t [B] and their increments for dt, [B, 256]: cos(a + d) - cos(a) = -2 sin(a + d/2) sin(d/2)."""
    half = FREQUENCIES // 2
    frequency = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, device=t.device, dtype=t.dtype) / half)
    angle, step = t[:, None] * frequency, dt[:, None] * frequency / 2
    middle, chord = angle + step, 2 * step.sin()
    value = torch.cat([angle.cos(), angle.sin()], 1)
    return value, torch.cat([-middle.sin() * chord, middle.cos() * chord], 1)


def sigmoid_increment(z: Tensor, dz: Tensor) -> Tensor:
    """sigmoid(z + dz) - sigmoid(z) = sigmoid(z + dz) sigmoid(-z) (1 - e^-dz)."""
    end = torch.sigmoid(z + dz)
    small = -torch.expm1(-dz.clamp(-LARGE, LARGE)) * end * torch.sigmoid(-z)
    return torch.where(dz.abs() <= LARGE, small, end - torch.sigmoid(z))


def silu(h: Tensor, dh: Tensor) -> Pair:
    """h sigmoid(h) and its increment."""
    return F.silu(h), dh * torch.sigmoid(h + dh) + h * sigmoid_increment(h, dh)


def gelu(h: Tensor, dh: Tensor) -> Pair:
    """The tanh GELU, h sigmoid(2 u(h)) with u = sqrt(2/pi) (h + 0.044715 h^3), and its increment."""
    scale, cubic = 2 * math.sqrt(2 / math.pi), 0.044715
    z = scale * (h + cubic * h**3)
    dz = scale * dh * (1 + cubic * (3 * h * h + 3 * h * dh + dh * dh))
    return h * torch.sigmoid(z), dh * torch.sigmoid(z + dz) + h * sigmoid_increment(z, dz)


def layernorm(h: Tensor, dh: Tensor, eps: float = 1e-6) -> Pair:
    """LayerNorm over the last dimension and its increment, with 1/a' - 1/a = (a^2 - a'^2) / (a a' (a + a'))."""
    h, dh = h - h.mean(-1, keepdim=True), dh - dh.mean(-1, keepdim=True)
    start = (h.square().mean(-1, keepdim=True) + eps).sqrt()
    dvar = (dh * (2 * h + dh)).mean(-1, keepdim=True)
    end = ((h + dh).square().mean(-1, keepdim=True) + eps).sqrt()
    return h / start, dh / end - h * dvar / (start * end * (start + end))


def modulate(n: Pair, shift: Pair, scale: Pair) -> Pair:
    """n (1 + scale) + shift for n [B, T, D], shift and scale [B, D]."""
    (n0, dn), (b, db), (a, da) = n, *((v[:, None], dv[:, None]) for v, dv in (shift, scale))
    return n0 * (1 + a) + b, dn * (1 + a + da) + n0 * da + db


def gate_residual(x: Pair, y: Pair, gate: Pair) -> Pair:
    """x + gate y for x, y [B, T, D], gate [B, D]."""
    g, dg = gate[0][:, None], gate[1][:, None]
    return x[0] + g * y[0], x[1] + (g + dg) * y[1] + dg * y[0]


def softmax(scores: Tensor, dscores: Tensor) -> Pair:
    """P = softmax(S) and softmax(S + dS) - P = P (e^dS - Z) / Z with Z = sum P e^dS, by expm1."""
    p = torch.softmax(scores, -1)
    dscores = dscores - (p * dscores).sum(
        -1, keepdim=True
    )  # softmax does not see a shift; the rest is as small as it gets
    growth = torch.expm1(dscores.clamp(-LARGE, LARGE))
    mean = (p * growth).sum(-1, keepdim=True)
    small = p * (growth - mean) / (1 + mean)
    near = dscores.abs().amax(-1, keepdim=True) <= LARGE
    return p, torch.where(near, small, torch.softmax(scores + dscores, -1) - p)

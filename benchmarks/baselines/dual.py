"""du/dt of a DiT as well as it can be written: the tangents alone, beside a forward that is made in any case.

torch.func.jvp computes values and tangents at once, and of F.linear it makes three products: values, tangents, and the
input with the tangent of the weight, a matrix of zeros (torch 2.13; Inductor leaves it so): 3.0 forwards. Here the
values are those that the student's own forward came to (`TapedOutputs`), so that each layer makes one product, of its
tangent: 1.0 forwards and what attention takes. What lies between the products is made again, in closed form:

    gated residual       x' = x + g y;  dx' = dx + dg y + g dy
    norm, modulated      h = (x' - mean) rstd;  dh = rstd (dx' - mean(dx') - h mean(h dx'))
                         n = h (1 + scale) + shift;  dn = dh (1 + scale) + h dscale + dshift
    GELU, SiLU           dx times the derivative at x
    attention            S = q k' / sqrt(d), P = softmax(S);  dS = (dq k' + q dk') / sqrt(d)
                         dP = P (dS - sum_k P dS);  dO = dP v + P dv

Weights, values and tangents are in the dtype in which the student multiplies; norms and conditioning are float32. There
is no gradient. Tokens are [B, T, D], modulations [B, D]. A block is two functions and attention between them, so that
they can be compiled beside an attention that cannot be.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from soflow_fast.models.dit import FREQUENCIES, MAX_PERIOD, DiT, TapedOutputs, TimeEmbedder
from soflow_fast.models.fused_layers import EPS, weights_of

FLASH_HEADS = (16, 32, 64, 128, 256)
"""The head dimensions of jvp_flash_attention; others are filled up with zeros."""


class Dual(NamedTuple):
    """A value and its tangent, of one shape."""

    value: Tensor
    tangent: Tensor


Attention = Callable[[Dual, Dual, Dual], Tensor]
"""q, k, v [B, heads, T, d] -> the tangent of their attention, [B, heads, T, d]."""


class Way(NamedTuple):
    """The parts of a block, as they are or compiled."""

    before: Callable[..., tuple[Dual, Tensor]]
    after: Callable[..., tuple[Dual, Tensor]]
    whole: Callable[..., tuple[Dual, Tensor]]
    """Both, with attention between."""


def derivative(
    network: DiT, z: Dual, t: Tensor, r: Tensor, y: Tensor, tape: TapedOutputs, way: Way, attention: Any
) -> Tensor:
    """The tangent [B, C, H, W] of u(z, r, t; y) along (dz, 0, 1).

    z: [B, C, H, W]; t, r [B]; y: labels [B]; tape: of a forward of the network on these samples, in the precision in
    which the products are to be. Runs under the autocast of that forward. attention: None: in the block, by `composed`;
    else an Attention between its halves. Raises ValueError for a network that normalises queries and keys.
    """
    if network.config.qk_norm:
        raise ValueError("model.qk_norm: the tangents of norms of queries and keys are not written here")
    device = z.value.device.type
    wide = network.pos_embed.dtype
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else wide
    assert not any(any(at.deferred) for at in tape.blocks), "plain operations add every bias at once"
    with torch.autocast(device, enabled=False):
        c = conditioning(network, t, r, y)
        m = modulations(network, c.to(dtype), tape.modulations)
        embed = network.x_embedder
        tangent = F.linear(embed.patches(z.tangent), embed.proj.weight.flatten(1))
        x, branch, gate = Dual((embed(z.value) + network.pos_embed).to(dtype), tangent.to(dtype)), None, None
        for k, block in enumerate(network.blocks):
            layers = block.linears()
            weights = [weights_of(layer, dtype).weight for layer in layers]
            at = tape.blocks[k]
            values = [at.q, at.k, at.v, at.proj, at.fc1, at.fc2]
            shift, scale, *inner, following = m[6 * k : 6 * k + 6]
            entry, heads = (x, branch, gate, shift, scale), block.attn.num_heads
            if attention is None:
                x, tangent = way.whole(entry, inner, weights, values, heads)
            else:
                x, tangent = way.before(entry, weights[0])
                heads_of = functools.partial(apart, heads=heads)
                q, k_, v = (Dual(*map(heads_of, pair)) for pair in zip(values[:3], tangent.chunk(3, -1), strict=True))
                x, tangent = way.after(x, together(attention(q, k_, v)), inner, weights, values)
            branch, gate = Dual(at.fc2, tangent), following
        _, tangent = normed((x, branch, gate, *m[-2:]), wide)
        return network.unpatchify(F.linear(tangent, network.final_layer.linear.weight))


def conditioning(network: DiT, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
    """The tangent of SiLU(c), [B, D], as t moves by 1, and t - r with it."""
    of_t, of_r = _embedded(t, network.t_embedder), _embedded(t - r, network.s_embedder)
    c = of_t.value + of_r.value + network.y_embedder(y)
    return torch.ops.aten.silu_backward(of_t.tangent + of_r.tangent, c)


def _embedded(time: Tensor, embedder: TimeEmbedder) -> Dual:
    """The embedding [B, D] of a time that moves by 1."""
    first, _, second = embedder.mlp
    half = FREQUENCIES // 2
    w = torch.exp(-math.log(MAX_PERIOD) * (torch.arange(half, device=time.device, dtype=time.dtype) / half))
    angle = time[:, None] * w
    cos, sin = angle.cos(), angle.sin()
    pair = torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin * w, cos * w], 1)])
    inner, dinner = F.linear(pair, first.weight).chunk(2)
    inner = inner + first.bias
    out = F.linear(torch.cat([F.silu(inner), torch.ops.aten.silu_backward(dinner, inner)]), second.weight)
    return Dual(out[: len(time)] + second.bias, out[len(time) :])


def modulations(network: DiT, dc: Tensor, values: list[Tensor]) -> list[Dual]:
    """`DiT.modulations` and their tangents, of the tangent of SiLU(c)."""
    weights = [layer.weight.to(dc.dtype) for layer in network.modulation_layers()]
    tangents = F.linear(dc, torch.cat(weights)).split(network.config.hidden_size, 1)
    return [Dual(*pair) for pair in zip(values, tangents, strict=True)]


def normed(entry: tuple[Any, ...], dtype: torch.dtype) -> tuple[Dual, Tensor]:
    """x' and the tangent of its modulated norm, the latter in a dtype. entry: x, the branch that is still to be added
    to it and the branch's gate (None: nothing is), shift and scale of the norm."""
    x, branch, gate, shift, scale = entry
    if branch is not None:
        g, dg = gate.value.unsqueeze(1), gate.tangent.unsqueeze(1)
        value = torch.addcmul(x.value, g, branch.value)
        x = Dual(value, torch.addcmul(x.tangent, dg, branch.value).addcmul_(g, branch.tangent))
    wide = torch.promote_types(x.value.dtype, torch.float32)
    dx = x.tangent.to(wide)
    h, _, rstd = torch.native_layer_norm(x.value.to(wide), x.value.shape[-1:], None, None, EPS)
    by = 1 + scale.value.to(wide).unsqueeze(1)
    out = torch.addcmul(dx - dx.mean(-1, keepdim=True), h, (h * dx).mean(-1, keepdim=True), value=-1).mul_(rstd)
    out = torch.addcmul(shift.tangent.to(wide).unsqueeze(1), out, by)
    return x, out.addcmul_(h, scale.tangent.to(wide).unsqueeze(1)).to(dtype)


def before(entry: tuple[Any, ...], weight: Tensor) -> tuple[Dual, Tensor]:
    """x' and the tangent of q, k and v, [B, T, 3 D]. weight: of their product."""
    x, tangent = normed(entry, weight.dtype)
    return x, F.linear(tangent, weight)


def after(
    x: Dual, tangent: Tensor, inner: list[Dual], weights: list[Tensor], values: list[Tensor]
) -> tuple[Dual, Tensor]:
    """The residual that leaves a block and the tangent of the branch that is still to be added to it.

    tangent: of attention, [B, T, D]; inner: the gate of attention, shift and scale of the second norm; weights and
    values: of the block's products, and what they came to, q, k and v apart.
    """
    gate, shift, scale = inner
    _, proj, fc1, fc2 = weights
    branch = Dual(values[3], F.linear(tangent, proj))
    x, tangent = normed((x, branch, gate, shift, scale), fc1.dtype)
    tangent = torch.ops.aten.gelu_backward(F.linear(tangent, fc1), values[4], approximate="tanh")
    return x, F.linear(tangent, fc2)


def whole(
    entry: tuple[Any, ...], inner: list[Dual], weights: list[Tensor], values: list[Tensor], heads: int
) -> tuple[Dual, Tensor]:
    """A block, its attention `composed`."""
    x, tangent = before(entry, weights[0])
    pairs = zip(values[:3], tangent.chunk(3, -1), strict=True)
    q, k, v = (Dual(*(apart(part, heads) for part in pair)) for pair in pairs)
    return after(x, together(composed(q, k, v)), inner, weights, values)


def apart(x: Tensor, heads: int) -> Tensor:
    """[B, T, D] -> [B, heads, T, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def together(out: Tensor) -> Tensor:
    """[B, heads, T, d] -> [B, T, D]."""
    return out.transpose(1, 2).flatten(2)


def composed(q: Dual, k: Dual, v: Dual) -> Tensor:
    """Attention's tangent by products and a softmax; those that are added up are one product."""
    scale = q.value.shape[-1] ** -0.5
    q = Dual(q.value * scale, q.tangent * scale)
    weights = (q.value @ k.value.mT).softmax(-1)
    dscores = torch.cat([q.tangent, q.value], -1) @ torch.cat([k.value, k.tangent], -1).mT
    dweights = torch._softmax_backward_data(dscores, weights, -1, weights.dtype)
    return torch.cat([dweights, weights], -1) @ torch.cat([v.value, v.tangent], -2)


def flash(q: Dual, k: Dual, v: Dual) -> Tensor:
    """jvp_flash_attention on dual tensors. Its `attention` drops tangents; `fwd_dual` carries them."""
    from jvp_flash_attention.jvp_attention import JVPAttn  # pyright: ignore[reportMissingImports]

    d = q.value.shape[-1]
    missing = next(size for size in FLASH_HEADS if size >= d) - d
    with forward_ad.dual_level():
        # Made dual last: what is filled up must be dual as well.
        duals = [forward_ad.make_dual(*(F.pad(part, (0, missing)).contiguous() for part in pair)) for pair in (q, k, v)]
        tangent = forward_ad.unpack_dual(JVPAttn.fwd_dual(*duals, sm_scale=d**-0.5)).tangent
        assert tangent is not None, "forward-mode AD lost the tangent"
        return tangent[..., :d]


EAGER = Way(before, after, whole)


@functools.cache
def compiled() -> Way:
    """Each part compiled without a break; equal blocks share its code."""
    return Way(*(torch.compile(part, fullgraph=True, dynamic=False) for part in EAGER))

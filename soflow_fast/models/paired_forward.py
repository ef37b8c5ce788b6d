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

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soflow_kernels import (
    attention_increment,
    bias_gelu_increment,
    gate_residual_layernorm_modulate_increment,
    layernorm_modulate_increment,
    on_gpu,
    qk_rms_norm_increment,
    silu_increment,
    time_embedding_increment,
)
from soflow_kernels.increment import Pair

from .dit import (
    FREQUENCIES,
    MAX_PERIOD,
    Block,
    DiT,
    Modulation,
    TapedOutputs,
    guidance_time,
    merge_heads,
    split_heads,
)
from .fused_layers import (
    EPS,
    BlockModulation,
    BlockOutputs,
    PendingResidual,
    SavePolicy,
    fused_block,
    normed_linear,
    weights_of,
)
from .plain_layers import has_hooks, watched_everywhere
from .sharding import ends_gathered, gathered, without_parameters

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
    w: Tensor | None = None,
    tape: TapedOutputs | None = None,
) -> tuple[Tensor, Tensor]:
    """(N(x, t, s; y), N(x + dx, t + dt, s; y) - N(x, t, s; y)), both [B, C, H, W], without gradient.

    Args:
        net: a DiT, any size; the parameters of its ends in float32 or float64, those of its blocks in any dtype. All
            its layers must be as `DiT` makes them: what acts when they are called would be missed here. One that
            `sharding.shard` has cut is gathered block by block, by all ranks at the same time.
        x, dx: [B, C, H, W]; t, dt, s: [B], dt of either sign; y: labels [B] or vectors [B, E], None: the null one.
        dtype: of the operands of the products (accumulated in float32): bfloat16, float16, float32 or float64. The
            conditioning, the patches and the last product, which cost next to nothing, stay in float32.
        w: guidance scales [B], the same at both ends, of a network that has them.
        tape: of a forward at (x, t, s, y, w). Its values are taken for those of this pass, which then makes the
            products of increments alone and costs one forward; the value that is returned is that forward's output.

    The relative error of the increment does not grow as dx and dt go to 0.

    Raises:
        ValueError: for shapes that do not fit the network, another dtype, a network that is no DiT, or a layer of it
            that was replaced, wrapped, hooked, pruned, quantised or sharded by others, which is named.
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
    net.check_input(x, t, s, y, w)
    if dx.shape != x.shape or dt.shape != t.shape:
        raise ValueError(f"dx and dt must have the shapes of x and t, got {list(dx.shape)} and {list(dt.shape)}")
    work = net.x_embedder.proj.weight.dtype
    work = torch.float64 if dtype == torch.float64 or work == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        x, dx, t, dt, s = (v.to(work) for v in (x, dx, t, dt, s))
        w = None if w is None else w.to(work)
        with ends_gathered(net), closing(gathered(net)) as units:
            return _IncrementPass(net, work, dtype).network(units, x, dx, t, dt, s, y, w, tape)


def missed_part(net: DiT, *, float8: bool = True) -> str | None:
    """The first module whose change a value-and-increment forward would miss, as it calls none; None: all are plain.
    float8: linear layers of torchao's float8 recipe pass too."""
    if watched_everywhere():
        return "every module"
    if has_hooks(net, net.sharding) or "forward" in net.__dict__ or type(net).forward is not _FORWARD:
        return "net"
    for k, block in enumerate(net.blocks):
        if "attend" in getattr(block, "attn", block).__dict__:
            return f"net.blocks.{k}.attn"
    changed = net.changed_part(float8=float8)
    return None if changed is None else f"net.{changed}"


class PendingIncrement(NamedTuple):
    """The increment of a `PendingResidual`: of x, and the branch that is still to be gated and added, as a pair."""

    dx: Tensor
    branch: Pair | None = None
    gate: Pair | None = None
    bias: Tensor | None = None
    """What the value of the branch lacks."""


class _IncrementPass:
    """One pass of increments. `work` is the dtype of the two ends and of the residual's increment, `operand` that of
    the operands of all other products."""

    def __init__(self, net: DiT, work: torch.dtype, operand: torch.dtype) -> None:
        self.net, self.work, self.operand = net, work, operand
        # Increments lie below the range of float16: between products they have that of float32.
        self.between = work if operand == torch.float16 else operand

    def network(
        self,
        units: Iterator[Any],
        x: Tensor,
        dx: Tensor,
        t: Tensor,
        dt: Tensor,
        s: Tensor,
        y: Tensor | None,
        w: Tensor | None,
        tape: TapedOutputs | None,
    ) -> tuple[Tensor, Tensor]:
        """The value and the increment, [B, C, H, W]. Without a tape every block is made first, and then its
        increments. units: those of the network, each with whole parameters until the next is asked for."""
        net = self.net
        c, dc = self.conditioning(t, dt, s, y, w)
        dc = silu_increment((c, dc)).to(self.between)
        if tape is not None:
            m = tape.modulations
        else:
            c = F.silu(c)
            m = net.modulations(c, self.operand) if net.sharding is None else None  # else made with each block
        # The patch embedding is linear: the increment takes no bias and no positions.
        embedding = net.x_embedder.proj.weight.flatten(1).to(self.work)
        pending = PendingIncrement(F.linear(net.x_embedder.patches(dx), embedding))
        residual = PendingResidual((net.x_embedder(x) + net.pos_embed).to(self.work)) if tape is None else None
        for k, block in zip(range(len(net.blocks)), units, strict=False):
            pairs = self.modulation(block.adaLN_modulation, c, dc, None if m is None else m[6 * k : 6 * k + 6])
            if residual is not None:
                weights = block.weights(self.operand)
                modulation = BlockModulation(*(value for value, _ in pairs))
                attn, save = block.attn, SavePolicy(norms=True, inner=True)
                parts = attn.parts(self.operand, x.device)
                residual, at = fused_block(residual, modulation, weights, attn.attend, save, True, parts)
            else:
                assert tape is not None
                at = tape.blocks[k]
            pending = self.block(block, at, pending, pairs)
            if net.sharding is not None:  # the block's are freed before the next one takes its last bias along
                pending = without_parameters(pending)
                residual = None if residual is None else without_parameters(residual)
        shift, scale = self.modulation(next(units), c, dc, None if m is None else m[-2:])
        final = weights_of(net.final_layer.linear, self.work)
        if residual is not None:
            last, patches = normed_linear(residual, shift[0], scale[0], final, keep_norm=True)
        else:
            assert tape is not None and tape.residual is not None and tape.patches is not None
            last, patches = tape.residual, tape.patches.to(self.work)
        _, dn = self.norm(last, pending, shift, scale, self.work)
        return net.unpatchify(patches), net.unpatchify(F.linear(dn, final.weight))

    def modulation(self, part: Modulation, c: Tensor, dc: Tensor, values: Sequence[Tensor] | None) -> list[Pair]:
        """Shifts, scales and gates of SiLU(c) and their increments, [B, D] each; values: these are made already."""
        D = self.net.config.hidden_size
        values = part.product(c, self.operand).split(D, 1) if values is None else values
        layer: Any = part[1]
        return list(zip(values, self.product(dc, layer).split(D, 1), strict=True))

    def conditioning(self, t: Tensor, dt: Tensor, s: Tensor, y: Tensor | None, w: Tensor | None) -> Pair:
        """c [B, D], before its SiLU; t - s changes by dt as t does, condition and guidance scale do not."""
        net = self.net
        value = net.embedded_condition(y, t)
        if w is not None:
            value = value + net.w_embedder(guidance_time(w))
        increment: Tensor | None = None
        times = time_embedding_increment(t, dt, s, frequencies=FREQUENCIES, max_period=MAX_PERIOD)
        for k, embedder in enumerate((net.t_embedder, net.s_embedder)):
            first, second = (weights_of(embedder.mlp[i], self.work) for i in (0, 2))
            h, dh = F.linear(times[0, k], *first), F.linear(times[1, k], first.weight)
            value = value + F.linear(F.silu(h), *second)
            d = F.linear(silu_increment((h, dh)), second.weight)
            increment = d if increment is None else increment + d
        assert increment is not None
        return value, increment

    def block(
        self, block: Block, at: BlockOutputs, pending: PendingIncrement, modulation: list[Pair]
    ) -> PendingIncrement:
        """The increment of a block, from the residual that enters it to the one that leaves it; at: what it came to."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        attn, mlp = block.attn, block.mlp
        b_proj, b_fc2 = (layer.bias if at.deferred.branches else None for layer in (attn.proj, mlp.fc2))
        b_fc1 = mlp.fc1.bias if at.deferred.fc1 else None
        assert at.fc1 is not None
        dx, dn = self.norm(at.x1, pending, shift1, scale1, self.between)
        increments = self.product(dn, attn.qkv).chunk(3, -1)
        q, k, v = (
            (split_heads(value.to(self.between), attn.num_heads), split_heads(increment, attn.num_heads))
            for value, increment in zip((at.q, at.k, at.v), increments, strict=True)
        )
        if at.normed_q is not None and at.normed_k is not None:
            dq, dk = qk_rms_norm_increment(q, k, attn.q_norm.weight, attn.k_norm.weight, eps=EPS)
            normed = (split_heads(value.to(self.between), attn.num_heads) for value in (at.normed_q, at.normed_k))
            q, k = zip(normed, (dq, dk), strict=True)
        branch = at.proj, self.product(merge_heads(attention_increment(q, k, v)), attn.proj)
        dx, dn = self.norm(at.x2, PendingIncrement(dx, branch, gate1, b_proj), shift2, scale2, self.between)
        inner = bias_gelu_increment((at.fc1, self.product(dn, mlp.fc1)), b_fc1)
        return PendingIncrement(dx, (at.fc2, self.product(inner, mlp.fc2)), gate2, b_fc2)

    def norm(
        self, x: Tensor, pending: PendingIncrement, shift: Pair, scale: Pair, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The increments of the residual, whose value is x, and in a dtype of its modulated norm."""
        dx, branch, gate, bias = pending
        if branch is None or gate is None:
            return dx, layernorm_modulate_increment((x, dx), shift, scale, eps=EPS, dtype=dtype)
        return gate_residual_layernorm_modulate_increment(
            x, dx, branch, gate, shift, scale, bias, eps=EPS, dtype=dtype
        )  # fmt: skip

    def product(self, dh: Tensor, layer: nn.Linear) -> Tensor:
        """W dh, both operands rounded to the operand dtype and their products accumulated in float32."""
        weight = layer.weight
        if self.operand != torch.float16:
            return F.linear(dh.to(self.operand), weight.to(self.operand))
        # Matrices are scaled by powers of two to the range of float16.
        (a, by_a), (b, by_b) = _scaled(dh), _scaled(weight.to(self.work))
        a, b = a.to(self.operand).flatten(0, -2), b.to(self.operand)
        # On a CPU: the products of rounded operands are exact in float32.
        out = torch.mm(a, b.t(), out_dtype=self.work) if on_gpu(a) else a.to(self.work) @ b.t().to(self.work)
        return out.unflatten(0, dh.shape[:-1]) * (by_a * by_b)


def _scaled(a: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices [..., M, K] with a largest element in [1, 2), and what to multiply them by, [..., 1, 1]."""
    largest = a.abs().amax((-2, -1), keepdim=True)
    by = torch.exp2(torch.where(largest > 0, largest, 1).log2().floor())
    return a / by, by

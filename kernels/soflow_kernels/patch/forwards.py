"""What patched modules do: the forwards of blocks and final layers, with the kernels in them."""

import functools
import inspect

import torch
from torch import Tensor, nn

from soflow_kernels.adaln import gate_residual_layernorm_modulate, layernorm_modulate
from soflow_kernels.gated_residual import gate_residual
from soflow_kernels.gelu import linear_gelu
from soflow_kernels.patch.structure import mlp_layers
from soflow_kernels.rmsnorm import gate_residual_rmsnorm_modulate, rmsnorm_modulate


def adaln_block(block, x, c, *positions):
    """The output [B, T, D] of a block of the form "block" for tokens x [B, T, D] and conditions c [B, ...].

    positions: what its attention takes besides its input, such as LightningDiT's rotary embedding; nothing for DiT.
    """
    x, modulation = _rows(x, block.adaLN_modulation(c))
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = _six(modulation, x.shape[2])
    attended = block.attn(_modulated(block.norm1, x, shift, scale), *positions)
    x, h = _gated_and_modulated(block.norm2, x, attended, gate, shift_mlp, scale_mlp)
    return gate_residual(x, _mlp(block.mlp, h), gate_mlp)


def adaln_final_layer(layer, x, c):
    """The output [B, T, ...] of a final layer: linear(modulated norm of x)."""
    x, modulation = _rows(x, layer.adaLN_modulation(c))
    shift, scale = modulation.chunk(2, dim=1)
    return layer.linear(_modulated(layer.norm_final, x, shift, scale))


def _rows(x, m):
    """Tokens and modulations of as many samples each; one row of either serves all."""
    samples, rows = x.shape[0], m.shape[0]  # len() would fix a batch of any size, for torch.export
    if samples == rows:
        return x, m
    return (x, m.expand(samples, -1)) if rows == 1 else (x.expand(rows, -1, -1), m)


def _six(modulation: Tensor, D: int) -> tuple[Tensor, ...]:
    """Shift, scale and gate of the attention, then of the MLP; the shifts are zeros where a block has none."""
    if modulation.shape[1] != 4 * D:
        return modulation.chunk(6, dim=1)
    scale, gate, scale_mlp, gate_mlp = modulation.chunk(4, dim=1)
    shift = scale.new_zeros(D).expand_as(scale)
    return shift, scale, gate, shift, scale_mlp, gate_mlp


def _modulated(norm, x, shift, scale):
    if isinstance(norm, nn.LayerNorm):
        return layernorm_modulate(x, shift, scale, norm.eps)
    return rmsnorm_modulate(x, shift, scale, getattr(norm, "weight", None), norm.eps)


def _gated_and_modulated(norm, x, y, gate, shift, scale):
    if isinstance(norm, nn.LayerNorm):
        return gate_residual_layernorm_modulate(x, y, gate, shift, scale, norm.eps)
    return gate_residual_rmsnorm_modulate(x, y, gate, shift, scale, getattr(norm, "weight", None), norm.eps)


def _mlp(mlp, h):
    """mlp(h), its first product and GELU by the kernel where nothing else happens in between."""
    inner, outer = mlp_layers(mlp)
    if inner is None or outer is None or not _unwatched(mlp) or _drops(mlp):
        return mlp(h)
    return outer(linear_gelu(h, inner.weight, inner.bias))


def _drops(mlp):
    return any(isinstance(m, nn.Dropout) and m.p > 0 and m.training for m in mlp.modules())


def _unwatched(module):
    """Whether nobody has hooked into these modules, most of which would be passed over, or wrapped their forward."""
    watchers = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    everywhere = any(getattr(nn.modules.module, f"_global{name}", None) for name in watchers)
    return not everywhere and not any(
        "forward" in vars(m) or any(getattr(m, name) for name in watchers) for m in module.modules()
    )


def _fusable(module, *norms):
    """Whether these norms of a patched module, which the kernels compute, are what they were, and nobody watches."""
    rms = module._soflow_rms
    return all(
        (type(m) is rms if rms is not None and type(m) is not nn.LayerNorm else _plain_layernorm(m)) and _unwatched(m)
        for m in norms
    )


def _plain_layernorm(norm):
    return type(norm) is nn.LayerNorm and not norm.elementwise_affine


# The forwards, each with the module's own where something was put between.


def _block(self, x, c, *positions):
    # A condition for every token, say.
    if x.dim() != 3 or c.dim() != 2 or not _fusable(self, self.norm1, self.norm2):
        return self._soflow_base.forward(self, x, c, *positions)
    return adaln_block(self, x, c, *positions)


def _final(self, x, c):
    if x.dim() != 3 or c.dim() != 2 or not _fusable(self, self.norm_final):
        return self._soflow_base.forward(self, x, c)
    return adaln_final_layer(self, x, c)


def _diffusers_block(
    self, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None, timestep=None,
    cross_attention_kwargs=None, class_labels=None, added_cond_kwargs=None,
):  # fmt: skip
    x, options = hidden_states, dict(cross_attention_kwargs or {})
    plain = _fusable(self, self.norm1.norm, self.norm3) and _unwatched(self.norm1)
    if self._chunk_size is not None or "gligen" in options or x.dim() != 3 or not plain:
        return self._soflow_base.forward(
            self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
            cross_attention_kwargs, class_labels, added_cond_kwargs,
        )  # fmt: skip
    c = self.norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1.linear(self.norm1.silu(c)).chunk(6, dim=1)
    h = layernorm_modulate(x, shift, scale, self.norm1.norm.eps)
    attended = self.attn1(h, encoder_hidden_states=None, attention_mask=attention_mask, **options)
    x, h = gate_residual_layernorm_modulate(x, attended, gate, shift_mlp, scale_mlp, eps=self.norm3.eps)
    return gate_residual(x, _mlp(self.ff, h), gate_mlp)


FORWARDS = {"block": _block, "final layer": _final, "diffusers block": _diffusers_block}


@functools.cache
def patched_class(base, kind, rms):
    """A subclass of `base` whose forward runs the kernels. Copies of its instances are rebuilt from `base`.

    rms: the class of the module's RMSNorms, None if it has none.
    """

    def reduce(self, protocol):
        return _rebuild, (base, kind, rms), self.__dict__

    forward = _named(FORWARDS[kind], base, kind)
    # The public way to ask, `torch.compiler.is_compiling`, is about the moment, not about a function.
    if hasattr(base.forward, "_torchdynamo_orig_callable"):  # decorated with torch.compile, as LightningDiT's are
        forward = torch.compile(forward)
    names = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "_soflow_base": base,
        "_soflow_rms": rms,
        "__module__": base.__module__,
    }
    return type(base.__name__, (base,), names)


def _named(forward, base, kind):
    """`forward` of (x, c) or (x, c, positions) under the names that the base's own forward gives its arguments."""
    names = [p.name for p in list(inspect.signature(base.forward).parameters.values())[1:]]
    if kind == "diffusers block" or names == ["x", "c"]:
        return forward
    needed = {p.name for p in inspect.signature(base.forward).parameters.values() if p.default is p.empty} & set(names)

    def renamed(self, *arguments, **keywords):
        found = dict(zip(names, arguments, strict=False))
        if len(arguments) > len(names) or set(keywords) - set(names) or set(keywords) & set(found):
            raise TypeError(f"forward takes ({', '.join(names)})")
        found |= keywords
        if needed - set(found):
            raise TypeError(f"forward takes ({', '.join(names)})")
        return forward(self, *(found[name] for name in names if name in found))

    return renamed


def _rebuild(base, kind, rms):
    cls = patched_class(base, kind, rms)
    return cls.__new__(cls)

"""The blocks as layers of Hugging Face's `kernels`: `kernelize` puts their forward into a class of the same form.

They have no state and no constructor of their own, as its rules ask: `self` is the module that adopts the forward.
Nothing is compared, unlike in `patch_dit`: whoever names a class for a layer says that it has its form.
"""

from torch import Tensor, nn

from soflow_kernels.patch.forwards import adaln_block, adaln_final_layer


class DiTBlock(nn.Module):
    """A block of DiT, SiT or REPA: norm1, attn, norm2, mlp, adaLN_modulation; norms are LayerNorm without affine or
    RMSNorm."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x: [B, T, D]; c: [B, ...], the condition. Returns [B, T, D]."""
        return adaln_block(self, x, c)


class LightningDiTBlock(nn.Module):
    """A block of LightningDiT: as `DiTBlock`, with a rotary embedding for its attention, or None."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor, c: Tensor, feat_rope=None) -> Tensor:
        """x: [B, T, D]; c: [B, ...], the condition; feat_rope: handed on to attn. Returns [B, T, D]."""
        return adaln_block(self, x, c, feat_rope)


class DiTFinalLayer(nn.Module):
    """The final layer of DiT, SiT, REPA or LightningDiT: norm_final, linear, adaLN_modulation."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x: [B, T, D]; c: [B, ...], the condition. Returns [B, T, what linear makes]."""
        return adaln_final_layer(self, x, c)

"""The kernels in other people's diffusion transformers: `patch_dit(model)`.

Recognised by structure, whatever the classes are called:

* the block of DiT (arXiv 2212.09748), SiT (arXiv 2401.08740) and REPA (arXiv 2410.06940): norm1, attn, norm2, mlp,
  adaLN_modulation, called as block(x, c); shift, scale and gate of the attention and of the MLP are the six parts of
  adaLN_modulation(c);
* the block of LightningDiT (arXiv 2501.01423): the same with RMSNorm, a rotary embedding as a third argument, which
  goes on to attn, or four parts, without shifts; qk-norm, rotary embedding and SwiGLU are called as they are;
* their final layer: norm_final, linear, adaLN_modulation, called as layer(x, c);
* the block of diffusers' DiTTransformer2DModel: norm1 (with its embedding), attn1, norm3, ff.

A block then makes four passes over its tokens besides products and attention: norm and modulation; gated residual, norm
and modulation; bias and GELU, where the MLP is two products around a tanh GELU; gated residual. Parameters, buffers and
the keys of the state_dict stay as they are.
"""

from typing import TypeVar

import torch
from torch import nn

from soflow_kernels.patch.comparison import compare
from soflow_kernels.patch.forwards import patched_class
from soflow_kernels.patch.structure import Mismatch, recognise

Model = TypeVar("Model", bound=nn.Module)

TOKENS = 16
"""Tokens of the input on which a block is compared before and after, where the model does not say how many it takes."""


def patch_dit(model: Model) -> Model:
    """Put the kernels into the blocks of somebody else's DiT, in place; returns the model.

    model: a torch.nn.Module with blocks of the forms in the module's docstring, anywhere inside. Their parameters, and
    the keys of the state_dict, do not change; outputs and gradients are the same within rounding. Every
    block is run on a small input before and after, which must agree: so patch a model before it is wrapped, sharded or
    compiled, on a device that computes. A forward that its class decorates with torch.compile is compiled again, with
    the kernels. Patching again changes nothing. A block whose norm somebody hooks or replaces
    runs its own forward, and so does an MLP; other layers are called as they are: a LoRA keeps its effect.
    Raises ValueError, and changes nothing, if there is no such block, or one that looks like it but is of another form:
    its place, its class and what differs are named.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"patch_dit: model must be a torch.nn.Module, got {type(model).__name__}")
    pos = getattr(model, "pos_embed", None)
    tokens = pos.shape[1] if isinstance(pos, torch.Tensor) and pos.dim() == 3 else TOKENS
    found, patched = [], 0
    for path, module in model.named_modules():
        if hasattr(type(module), "_soflow_base"):
            patched += 1
            continue
        try:
            form = recognise(module)
            if form is None:
                continue
            positions = None if form.positions is None else getattr(model, form.positions.name, None)
            compare(module, form, tokens, positions)
        except Mismatch as mismatch:
            where = path or "the model itself"
            raise ValueError(f"patch_dit: {where} ({type(module).__name__}) is no DiT block: {mismatch}") from None
        found.append((module, form))
    if not patched and all(form.kind == "final layer" for _, form in found):
        raise ValueError(
            f"patch_dit: found no DiT block in {type(model).__name__}: none has norm1, attn, norm2, mlp and "
            "adaLN_modulation, or is a diffusers block of norm_type 'ada_norm_zero'"
        )
    for module, form in found:
        module.__class__ = patched_class(type(module), form.kind, form.rms)
    return model

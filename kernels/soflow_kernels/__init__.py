"""Fused Triton kernels for DiT training, for any trainer. Without triton or a GPU the references run: see `status`."""

from typing import NamedTuple

from soflow_kernels._dispatch import INTERPRETED, on_gpu, transformed, use_kernel, why_reference
from soflow_kernels.adaln import (
    gate_residual_layernorm_modulate,
    gate_residual_layernorm_modulate_reference,
    layernorm_modulate,
    layernorm_modulate_reference,
)
from soflow_kernels.adamw import AdamWEMA, adamw_ema, adamw_ema_reference, clip_scale
from soflow_kernels.gated_residual import gate_residual, gate_residual_reference
from soflow_kernels.gelu import bias_gelu, bias_gelu_reference, linear_gelu, linear_gelu_reference
from soflow_kernels.increment import (
    attention_increment,
    attention_increment_reference,
    bias_gelu_increment,
    bias_gelu_increment_reference,
    gate_residual_layernorm_modulate_increment,
    gate_residual_layernorm_modulate_increment_reference,
    layernorm_modulate_increment,
    layernorm_modulate_increment_reference,
    qk_rms_norm_increment,
    qk_rms_norm_increment_reference,
    silu_increment,
    silu_increment_reference,
    time_embedding_increment,
    time_embedding_increment_reference,
)
from soflow_kernels.lookahead import euler_lookahead, euler_lookahead_reference, path_point, path_point_reference
from soflow_kernels.losses import (
    consistency_loss,
    consistency_loss_reference,
    flow_matching_loss,
    flow_matching_loss_reference,
)
from soflow_kernels.packed_gradient import qkv_gradient
from soflow_kernels.patch import layers, patch_dit
from soflow_kernels.qk_norm import qk_rms_norm, qk_rms_norm_reference
from soflow_kernels.rmsnorm import (
    gate_residual_rmsnorm_modulate,
    gate_residual_rmsnorm_modulate_reference,
    rmsnorm_modulate,
    rmsnorm_modulate_reference,
)
from soflow_kernels.time_embedding import dual_time_embedding, dual_time_embedding_reference
from soflow_kernels.version import __version__

__all__ = [
    "AdamWEMA",
    "Status",
    "__version__",
    "adamw_ema",
    "adamw_ema_reference",
    "attention_increment",
    "attention_increment_reference",
    "bias_gelu",
    "bias_gelu_increment",
    "bias_gelu_increment_reference",
    "bias_gelu_reference",
    "clip_scale",
    "consistency_loss",
    "consistency_loss_reference",
    "dual_time_embedding",
    "dual_time_embedding_reference",
    "euler_lookahead",
    "euler_lookahead_reference",
    "flow_matching_loss",
    "flow_matching_loss_reference",
    "gate_residual",
    "gate_residual_layernorm_modulate",
    "gate_residual_layernorm_modulate_increment",
    "gate_residual_layernorm_modulate_increment_reference",
    "gate_residual_layernorm_modulate_reference",
    "gate_residual_reference",
    "gate_residual_rmsnorm_modulate",
    "gate_residual_rmsnorm_modulate_reference",
    "layernorm_modulate",
    "layernorm_modulate_increment",
    "layernorm_modulate_increment_reference",
    "layernorm_modulate_reference",
    "layers",
    "linear_gelu",
    "linear_gelu_reference",
    "on_gpu",
    "patch_dit",
    "path_point",
    "path_point_reference",
    "qk_rms_norm",
    "qk_rms_norm_increment",
    "qk_rms_norm_increment_reference",
    "qk_rms_norm_reference",
    "qkv_gradient",
    "rmsnorm_modulate",
    "rmsnorm_modulate_reference",
    "silu_increment",
    "silu_increment_reference",
    "status",
    "time_embedding_increment",
    "time_embedding_increment_reference",
    "transformed",
    "use_kernel",
]

OPERATIONS = [name.removesuffix("_reference") for name in __all__ if name.endswith("_reference")]


class Status(NamedTuple):
    kernel: bool  # whether calls go to the kernel
    why: str


def status():
    """{operation: Status(kernel, why)}: what float16, bfloat16 and float32 tensors on the GPU get in this process.

    Calls with float64 tensors, under forward-mode AD or under torch.func transforms take the reference in any case, and
    so do sizes and dtypes that an operation's docstring leaves to it.
    """
    why = why_reference()
    return {name: Status(why is None, why or ("interpreted" if INTERPRETED else "GPU found")) for name in OPERATIONS}

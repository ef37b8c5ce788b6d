"""How the pieces of a DiT change when their input changes by a little: the increments alone, beside a forward.

An argument that changes is a pair, the value h and dh = h(end) - h(start) as a number of its own: two tensors, each
with its own dtype and strides. The values are those of a forward that is made in any case, so that only increments are
computed and written. Each operation gives the increment of its result by an identity in which nothing cancels, in
float32, so that its error is relative to itself. Each file here is named after its twin, the operation on plain
tensors:

    adaln            LayerNorm, modulation, gated residual
    gelu, silu       h sigma(z(h))
    time_embedding   sinusoids, values as well
    attention        softmax and its products
    qk_norm          RMSNorm of queries and keys

SoFlow (arXiv 2512.15657) divides the increment of its network by a time step of 0.002 and less; the difference of two
forwards in bfloat16 would be rounding error. Nothing here has a gradient.
"""

from soflow_kernels.increment._pair import Pair
from soflow_kernels.increment.adaln import (
    gate_residual_layernorm_modulate_increment,
    gate_residual_layernorm_modulate_increment_reference,
    layernorm_modulate_increment,
    layernorm_modulate_increment_reference,
)
from soflow_kernels.increment.attention import attention_increment, attention_increment_reference
from soflow_kernels.increment.gelu import bias_gelu_increment, bias_gelu_increment_reference
from soflow_kernels.increment.qk_norm import qk_rms_norm_increment, qk_rms_norm_increment_reference
from soflow_kernels.increment.silu import silu_increment, silu_increment_reference
from soflow_kernels.increment.time_embedding import time_embedding_increment, time_embedding_increment_reference

__all__ = [
    "Pair",
    "attention_increment",
    "attention_increment_reference",
    "bias_gelu_increment",
    "bias_gelu_increment_reference",
    "gate_residual_layernorm_modulate_increment",
    "gate_residual_layernorm_modulate_increment_reference",
    "layernorm_modulate_increment",
    "layernorm_modulate_increment_reference",
    "qk_rms_norm_increment",
    "qk_rms_norm_increment_reference",
    "silu_increment",
    "silu_increment_reference",
    "time_embedding_increment",
    "time_embedding_increment_reference",
]

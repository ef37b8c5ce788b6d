"""The Diffusion Transformer (Peebles & Xie 2023, arXiv 2212.09748) with SoFlow's two times (arXiv 2512.15657).

Block names and parameter keys are those of the public checkpoints. The norms, modulations and gated residuals go
through `soflow_kernels`: a residual and the norm after it are one operation, so the blocks' boundaries are crossed
in `DiT.forward`, not inside the blocks.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soflow_kernels import (
    bias_gelu,
    dual_time_embedding,
    gate_residual_layernorm_modulate,
    layernorm_modulate,
    linear_gelu,
)

from .attention import attention
from .config import DiTConfig, validate_model

FREQUENCIES = 256
MAX_PERIOD = 10_000.0


class Tape:
    """What the products of a forward came to on some of its samples, for a pass that goes the same way once more."""

    def __init__(self, rows: slice) -> None:
        self.rows = rows
        self.outputs: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}

    def keep(self, layer: nn.Module, output: Tensor, bias: Tensor | None = None) -> Tensor:
        """Note the output of `layer`, without gradient, and the bias that it still lacks. Returns the output."""
        self.outputs[layer] = (output.detach()[self.rows], None if bias is None else bias.detach())
        return output


def product(layer: Any, x: Tensor, tape: Tape | None) -> Tensor:
    """layer(x), kept on the tape if there is one."""
    out = layer(x)
    return out if tape is None else tape.keep(layer, out)


class PatchEmbed(nn.Module):
    """Images [B, C, H, W] -> tokens [B, T, D], T = (H / patch)^2 in row order."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, kernel_size=patch, stride=patch)

    def patches(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, T, C patch^2], the input of the embedding's product."""
        B, C, H, W = x.shape
        p = self.proj.kernel_size[0]
        return x.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * p * p)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.patches(x), self.proj.weight.flatten(1), self.proj.bias)


class TimeEmbedder(nn.Module):
    """The parameters that take a time to [B, D]: 256 sinusoids [cos, sin] of max period 10000, Linear, SiLU, Linear."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp: Any = nn.Sequential(
            nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )


class LabelEmbedder(nn.Module):
    """Labels [B] -> [B, D]; the last row of the table is the null label."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    """Multi-head self-attention, tokens [B, T, D] -> [B, T, D]."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, tape: Tape | None = None) -> Tensor:
        B, T, D = x.shape
        qkv = product(self.qkv, x, tape)
        q, k, v = qkv.reshape(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        return product(self.proj, attention(q, k, v).transpose(1, 2).reshape(B, T, D), tape)


class MLP(nn.Module):
    """Linear, tanh GELU, Linear on tokens [B, T, D]."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor, tape: Tape | None = None) -> Tensor:
        if tape is None:
            return self.fc2(linear_gelu(x, self.fc1.weight, self.fc1.bias))
        inner = tape.keep(self.fc1, F.linear(x, self.fc1.weight), self.fc1.bias)
        return product(self.fc2, bias_gelu(inner, self.fc1.bias), tape)


class Block(nn.Module):
    """One DiT block's parameters; its norms and residuals are in `DiT.forward`."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.attn = Attention(D, config.num_heads)
        self.mlp = MLP(D, int(D * config.mlp_ratio))
        self.adaLN_modulation: Any = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))


class FinalLayer(nn.Module):
    """Tokens -> patches, after the last norm."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.linear = nn.Linear(D, config.patch_size**2 * config.in_channels)
        self.adaLN_modulation: Any = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))


class DiT(nn.Module):
    """N(x, t, s; y), the network of a SolutionFlow, from `DiTConfig`. Raises ValueError for a wrong configuration."""

    pos_embed: Tensor
    blocks: Any  # a ModuleList of Block

    def __init__(self, config: DiTConfig | None = None) -> None:
        super().__init__()
        config = config or DiTConfig()
        validate_model(config)
        self.config = config
        self.num_classes = config.num_classes
        D = config.hidden_size
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimeEmbedder(D)
        self.s_embedder = TimeEmbedder(D)
        self.y_embedder = LabelEmbedder(config.num_classes, D)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.register_buffer("pos_embed", torch.empty(1, (config.input_size // config.patch_size) ** 2, D))
        self.initialize()

    @torch.no_grad()
    def initialize(self, source: torch.Generator | None = None) -> None:
        """The public initialisation: Xavier uniform, zero biases; label table and the two Linear weights of the **t**
        embedder N(0, 0.02), while the s embedder keeps Xavier; adaLN and output layers zero."""
        self.pos_embed.copy_(sincos_positions(self.config.hidden_size, math.isqrt(self.pos_embed.shape[1])))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1), generator=source)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02, generator=source)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02, generator=source)
        for block in self.blocks:
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def conditioning(self, t: Tensor, s: Tensor, y: Tensor | None) -> Tensor:
        """SiLU(c), c = e_t(t) + e_s(t - s) + e_y(y), [B, D]; times [B] are not scaled, y None is the null label."""
        of_t, of_s = (tuple(embedder.mlp.parameters()) for embedder in (self.t_embedder, self.s_embedder))
        return dual_time_embedding(t, s, y, of_t, of_s, self.y_embedder.embedding_table.weight, max_period=MAX_PERIOD)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None, *, tape: Tape | None = None) -> Tensor:
        """The network's output, [B, C, H, W], for x [B, C, H, W], times t and s [B], labels y [B] (None: null).

        Computes in the dtype of the parameters. Under autocast the two ends stay in it as well: the conditioning, the
        patches and the last product cost nothing beside the blocks, and what they round is lost in every token.
        `tape` notes the products on the way. Raises ValueError for shapes that do not fit the configuration.
        """
        self.check_input(x, t, s, y)
        with torch.autocast(x.device.type, enabled=False):
            c = self.conditioning(t, s, y)
            x = self.x_embedder(x) + self.pos_embed
        # shift, scale and gate of the attention and of the MLP of each block, then shift and scale of the final layer
        modulations = [product(block.adaLN_modulation[1], c, tape).chunk(6, dim=1) for block in self.blocks]
        final_shift, final_scale = product(self.final_layer.adaLN_modulation[1], c, tape).chunk(2, dim=1)
        entries = [m[:2] for m in modulations[1:]] + [(final_shift, final_scale)]
        h = layernorm_modulate(x, modulations[0][0], modulations[0][1])
        for block, (_, _, gate_attn, shift, scale, gate_mlp), (next_shift, next_scale) in zip(
            self.blocks, modulations, entries, strict=True
        ):
            x, h = gate_residual_layernorm_modulate(x, block.attn(h, tape), gate_attn, shift, scale)
            x, h = gate_residual_layernorm_modulate(x, block.mlp(h, tape), gate_mlp, next_shift, next_scale)
        with torch.autocast(x.device.type, enabled=False):
            return self.unpatchify(product(self.final_layer.linear, h.to(x.dtype), tape))

    def unpatchify(self, x: Tensor) -> Tensor:
        """Output patches [B, T, patch^2 C] -> images [B, C, H, W]."""
        p, C = self.config.patch_size, self.config.in_channels
        n = self.config.input_size // p
        return x.reshape(-1, n, n, p, p, C).permute(0, 5, 1, 3, 2, 4).reshape(-1, C, n * p, n * p)

    def check_input(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None) -> None:
        """Raise ValueError naming the input whose shape does not fit."""
        shape = (self.config.in_channels, self.config.input_size, self.config.input_size)
        if x.dim() != 4 or tuple(x.shape[1:]) != shape:
            raise ValueError(f"x must be [B, {shape[0]}, {shape[1]}, {shape[2]}], got {list(x.shape)}")
        for name, value in (("t", t), ("s", s), ("y", y)):
            if value is not None and value.shape != x.shape[:1]:
                raise ValueError(f"{name} must be [{x.shape[0]}], got {list(value.shape)}")


def sincos_positions(hidden_size: int, grid: int) -> Tensor:
    """Fixed 2-D sine-cosine positions [grid^2, D] (float32): half of the channels for the column, half for the row,
    each [sin, cos] of D/4 frequencies 10000^(-4 i / D)."""
    omega = MAX_PERIOD ** (-torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size / 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # [grid, D/2]
    columns = axis[None].expand(grid, grid, -1)
    rows = axis[:, None].expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=2).reshape(grid * grid, hidden_size).float()

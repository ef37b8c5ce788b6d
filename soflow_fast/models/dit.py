"""The Diffusion Transformer (Peebles & Xie 2023, arXiv 2212.09748) with SoFlow's two times (arXiv 2512.15657).

Block names and parameter keys are those of the public checkpoints. A gated residual, the norm after it and the product
after that are one operation (`products`), so a block hands its last residual on to the next block unfinished.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from soflow_kernels import dual_time_embedding, on_gpu

from ..config.schema import DiTConfig
from ..config.validation import validate_model
from .attention import Backend, attention
from .fused_layers import Entry, Weight, defers_bias, linear, normed_linear, normed_mlp, stacked_linear
from .low_precision import Stack, keep_copies, operands, stack_in_place

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


class Table(nn.Embedding):
    """An embedding that draws nothing on the meta device: torch would import its compiler for that, which takes
    seconds."""

    def reset_parameters(self) -> None:
        if self.weight.device.type != "meta":
            super().reset_parameters()


class LabelEmbedder(nn.Module):
    """Labels [B] -> [B, D]; the last row of the table is the null label."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = Table(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    """The parameters of multi-head self-attention on tokens [B, T, D]."""

    backend: Backend = "sdpa"

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, qkv: Tensor) -> Tensor:
        """What lies between its products: [B, T, 3 D] -> [B, T, D]."""
        B, T, D = qkv.shape
        q, k, v = qkv.reshape(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return attention(q, k, v, self.backend).transpose(1, 2).reshape(B, T, D // 3)


class MLP(nn.Module):
    """The parameters of Linear, tanh GELU, Linear on tokens [B, T, D]."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)


class Block(nn.Module):
    """One DiT block, from the gated residual that enters it to the one that leaves it."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.attn = Attention(D, config.num_heads)
        self.mlp = MLP(D, int(D * config.mlp_ratio))
        self.adaLN_modulation: Any = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def products(self) -> list[nn.Linear]:
        """Its layers on tokens, in the order in which they are run."""
        return [self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2]

    def forward(
        self,
        entry: Entry,
        inner: tuple[Tensor, Tensor, Tensor],
        weights: list[Weight],
        keep_norms: bool = False,
        keep_inner: bool = True,
        taped: bool = False,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor | None]]:
        """(x, y): the residual [B, T, D] and the MLP's result that is still to be gated and added to it.

        entry: what leads into the first norm; inner: the attention's gate, and shift and scale of the second norm,
        [B, D] each; weights: of `products`. Third, what qkv, proj and fc1 came to. The others as in
        `products.normed_mlp`.
        """
        qkv_weight, proj, fc1, fc2 = weights
        gate, shift, scale = inner
        x, qkv = normed_linear(entry, qkv_weight, keep_norm=keep_norms)
        later = defers_bias(x)
        y = linear(self.attn(qkv), proj, bias=not later)
        entry = Entry(x, y, gate, proj.master_bias if later else None, shift, scale)
        x, out, u = normed_mlp(entry, fc1, fc2, keep_norm=keep_norms, keep_inner=keep_inner, taped=taped)
        return x, out, (qkv, y, u)


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
    recompute = "none"
    """What a backward makes again beside norms and GELUs: "none", "mlp" (the first product of each MLP), "block"."""
    keep_norms: bool | None = None
    """Keep every product's input for the backward instead, as autograd would. None: on a CPU, where memory is not what
    is short, unless `recompute` asks for less."""
    stack: Stack | None = None

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
        embedder N(0, 0.02), while the s embedder keeps Xavier; adaLN and output layers zero. Nothing on the meta
        device."""
        if self.pos_embed.device.type == "meta":
            return
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

    def modulation_layers(self) -> list[nn.Linear]:
        """The layers from SiLU(c) to shifts, scales and gates: six rows of D for each block, two for the last norm."""
        return [block.adaLN_modulation[1] for block in self.blocks] + [self.final_layer.adaLN_modulation[1]]

    def set_attention(self, backend: Backend) -> None:
        """Let all blocks take the attention of a backend: one of `attention.BACKENDS`, or a function of q, k and v."""
        for block in self.blocks:
            block.attn.backend = backend

    def keep_copies(self, dtype: torch.dtype) -> None:
        """Keep copies of the blocks' weights in a dtype, which products under autocast to that dtype then take; in the
        dtype of the weights: lay those of the modulations side by side. Either way they are one product."""
        layers = self.modulation_layers()
        if dtype == layers[0].weight.dtype:
            self.stack = stack_in_place(layers)
        else:
            self.stack = keep_copies([layer for block in self.blocks for layer in block.products()], layers, dtype)

    def copied_layers(self) -> list[Any]:
        """The layers that keep copies of their weights."""
        layers = [layer for block in self.blocks for layer in block.products()] + self.modulation_layers()
        return [layer for layer in layers if hasattr(layer, "copy")]

    def refresh_copies(self) -> None:
        """Bring the copies up to date now, for a forward in which Python does not look."""
        for layer in self.copied_layers():
            layer.copy.follow(layer)

    def forget_copies(self) -> None:
        """Have the copies made anew at their next use: for changes that torch's version counters do not show, such as
        those through `.data` and by torch's fused optimisers."""
        for layer in self.copied_layers():
            layer.copy.forget()

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the blocks by torch.compile, one graph each without breaks; equal blocks share their code."""
        # One variant for the first block and one for the others, with and without gradient, for each size of batch.
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, 64)
        for block in self.blocks:
            block.compile(backend=backend, fullgraph=True, dynamic=False)

    def modulations(self, c: Tensor, dtype: torch.dtype, tape: Tape | None = None) -> list[Tensor]:
        """Of SiLU(c) [B, D]: per block shift, scale and gate of attention and of the MLP, then shift and scale of the
        last norm, [B, D] each, in one list."""
        layers = self.modulation_layers()
        weights = [operands(layer, dtype) for layer in layers]
        stack = None
        if self.stack is not None and self.stack.holds(weights):
            stack = self.stack.weight, self.stack.bias
        out = stacked_linear(c.to(dtype), weights, stack)
        if tape is not None:
            for layer, value in zip(layers, out, strict=True):
                tape.keep(layer, value)
        return [part for value in out for part in value.split(self.config.hidden_size, dim=1)]

    def forward(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None, *, tape: Tape | None = None) -> Tensor:
        """The network's output, [B, C, H, W], for x [B, C, H, W], times t and s [B], labels y [B] (None: null).

        The blocks compute in the dtype of their weights, or of autocast where it is on, residual and modulations
        included; the statistics of norms are float32 in any case. The two ends stay in the dtype of the weights under
        autocast as well: the conditioning, the patches and the last product cost nothing beside the blocks, and what
        they round is lost in every token. `tape` notes the products on the way.
        Raises ValueError for shapes that do not fit the configuration.
        """
        self.check_input(x, t, s, y)
        device = x.device.type
        dtype = self.pos_embed.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            c = self.conditioning(t, s, y)
            x = (self.x_embedder(x) + self.pos_embed).to(dtype)
            m = self.modulations(c, dtype, tape)
            keep_norms = self.keep_norms
            if keep_norms is None:
                keep_norms = not on_gpu(x) and self.recompute == "none"
            branch = gate = bias = None
            for k, block in enumerate(self.blocks):
                shift, scale, gate1, shift2, scale2, next_gate = m[6 * k : 6 * k + 6]
                entry = Entry(x, branch, gate, bias, shift, scale)
                x, branch = self._block(block, entry, (gate1, shift2, scale2), keep_norms, tape)
                gate = next_gate
                bias = block.mlp.fc2.bias if defers_bias(x) else None
            final = operands(self.final_layer.linear, self.pos_embed.dtype)
            _, out = normed_linear(Entry(x, branch, gate, bias, m[-2], m[-1]), final, keep_norm=keep_norms)
            if tape is not None:
                tape.keep(self.final_layer.linear, out)
            return self.unpatchify(out)

    def _block(
        self, block: Block, entry: Entry, inner: tuple[Tensor, Tensor, Tensor], keep_norms: bool, tape: Tape | None
    ) -> tuple[Tensor, Tensor]:
        layers = block.products()
        weights = [operands(layer, entry.x.dtype) for layer in layers]
        how = (keep_norms, self.recompute == "none", tape is not None)
        if self.recompute == "block" and torch.is_grad_enabled():
            x, out, _ = checkpoint(block, entry, inner, weights, *how, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportGeneralTypeIssues]
            return x, out
        x, out, values = block(entry, inner, weights, *how)
        if tape is not None:
            later = defers_bias(x)
            for k, (layer, value) in enumerate(zip(layers, (*values, out), strict=True)):
                tape.keep(layer, value, layer.bias if later and k else None)
        return x, out

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

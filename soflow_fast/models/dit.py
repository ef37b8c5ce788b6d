"""The Diffusion Transformer (Peebles & Xie 2023, arXiv 2212.09748) with SoFlow's two times (arXiv 2512.15657).

Every module's forward says what it computes. Where all layers are plain and nobody watches them, `DiT.forward` runs the
same computation fused across the borders of its modules (`fused_layers`), with the modulations of all blocks as one
product, or each with its block where the network is sharded (`sharding`); else it calls the modules one by one. Names
of parameters are those of the public checkpoints.
"""

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from soflow_kernels import (
    dual_time_embedding,
    gate_residual,
    gate_residual_layernorm_modulate,
    layernorm_modulate,
    on_gpu,
)
from soflow_kernels.qk_norm import rms_norm_reference

from ..config.schema import DiTConfig
from ..config.validation import validate_model
from .attention import Backend, attention, packed_attention, takes_packed
from .fused_layers import (
    EPS,
    BlockModulation,
    BlockOutputs,
    BlockWeights,
    HeadNorms,
    PendingResidual,
    SavePolicy,
    fused_block,
    linear,
    normed_linear,
    rounded_sum,
    stacked_linear,
    weights_of,
)
from .plain_layers import PLAIN_LAYERS, Kinds, Sharding, call_layer, changed_part, plain_kind, watched_everywhere
from .sharding import Unit, in_turn, without_parameters

FREQUENCIES = 256
MAX_PERIOD = 10_000.0


class TapedOutputs:
    """What the layers of a forward came to for some of its samples, without gradient.

    A value-and-increment pass over the same samples (`paired_forward`) takes its values from here.
    """

    def __init__(self, rows: slice) -> None:
        self.rows = rows
        self.modulations: list[Tensor] = []
        """As of `DiT.modulations`."""
        self.blocks: list[BlockOutputs] = []
        self.residual: Tensor | None = None
        """At the last norm, [B, T, D]."""
        self.patches: Tensor | None = None
        """The output of the last layer, [B, T, patch^2 C]."""

    def taken(self, tensor: Tensor) -> Tensor:
        """The part of a tensor [B, ...] that belongs to the samples."""
        return tensor.detach()[self.rows]

    def keep_block(self, outputs: BlockOutputs) -> None:
        """Note what the next block came to."""
        assert outputs.fc1 is not None
        parts = {name: value for name, value in outputs._asdict().items() if isinstance(value, Tensor)}
        self.blocks.append(outputs._replace(**{name: self.taken(value) for name, value in parts.items()}))


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
        x = x.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(B, (H // p) * (W // p), C * p * p)

    def forward(self, x: Tensor) -> Tensor:
        if changed_part(self.proj, nn.Conv2d, PLAIN_LAYERS) is None and not watched_everywhere():
            # One matrix product, as for the increments: a convolution rounds otherwise.
            return F.linear(self.patches(x), self.proj.weight.flatten(1), self.proj.bias)
        return call_layer(self.proj, x).flatten(2).transpose(1, 2)


class TimeMLP(nn.Sequential):
    """Linear, SiLU, Linear."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))


class TimeEmbedder(nn.Module):
    """Times [B] -> [B, D]: 256 sinusoids [cos, sin] of max period 10000, Linear, SiLU, Linear."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp: Any = TimeMLP(hidden_size)

    def forward(self, t: Tensor) -> Tensor:
        phi = sinusoids(t)
        dtype = next((p.dtype for p in self.mlp.parameters() if p.is_floating_point()), phi.dtype)
        return self.mlp(phi.to(dtype))


class LabelTable(nn.Embedding):
    """An embedding that draws nothing on the meta device: torch would import its compiler for that, which takes
    seconds."""

    def reset_parameters(self) -> None:
        if self.weight.device.type != "meta":
            super().reset_parameters()


class LabelEmbedder(nn.Module):
    """Labels [B] -> [B, D]; the last row of the table is the null label, if there is one."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.embedding_table = LabelTable(config.num_classes + config.null_label, config.hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class VectorEmbedder(nn.Module):
    """Vectors [B, E] -> [B, D] by a linear layer."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.condition_size, config.hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        dtype = next((p.dtype for p in self.proj.parameters() if p.is_floating_point()), y.dtype)
        return self.proj(y.to(dtype))


class NullVectorEmbedder(VectorEmbedder):
    """The same with a vector `null` [E], learned from zero, in the place of a row of NaN, which is no condition
    (`flow.null_like`)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.null = nn.Parameter(torch.zeros(config.condition_size))

    def forward(self, y: Tensor) -> Tensor:
        dropped = y.isnan().all(1, keepdim=True)  # NaN itself would reach the gradient of the layer
        return super().forward(torch.where(dropped, self.null, y.to(self.null.dtype)))


def condition_embedder(config: DiTConfig) -> type[nn.Module]:
    """The kind of module that embeds y."""
    if not config.condition_size:
        return LabelEmbedder
    return NullVectorEmbedder if config.null_label else VectorEmbedder


class HeadNorm(nn.Module):
    """RMSNorm over the head dimension with a weight, [..., head_dim]: statistics and product in float32, rounded once,
    as timm's RmsNorm does."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm_reference(x, self.weight, EPS)


class Attention(nn.Module):
    """Multi-head self-attention on tokens [B, T, D]: qkv, softmax(q k' / sqrt(head_dim)) v, proj.

    With `qk_norm` each head of q and of k is normalised first, by `q_norm` and `k_norm` (names as in timm).
    """

    backend: Backend = "sdpa"
    q_norm: HeadNorm
    k_norm: HeadNorm

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads, self.qk_norm = num_heads, qk_norm
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        if qk_norm:
            self.q_norm, self.k_norm = HeadNorm(hidden_size // num_heads), HeadNorm(hidden_size // num_heads)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        qkv = call_layer(self.qkv, x)
        if self.parts(qkv.dtype, qkv.device) == 1:
            return call_layer(self.proj, self.attend(qkv))
        q, k, v = qkv.chunk(3, -1)
        if self.qk_norm:
            q, k = (
                norm(part.unflatten(-1, (self.num_heads, -1))).flatten(2)
                for norm, part in ((self.q_norm, q), (self.k_norm, k))
            )
        return call_layer(self.proj, self.attend(q, k, v))

    def parts(self, dtype: torch.dtype, device: torch.device) -> int:
        """The number of tensors in which `attend` takes q, k and v: as the backend puts together their gradients.
        Normalised q and k are tensors of their own."""
        return 1 if not self.qk_norm and takes_packed(self.backend, dtype, device.type) else 3

    def norms(self) -> list[HeadNorm]:
        """The norms of q and k, where there are some."""
        return [self.q_norm, self.k_norm] if self.qk_norm else []

    def attend(self, *qkv: Tensor) -> Tensor:
        """The attention between the two linear layers: q, k and v [B, T, D], or one [B, T, 3 D] -> [B, T, D]."""
        if len(qkv) == 1:
            assert isinstance(self.backend, str)
            return packed_attention(qkv[0].unflatten(-1, (3, self.num_heads, -1)), self.backend).flatten(2)
        q, k, v = (split_heads(part, self.num_heads) for part in qkv)
        return merge_heads(attention(q, k, v, self.backend))


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, T, D] -> [B, heads, T, head_dim], a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, heads, T, head_dim] -> [B, T, D]: a view of what attention kernels write."""
    return x.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """Linear, tanh GELU, Linear on tokens [B, T, D]."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return call_layer(self.fc2, F.gelu(call_layer(self.fc1, x), approximate="tanh"))


class Modulation(Unit, nn.Sequential):
    """The conditioning c [B, D] -> `chunks` rows of D in the dtype of the blocks: SiLU, Linear; [B, chunks D]."""

    def __init__(self, hidden_size: int, chunks: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(hidden_size, chunks * hidden_size))

    def forward(self, c: Tensor, dtype: torch.dtype) -> Tensor:
        silu, layer = self
        return call_layer(layer, silu(c).to(dtype))

    def product(self, c: Tensor, dtype: torch.dtype) -> Tensor:
        """The same of SiLU(c), with the layer not called."""
        return linear(c.to(dtype), weights_of(self[1], dtype))  # pyright: ignore[reportArgumentType]


class Block(Unit, nn.Module):
    """One DiT block with adaLN-Zero (arXiv 2212.09748, section 3.2)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.attn = Attention(D, config.num_heads, config.qk_norm)
        self.mlp = MLP(D, int(D * config.mlp_ratio))
        self.adaLN_modulation: Any = Modulation(D, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x + gate1 attn(n1), then + gate2 mlp(n2), each n a modulated norm; [B, T, D].

        x: tokens [B, T, D]; c: the conditioning [B, D], from which shift, scale and gate of attention come, then those
        of the MLP.
        """
        m = BlockModulation(*self.adaLN_modulation(c, x.dtype).chunk(6, dim=1))
        h = layernorm_modulate(x, m.shift1, m.scale1, EPS)
        x, h = gate_residual_layernorm_modulate(x, self.attn(h), m.gate1, m.shift2, m.scale2, EPS)
        return gate_residual(x, self.mlp(h), m.gate2)

    def linears(self) -> list[nn.Linear]:
        """The linear layers on tokens, in the order in which they are run."""
        return [self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2]

    def weights(self, dtype: torch.dtype) -> BlockWeights:
        """What the fused block multiplies with: of products in a dtype, of norms of q and k in their own."""
        linears = (weights_of(layer, dtype) for layer in self.linears())
        norms = HeadNorms(self.attn.q_norm.weight, self.attn.k_norm.weight) if self.attn.qk_norm else None
        return BlockWeights(*linears, heads=norms)


class FinalLayer(nn.Module):
    """Tokens [B, T, D] -> patches [B, T, patch^2 C]: the last modulated norm and a linear layer."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.linear = nn.Linear(D, config.patch_size**2 * config.in_channels)
        self.adaLN_modulation: Any = Modulation(D, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """c: the conditioning [B, D], from which shift and scale come. The patches are in the dtype of c."""
        shift, scale = self.adaLN_modulation(c, x.dtype).chunk(2, dim=1)
        return call_layer(self.linear, layernorm_modulate(x, shift, scale, EPS, c.dtype))


KINDS: Kinds = {
    **PLAIN_LAYERS,
    **plain_kind(LabelTable, parameters=("weight",)),
    **plain_kind(PatchEmbed, {"proj": nn.Conv2d}),
    **plain_kind(TimeMLP, {"0": nn.Linear, "1": nn.SiLU, "2": nn.Linear}),
    **plain_kind(TimeEmbedder, {"mlp": TimeMLP}),
    **plain_kind(LabelEmbedder, {"embedding_table": LabelTable}),
    **plain_kind(VectorEmbedder, {"proj": nn.Linear}),
    **plain_kind(NullVectorEmbedder, {"proj": nn.Linear}, ("null",)),
    **plain_kind(Attention, {"qkv": nn.Linear, "proj": nn.Linear}),
    **plain_kind(MLP, {"fc1": nn.Linear, "fc2": nn.Linear}),
    **plain_kind(Modulation, {"0": nn.SiLU, "1": nn.Linear}),
    **plain_kind(Block, {"attn": Attention, "mlp": MLP, "adaLN_modulation": Modulation}),
    **plain_kind(FinalLayer, {"linear": nn.Linear, "adaLN_modulation": Modulation}),
}
QK_NORM_KINDS: Kinds = {
    **KINDS,
    **plain_kind(HeadNorm, parameters=("weight",)),
    **plain_kind(Attention, {"qkv": nn.Linear, "q_norm": HeadNorm, "k_norm": HeadNorm, "proj": nn.Linear}),
}
"""Of a network with `qk_norm`."""


class DiT(nn.Module):
    """N(x, t, s; y, w), the network of a SolutionFlow, from `DiTConfig`; y are vectors where it has a `condition_size`,
    else labels; w, a guidance scale for each sample, is of one with a `guidance_range` alone. Raises ValueError for a
    wrong configuration."""

    pos_embed: Tensor
    blocks: Any  # a ModuleList of Block
    w_embedder: Any
    """A TimeEmbedder of 1 - 1/w; None: the network sees no guidance scale."""
    recompute = "none"
    """The parts that a backward makes again beside norms and GELUs: "none", "mlp" (its first linear layer), "block"."""
    keep_norms: bool | None = None
    """Keep every product's input for the backward instead, as autograd would. None: on a CPU, where memory is not what
    is short, unless `recompute` asks for less."""
    compile_backend: str | Callable[..., Any] | None = None
    """The backend of torch.compile for the fused blocks; None: they are not compiled."""
    watch_gradient: Callable[[Tensor], None] | None = None
    """Is told the gradient of the tokens that enter the first block, through which all others pass."""
    mlp = "kernels"
    """Who makes the products around the GELUs of fused blocks that keep little for the backward (`mlp_products`)."""
    sharding: Sharding | None = None
    """What `sharding.shard` made of the modules; None: it was not called, and parameters are whole."""

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
        self.w_embedder = None if config.guidance_range is None else TimeEmbedder(D)
        self.y_embedder: Any = condition_embedder(config)(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.register_buffer("pos_embed", torch.empty(1, (config.input_size // config.patch_size) ** 2, D))
        self.initialize()

    @torch.no_grad()
    def initialize(
        self,
        source: torch.Generator | None = None,
        whole: Callable[[Tensor], AbstractContextManager[Tensor]] = nullcontext,
    ) -> None:
        """The public initialisation: Xavier uniform, zero biases; label table and the two Linear weights of the **t**
        embedder N(0, 0.02), while the s embedder keeps Xavier; adaLN and output layers zero, as is the last layer of
        the w embedder; norms of q and k one. Nothing on the meta device.

        whole: gives what is drawn into for a parameter, where that is only a part of one.
        """
        if self.pos_embed.device.type == "meta":
            return
        self.pos_embed.copy_(sincos_positions(self.config.hidden_size, math.isqrt(self.pos_embed.shape[1])))
        for module in self.modules():  # the layers that end at zero draw as well: so a seed gives the same weights
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                with whole(module.weight) as weight:
                    nn.init.xavier_uniform_(weight.flatten(1), generator=source)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        vectors = self.config.condition_size > 0
        table = [] if vectors else [self.y_embedder.embedding_table]
        for layer in (*table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            with whole(layer.weight) as weight:
                nn.init.normal_(weight, std=0.02, generator=source)
        # A random embedding of w, larger than that of the label, is hardly unlearned in the steps that the digits take.
        silent = [] if self.w_embedder is None else [self.w_embedder.mlp[2]]
        for layer in (*self.modulation_layers(), self.final_layer.linear, *silent):
            nn.init.zeros_(layer.weight)
        if vectors and self.config.null_label:
            nn.init.zeros_(self.y_embedder.null)
        for block in self.blocks:
            for norm in block.attn.norms():
                nn.init.ones_(norm.weight)

    @property
    def input_dtype(self) -> torch.dtype:
        """The dtype in which images are taken: that of the two ends."""
        return self.pos_embed.dtype

    @property
    def attention_backend(self) -> Backend:
        """What `set_attention` has set."""
        return self.blocks[0].attn.backend

    def modulation_layers(self) -> list[nn.Linear]:
        """The layers from SiLU(c) to shifts, scales and gates: six rows of D for each block, two for the last norm."""
        parts: list[Any] = [*self.blocks, self.final_layer]
        return [part.adaLN_modulation[1] for part in parts]

    def low_precision_layers(self) -> list[nn.Module]:
        """The layers whose parameters are in low precision in a step in low precision: those of the blocks, and all
        modulations."""
        inside = (layer for block in self.blocks for layer in (*block.linears(), *block.attn.norms()))
        return [*inside, *self.modulation_layers()]

    def units(self) -> list[Any]:
        """The parts that hold all parameters but those of the two ends, in the order in which they run: the blocks and
        the last modulation. A sharded network gathers them one by one."""
        return [*self.blocks, self.final_layer.adaLN_modulation]

    def set_attention(self, backend: Backend) -> None:
        """Let all blocks take an attention backend: one of `attention.BACKENDS`, or a function of q, k and v that is an
        implementation of softmax(q k' / sqrt(head_dim)) v, as increments are those of this formula."""
        for block in self.blocks:
            block.attn.backend = backend

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile the fused blocks by torch.compile, one graph each without breaks; equal blocks share their code."""
        # One variant for the first block and one for the others, with and without gradient, for each size of batch.
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, 64)
        self.compile_backend = backend

    def changed_part(self, *, float8: bool = False) -> str | None:
        """The name of the first submodule that is not as `DiT` makes it, or `sharding.shard` of that: replaced,
        wrapped, hooked, pruned, quantised or sharded by others; None: all are plain. float8: linear layers of torchao's
        float8 recipe pass too."""
        parts: list[tuple[str, nn.Module, type[nn.Module]]] = [
            ("x_embedder", self.x_embedder, PatchEmbed),
            ("t_embedder", self.t_embedder, TimeEmbedder),
            ("s_embedder", self.s_embedder, TimeEmbedder),
            *([] if self.w_embedder is None else [("w_embedder", self.w_embedder, TimeEmbedder)]),
            ("y_embedder", self.y_embedder, condition_embedder(self.config)),
            *((f"blocks.{k}", block, Block) for k, block in enumerate(self.blocks)),
            ("final_layer", self.final_layer, FinalLayer),
        ]
        for name, module, kind in parts:
            kinds = QK_NORM_KINDS if self.config.qk_norm else KINDS
            found = changed_part(module, kind, kinds, float8=float8, sharding=self.sharding)
            if found is not None:
                return f"{name}.{found}" if found else name
        if self.sharding is not None:
            whole = next((unit for unit in self.units() if unit not in self.sharding.modules), None)
            return next((name for name, module in self.named_modules() if module is whole), None)
        return None

    def conditioning(self, t: Tensor, s: Tensor, y: Tensor | None, w: Tensor | None = None) -> Tensor:
        """SiLU(c), c = e_t(t) + e_s(t - s) + e_y(y), [B, D], with w + e_w(1 - 1/w); times [B] are not scaled, y None is
        the null label or vector. All embedders must be plain."""
        of_t, of_s = (tuple(embedder.mlp.parameters()) for embedder in (self.t_embedder, self.s_embedder))
        if self.config.condition_size:  # embedded vectors are a table of as many rows as samples, each with its own
            of_y = self.embedded_condition(y, t)
            y = torch.arange(t.shape[0], device=t.device)
        else:
            of_y = self.y_embedder.embedding_table.weight
        if w is None:
            return dual_time_embedding(t, s, y, of_t, of_s, of_y, max_period=MAX_PERIOD)
        third = {"g": guidance_time(w), "g_weights": tuple(self.w_embedder.mlp.parameters())}
        return dual_time_embedding(t, s, y, of_t, of_s, of_y, max_period=MAX_PERIOD, **third)

    def embedded_condition(self, y: Tensor | None, like: Tensor) -> Tensor:
        """e_y(y), [B, D], of labels [B] or vectors [B, E]; None: of the null label or vector, for `like` [B]."""
        if y is None and self.config.condition_size:
            y = torch.full((like.shape[0], self.config.condition_size), math.nan, device=like.device)
        elif y is None:
            y = torch.full(like.shape, self.num_classes, device=like.device)
        return self.y_embedder(y)

    def modulations(self, c: Tensor, dtype: torch.dtype, tape: TapedOutputs | None = None) -> list[Tensor]:
        """Modulations from SiLU(c) [B, D], all in one product: six [B, D] for each block, then shift and scale of the
        last norm, in one list."""
        layers = self.modulation_layers()
        weights = [weights_of(layer, dtype) for layer in layers]
        out = stacked_linear(c.to(dtype), weights)
        D = self.config.hidden_size
        if tape is not None:
            tape.modulations = list(tape.taken(out).split(D, dim=1))
        return list(out.split(D, dim=1))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        y: Tensor | None = None,
        w: Tensor | None = None,
        *,
        tape: TapedOutputs | None = None,
    ) -> Tensor:
        """The network's output, [B, C, H, W], for x [B, C, H, W], times t and s [B], labels y [B] or vectors [B, E]
        (None: null; a vector of NaN too), and guidance scales w [B] where there is a `guidance_range`.

        The blocks compute in the dtype of autocast where it is on, else in that of `pos_embed`, whatever the dtype of
        their weights, residual and modulations included; the statistics of norms are float32 in any case. The two ends
        stay in the dtype of `pos_embed` under autocast as well: the conditioning, the patches and the last product
        cost nothing beside the blocks, and what they round is lost in every token. `tape` notes the outputs of layers
        on the way; all layers must then be plain.
        Raises ValueError for shapes that do not fit the configuration.
        """
        self.check_input(x, t, s, y, w)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.pos_embed.dtype
        changed = self.changed_part()
        with torch.autocast(device, enabled=False):
            if changed is None and not watched_everywhere():
                out = self.unpatchify(self._fused(x, t, s, y, w, dtype, tape))
            elif tape is not None:
                raise ValueError(f"tape: {changed or 'every module'} is watched or changed, its outputs are not taken")
            else:
                out = self.unpatchify(self._called(x, t, s, y, w, dtype))
        # FSDP's hook on a view would be lost if somebody wrote to it.
        return out if self.sharding is None else out.clone()

    def _called(
        self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None, w: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Patches [B, T, patch^2 C], every module called."""
        c = self.t_embedder(t) + self.s_embedder(t - s) + self.embedded_condition(y, t)
        if w is not None:
            c = c + self.w_embedder(guidance_time(w))
        x = self._watched((self.x_embedder(x) + self.pos_embed).to(dtype))
        for block in self.blocks:
            if self.recompute == "block" and torch.is_grad_enabled():
                x = _checkpoint(block, x, c)
            else:
                x = block(x, c)
        return self.final_layer(x, c)

    def _watched(self, x: Tensor) -> Tensor:
        if self.watch_gradient is not None and x.requires_grad:
            x.register_hook(self.watch_gradient)
        return x

    def _fused(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        y: Tensor | None,
        w: Tensor | None,
        dtype: torch.dtype,
        tape: TapedOutputs | None,
    ) -> Tensor:
        """Patches [B, T, patch^2 C], fused across the borders of modules."""
        c = self.conditioning(t, s, y, w)
        x = self._watched(rounded_sum(self.x_embedder(x), self.pos_embed, dtype))
        keep_norms = self.keep_norms
        if keep_norms is None:
            keep_norms = not on_gpu(x) and self.recompute == "none"
        save = SavePolicy(norms=keep_norms, inner=self.recompute == "none")
        residual = PendingResidual(x)
        if self.sharding is None:
            m = self.modulations(c, dtype, tape)
            for k, block in enumerate(self.blocks):
                residual = self._fused_block(block, residual, BlockModulation(*m[6 * k : 6 * k + 6]), save, tape)
            shift, scale = m[-2:]
        else:
            with closing(in_turn(self)) as turns:
                for _ in self.blocks:
                    residual = next(turns)(self._block_and_modulation, residual, c, save, tape)
                product = next(turns)(Modulation.product, c, dtype)
            shift, scale = self._rows(product, tape)
        final = weights_of(self.final_layer.linear, self.pos_embed.dtype)
        x, out = normed_linear(residual, shift, scale, final, keep_norm=keep_norms)
        if tape is not None:
            tape.residual, tape.patches = tape.taken(x), tape.taken(out)
        return out

    def _rows(self, product: Tensor, tape: TapedOutputs | None) -> tuple[Tensor, ...]:
        """The modulations [B, D] in the product of one layer, noted on the tape."""
        rows = product.split(self.config.hidden_size, dim=1)
        if tape is not None:
            tape.modulations += map(tape.taken, rows)
        return rows

    def _block_and_modulation(
        self, block: Block, residual: PendingResidual, c: Tensor, save: SavePolicy, tape: TapedOutputs | None
    ) -> PendingResidual:
        """A block with the modulations of its own, for SiLU(c) [B, D]. Nothing that leaves it is a parameter, whose
        memory is freed after it, or a view, on which FSDP's hook would not be safe: on a GPU the gate [B, D] alone."""
        rows = self._rows(block.adaLN_modulation.product(c, residual.x.dtype), tape)
        leaving = without_parameters(self._fused_block(block, residual, BlockModulation(*rows), save, tape))
        return PendingResidual._make(
            v.clone() if v is not None and v.requires_grad and v._base is not None else v for v in leaving
        )

    def _fused_block(
        self,
        block: Block,
        residual: PendingResidual,
        modulation: BlockModulation,
        save: SavePolicy,
        tape: TapedOutputs | None,
    ) -> PendingResidual:
        weights = block.weights(residual.x.dtype)
        run: Any = fused_block if self.compile_backend is None else _compiled_block(self.compile_backend)
        if self.recompute == "block" and torch.is_grad_enabled():
            run = functools.partial(_checkpoint, run)
        parts = block.attn.parts(residual.x.dtype, residual.x.device)
        leaving, outputs = run(
            residual, modulation, weights, block.attn.attend, save, tape is not None, parts, self.mlp
        )
        if tape is not None:
            tape.keep_block(outputs)
        return leaving

    def unpatchify(self, x: Tensor) -> Tensor:
        """Output patches [B, T, patch^2 C] -> images [B, C, H, W]."""
        p, C = self.config.patch_size, self.config.in_channels
        n, B = self.config.input_size // p, x.shape[0]  # len() would fix a batch of any size, for torch.export
        return x.reshape(B, n, n, p, p, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, n * p, n * p)

    def check_input(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None, w: Tensor | None = None) -> None:
        """Raise ValueError naming the input whose shape does not fit, or a label or guidance scale that is missing."""
        shape = (self.config.in_channels, self.config.input_size, self.config.input_size)
        if x.dim() != 4 or tuple(x.shape[1:]) != shape:
            raise ValueError(f"x must be [B, {shape[0]}, {shape[1]}, {shape[2]}], got {list(x.shape)}")
        E = self.config.condition_size
        for name, value in (("t", t), ("s", s), ("y", y), ("w", w)):
            wanted = (x.shape[0], E) if name == "y" and E else x.shape[:1]
            if value is not None and value.shape != wanted:
                raise ValueError(f"{name} must be {list(wanted)}, got {list(value.shape)}")
        if y is not None and y.is_floating_point() != (E > 0):
            raise ValueError(f"y must be {f'vectors of {E} numbers' if E else 'labels'}, got {y.dtype}")
        if y is None and not self.config.null_label:
            raise ValueError("y must be given: the network was trained with a label each, it has no null label")
        if (w is None) != (self.w_embedder is None):
            if w is not None:
                raise ValueError("w must be left out: the network has no embedder of guidance scales (guidance_range)")
            assert self.config.guidance_range is not None
            low, high = self.config.guidance_range
            raise ValueError(f"w must be given: the network sees a guidance scale for each sample, {low:g} to {high:g}")


def _checkpoint(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function whose backward makes again what it would keep."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


@functools.cache
def _compiled_block(backend: str | Callable[..., Any]) -> Callable[..., tuple[PendingResidual, BlockOutputs]]:
    return torch.compile(fused_block, backend=backend, fullgraph=True, dynamic=False)


def guidance_time(w: Tensor) -> Tensor:
    """1 - 1/w, [B]: what the embedder of guidance scales w sees. As times it is in [0, 1), 0 without guidance; the
    guided velocity's distance from the labelled one grows evenly with it (iMF, arXiv 2512.02012; TVM embeds 1/w)."""
    return 1 - w.reciprocal()


def sinusoids(t: Tensor) -> Tensor:
    """Times [B] -> 256 sinusoids [B, 256], [cos, sin] of t w_i, w_i = 10000^(-i/128); float32, or float64 of such t."""
    half = FREQUENCIES // 2
    t = t if t.dtype == torch.float64 else t.float()
    w = torch.exp(-math.log(MAX_PERIOD) * (torch.arange(half, device=t.device, dtype=t.dtype) / half))
    angle = t[:, None] * w
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def sincos_positions(hidden_size: int, grid: int) -> Tensor:
    """Fixed 2-D sine-cosine positions [grid^2, D] (float32): half of the channels for the column, half for the row,
    each [sin, cos] of D/4 frequencies 10000^(-4 i / D)."""
    omega = MAX_PERIOD ** (-torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size / 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # [grid, D/2]
    columns = axis[None].expand(grid, grid, -1)
    rows = axis[:, None].expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=2).reshape(grid * grid, hidden_size).float()

"""DDPM++, the U-Net of Song et al. (arXiv 2011.13456) as EDM has it (arXiv 2206.00364), with SoFlow's two times.

It is made of diffusers' blocks and not of its `UNet2DModel`, which has one width for the first convolution and the
first level, attention in all blocks of a level on the way up, resampling blocks without a convolution beside them, and
no scale of the sum in a block. Parts have the names of EDM's SongUNet: `enc.32x32_block0`, `dec.8x8_in0`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config.schema import UNetConfig
from ..config.validation import validate_model
from ..errors import ConfigError
from ._seeded_dropout import SeededDropout

EPS = 1e-6
SUM = math.sqrt(2)
"""A block's two branches are added and divided by this, so that the variance stays."""
AUGMENTATION = 9
"""Numbers that say how an image was changed."""
SMALL, ATTENTION = 1e-5, math.sqrt(0.2)
"""The sizes, beside Xavier's, of the initial weights that end a branch, and of queries, keys and values."""


def _diffusers() -> tuple[Any, ...]:
    """diffusers' residual block, attention, its plain implementation, and embedding of a time. Raises ConfigError."""
    try:
        from diffusers.models.attention_processor import Attention, AttnProcessor
        from diffusers.models.embeddings import TimestepEmbedding
        from diffusers.models.resnet import ResnetBlock2D
    except ImportError:
        raise ConfigError(
            "model.kind unet: its blocks are those of diffusers, which is not installed: pip install 'soflow-fast[hub]'"
        ) from None
    return ResnetBlock2D, Attention, AttnProcessor, TimestepEmbedding


def groups(channels: int) -> int:
    """The groups of a norm: 32, of fewer than 128 channels as many as have four each."""
    return next(n for n in range(max(1, min(32, channels // 4)), 0, -1) if channels % n == 0)


def sinusoids(t: Tensor, size: int) -> Tensor:
    """Times [B] -> [B, size], [sin, cos] of t 10000^(-i / (size / 2 - 1)); float32, or float64 of such t."""
    half = size // 2
    t = t if t.dtype == torch.float64 else t.float()
    w = 10_000.0 ** -(torch.arange(half, device=t.device, dtype=t.dtype) / max(1, half - 1))
    angle = t[:, None] * w
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class UNetBlock(nn.Module):
    """diffusers' residual block, one that may halve or double both sides, and attention after it where there is some.

    Images [B, C, H, W] and the embedding of both times [B, E] -> [B, C', H', W'].
    """

    def __init__(
        self, in_channels: int, out_channels: int, embedding: int, dropout: float, *, attention: bool, **resample: bool
    ) -> None:
        super().__init__()
        ResnetBlock2D, Attention, AttnProcessor, _ = _diffusers()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.resnet: Any = ResnetBlock2D(
            in_channels=in_channels,
            out_channels=out_channels,
            temb_channels=embedding,
            groups=groups(in_channels),
            groups_out=groups(out_channels),
            eps=EPS,
            output_scale_factor=SUM,
            # A block that resamples has a convolution beside its branch whatever its channels.
            use_in_shortcut=bool(resample) or in_channels != out_channels,
            **resample,
        )
        self.resnet.dropout = SeededDropout(dropout)
        self.attention: Any = None
        if attention:
            self.attention = Attention(
                out_channels,
                heads=1,
                dim_head=out_channels,
                eps=EPS,
                norm_num_groups=groups(out_channels),
                rescale_output_factor=SUM,
                residual_connection=True,
                bias=True,
                # Of products and a softmax, whose backward is the same to the bit each time.
                processor=AttnProcessor(),
            )

    def forward(self, x: Tensor, embedding: Tensor, seeds: Tensor | None = None) -> Tensor:
        """seeds: of the samples' dropout, int32 [B]; None: nothing is left out."""
        with self.resnet.dropout.seeded(seeds):
            x = self.resnet(x, embedding)
        return x if self.attention is None else self.attention(x)


class UNet(nn.Module):
    """N(x, t, s), the network of a SolutionFlow, from `UNetConfig`.

    The embedding of t is EDM's, with the labels of the augmentation; that of t - s is added to its output, as in the
    DiT. Raises ValueError for a wrong configuration, ConfigError without diffusers.
    """

    num_classes = 0
    recompute = "none"
    """The parts that a backward makes again: "none" or "block"."""
    keep_norms: bool | None = None
    """Of the DiT; a U-Net keeps what autograd keeps."""
    watch_gradient: Callable[[Tensor], None] | None = None
    """Is told the gradient of the first convolution's output, through which all others pass."""
    mlp = "kernels"
    sharding: None = None
    attention_backend = "math"

    def __init__(self, config: UNetConfig | None = None) -> None:
        super().__init__()
        config = config or UNetConfig()
        validate_model(config)
        *_, TimestepEmbedding = _diffusers()
        self.config, C = config, config.channels
        E = 4 * C
        labels = AUGMENTATION if config.augmentation_labels else None
        self.t_embedder: Any = TimestepEmbedding(C, E, cond_proj_dim=labels)
        self.s_embedder: Any = TimestepEmbedding(C, E)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        here, skips = C, [C]

        def block(out: int, attention: bool, skip: int = 0, **resample: bool) -> UNetBlock:
            nonlocal here
            made = UNetBlock(here + skip, out, E, config.dropout, attention=attention, **resample)
            here = out
            return made

        widths = [C * multiplier for multiplier in config.multipliers]
        for level, width in enumerate(widths):
            size = config.input_size >> level
            attends = size in config.attention_sizes
            if level == 0:
                self.enc[f"{size}x{size}_conv"] = nn.Conv2d(config.in_channels, C, 3, padding=1)
            else:
                self.enc[f"{size}x{size}_down"] = block(here, False, down=True)
                skips.append(here)
            for k in range(config.blocks):
                self.enc[f"{size}x{size}_block{k}"] = block(width, attends)
                skips.append(here)
        for level, width in reversed([*enumerate(widths)]):
            size = config.input_size >> level
            attends = size in config.attention_sizes
            if level == len(widths) - 1:
                self.dec[f"{size}x{size}_in0"] = block(here, True)
                self.dec[f"{size}x{size}_in1"] = block(here, False)
            else:
                self.dec[f"{size}x{size}_up"] = block(here, False, up=True)
            for k in range(config.blocks + 1):
                last = k == config.blocks
                self.dec[f"{size}x{size}_block{k}"] = block(width, attends and last, skips.pop())
        size = config.input_size
        self.dec[f"{size}x{size}_aux_norm"] = nn.GroupNorm(groups(here), here, eps=EPS)
        self.dec[f"{size}x{size}_aux_conv"] = nn.Conv2d(here, config.in_channels, 3, padding=1)
        for number, made in enumerate(self.unet_blocks()):
            made.resnet.dropout.number = number
        self.initialize()

    @property
    def input_dtype(self) -> torch.dtype:
        """The dtype in which images are taken."""
        return self.first.weight.dtype

    @property
    def first(self) -> Any:
        """The first convolution."""
        return next(iter(self.enc.values()))

    def unet_blocks(self) -> Iterator[Any]:
        """The blocks, in the order in which they run."""
        return (part for part in (*self.enc.values(), *self.dec.values()) if isinstance(part, UNetBlock))

    @torch.no_grad()
    def initialize(
        self,
        source: torch.Generator | None = None,
        whole: Callable[[Tensor], AbstractContextManager[Tensor]] = nullcontext,
    ) -> None:
        """EDM's initialisation: Xavier uniform, of queries, keys and values times sqrt(0.2), of the layers that end a
        branch or the network times 1e-5; zero biases, norms one. Nothing on the meta device.

        whole: gives what is drawn into for a parameter, where that is only a part of one.
        """
        if self.first.weight.device.type == "meta":
            return
        sizes: dict[nn.Module, float] = {[*self.dec.values()][-1]: SMALL}
        for block in self.unet_blocks():
            sizes[block.resnet.conv2] = SMALL
            if block.attention is not None:
                attention = block.attention
                sizes |= {layer: ATTENTION for layer in (attention.to_q, attention.to_k, attention.to_v)}
                sizes[attention.to_out[0]] = SMALL
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                with whole(module.weight) as weight:
                    nn.init.xavier_uniform_(weight, generator=source).mul_(sizes.get(module, 1.0))
            elif isinstance(module, nn.GroupNorm):
                nn.init.ones_(module.weight)
            bias = getattr(module, "bias", None)
            if isinstance(bias, Tensor):
                nn.init.zeros_(bias)

    def low_precision_layers(self) -> list[nn.Module]:
        """The layers whose parameters are in low precision in a step in low precision: none, autocast rounds them."""
        return []

    def compile_blocks(self, backend: Any = "inductor") -> None:
        """Raises ConfigError: the blocks are diffusers', which are not compiled here."""
        raise ConfigError("compile: is of the DiT's blocks; the network is a U-Net")

    def set_attention(self, backend: Any) -> None:
        """Nothing: the attention is the network's own, whatever the DiT would take."""

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        y: Tensor | None = None,
        *,
        augmentation: Tensor | None = None,
        dropout: Tensor | None = None,
    ) -> Tensor:
        """The network's output [B, C, H, W], in the dtype of x, for x [B, C, H, W] and times t and s [B].

        y: None, or labels that are all 0, the null label. augmentation: how the images were changed, [B, 9]
        (`augmentation.labels`); None: not at all. dropout: int32 [B], a seed of each sample's own dropout, of which
        alone it is a function; None: none, as for samples, whether the network is in training mode or not.
        The convolutions compute in the dtype of autocast where it is on; embeddings of the times and the last layer
        stay in that of the parameters. Raises ValueError for shapes that do not fit the configuration.
        """
        self.check_input(x, t, s, y, augmentation, dropout)
        given, device, dtype = x.dtype, x.device.type, self.input_dtype
        with torch.autocast(device, enabled=False):
            c = self.conditioning(t, s, augmentation).to(dtype)
        x = self.first(x.to(dtype))
        if self.watch_gradient is not None and x.requires_grad:
            x.register_hook(self.watch_gradient)
        skips = [x]
        for part in [*self.enc.values()][1:]:
            x = self._run(part, x, c, dropout)
            skips.append(x)
        *blocks, norm, last = self.dec.values()
        for part in blocks:
            if x.shape[1] != part.in_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = self._run(part, x, c, dropout)
        with torch.autocast(device, enabled=False):
            return last(nn.functional.silu(norm(x.to(dtype)))).to(given)

    def conditioning(self, t: Tensor, s: Tensor, augmentation: Tensor | None = None) -> Tensor:
        """e_t(t, augmentation) + e_s(t - s), [B, 4 channels]; times are not scaled. The blocks begin with its SiLU."""
        dtype, size = self.input_dtype, self.config.channels
        labels = None if augmentation is None else augmentation.to(dtype)
        if labels is None and self.config.augmentation_labels:
            labels = t.new_zeros(len(t), AUGMENTATION, dtype=dtype)  # so that every parameter has a gradient
        of_t = self.t_embedder(sinusoids(t, size).to(dtype), labels)
        return of_t + self.s_embedder(sinusoids(t - s, size).to(dtype))

    def _run(self, block: Any, x: Tensor, c: Tensor, dropout: Tensor | None) -> Tensor:
        if self.recompute == "block" and torch.is_grad_enabled():
            made: Any = checkpoint(block, x, c, dropout, use_reentrant=False, preserve_rng_state=False)
            return made
        return block(x, c, dropout)

    def check_input(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        y: Tensor | None = None,
        augmentation: Tensor | None = None,
        dropout: Tensor | None = None,
    ) -> None:
        """Raise ValueError naming the input whose shape does not fit, or that the network does not take."""
        shape = (self.config.in_channels, self.config.input_size, self.config.input_size)
        if x.dim() != 4 or tuple(x.shape[1:]) != shape:
            raise ValueError(f"x must be [B, {shape[0]}, {shape[1]}, {shape[2]}], got {list(x.shape)}")
        for name, value in (("t", t), ("s", s), ("y", y), ("dropout", dropout)):
            if value is not None and value.shape != x.shape[:1]:
                raise ValueError(f"{name} must be [{x.shape[0]}], got {list(value.shape)}")
        if augmentation is not None and not self.config.augmentation_labels:
            raise ValueError("augmentation must be left out: the network sees none (model.augmentation_labels)")
        if augmentation is not None and augmentation.shape != (len(x), AUGMENTATION):
            raise ValueError(f"augmentation must be [{len(x)}, {AUGMENTATION}], got {list(augmentation.shape)}")

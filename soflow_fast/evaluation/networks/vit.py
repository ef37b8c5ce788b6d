"""DINOv2, by whose features FD-DINOv2 is measured (arXiv 2304.07193, arXiv 2306.04675)."""

import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...errors import ConfigError
from .extractor import Extract, Extracted

SIZE, PATCH, HEAD = 224, 14, 64
"""Pixels of an image's side, of a patch's, and numbers of a head of attention."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OFFSET = 0.1
"""Added to the number of patches where the positions are scaled, as in the authors' code."""
EPS = 1e-6

Weights = dict[str, Tensor]

_TRANSFORMERS = (
    (r"^(dinov2\.)?embeddings\.cls_token$", "cls_token"),
    (r"^(dinov2\.)?embeddings\.position_embeddings$", "pos_embed"),
    (r"^(dinov2\.)?embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(dinov2\.)?encoder\.layer\.(\d+)\.", r"blocks.\2."),
    (r"^(dinov2\.)?layernorm\.", "norm."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
)
"""The names in files of transformers, and what they are in the authors'."""


class Dinov2:
    """DINOv2 without registers, of any size, in float32: the normed class token of images of 224 x 224.

    Images are scaled by Pillow's bicubic filter, as in the code of arXiv 2306.04675, which takes ViT-L/14.

    Args:
        place: the authors' file (`dinov2_vitl14_pretrain.pth`), or a file or folder of transformers
            (`facebook/dinov2-large`: model.safetensors).

    Raises ConfigError for what is no such file.
    """

    name = "dinov2"

    def __init__(self, place: str) -> None:
        self._weights = _read(place)

    def on(self, device: torch.device) -> Extract:
        """See Extractor."""
        weights = {name: value.to(device) for name, value in self._weights.items()}
        return lambda images: Extracted(class_token(weights, prepared(images).to(device)))


def prepared(images: Tensor) -> Tensor:
    """Images [n, 3, H, W] uint8 as the network takes them, float32 [n, 3, 224, 224] on the host."""
    scaled = [
        np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        for image in images.permute(0, 2, 3, 1).cpu().numpy()
    ]
    x = torch.from_numpy(np.stack(scaled)).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]


def class_token(w: Weights, x: Tensor) -> Tensor:
    """The class token after the last norm, [n, D], of prepared images. w: the authors' names."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], EPS)

    x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=PATCH).flatten(2).mT
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1) + _positions(w["pos_embed"])
    n, T, D = x.shape
    for k in range(_depth(w)):
        block = f"blocks.{k}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").view(n, T, 3, D // HEAD, HEAD)
        q, k_, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k_, v).transpose(1, 2).reshape(n, T, D)
        x = x + w[f"{block}.ls1.gamma"] * linear(mixed, f"{block}.attn.proj")
        h = norm(x, f"{block}.norm2")
        if f"{block}.mlp.fc1.weight" in w:
            h = linear(F.gelu(linear(h, f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        else:  # ViT-g/14
            gate, value = linear(h, f"{block}.mlp.w12").chunk(2, -1)
            h = linear(F.silu(gate) * value, f"{block}.mlp.w3")
        x = x + w[f"{block}.ls2.gamma"] * h
    return norm(x[:, 0], "norm")


def _positions(table: Tensor) -> Tensor:
    """The embedding of the positions [1, 1 + M M, D], scaled from M x M patches to those of an image."""
    side, patches = round((table.shape[1] - 1) ** 0.5), SIZE // PATCH
    if side == patches:
        return table
    grid = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = (patches + OFFSET) / side
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([table[:, :1], grid.flatten(2).mT], 1)


def _depth(w: Weights) -> int:
    return sum(bool(re.fullmatch(r"blocks\.\d+\.norm1\.weight", name)) for name in w)


def _read(place: str) -> Weights:
    """The weights by the authors' names, float32. Raises ConfigError."""
    flag = f"--dinov2 {place}"
    path = Path(place)
    if path.is_dir():
        path = path / "model.safetensors"
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
        found = {str(name): value.float() for name, value in found.items()}
    except OSError as error:
        raise ConfigError(f"{flag}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # of a damaged file torch and safetensors raise many kinds
        text = " ".join(str(error).split()).partition("(1)")[0]
        raise ConfigError(f"{flag}: holds no weights ({type(error).__name__}: {text[:100]})") from None
    try:
        weights = _as_the_authors_name_them(found)
        size = weights["cls_token"].shape[-1]
        right = size % HEAD == 0 and weights["patch_embed.proj.weight"].shape == (size, 3, PATCH, PATCH)
        if not right or "register_tokens" in weights:
            raise ValueError(f"it must be without registers, with patches of {PATCH}")
        with torch.no_grad():
            class_token(weights, torch.zeros(1, 3, SIZE, SIZE))
    except (KeyError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{flag}: is no DINOv2 ({' '.join(str(error).split())[:100]})") from None
    return weights


def _as_the_authors_name_them(found: Weights) -> Weights:
    renamed = {}
    for name, value in found.items():
        for theirs, ours in _TRANSFORMERS:
            name = re.sub(theirs, ours, name)
        renamed[name] = value
    for name in [name for name in renamed if re.search(r"\.attn\.query\.", name)]:
        parts = [renamed.pop(name.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        renamed[name.replace(".query.", ".qkv.")] = torch.cat(parts)
    return renamed

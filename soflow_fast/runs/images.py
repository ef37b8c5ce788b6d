"""Images of a run: bytes from tensors, grids and PNG files."""

import io

import numpy as np
import torch
from torch import Tensor


def has_colours(channels: int) -> bool:
    """Whether samples of so many channels are images that can be shown: grey or colours; others are latents."""
    return channels in (1, 3)


def to_uint8(x: Tensor) -> Tensor:
    """Images [N, C, H, W] in [-1, 1] -> uint8 [N, H, W, C], on their device. Raises ValueError unless C is 1 or 3."""
    if not has_colours(x.shape[1]):
        raise ValueError(f"{x.shape[1]} channels are no colours")
    x = x.detach().float()
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def make_grid(images: Tensor, columns: int = 0, least: int = 40) -> Tensor:
    """uint8 images [N, H, W, C] side by side, [H', W', C]; small ones enlarged to `least` pixels by whole factors."""
    n, H, _, C = images.shape
    columns = columns or round(n**0.5 + 0.49)
    scale = max(1, -(-least // H))
    images = images.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    gap, rows = 2, -(-n // columns)
    height, width = images.shape[1] + gap, images.shape[2] + gap
    grid = torch.full((rows * height + gap, columns * width + gap, C), 128, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = gap + (i // columns) * height, gap + (i % columns) * width
        grid[top : top + height - gap, left : left + width - gap] = image
    return grid


def npy(x: Tensor) -> bytes:
    """A tensor as the bytes of a .npy file, float32."""
    buffer = io.BytesIO()
    np.save(buffer, x.detach().float().cpu().numpy())
    return buffer.getvalue()


def png(image: Tensor) -> bytes:
    """A uint8 image [H, W, C] as the bytes of a PNG file."""
    from PIL import Image

    array = image.numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(buffer, "PNG")
    return buffer.getvalue()

"""Images of a run: bytes from tensors, grids and PNG files."""

import io
import zlib

import numpy as np
import torch
from torch import Tensor

from ..config.schema import SampleFormat

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def has_colours(channels: int) -> bool:
    """Whether samples of so many channels are images that can be shown: grey or colours; others are latents."""
    return channels in (1, 3)


def to_uint8(x: Tensor) -> Tensor:
    """Images [N, C, H, W] in [-1, 1] -> uint8 [N, H, W, C], on their device. Raises ValueError unless C is 1 or 3."""
    if not has_colours(x.shape[1]):
        raise ValueError(f"{x.shape[1]} channels are no colours")
    x = x.detach().float()
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_adm_uint8(x: Tensor) -> Tensor:
    """The same as DiT writes them for ADM's evaluation: 127.5 x + 128, clamped and cut off to whole numbers.

    Numbers that are exact would be rounded as in `to_uint8`; those of float32 may differ by one where a sum lies within
    its last bits of the middle between two bytes. Raises ValueError unless C is 1 or 3.
    """
    if not has_colours(x.shape[1]):
        raise ValueError(f"{x.shape[1]} channels are no colours")
    x = x.detach().float()
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def in_bytes(x: Tensor, form: SampleFormat) -> tuple[Tensor, ...]:
    """Images [N, C, H, W] as PNGs are made of them, as ADM takes them, or both: each uint8 [N, H, W, C]."""
    return (*((to_uint8(x),) if form != "npz" else ()), *((to_adm_uint8(x),) if form != "png" else ()))


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
    """A tensor as the bytes of a .npy file: of whole numbers as they are, others as float32."""
    buffer = io.BytesIO()
    x = x.detach().cpu()
    np.save(buffer, (x.float() if x.is_floating_point() else x).numpy())
    return buffer.getvalue()


def png(image: Tensor) -> bytes:
    """A uint8 image [H, W, C] as the bytes of a PNG file."""
    from PIL import Image

    array = image.numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(buffer, "PNG")
    return buffer.getvalue()


def from_png(content: bytes) -> Tensor:
    """The image [H, W, C] of which `png` has made a file."""
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        array = np.array(image)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None])


def is_whole_png(content: bytes) -> bool:
    """Whether the bytes are those of a whole PNG, by the checksums of its chunks. Nothing is decoded."""
    at, size = len(SIGNATURE), len(content)
    whole = content.startswith(SIGNATURE)
    while whole and at + 12 <= size:  # length, name, content and checksum of a chunk
        name, end = content[at + 4 : at + 8], at + 12 + int.from_bytes(content[at : at + 4], "big")
        whole = end <= size and zlib.crc32(content[at + 4 : end - 4]) == int.from_bytes(content[end - 4 : end], "big")
        if name == b"IEND":
            return whole and end == size
        at = end
    return False

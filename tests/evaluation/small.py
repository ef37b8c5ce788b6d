"""Sets of images, and a small network in the place of Inception: it has everything that figures are made of."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from soflow_fast.evaluation import Extracted, RandomFeatures


def pictures(n: int, seed: int, size: int = 8, light: int = 0) -> Tensor:
    """Smooth colours, uint8 [n, 3, size, size]; light: how much lighter they are."""
    source = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 2, 2, generator=source) * 200 + light
    return F.interpolate(coarse, size=size, mode="bilinear").clamp(0, 255).to(torch.uint8)


def save_folder(images: Tensor, folder: Path, into: int = 1) -> Path:
    """PNGs, dealt out to folders where `into` is more than one."""
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        place = folder / f"class-{i % into}" if into > 1 else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i:05d}.png")
    return folder


def save_npz(images: Tensor, path: Path, **others: np.ndarray) -> Path:
    np.savez(path, images.permute(0, 2, 3, 1).numpy(), **others)
    return path


class Small:
    """The features of RandomFeatures, a few pixels, and logits of 5 classes that are made of the colours."""

    name = "inception"

    def on(self, device: torch.device):
        features = RandomFeatures().on(device)

        def extract(images: Tensor) -> Extracted:
            assert images.dtype == torch.uint8 and images.shape[1] == 3
            x = images.float() / 127.5 - 1
            colours = x.mean((2, 3))
            logits = 10 * torch.cat([colours, colours[:, :2] ** 2], 1)
            return Extracted(features(images).features, x[:, :2, ::2, ::4].permute(0, 2, 3, 1).flatten(1), logits)

        return extract

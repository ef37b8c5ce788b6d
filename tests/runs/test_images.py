"""Images: bytes, grids, PNG files."""

import io

import pytest
import torch
from PIL import Image

from soflow_fast.runs.images import make_grid, png, to_uint8


def test_images_become_bytes() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).reshape(1, 1, 1, 5)
    assert to_uint8(x).flatten().tolist() == [0, 0, 128, 255, 255]
    assert [to_uint8(torch.zeros(2, c, 4, 4)).shape[3] for c in (1, 3)] == [1, 3]
    for c in (2, 4):
        with pytest.raises(ValueError, match=f"{c} channels are no colours"):
            to_uint8(torch.zeros(2, c, 4, 4))
    channels = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1)
    assert to_uint8(channels).shape == (1, 1, 1, 3)
    assert to_uint8(channels).flatten().tolist() == [0, 128, 255]


def test_a_grid_shows_every_image_in_its_place() -> None:
    images = torch.arange(7, dtype=torch.uint8).reshape(7, 1, 1, 1).expand(7, 8, 8, 1) * 10
    grid = make_grid(images, columns=3)
    assert grid.shape == (3 * 42 + 2, 3 * 42 + 2, 1)  # enlarged fivefold, 2 pixels apart
    centres = grid[22::42, 22::42, 0]
    assert centres.flatten().tolist() == [0, 10, 20, 30, 40, 50, 60, 128, 128]
    assert make_grid(images[:1]).shape == (44, 44, 1)
    assert make_grid(torch.zeros(10, 64, 64, 3, dtype=torch.uint8)).shape == (3 * 66 + 2, 4 * 66 + 2, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_gives_the_image_back(channels: int) -> None:
    image = torch.arange(12 * channels, dtype=torch.uint8).reshape(3, 4, channels)
    with Image.open(io.BytesIO(png(image))) as read:
        assert read.format == "PNG" and read.size == (4, 3)
        assert list(read.tobytes()) == image.flatten().tolist()

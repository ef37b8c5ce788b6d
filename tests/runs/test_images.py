"""Images: bytes, grids, PNG files."""

import io

import pytest
import torch
from PIL import Image

from soflow_fast.runs.images import from_png, in_bytes, is_whole_png, make_grid, png, to_adm_uint8, to_uint8


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
    assert torch.equal(from_png(png(image)), image)


def test_bytes_of_adm_are_ours_but_in_the_middle_between_two() -> None:
    x = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0, float("inf")]).reshape(1, 1, 1, 6)
    assert to_adm_uint8(x).flatten().tolist() == [0, 0, 128, 255, 255, 255]
    middles = ((torch.arange(255) + 0.5) / 127.5 - 1).reshape(1, 1, 1, 255)
    ours, theirs = to_uint8(middles).int(), to_adm_uint8(middles).int()
    assert set((theirs - ours).flatten().tolist()) == {0, 1}
    usual = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) / 2
    # sums below 2^8 have last bits of 2^-16: one value in some 2^15 is as near to a middle
    assert (to_uint8(usual) != to_adm_uint8(usual)).float().mean() < 1e-3
    with pytest.raises(ValueError, match="4 channels are no colours"):
        to_adm_uint8(torch.zeros(2, 4, 4, 4))
    forms = {form: in_bytes(usual, form) for form in ("png", "npz", "both")}
    assert [len(found) for found in forms.values()] == [1, 1, 2]
    assert torch.equal(forms["both"][0], to_uint8(usual)) and torch.equal(forms["both"][1], forms["npz"][0])


def test_a_whole_png_is_told_from_every_damage() -> None:
    content = png(torch.arange(4 * 4 * 3, dtype=torch.uint8).reshape(4, 4, 3))
    assert is_whole_png(content)
    for at in range(len(content)):
        assert not is_whole_png(content[:at])
        flipped = bytearray(content)
        flipped[at] ^= 4
        assert not is_whole_png(bytes(flipped)), at
    assert not is_whole_png(content + b"\0") and not is_whole_png(b"\0" * 100)

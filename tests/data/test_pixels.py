"""What the pixels of an image file mean, and how they come to a size."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from soflow_fast.data.dataset import Wanted
from soflow_fast.data.images import Unreadable
from soflow_fast.data.images.pixels import MOST_PIXELS, decode, examine

RED, GRAY, WHITE = (200, 30, 60), (90, 90, 90), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Something with edges, slopes and grain."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width] / max(width, height)
    waves = np.stack([np.sin(9 * rows + 4 * columns), np.cos(7 * columns), (rows > columns) * 1.0], -1)
    return Image.fromarray((128 + 90 * waves + rng.normal(0, 9, waves.shape)).clip(0, 255).astype(np.uint8))


def shown(content: bytes, size: int = 8, channels: int = 3, resize: bool = False) -> np.ndarray:
    """[H, W, C]."""
    pixels = decode(content, Wanted(size, channels, resize))
    assert pixels.shape == (channels, size, size) and pixels.dtype == np.uint8
    return pixels.transpose(1, 2, 0)


def flat(colour: Any, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (8, 8), colour)


def adm(image: Image.Image, size: int) -> np.ndarray:
    """The centre crop of Dhariwal and Nichol, as their paper's data was made."""
    width, height = image.size
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        image = image.resize((width, height), Image.Resampling.BOX)
    scale = size / min(width, height)
    pixels = np.array(image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("size", [8, 16, 31, 64])
@pytest.mark.parametrize("shape", [(8, 8), (64, 64), (37, 53), (53, 37), (200, 20), (21, 128), (129, 128), (5, 9)])
def test_other_sizes_are_cropped_as_adm_does(shape: tuple[int, int], size: int) -> None:
    image = photograph(*shape)
    assert np.array_equal(shown(encoded(image), size), adm(image, size))


@pytest.mark.parametrize("shape", [(37, 53), (200, 20), (5, 9), (16, 40)])
def test_or_both_sides_are_scaled(shape: tuple[int, int]) -> None:
    image = photograph(*shape)
    scaled = image.resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(shown(encoded(image), 16, resize=True), np.array(scaled))


@pytest.mark.parametrize("resize", [False, True])
@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_the_right_size_stays_as_it_is(kind: str, resize: bool) -> None:
    image = photograph(16, 16)
    assert np.array_equal(shown(encoded(image, kind), 16, resize=resize), np.array(image))


@pytest.mark.parametrize("shape", [(1, 30_000), (30_000, 2)])
def test_a_strip_needs_little_memory(shape: tuple[int, int]) -> None:
    assert (shown(encoded(Image.new("RGB", shape, RED)), 256) == RED).all()


@pytest.mark.parametrize("shape", [(3000, 20), (7, 1001), (1, 4000), (2001, 2)])
def test_a_strip_is_cropped_as_adm_does(shape: tuple[int, int]) -> None:
    image = photograph(*shape)
    assert np.abs(shown(encoded(image), 16).astype(int) - adm(image, 16)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photographs_are_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    content = encoded(photograph(24, 17), kind, exif=exif, **options)
    with Image.open(io.BytesIO(content)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    assert upright.size == ((24, 17) if orientation < 5 else (17, 24))
    assert np.array_equal(shown(content, 16), adm(upright, 16))


def test_what_a_camera_says_is_no_damage() -> None:
    content = encoded(flat(RED), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert (shown(content) == RED).all()


def with_transparency(content: bytes, value: bytes) -> bytes:
    """A PNG with a colour, or grays of a palette, that are transparent."""
    chunk = b"tRNS" + value
    at = content.index(b"IDAT") - 4
    return content[:at] + struct.pack(">I", len(value)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[at:]


def png(depth: int, colour: int, pixels: bytes, *, transparent: bytes = b"", palette: bytes = b"") -> bytes:
    """A PNG of 8 x 8 of any kind, from its rows of bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    width = len(pixels) // 8
    rows = b"".join(b"\0" + pixels[width * i : width * (i + 1)] for i in range(8))
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, depth, colour, 0, 0, 0)),
            chunk(b"PLTE", palette) if palette else b"",
            chunk(b"tRNS", transparent) if transparent else b"",
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        ]
    )


def sixteen(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values) * 64


def mixed(colour: tuple[int, ...], alpha: int) -> tuple[int, ...]:
    return tuple(round((c * alpha + 255 * (255 - alpha)) / 255) for c in colour)


def palette(colour: tuple[int, int, int]) -> Image.Image:
    image = Image.new("P", (8, 8), 3)
    image.putpalette([0] * 9 + list(colour))
    return image


# Files of one colour; the colour that they show, and whether some of it is transparent.
MEANINGS: dict[str, tuple[bytes, tuple[int, ...], bool]] = {
    "colours": (encoded(flat(RED)), RED, False),
    "gray": (encoded(flat(90, "L")), GRAY, False),
    "black and white": (encoded(flat(1, "1")), WHITE, False),
    "gray of 2 bits": (png(2, 0, b"\x55" * 16), (85, 85, 85), False),
    "gray of 4 bits": (png(4, 0, b"\x66" * 32), (102, 102, 102), False),
    "gray of 16 bits": (png(16, 0, sixteen(90 * 257)), GRAY, False),
    "dark gray of 16 bits": (png(16, 0, sixteen(200)), (1, 1, 1), False),
    "gray of 16 bits, TIFF": (encoded(Image.fromarray(np.full((8, 8), 90 * 257, np.uint16)), "TIFF"), GRAY, False),
    "integers to 65535": (encoded(flat(90 * 257, "I"), "TIFF"), GRAY, False),
    "integers to 255": (encoded(flat(90, "I"), "TIFF"), GRAY, False),
    "floats to 1": (encoded(flat(90 / 255, "F"), "TIFF"), GRAY, False),
    "floats to 255": (encoded(flat(90.0, "F"), "TIFF"), GRAY, False),
    "colours of 16 bits": (png(16, 2, sixteen(*(c * 257 for c in RED))), RED, False),
    "opaque": (encoded(flat((*RED, 255), "RGBA")), RED, False),
    "half transparent": (encoded(flat((*RED, 128), "RGBA")), mixed(RED, 128), True),
    "transparent": (encoded(flat((*RED, 0), "RGBA")), WHITE, True),
    "transparent, WebP": (encoded(flat((*RED, 0), "RGBA"), "WEBP", lossless=True), WHITE, True),
    "transparent, TIFF": (encoded(flat((*RED, 128), "RGBA"), "TIFF"), mixed(RED, 128), True),
    "transparent, 16 bits": (png(16, 6, sixteen(*(c * 257 for c in RED), 128 * 257)), mixed(RED, 128), True),
    "gray half transparent": (encoded(flat((90, 128), "LA")), mixed(GRAY, 128), True),
    "gray opaque": (encoded(flat((90, 255), "LA")), GRAY, False),
    "gray transparent, 16 bits": (png(16, 4, sixteen(90 * 257, 128 * 257)), mixed(GRAY, 128), True),
    "a palette": (encoded(palette(RED)), RED, False),
    "a palette, GIF": (encoded(palette(RED), "GIF"), RED, False),
    "a palette, BMP": (encoded(palette(RED), "BMP"), RED, False),
    "a palette with a transparent colour": (encoded(palette(RED), transparency=3), WHITE, True),
    "a palette with alphas": (with_transparency(encoded(palette(RED)), b"\xff\xff\xff\x80"), mixed(RED, 128), True),
    "a palette with another transparent colour": (encoded(palette(RED), transparency=1), RED, False),
    "a transparent GIF": (encoded(palette(RED), "GIF", transparency=3), WHITE, True),
    "a transparent colour": (png(8, 2, bytes(RED) * 64, transparent=struct.pack(">3H", *RED)), WHITE, True),
    "another transparent colour": (png(8, 2, bytes(RED) * 64, transparent=struct.pack(">3H", 1, 2, 3)), RED, False),
    "a transparent colour of 16 bits": (
        png(16, 2, sixteen(*(c * 257 for c in RED)), transparent=struct.pack(">3H", *(c * 257 for c in RED))),
        WHITE,
        True,
    ),
    "a transparent colour of 16 bits, beside it": (
        png(16, 2, sixteen(*(c * 257 for c in RED)), transparent=struct.pack(">3H", *(c * 257 + 1 for c in RED))),
        RED,
        False,
    ),
    "a transparent gray": (png(8, 0, b"\x5a" * 64, transparent=b"\0\x5a"), WHITE, True),
    "a transparent gray of 4 bits": (png(4, 0, b"\x66" * 32, transparent=b"\0\x06"), WHITE, True),
    "a transparent gray of 2 bits": (png(2, 0, b"\x55" * 16, transparent=b"\0\x01"), WHITE, True),
    "a transparent black": (png(1, 0, b"\0" * 8, transparent=b"\0\0"), WHITE, True),
    "a transparent gray of 16 bits": (png(16, 0, sixteen(23130), transparent=struct.pack(">H", 23130)), WHITE, True),
    "CMYK, TIFF": (encoded(flat((0, 255, 255, 0), "CMYK"), "TIFF"), (255, 0, 0), False),
}  # fmt: skip


@pytest.mark.parametrize("case", MEANINGS)
def test_colours_are_those_that_people_see(case: str) -> None:
    content, colour, transparent = MEANINGS[case]
    assert np.abs(shown(content).astype(int) - colour).max() <= 1, shown(content)[0, 0]
    gray = shown(content, channels=1).astype(int)
    assert np.abs(gray - np.dot(colour, (0.299, 0.587, 0.114))).max() <= 1.5
    assert examine(content) == (transparent, False)


def test_gray_from_white_to_black() -> None:
    """As TIFF may have it: Pillow turns 8 bits when it writes them, and 16 bits never."""
    for kind, value, meant in ((np.uint8, 90, 90), (np.uint16, 90 * 257, 255 - 90)):
        content = encoded(Image.fromarray(np.full((8, 8), value, kind)), "TIFF", tiffinfo={262: 0})
        assert (shown(content) == meant).all()


@pytest.mark.parametrize("value", [-1.0, 70_000.0, float("nan"), float("inf")])
def test_numbers_that_are_no_grays(value: float) -> None:
    image = flat(0.5, "F")
    image.putpixel((3, 3), value)
    with pytest.raises(Unreadable, match="which are no levels of gray"):
        decode(encoded(image, "TIFF"), Wanted(8, 3))


def test_cmyk_as_photoshop_writes_it() -> None:
    """Inverted; Pillow writes it so, too."""
    red = shown(encoded(flat((0, 255, 255, 0), "CMYK"), "JPEG", quality=100))
    assert np.abs(red.astype(int) - (255, 0, 0)).max() <= 3
    black = shown(encoded(flat((0, 0, 0, 255), "CMYK"), "JPEG", quality=100))
    assert black.max() <= 3


def profile(gamma: float, primaries: list[tuple[float, float, float]]) -> bytes:
    """A profile of three primaries (XYZ at D50) and a gamma, version 2."""

    def number(x: float) -> bytes:
        return struct.pack(">i", round(x * 65536))

    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + bytes(78), b"cprt": b"text\0\0\0\0none\0"}
    tags[b"wtpt"] = b"XYZ \0\0\0\0" + number(0.9642) + number(1) + number(0.8249)
    for name, xyz in zip(b"rgb", primaries, strict=True):
        tags[bytes([name]) + b"XYZ"] = b"XYZ \0\0\0\0" + b"".join(map(number, xyz))
        tags[bytes([name]) + b"TRC"] = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    table, body = b"", b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(content))
        body += content
    header = struct.pack(">I4sI4s4s4s12s4s", 0, b"none", 0x02400000, b"mntr", b"RGB ", b"XYZ ", bytes(12), b"acsp")
    header += bytes(28) + number(0.9642) + number(1) + number(0.8249)
    header += bytes(128 - len(header))
    whole = header + struct.pack(">I", len(tags)) + table + body
    return struct.pack(">I", len(whole)) + whole[4:]


ADOBE = profile(2.19921875, [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA"])
def test_colours_of_a_wide_gamut(kind: str, mode: str) -> None:
    """A middle green of Adobe RGB (1998) is further from gray in sRGB: (100, 150, 100) is (66, 151, 97), by hand."""
    if (kind, mode) in (("JPEG", "P"), ("JPEG", "RGBA"), ("WEBP", "P")):
        pytest.skip("there is no such file")
    image = palette((100, 150, 100)) if mode == "P" else flat((100, 150, 100, 255)[: len(mode)], mode)
    options = {"quality": 100} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    content = encoded(image, kind, icc_profile=ADOBE, **options)
    assert np.abs(shown(content).astype(int) - (66, 151, 97)).max() <= 3, shown(content)[0, 0]


def test_colours_of_srgb_are_left_alone_and_so_are_those_of_a_damaged_profile() -> None:
    image = photograph(16, 16)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for known in (srgb, b"junk", ADOBE[:200], ADOBE.replace(b"RGB XYZ ", b"CMYKXYZ ")):
        assert np.array_equal(shown(encoded(image, icc_profile=known), 16), np.array(image))


SRGB = [(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141)]


def test_a_profile_is_judged_by_what_it_does() -> None:
    """Linear light is converted, though its description says sRGB; sRGB itself is left alone, whatever it is called."""
    linear = profile(1.0, SRGB).replace(b"wide\0", b"sRGB\0")
    light = (np.array(RED) / 255) ** (1 / 2.4) * 1.055 - 0.055
    assert np.abs(shown(encoded(flat(RED), icc_profile=linear)) - 255 * light).max() <= 2
    image = photograph(16, 16)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    renamed = srgb.replace("sRGB".encode("utf-16-be"), "wide".encode("utf-16-be"))
    assert renamed != srgb and np.array_equal(shown(encoded(image, icc_profile=renamed), 16), np.array(image))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [flat(colour) for colour in (RED, GRAY, WHITE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (shown(content) == RED).all()
    assert examine(content) == (False, True)
    assert examine(encoded(frames[0], kind, **options)) == (False, False)


def test_the_preview_in_a_photograph_is_no_animation() -> None:
    content = encoded(flat(RED), "MPO", save_all=True, append_images=[flat(GRAY)], quality=100)
    assert np.abs(shown(content).astype(int) - RED).max() <= 3 and examine(content) == (False, False)


@pytest.mark.parametrize("shape", [(2**13 + 1, 2**13), (2**14, 2**14), (60_000, 60_000)])
def test_more_pixels_than_are_read(shape: tuple[int, int]) -> None:
    content = bytearray(encoded(flat(1, "1")))
    content[16:24] = struct.pack(">II", *shape)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    with pytest.raises(Unreadable, match=rf"has .* pixels, and at most {MOST_PIXELS} are read") as error:
        decode(bytes(content), Wanted(8, 3))
    assert str(shape[0] * shape[1]) in str(error.value) or f"{shape[0]} x {shape[1]}" in str(error.value)

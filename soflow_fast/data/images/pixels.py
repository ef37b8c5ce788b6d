"""From an image file's bytes to pixels of a size: uint8, in the colours that people see."""

import functools
import io
import os
import re
from typing import Any

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from ...errors import printable
from ..dataset import Unreadable, Wanted

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF")
"""The formats that are read, whatever a file is called: for some others Pillow starts a program (EPS)."""
MOST_PIXELS = 2**26
"""Of an image as it is stored, 8192 x 8192: Pillow needs 4 bytes for each."""
LONGEST = 64
"""How many times as long as wide an image may be to be scaled as a whole before it is cropped."""
LIKE_SRGB = 2
"""Levels by which the colours of a profile may differ from sRGB to be left as they are."""
EXIF = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What sets an image upright, by its orientation in EXIF."""
GRAYS = {"L;2": 85, "L;4": 17, "1": 255}
"""By how much Pillow multiplies grays of fewer bits than 8, though not the one that is transparent."""
HIGH, LOW = "RGB;16B", "RGB;16L"
"""How Pillow is told to take the higher or the lower byte of colours of 16 bits in a PNG."""
COLOUR_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}


def reason(error: Exception) -> str:
    """What is wrong with a file, after its name: decoders raise many kinds of errors, which mean that it is damaged."""
    if isinstance(error, Unreadable):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read ({os.strerror(error.errno)})"
    kind, text = type(error).__name__, printable(" ".join(str(error).split()))
    named = isinstance(error, UnidentifiedImageError) or not text
    return f"is no readable image ({kind})" if named else f"is no readable image ({kind}: {text[:200]})"


def decode(content: bytes, wanted: Wanted) -> np.ndarray:
    """The pixels of an image file, uint8 [C, size, size]. Raises what decoders raise, or Unreadable."""
    return _array(_fitted(_picture(content, wanted.channels), wanted))


def decode_unscaled(content: bytes, channels: int) -> np.ndarray:
    """The pixels of an image file as large as it is, uint8 [C, H, W]. Raises as `decode` does."""
    return _array(_picture(content, channels))


def _picture(content: bytes, channels: int) -> Image.Image:
    image, _ = _colours(_opened(content))
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _array(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def examine(content: bytes) -> tuple[bool, bool]:
    """Decode all that `decode` needs; whether some of the image is transparent, and whether it has more frames."""
    opened = _opened(content)
    _, transparent = _colours(opened)
    frames = opened.format in ("GIF", "PNG", "WEBP", "TIFF")  # the other one of a JPEG is a preview
    return transparent, frames and bool(getattr(opened, "is_animated", False))


def _opened(content: bytes) -> Image.Image:
    """Raises Unreadable, before anything is unpacked, for more pixels than are read."""
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        count = re.search(r"\d+(?= pixels)", str(error))
        raise _too_large(count[0] if count else "far more") from None
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise _too_large(f"{width} x {height}")
    return image


def _too_large(pixels: str) -> Unreadable:
    return Unreadable(f"has {pixels} pixels, and at most {MOST_PIXELS} are read")


def _colours(opened: Image.Image) -> tuple[Image.Image, bool]:
    """The first frame upright, in mode L or RGB and sRGB, over white; and whether some of it was transparent."""
    tile = getattr(opened, "tile", None)
    stored = tile[0][3] if tile else ""
    clear = opened.info.get("transparency")
    low = _low_bytes(opened) if isinstance(clear, tuple) and stored == HIGH else None
    opened.load()
    info, image = opened.info, opened
    profile, clear = info.get("icc_profile"), info.get("transparency")
    alpha: Image.Image | None = None
    if image.mode[0] in "IF":
        image, alpha = _levels(image, clear)
    elif low is not None:
        clears = np.array(clear)
        same = (np.asarray(image) == clears >> 8) & (low == clears & 255)
        alpha = Image.fromarray(np.where(same.all(2), 0, 255).astype(np.uint8))
    else:
        if isinstance(clear, int) and isinstance(stored, str) and image.mode in ("1", "L"):
            info["transparency"] = clear * GRAYS.get(stored, 1)
        if image.mode == "1":
            image = image.convert("L")
        if image.has_transparency_data:
            # Premultiplied colours are divided first.
            image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode))
            image = image.convert("LA" if image.mode in ("L", "LA") else "RGBA")
            image, alpha = image.convert(image.mode[:-1]), image.getchannel("A")
    if image.mode not in COLOUR_SPACES:
        image = image.convert("RGB")
    transform = _to_srgb(profile, image.mode) if isinstance(profile, bytes) and profile else None
    if transform is not None:
        image = ImageCms.applyTransform(image, transform)
        assert image is not None
    if image.mode == "CMYK":
        image = image.convert("RGB")
    transparent = alpha is not None and alpha.getextrema() != (255, 255)
    if transparent:
        over = Image.new(image.mode, image.size, "white")
        over.paste(image, mask=alpha)
        image = over
    return _upright(image, opened), transparent


def _low_bytes(opened: Image.Image) -> np.ndarray:
    """The lower bytes of colours of 16 bits, uint8 [H, W, 3]: Pillow drops them."""
    again: Any = _opened(opened.fp.getvalue())  # type: ignore[attr-defined]
    again.tile = [(*tile[:3], LOW) for tile in again.tile]
    again.info.pop("transparency")
    return np.array(again)


def _levels(image: Image.Image, clear: Any) -> tuple[Image.Image, Image.Image | None]:
    """Gray of more bits or of numbers, in 8 bits, and what of it is opaque.

    Integers of 32 bits and floats do not say what is white: it is the least of 1 (floats), 255 and 65535 that none of
    them exceeds.
    """
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16") or image.format == "PNG":
        white = 4095 if tags.get(258) in (12, (12,)) else 65535
    else:
        low, high = float(values.min()), float(values.max())
        whites = [white for white in ((1, 255, 65535) if image.mode == "F" else (255, 65535)) if high <= white]
        if not low >= 0 or not whites:  # not a number is neither
            raise Unreadable(f"holds numbers from {low:g} to {high:g}, which are no levels of gray")
        white = whites[0]
    if image.mode == "F":
        levels = np.rint(values * np.float32(255 / white))
    else:
        levels = (values.astype(np.uint32) * 255 + white // 2) // white
    if image.mode.startswith("I;16") and tags.get(262) == 0:  # TIFF's gray from white to black
        levels = 255 - levels
    opaque = Image.fromarray((values != clear).astype(np.uint8) * 255) if isinstance(clear, int) else None
    return Image.fromarray(levels.astype(np.uint8)), opaque


@functools.lru_cache(maxsize=32)
def _to_srgb(profile: bytes, mode: str) -> Any:
    """The transform from a profile's colours to sRGB; None, if it is sRGB, of other colours or damaged."""
    try:
        known: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if known.profile.xcolor_space.strip() != COLOUR_SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(known, ImageCms.createProfile("sRGB"), mode, "RGB")
        return None if mode != "CMYK" and _changes_little(transform, mode) else transform
    except Exception:  # viewers show such an image without it
        return None


def _changes_little(transform: Any, mode: str) -> bool:
    """Whether it leaves colours all over a cube, or grays, about as they are."""
    levels = np.linspace(0, 255, 9 if mode == "RGB" else 256).astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 9, 3) if mode == "RGB" else levels[None]
    before = Image.fromarray(cube)
    after: Any = ImageCms.applyTransform(before, transform)
    difference = np.asarray(after, np.int64) - np.asarray(before.convert("RGB"), np.int64)
    return bool(np.abs(difference).max() <= LIKE_SRGB)


def _upright(image: Image.Image, opened: Image.Image) -> Image.Image:
    if not EXIF & opened.info.keys():
        return image
    try:
        method = UPRIGHT.get(opened.getexif().get(ORIENTATION, 1))
    except Exception:  # a photograph is not damaged because what a camera says of it is
        return image
    return image if method is None else image.transpose(method)


def _fitted(image: Image.Image, wanted: Wanted) -> Image.Image:
    """Scaled to the wanted size: both sides; or, as ADM does, halved while that leaves enough, scaled by its short
    side, and the centre of it."""
    size = wanted.size
    if image.size == (size, size):
        return image
    if wanted.resize:
        return image.resize((size, size), Image.Resampling.BICUBIC)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if max(image.size) > LONGEST * min(image.size):  # the centre alone, a level off at most, as the box has 32 bits
        left, top = (width - size) // 2, (height - size) // 2
        x, y, high = image.width / width, image.height / height, image.height
        image = image.resize((size, high), Image.Resampling.BICUBIC, (left * x, 0, (left + size) * x, high))
        return image.resize((size, size), Image.Resampling.BICUBIC, (0, top * y, size, (top + size) * y))
    if image.width > image.height:  # Pillow scales along the rows first, and of the rest only the centre is needed
        image = _centre(image.resize((width, image.height), Image.Resampling.BICUBIC), size, image.height)
        width = size
    return _centre(image.resize((width, height), Image.Resampling.BICUBIC), size, size)


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))

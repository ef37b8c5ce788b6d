"""Images in a page: small ones as they are, large ones made smaller, each as a data URI."""

import base64
import io
from pathlib import Path

from torch import Tensor

from ...files import read_file

MOST_FILE = 2**26
"""Bytes that an image may have."""
AS_IT_IS = 2**19
"""Bytes up to which it goes into a page as it is."""
WIDEST = 1400
CELL = 160
"""Pixels of the side of a larger grid, and of a single image, in a page."""
PNG = b"\x89PNG\r\n\x1a\n"


def shown(path: Path) -> str | None:
    """A PNG file as a data URI; None: it cannot be read as one."""
    from PIL import Image

    try:
        content = read_file(path, MOST_FILE)
        if not content.startswith(PNG):
            return None
        with Image.open(io.BytesIO(content)) as image:
            if len(content) <= AS_IT_IS:
                image.verify()
                return uri(content, "png")
            image.thumbnail((WIDEST, WIDEST))
            return uri(_jpeg(image), "jpeg")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, MemoryError):  # as PIL says it
        return None


def cell(pixels: Tensor) -> str:
    """A uint8 image [H, W, C] as a data URI."""
    from PIL import Image

    array = pixels.numpy()
    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    if max(image.size) > CELL // 2:
        image.thumbnail((CELL, CELL))
        return uri(_jpeg(image), "jpeg")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return uri(buffer.getvalue(), "png")


def uri(content: bytes, kind: str) -> str:
    """Bytes of an image as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _jpeg(image: object) -> bytes:
    from PIL import Image

    assert isinstance(image, Image.Image)
    buffer = io.BytesIO()
    (image if image.mode == "L" else image.convert("RGB")).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()

"""All images in one file, in the layout of ADM's samples: arr_0, uint8 [n, H, W, C], and arr_1, int64 [n], labels."""

import math
import os
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from torch import Tensor

from ...files import sync


def write_npz(path: Path, parts: Iterable[np.ndarray], shape: tuple[int, ...], labels: Tensor | None) -> None:
    """Write a file that `numpy.load` reads, part by part, so that not all lie in memory. Raises OSError.

    parts: uint8 [k, H, W, C], of n images in all. shape: (n, H, W, C). labels: int64 [n]; None: there are none.
    The file has its name when it is whole and on the disk.
    """
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            with _array(archive, "arr_0", shape, "|u1") as file:
                count = sum(_write(file, part) for part in parts)
            assert count == shape[0]
            if labels is not None:
                with _array(archive, "arr_1", (len(labels),), "<i8") as file:
                    _write(file, labels.numpy().astype("<i8"))
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_first(path: Path, count: int) -> np.ndarray:
    """The first images of a file that `write_npz` has written, uint8 [count, H, W, C], without the rest in memory."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        np.lib.format.read_magic(file)
        (_, *shape), _, dtype = np.lib.format.read_array_header_1_0(file)
        return np.frombuffer(bytearray(file.read(count * math.prod(shape))), dtype).reshape(count, *shape)


@contextmanager
def _array(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: str) -> Iterator[IO[bytes]]:
    """A member of an archive for the content of an array. Its time is always the same, so that the bytes are."""
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
        header = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]
        yield file


def _write(file: IO[bytes], values: np.ndarray) -> int:
    file.write(np.ascontiguousarray(values).data)
    return len(values)

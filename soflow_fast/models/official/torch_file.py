"""What is in a file of torch.save, read without running any of it, its tensors left on the disk until they are used.

Such a file is a zip archive: a pickle, and beside it the bytes of each storage, stored as they are. The pickle is
described and not run (`data.latent_formats.pickled`); of the description plain values are taken, tensors are views of
the mapped file, objects of unknown classes stay unmade, and whatever else would be called is an error that names it.
Files from before torch 1.6 are no archives; torch reads them, weights only.
"""

import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...data.latent_formats.pickled import Call, Name, Stored, array, described
from ...errors import CheckpointError

MOST_INSTRUCTIONS = 10**7
MOST_BYTES = 2**28
"""Of the pickle: the names and shapes of the largest models take a thousandth of it."""
LOCAL_HEADER = 30
"""Bytes before the name of a file in an archive; its last four are the lengths of the name and of what follows it."""

STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
TENSORS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")
PARAMETERS = ("_rebuild_parameter", "_rebuild_parameter_with_state")
PATHS = {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path", "PurePath"}


class Unmade(NamedTuple):
    """An object that was not made, by the name of its class."""

    name: str


def read(where: str) -> Mapping[str, Any]:
    """The content of a file of torch.save that holds a dict; tensors are views of the file, mapped for reading.

    numpy's numbers and arrays are those, a Namespace is a dict, a Path is one, an object of an unknown class is
    `Unmade`. Raises CheckpointError for another file, and for a pickle that calls anything else, which is named.
    """
    try:
        with open(where, "rb") as file:
            is_archive = zipfile.is_zipfile(file)
        if is_archive:
            content = _Archive(where).content()
        else:
            content = _of_older_torch(where)
    except OSError as error:
        raise CheckpointError(f"{where}: {error.strerror or error}") from None
    except Exception as error:  # torch, zipfile and damaged content raise many kinds; all mean that it is no such file
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{where}: not a checkpoint of plain weights ({reason})") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{where}: holds a {type(content).__name__}, not weights")
    return content


def _of_older_torch(where: str) -> Any:
    try:
        return torch.load(where, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # whose texts advise to run what is in the file
        raise ValueError("it is no archive of torch.save, nor plain weights of a torch before 1.6") from None


class _Archive:
    """One file. Every method raises ValueError for what is not as torch writes it."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.made: dict[int, Any] = {}
        """What a part of the description came to, by its identity: what is used a thousand times is made once."""
        self.storages: dict[str, Tensor] = {}
        with zipfile.ZipFile(where) as archive:
            self.files = {info.filename: info for info in archive.infolist()}
            # Torch never compresses; a file that unpacks to more than its size could fill the memory.
            if any(info.file_size != info.compress_size for info in self.files.values()):
                raise ValueError("its parts are compressed")
            pickles = [name for name in self.files if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError("it holds no data.pkl")
            self.folder = pickles[0].removesuffix("data.pkl")
            if self.files[pickles[0]].file_size > MOST_BYTES:
                raise ValueError("its data.pkl is longer than that of any model")
            self.pickle = archive.read(pickles[0])
            order = self.folder + "byteorder"
            if order in self.files and archive.read(order) != b"little":
                raise ValueError("its numbers are big-endian")
        # A private mapping: who writes to it writes to memory of his own.
        self.bytes = torch.from_file(where, shared=False, size=os.path.getsize(where), dtype=torch.uint8)

    def content(self) -> Any:
        whole = described(self.pickle, MOST_INSTRUCTIONS)  # which lives as long as its parts are known by identity
        return self.value(whole)

    def value(self, part: Any) -> Any:
        """The value that a part of the description stands for."""
        if isinstance(part, Name):
            return Unmade(f"{part.module}.{part.name}")
        if isinstance(part, dict | list | tuple | Call) and not isinstance(part, Stored):
            if id(part) not in self.made:
                self.made[id(part)] = self.value_of(part)
            return self.made[id(part)]
        return part

    def value_of(self, part: dict[Any, Any] | list[Any] | tuple[Any, ...] | Call) -> Any:
        if isinstance(part, dict):
            return {self.value(key): self.value(value) for key, value in part.items()}
        if isinstance(part, list):
            return [self.value(each) for each in part]
        if isinstance(part, tuple):
            return tuple(map(self.value, part))
        function, arguments = part.function, part.arguments
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise ValueError("it calls what is no name")
        module, name = function
        if module == "torch._utils" and name in TENSORS:
            return self.tensor(*arguments[:4], dtype=arguments[6] if name == TENSORS[2] else None)
        if module == "torch._utils" and name in PARAMETERS:
            return self.value(arguments[0])
        if (module, name) in (("argparse", "Namespace"), ("types", "SimpleNamespace")):
            return self.value(part.state or {})
        if module.partition(".")[0] == "pathlib" and name in PATHS:
            return PurePosixPath(*map(str, arguments))
        if (module, name) in (("torch", "Size"), ("torch", "device")):
            return self.value(arguments[0]) if name == "Size" else str(arguments[0])
        if module.partition(".")[0] == "numpy" and name in ("_reconstruct", "_frombuffer", "scalar"):
            return self.numbers(part)
        if part.of_class:
            return Unmade(f"{module}.{name}")
        raise ValueError(f"it asks to call {module}.{name}")

    def numbers(self, part: Call) -> Any:
        """numpy's array, or its number as one of Python's."""
        try:
            found = array(part)
        except ValueError:
            return Unmade("numpy.ndarray")
        return found if found.shape else found.item()

    def tensor(self, stored: Any, offset: Any, shape: Any, strides: Any, *, dtype: Any = None) -> Tensor:
        """A tensor of a shape and strides, in elements, that begins at an offset into its storage."""
        kind, key, elements = self.stored(stored)
        if dtype is not None:
            kind = getattr(torch, dtype.name, None) if isinstance(dtype, Name) and dtype.module == "torch" else None
        if not isinstance(kind, torch.dtype):
            raise ValueError("it holds a tensor of a kind that is not known here")
        numbers = (offset, *shape, *strides)
        if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("it holds a tensor of no sensible shape")
        values = self.storage(key).view(kind)
        if dtype is None and len(values) < elements:
            raise ValueError(f"its storage {key} is cut short")
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if 0 not in shape and last >= len(values):
            raise ValueError(f"a tensor reaches beyond its storage {key}")
        if math.prod(shape) > len(values):
            raise ValueError("a tensor is larger than what is stored of it")
        return values.as_strided(shape, strides, values.storage_offset() + offset)

    def stored(self, stored: Any) -> tuple[Any, str, int]:
        """The dtype, name and elements of a storage."""
        tag, kind, key, _, elements = stored.key
        if tag != "storage" or not isinstance(kind, Name) or type(elements) is not int:
            raise ValueError("it refers to what is no storage")
        return STORAGES.get(kind.name), str(key), elements

    def storage(self, key: str) -> Tensor:
        """The bytes of a storage in the mapped file, uint8 [bytes]."""
        if key not in self.storages:
            info = self.files.get(f"{self.folder}data/{key}")
            if info is None:
                raise ValueError(f"its storage {key} is missing")
            header = bytes(self.bytes[info.header_offset : info.header_offset + LOCAL_HEADER].tolist())
            lengths = int.from_bytes(header[-4:-2], "little") + int.from_bytes(header[-2:], "little")
            start = info.header_offset + LOCAL_HEADER + lengths
            part = self.bytes[start : start + info.file_size]
            if len(part) != info.file_size:
                raise ValueError(f"its storage {key} is cut short")
            self.storages[key] = part if start % 16 == 0 else part.clone()  # a view of wider numbers must be aligned
        return self.storages[key]

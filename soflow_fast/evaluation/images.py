"""Sets of images to be measured: a folder, an .npz in the layout of ADM, or a data set that a run could learn from."""

import abc
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.dataset import Dataset, Wanted
from ..data.formats import image_formats, open_dataset
from ..data.images.folder import Folder
from ..data.images.pixels import decode, decode_unscaled, reason
from ..data.images.quiet import quiet
from ..errors import DataError, printable
from ..launch import processors
from .gaussian import Gaussian

BATCH = 64
MOST_THREADS = 8
"""That decode the images of a folder."""
GRID = "grid.png"
"""What `sample` leaves beside its images, and no image of its own."""
STATISTICS = {"mu": "sigma", "mu_s": "sigma_s"}
"""The members of an ADM reference with means, and with their covariances; _s: of spatial features."""
ARRAY = "arr_0"
SKEW = 1e-4
"""Of the largest entry of a covariance: how far it may be from symmetric. Sums in float32 are symmetric to 1e-6."""


class Images(abc.ABC):
    """A set of images that is read once through. `flag` and `path` are what errors begin with."""

    def __init__(self, path: str, flag: str) -> None:
        self.path, self.flag = path, flag

    statistics: dict[str, Gaussian] = {}  # noqa: RUF012  # of most there are none
    """By the name of their mean, what is known of the features of Inception without the images."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many; 0: the statistics are all."""

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Height and width."""

    @abc.abstractmethod
    def batches(self) -> Iterator[Tensor]:
        """uint8 [n, 3, H, W], in order. Raises DataError for what cannot be read."""

    def _error(self, text: str) -> DataError:
        return DataError(f"{self.flag}{self.path}: {text}")


def is_npz(path: str) -> bool:
    """Whether it is a file called .npz, damaged or not, or one that holds images or statistics of them."""
    place = Path(path)
    try:
        if place.suffix.lower() == ".npz" and place.is_file():
            return True
        if not place.is_file() or not zipfile.is_zipfile(place):
            return False
        with zipfile.ZipFile(place) as archive:
            return bool({f"{name}.npy" for name in (ARRAY, *STATISTICS)} & set(archive.namelist()))
    except (OSError, zipfile.BadZipFile):
        return False


def open_images(path: str, *, flag: str = "", size: int = 0, say: Callable[[str], None] = lambda text: None) -> Images:
    """The images at a path.

    size: that of the images which they are compared with: larger ones are scaled and cropped as a run's data are.
    0: all must be of one size. flag: "--reference ", in errors. say: is told how the check of a data set goes on.

    Raises DataError if there are none, or for what is wrong with them.
    """
    place = Path(path)
    if is_npz(path):
        return Npz(path, flag)
    try:
        if not place.exists():
            raise DataError(f"{flag}{path}: no such file or folder")
        if place.is_dir() and (not size or not _is_known(place)):
            return ImageFolder(path, flag, size)
    except OSError as error:
        raise DataError(f"{flag}{path}: cannot be read ({error.strerror})") from None
    if not size:
        raise DataError(f"{flag}{path}: is neither a folder of images nor an .npz with {ARRAY} or mu and sigma")
    try:
        return OfDataset(path, flag, open_dataset(path, "images", Wanted(size, 3, say=say)))
    except DataError as error:
        raise DataError(str(error).replace(f"--data {path}", f"{flag}{path}", 1)) from None


def _is_known(place: Path) -> bool:
    """Whether a folder is a data set of another kind than one of images."""
    return any(format.recognises(place) for format in image_formats()[:-1])


class ImageFolder(Images):
    """All images in a folder and in those below it, in the order of their names."""

    def __init__(self, path: str, flag: str, size: int) -> None:
        super().__init__(path, flag)
        self._files, self._fitted = Folder(Path(path)), size
        names = self._files.names
        self._numbers = [i for i in range(len(names)) if names[i] != GRID]
        if not self._numbers:
            raise self._error("holds no images")
        self._size = size or self._decoded(self._numbers[0]).shape[1]

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def size(self) -> int:
        return self._size

    @quiet
    def _decoded(self, number: int) -> np.ndarray:
        try:
            content = self._files.read(number)
            return decode(content, Wanted(self._fitted, 3)) if self._fitted else decode_unscaled(content, 3)
        except Exception as error:  # decoders raise many kinds
            raise self._error(f"{printable(self._files.names[number])} {reason(error)}") from None

    def _together(self, numbers: list[int]) -> Tensor:
        found = []
        for number in numbers:
            pixels = self._decoded(number)
            _, height, width = pixels.shape
            if (height, width) != (self._size, self._size):
                name, wanted = printable(self._files.names[number]), f"{self._size} x {self._size}"
                raise self._error(f"{name} is {width} x {height} pixels; all must be {wanted}")
            found.append(pixels)
        return torch.from_numpy(np.stack(found))

    def batches(self) -> Iterator[Tensor]:
        parts = (self._numbers[i : i + BATCH] for i in range(0, len(self._numbers), BATCH))
        threads = min(MOST_THREADS, processors())
        with ThreadPoolExecutor(threads, "decode") as pool:
            begun: deque[Future[Tensor]] = deque()
            for part in parts:
                begun.append(pool.submit(self._together, part))
                if len(begun) == 2 * threads:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()


class OfDataset(Images):
    """The samples of a data set, in its order."""

    def __init__(self, path: str, flag: str, dataset: Dataset) -> None:
        super().__init__(path, flag)
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def size(self) -> int:
        return self._dataset.shape[1]

    def batches(self) -> Iterator[Tensor]:
        for index in torch.arange(len(self)).split(BATCH):
            yield self._dataset.read(index)


class Npz(Images):
    """An .npz as ADM's evaluator takes it: images arr_0, uint8 [N, H, W, 3], statistics of Inception's features, or
    both. The images are read as they come: 50 000 of 256 x 256 pixels are 10 GB."""

    def __init__(self, path: str, flag: str) -> None:
        super().__init__(path, flag)
        self._shape = (0, 0, 0, 3)
        try:
            with zipfile.ZipFile(path) as archive:
                names = set(archive.namelist())
                if f"{ARRAY}.npy" in names:
                    with archive.open(f"{ARRAY}.npy") as file:
                        self._shape = self._images_shape(archive, file)
                pairs = [pair for pair in STATISTICS.items() if {f"{name}.npy" for name in pair} <= names]
                self.statistics = {mean: self._gaussian(archive, mean, other) for mean, other in pairs}
        except zipfile.BadZipFile as error:
            raise self._error(f"is a damaged .npz, or none: cannot be read ({_brief(error)})") from None
        except (OSError, ValueError, KeyError, EOFError, zlib.error, RuntimeError, NotImplementedError) as error:
            raise self._error(f"cannot be read ({_brief(error)})") from None
        if not len(self) and not self.statistics:
            raise self._error(f"holds no images {ARRAY}, and neither mu and sigma")

    def _images_shape(self, archive: zipfile.ZipFile, file: Any) -> tuple[int, int, int, int]:
        shape, fortran, dtype = _header(archive, ARRAY, file)
        square = len(shape) == 4 and shape[1] == shape[2] > 0 and shape[3] in (1, 3)
        if dtype != np.uint8 or fortran or not square:
            raise ValueError(f"{ARRAY} must be uint8 [N, H, H, 3], got {dtype} {list(shape)}")
        n, height, width, channels = shape
        return n, height, width, channels

    def _gaussian(self, archive: zipfile.ZipFile, mean: str, covariance: str) -> Gaussian:
        found = []
        for name in (mean, covariance):
            with archive.open(f"{name}.npy") as file:
                _, _, dtype = _header(archive, name, file)
            if dtype.kind != "f":
                raise ValueError(f"{name} must be of floats, got {dtype}")
            with archive.open(f"{name}.npy") as file:
                found.append(np.lib.format.read_array(file, allow_pickle=False).astype(np.float64))
            if not np.isfinite(found[-1]).all():
                raise ValueError(f"{name} is not finite")
        mu, sigma = found
        if mu.ndim != 1 or sigma.shape != 2 * mu.shape:
            raise ValueError(f"{mean} and {covariance} are no mean and covariance")
        if np.abs(sigma - sigma.T).max(initial=0) > SKEW * np.abs(sigma).max(initial=0):
            raise ValueError(f"{covariance} is not symmetric, and no covariance")
        return Gaussian(mu, sigma)

    def __len__(self) -> int:
        return self._shape[0]

    @property
    def size(self) -> int:
        return self._shape[1]

    def batches(self) -> Iterator[Tensor]:
        n, *image = self._shape
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{ARRAY}.npy") as file:
                self._images_shape(archive, file)
                for first in range(0, n, BATCH):
                    count = min(BATCH, n - first)
                    content = file.read(count * int(np.prod(image)))
                    found = np.frombuffer(bytearray(content), np.uint8).reshape(count, *image)
                    yield torch.from_numpy(found).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise self._error(f"cannot be read ({_brief(error)})") from None


def _header(archive: zipfile.ZipFile, name: str, file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """The shape, Fortran's order and type of an array, from the beginning of its member, which is left after them.

    Raises ValueError for what is no header, and for a shape that is not that of what follows: an array is made, and
    images are counted, by the shape that it claims.
    """
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"{name} is of format {version}")
    shape, fortran, dtype = read(file)
    held = archive.getinfo(f"{name}.npy").file_size - file.tell()
    if not dtype.hasobject and (min(shape, default=0) < 0 or prod(shape) * dtype.itemsize != held):
        raise ValueError(f"{name} is said to be {dtype} {list(shape)}, which its {held} bytes are not")
    return shape, fortran, dtype


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:160]

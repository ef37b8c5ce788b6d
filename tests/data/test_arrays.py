"""Data sets that are arrays: CIFAR in its forms and archives, MNIST's files, and what is made of their pixels."""

import gzip
import io
import os
import pickle
import struct
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from soflow_fast.data import cifar, mnist
from soflow_fast.data._arrays import fit
from soflow_fast.data._pickled import read_pickle
from soflow_fast.data.dataset import Dataset, Wanted
from soflow_fast.errors import DataError

COLOUR = Wanted(size=32, channels=3)
GRAY = Wanted(size=28, channels=1)


def pixels(n: int, seed: int) -> np.ndarray:
    """uint8 [n, 3072] of CIFAR's planes."""
    return np.random.default_rng(seed).integers(0, 256, (n, 3072), np.uint8)


def text2(text: bytes) -> bytes:
    return b"U" + bytes([len(text)]) + text


def pickle2(found: dict[bytes, Any]) -> bytes:
    """As Python 2 and the numpy of its time pickle a batch, in protocol 2: strings without a kind, arrays rebuilt."""
    out = b"\x80\x02}q\x01("
    for number, (key, value) in enumerate(found.items()):
        out += text2(key) + b"q" + bytes([2 + number])
        if isinstance(value, np.ndarray):
            n, length = value.shape
            out += (
                b"cnumpy.core.multiarray\n_reconstruct\nq\x20cnumpy\nndarray\nq\x21K\x00\x85" + text2(b"b") + b"\x87R"
            )
            out += b"(K\x01" + b"\x8a\x04" + struct.pack("<i", n) + b"M" + struct.pack("<H", length) + b"\x86"
            out += b"cnumpy\ndtype\nq\x22" + text2(b"u1") + b"K\x00K\x01\x87Rq\x23"
            out += b"(K\x03" + text2(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
            out += b"T" + struct.pack("<i", value.nbytes) + value.tobytes() + b"tb"
        elif isinstance(value, list):
            items = b"".join(text2(v) if isinstance(v, bytes) else b"K" + bytes([v]) for v in value)
            out += b"](" + items + b"e"
        else:
            out += text2(value)
    return out + b"u."


Batch = tuple[np.ndarray, list[int]]
TRAIN: list[Batch] = [(pixels(2, i), [i, 9 - i]) for i in range(5)]
TEST: Batch = (pixels(3, 9), [3, 2, 1])


def binary(batch: Batch, heads: int = 1) -> bytes:
    """The records of a batch, before the label of each a coarse one if there are two heads."""
    return b"".join(bytes([0] * (heads - 1) + [label]) + row.tobytes() for row, label in zip(*batch, strict=True))


def pickled(batch: Batch, fine: bool = False) -> bytes:
    names = {b"fine_labels": batch[1], b"coarse_labels": [0] * len(batch[1])} if fine else {b"labels": batch[1]}
    return pickle2({b"batch_label": b"batch", **names, b"data": batch[0], b"filenames": [b"a.png"] * len(batch[1])})


def every_form() -> dict[str, dict[str, bytes]]:
    """Files of each form by the name of its folder; those of CIFAR-100 hold all training images in one batch."""
    hundred: Batch = (np.concatenate([x for x, _ in TRAIN]), [number for _, numbers in TRAIN for number in numbers])
    ten_names, hundred_names = [f"ten{i}" for i in range(10)], [f"hundred{i}" for i in range(100)]
    return {
        "cifar-10-batches-bin": {
            **{f"data_batch_{i + 1}.bin": binary(batch) for i, batch in enumerate(TRAIN)},
            "test_batch.bin": binary(TEST),
            "batches.meta.txt": "\n".join([*ten_names, "", ""]).encode(),
        },
        "cifar-10-batches-py": {
            **{f"data_batch_{i + 1}": pickled(batch) for i, batch in enumerate(TRAIN)},
            "test_batch": pickled(TEST),
            "batches.meta": pickle2({b"label_names": [name.encode() for name in ten_names]}),
        },
        "cifar-100-binary": {
            "train.bin": binary(hundred, 2),
            "test.bin": binary(TEST, 2),
            "fine_label_names.txt": "\n".join(hundred_names).encode(),
        },
        "cifar-100-python": {
            "train": pickled(hundred, fine=True),
            "test": pickled(TEST, fine=True),
            "meta": pickle2({b"fine_label_names": [name.encode() for name in hundred_names]}),
        },
    }


FORMS = every_form()


def written(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def packed(path: Path, folder: str, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        root = tarfile.TarInfo(folder)
        root.type = tarfile.DIRTYPE
        archive.addfile(root)
        for name, content in {**files, "readme.html": b"<html>"}.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def everything(data: Dataset) -> tuple[torch.Tensor, list[int]]:
    return data.read(torch.arange(len(data))), data.labels.tolist()


def message(load: Callable[..., Dataset], place: Path, wanted: Wanted = COLOUR) -> str:
    """The line by which a data set is refused."""
    with pytest.raises(DataError) as error:
        load(place, wanted)
    line = str(error.value)
    assert line.startswith(f"--data {place}: ") and line.isprintable(), line
    return line


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_around_the_authors_own_is_looked_through(form: str, tmp_path: Path) -> None:
    """As torchvision leaves it, beside the archive; but not where another folder lies beside it."""
    outer = tmp_path / "root"
    outer.mkdir()
    expected = cifar.load(written(outer / form, FORMS[form]), COLOUR)
    packed(outer / "archive.tar.gz", form, FORMS[form])
    assert cifar.recognises(outer) and cifar.load(outer, COLOUR).contents == expected.contents
    (outer / "cats").mkdir()
    assert not cifar.recognises(outer)


@pytest.mark.parametrize("archived", [False, True], ids=["folder", "archive"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_cifar_gives_the_same_images(form: str, archived: bool, tmp_path: Path) -> None:
    if archived:
        place = packed(tmp_path / "any.tar.gz", form, FORMS[form])
    else:
        place = written(tmp_path / "any", FORMS[form])
    assert cifar.recognises(place)
    data = cifar.load(place, COLOUR)
    images, labels = everything(data)
    assert images.shape == (10, 3, 32, 32) and images.dtype == torch.uint8 and data.shape == (3, 32, 32)
    assert np.array_equal(images.reshape(10, 3072).numpy(), np.concatenate([x for x, _ in TRAIN]))
    assert labels == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5] and data.labels.dtype == torch.int64
    number = 10 if "-10-" in form else 100
    assert data.contents.classes == tuple(f"{'ten' if number == 10 else 'hundred'}{i}" for i in range(number))
    how = "pickled" if form.endswith(("py", "python")) else "binary"
    assert data.contents.kind == f"CIFAR-{number} in {how} batches" + ", in an archive" * archived
    test = {"bin": "test_batch.bin", "py": "test_batch", "binary": "test.bin", "python": "test"}[form.split("-")[-1]]
    assert data.contents.notes == [f"the training images are taken; those of {test} are not"]
    assert data.copies and data.nbytes() == images.nbytes
    assert torch.equal(data.read(torch.arange(len(images))), images)


def test_a_checksum_is_of_pixels_and_labels(tmp_path: Path) -> None:
    sums = [cifar.load(written(tmp_path / form, FORMS[form]), COLOUR).contents.checksum for form in FORMS]
    assert len(set(sums)) == 1
    for changed in (binary((TRAIN[4][0], [5, 4])), binary((TRAIN[0][0], TRAIN[4][1]))):
        (tmp_path / "cifar-10-batches-bin" / "data_batch_5.bin").write_bytes(changed)
        sums.append(cifar.load(tmp_path / "cifar-10-batches-bin", COLOUR).contents.checksum)
    assert len(set(sums)) == 3


@pytest.mark.parametrize("form", FORMS)
def test_one_batch_and_test_images_alone(form: str, tmp_path: Path) -> None:
    names = [name for name in FORMS[form] if name.startswith(("data_batch_2", "test", "train"))]
    place = written(tmp_path / "set", {name: FORMS[form][name] for name in names})
    first = next(name for name in names if name.startswith(("data", "train")))
    assert cifar.recognises(place / first)
    data = cifar.load(place / first, COLOUR)
    assert data.labels.tolist() == ([1, 8] if first.startswith("data") else [0, 9, 1, 8, 2, 7, 3, 6, 4, 5])
    assert data.contents.classes[:2] == (("airplane", "automobile") if "-10-" in form else ("apple", "aquarium_fish"))
    assert data.contents.notes == []
    (place / first).unlink()
    data = cifar.load(place, COLOUR)
    assert data.labels.tolist() == TEST[1] and "there are no training images" in data.contents.notes[0]


def test_the_classes_that_everybody_knows() -> None:
    assert len(set(cifar.CIFAR10)) == 10 and len(set(cifar.CIFAR100)) == 100
    assert list(cifar.CIFAR100) == sorted(cifar.CIFAR100) and cifar.CIFAR100[-1] == "worm"


def test_mirrored_samples_are_turned_left_for_right(tmp_path: Path) -> None:
    data = cifar.load(written(tmp_path / "set", FORMS["cifar-10-batches-bin"]), COLOUR)
    index, mirrored = torch.tensor([3, 3, 0]), torch.tensor([False, True, True])
    plain = data.read(index)
    turned = data.read(index, mirrored)
    assert turned.dtype == torch.uint8 and torch.equal(turned[0], plain[0])
    assert torch.equal(turned[1:], plain[1:].flip(3)) and not torch.equal(turned[1], plain[1])
    assert torch.equal(data.read(index), plain), "what is held was changed"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_this_numpy_are_read(protocol: int) -> None:
    array = pixels(2, 1)
    for data in (array, np.asfortranarray(array)):
        content = pickle.dumps({"data": data, b"labels": [1, 300], "name": b"a", "more": (None, True)}, protocol)
        found = read_pickle(content)
        assert np.array_equal(found.pop("data"), array)
        assert found == {"labels": [1, 300], "name": b"a", "more": (None, True)}


class Hostile:
    """An object that unpickles by running a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for protocol in range(6):
        for bad in (Hostile(mark), {"data": Hostile(mark)}, {"data": np.array([Hostile(mark)], object)}):
            content = pickle.dumps(bad, protocol)
            with pytest.raises(ValueError):
                read_pickle(content)
            if protocol >= 2:
                place = written(tmp_path / "set", {"train": content})
                assert cifar.recognises(place)
                message(cifar.load, place)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Hostile(mark)))
    assert mark.exists(), "these pickles run nothing anyway"


def pickles_that_are_refused() -> Iterator[tuple[bytes, str]]:
    yield pickle.dumps([1], 2), "holds no dictionary"
    yield pickle.dumps({1: 2}, 2), "keys that are no text"
    yield pickle.dumps({"a": {1, 2}}, 4), "instruction EMPTY_SET"
    yield pickle.dumps({"a": print}, 2), "asks for '__builtin__.print'"
    yield pickle.dumps({"a": np.zeros(3)}, 2), "other numbers than uint8"
    yield pickle.dumps({"a": np.zeros(3, object)}, 2), "other numbers than uint8"
    yield b"\x80\x02}(U\x01au.", "damaged"
    yield b"\x80\x02}(U\x01aM\x00\x00u", "pickle exhausted before seeing STOP"
    yield b"\x80\x02}U\x01ah\x05s.", "KeyError"
    yield b"\x80\x02u.", "IndexError"
    whole = pickle2({b"data": pixels(2, 0)})
    yield whole.replace(b"\x8a\x04\x02\0\0\0", b"\x8a\x04\x03\0\0\0"), "shape (3, 3072) with 6144 bytes"
    yield whole.replace(b"\x8a\x04\x02\0\0\0", b"\x8a\x04\xff\xff\xff\xff"), "damaged"
    yield whole.replace(b"cnumpy\nndarray\n", b"cnumpy\ndtype\n"), "other values than an array needs"


def test_pickles_that_are_refused(tmp_path: Path) -> None:
    for content, said in pickles_that_are_refused():
        with pytest.raises(ValueError) as error:
            read_pickle(content)
        assert said in str(error.value)
        assert said in message(cifar.load, written(tmp_path / "set", {"train": content}))


def test_a_pickle_that_unpacks_to_much_more_is_refused() -> None:
    """A text of 1 MB that is written out a thousand times; a memory at place 2 ** 31; a number of bytes that is not."""
    text = b"X" + struct.pack("<I", 2**20) + b"a" * 2**20
    call = b"c_codecs\nencode\nh\x01X\x06\0\0\0latin1\x86R"
    bombs = [
        (b"\x80\x02]" + text + b"q\x01(" + call * 1000 + b"e.", "unpacks to much more"),
        (b"\x80\x02}r\xff\xff\xff\x7f]s.", "IndexError"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"abc.", "but only"),
    ]
    tracemalloc.start()
    for content, said in bombs:
        with pytest.raises(ValueError, match=said):
            read_pickle(content)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * 2**20


def damaged(content: bytes, step: int = 1) -> Iterator[bytes]:
    """Cut off at every length, and with every byte changed; a step leaves some out."""
    for length in range(0, len(content), step):
        yield content[:length]
    for position in range(0, len(content), step):
        yield content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :]


def outcomes(load: Callable[..., Dataset], file: Path, place: Path, contents: Iterator[bytes]) -> tuple[int, int]:
    """How many contents of a file of a data set are refused, and how many are not."""
    refused = taken = 0
    for content in contents:
        file.write_bytes(content)
        try:
            data = load(place, COLOUR)
            assert data.read(torch.arange(len(data))).shape[1:] == data.shape == (3, 32, 32)
            assert int(data.labels.min()) >= 0 and int(data.labels.max()) < len(data.contents.classes)
            taken += 1
        except DataError as error:
            assert str(error).startswith(f"--data {place}: ") and str(error).isprintable(), error
            refused += 1
    return refused, taken


def test_whatever_is_damaged_in_a_batch_ends_in_one_line_or_in_images(tmp_path: Path) -> None:
    place = written(tmp_path / "bin", {"test_batch.bin": binary((pixels(1, 0), [3]))})
    refused, taken = outcomes(cifar.load, place / "test_batch.bin", place, damaged(binary((pixels(1, 0), [3])), 4))
    assert refused == 3073 // 4 + 2 and taken == 3073 // 4  # the label is out of range too
    content = pickled((pixels(1, 0), [3]), fine=True)
    start = content.index(b"T" + struct.pack("<i", 3072)) + 5
    place = written(tmp_path / "py", {"train": content})
    programs = (c for c in damaged(content) if c[start + 1 : start + 3071] in (content[start + 1 : start + 3071], b""))
    refused, taken = outcomes(cifar.load, place / "train", place, programs)
    assert refused > 2 * start * 0.8 and taken > 0
    meta = FORMS["cifar-100-python"]["meta"]
    (place / "train").write_bytes(content)
    refused, taken = outcomes(cifar.load, place / "meta", place, damaged(meta, 7))
    assert refused > len(meta) / 7 and taken > 0


def test_whatever_is_damaged_in_an_archive_ends_in_one_line_or_in_the_same_images(tmp_path: Path) -> None:
    files = {"train": pickled((np.zeros((1, 3072), np.uint8), [3]), fine=True), "test": pickled(TEST, fine=True)}
    place = packed(tmp_path / "set.tar.gz", "cifar-100-python", files)
    whole = cifar.load(place, COLOUR).contents.checksum
    content = place.read_bytes()
    taken = 0
    for bad in damaged(content, len(content) // 300):
        place.write_bytes(bad)
        cifar.recognises(place)
        try:
            assert cifar.load(place, COLOUR).contents.checksum == whole
            taken += 1
        except DataError as error:
            assert str(error).startswith(f"--data {place}: ") and str(error).isprintable(), error
    assert taken < 5, "bytes of gzip's header"


def test_an_archive_that_unpacks_to_much_more_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "LARGEST", 2**20)
    place = packed(tmp_path / "set.tar.gz", "cifar-100-python", {"more": bytes(2**22), **FORMS["cifar-100-python"]})
    assert cifar.recognises(place)
    assert "unpacks to more than 1 MiB" in message(cifar.load, place)


def test_what_is_no_whole_cifar_is_refused(tmp_path: Path) -> None:
    place = written(tmp_path / "set", FORMS["cifar-10-batches-bin"])
    third = place / "data_batch_3.bin"
    whole = third.read_bytes()
    cases = [
        (whole[:-1], "data_batch_3.bin has 6145 bytes, not a multiple of 3073"),
        (b"", "data_batch_3.bin has 0 bytes"),
        (b"\x0a" + whole[1:], "data_batch_3.bin has label 10 at image 0, not one of 0..9"),
    ]
    for content, said in cases:
        third.write_bytes(content)
        assert said in message(cifar.load, place)
    third.unlink()
    assert "data_batch_3.bin is missing" in message(cifar.load, place)
    third.write_bytes(whole)
    (place / "batches.meta.txt").write_bytes(b"cat\ndog\n")
    assert "batches.meta.txt does not hold the names of 10 classes" in message(cifar.load, place)
    (place / "batches.meta.txt").write_bytes(b"\xff")
    assert "batches.meta.txt 'utf-8' codec" in message(cifar.load, place)
    data, labels = TRAIN[0]
    for found, said in (
        ({b"data": data}, "train holds no `fine_labels`"),
        ({b"fine_labels": labels}, "train holds no `data` of 3072 bytes"),
        ({b"data": data[:, :9], b"fine_labels": labels}, "train holds no `data` of 3072 bytes"),
        ({b"data": data, b"fine_labels": [1]}, "train holds 2 images and 1 labels"),
        ({b"data": data, b"fine_labels": [1, 100]}, "train has label 100 at image 1, not one of 0..99"),
    ):
        assert said in message(cifar.load, written(tmp_path / "py", {"train": pickle2(found)}))
    assert "holds no batches" in message(cifar.load, tmp_path)
    assert "holds no batches" in message(cifar.load, tmp_path / "nowhere")


def test_other_places_are_not_taken_for_arrays(tmp_path: Path) -> None:
    (tmp_path / "folder" / "train").mkdir(parents=True)
    (tmp_path / "folder" / "test").write_bytes(b"text")
    (tmp_path / "folder" / "train.bin").write_bytes(b"text")
    (tmp_path / "train").write_bytes(b"text")
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(b"text" * 1000))
    (tmp_path / "y.tar.gz").write_bytes(gzip.compress(b"text" * 1000)[:15])
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("folder", "train", "x.tar.gz", "y.tar.gz", "pipe", "loop", "nowhere", "folder/train/x"):
        assert not cifar.recognises(tmp_path / name) and not mnist.recognises(tmp_path / name)
        message(cifar.load, tmp_path / name)
        if name != "pipe":
            message(mnist.load, tmp_path / name)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


DIGITS = np.random.default_rng(0).integers(0, 256, (12, 28, 28), np.uint8)
NUMBERS = np.arange(12) % 10
MNIST = {
    "train-images-idx3-ubyte": idx(DIGITS),
    "train-labels-idx1-ubyte": idx(NUMBERS),
    "t10k-images-idx3-ubyte": idx(DIGITS[:3]),
    "t10k-labels-idx1-ubyte": idx(NUMBERS[:3]),
}


@pytest.mark.parametrize("dot", [False, True], ids=["dash", "dot"])
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
def test_mnist(zipped: bool, dot: bool, tmp_path: Path) -> None:
    files = {
        (name.replace("-idx", ".idx") if dot else name) + ".gz" * zipped: gzip.compress(content) if zipped else content
        for name, content in MNIST.items()
    }
    place = written(tmp_path / "set", files)
    assert mnist.recognises(place)
    data = mnist.load(place, GRAY)
    images, labels = everything(data)
    assert np.array_equal(images[:, 0].numpy(), DIGITS) and labels == NUMBERS.tolist()
    assert images.dtype == torch.uint8 and data.shape == (1, 28, 28) and data.contents.classes == tuple("0123456789")
    assert data.contents.kind == "MNIST in idx files"
    assert data.contents.notes == ["the training images are taken; those of t10k are not"]
    for name in files:
        assert mnist.recognises(place / name)
    one = mnist.load(place / next(name for name in files if "t10k-images" in name), GRAY)
    assert len(one) == 3 and one.contents.notes == []
    for name in files:
        if name.startswith("train"):
            (place / name).unlink()
    rest = mnist.load(place, GRAY)
    assert len(rest) == 3 and "there are no training images" in rest.contents.notes[0]
    assert rest.contents.checksum == one.contents.checksum != data.contents.checksum


def test_mnist_as_a_larger_model_takes_it(tmp_path: Path) -> None:
    data = mnist.load(written(tmp_path / "set", MNIST), Wanted(size=32, channels=3, flip=True))
    images, _ = everything(data)
    expected = np.stack([np.asarray(Image.fromarray(x).resize((32, 32), Image.Resampling.BICUBIC)) for x in DIGITS])
    assert np.array_equal(images.numpy(), expected[:, None].repeat(3, 1))
    assert "images of 28 x 28 are scaled to 32 x 32" in data.contents.notes
    assert any("data.flip=false" in note for note in data.contents.notes)


def test_fashion_mnist_is_known_by_its_folder(tmp_path: Path) -> None:
    for name in ("fashion-mnist", "FashionMNIST/raw"):
        (tmp_path / name).mkdir(parents=True)
        place = written(tmp_path / name, MNIST)
        for chosen in (place, place / "train-images-idx3-ubyte"):
            data = mnist.load(chosen, GRAY)
            assert data.contents.classes[-1] == "Ankle boot" and data.contents.kind == "Fashion-MNIST in idx files"
    written(tmp_path / "root", {}).joinpath("FashionMNIST").symlink_to(tmp_path / "FashionMNIST")
    for outer in (tmp_path / "FashionMNIST", tmp_path / "root"):
        assert mnist.recognises(outer) and mnist.load(outer, GRAY).contents.checksum == data.contents.checksum


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_whatever_is_damaged_in_an_idx_file_ends_in_one_line_or_in_images(
    name: str, zipped: bool, tmp_path: Path
) -> None:
    files = {name: content for name, content in MNIST.items() if name.startswith("t10k")}
    files["t10k-images-idx3-ubyte"] = idx(np.arange(3 * 4 * 4).reshape(3, 4, 4))
    place = written(tmp_path / "set", files)
    content = gzip.compress(files[name]) if zipped else files[name]
    refused, taken = outcomes(mnist.load, place / name, place, damaged(content))
    # Cut off it is refused at every length; a byte that is changed is a pixel's, or of gzip's own header.
    assert refused >= len(content) and taken <= (10 if zipped else len(content))
    assert zipped or refused >= len(content) + 8


def test_what_is_no_whole_mnist_is_refused(tmp_path: Path) -> None:
    images, labels = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
    place = tmp_path / "set"
    for name, content, said in (
        (images, MNIST[images] + b"x", f"{images} says that it has 9408 bytes, and has more"),
        (images, MNIST[images][:-1], f"{images} says that it has 9408 bytes, and has 9407"),
        (images, idx(DIGITS[:11]), "holds 11 images and 12 labels"),
        (images, idx(DIGITS.reshape(12, 784)), f"{images} is no idx file of bytes in 3 dimensions"),
        (images, struct.pack(">I3I", 0x803, 0, 28, 28), f"{images} says that it is 0 x 28 x 28 bytes"),
        (images, struct.pack(">I3I", 0x803, *[2**32 - 1] * 3), f"{images} says that it is 4294967295 x"),
        (labels, MNIST[images], f"{labels} is no idx file of bytes in 1 dimensions"),
        (labels, idx(NUMBERS + 1), "label 10 of image 9 is not in 0..9"),
    ):
        assert said in message(mnist.load, written(place, {**MNIST, name: content}))
    written(place, MNIST)
    assert "is no file of images: name one" in message(mnist.load, place / labels)
    (place / labels).unlink()
    assert f"{labels} is missing" in message(mnist.load, place)
    assert f"{labels} is missing beside it" in message(mnist.load, place / images)


def test_a_gzip_that_unpacks_to_much_more_is_refused(tmp_path: Path) -> None:
    bomb = gzip.compress(idx(DIGITS) + bytes(100 * 2**20), 1)
    place = written(tmp_path / "set", {**MNIST, "train-images-idx3-ubyte": bomb})
    tracemalloc.start()
    assert "and has more" in message(mnist.load, place)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * 2**20


def test_sizes_are_halved_scaled_and_cropped() -> None:
    rng = np.random.default_rng(0)
    tall = rng.integers(0, 256, (2, 70, 40, 3), np.uint8)
    out = fit(tall, Wanted(size=16, channels=3), "--data x")
    halved = Image.fromarray(tall[1]).resize((20, 35), Image.Resampling.BOX)
    scaled = np.asarray(halved.resize((16, 28), Image.Resampling.BICUBIC))
    assert out.shape == (2, 3, 16, 16) and np.array_equal(out[1], scaled[6:22].transpose(2, 0, 1))
    apart = fit(tall, Wanted(size=16, channels=3, resize=True), "--data x")
    squeezed = np.asarray(Image.fromarray(tall[1]).resize((16, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(apart[1], squeezed.transpose(2, 0, 1))
    exact = rng.integers(0, 256, (2, 16, 16, 3), np.uint8)
    assert np.array_equal(fit(exact, Wanted(size=16, channels=3), ""), exact.transpose(0, 3, 1, 2))


def test_channels_become_gray_or_are_repeated() -> None:
    colour = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    gray = fit(colour, Wanted(size=8, channels=1), "")
    assert np.array_equal(gray[1, 0], np.asarray(Image.fromarray(colour[1]).convert("L")))
    assert np.array_equal(fit(gray.transpose(0, 2, 3, 1), Wanted(size=8, channels=3), ""), gray.repeat(3, 1))
    for images, channels in ((colour, 4), (colour[..., :2], 3)):
        with pytest.raises(DataError, match=r"^--data x: the images have \d channels, .* set model.in_channels"):
            fit(images, Wanted(size=8, channels=channels), "--data x")

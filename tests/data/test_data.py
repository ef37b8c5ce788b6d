"""Data sets: what they hold, the order in which a run sees them, and what is refused."""

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from soflow_fast.config.presets import preset
from soflow_fast.config.schema import NOTHING_LEFT, Config, override
from soflow_fast.data import InMemory, Source, digits, fitted, images, open_source
from soflow_fast.data.dataset import Wanted
from soflow_fast.data.digits import load_digits, to_pixels
from soflow_fast.data.images.listing import LARGEST_FILE
from soflow_fast.errors import DataError


def load_images(path: Path, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All images and labels of a folder or zip."""
    found = images.load(path, Wanted(size, 3))
    return found.read(torch.arange(len(found))), found.labels


def picture(value: int, size: int = 4, kind: str = "PNG", mode: str = "RGB") -> bytes:
    """An image file of one grey."""
    buffer = io.BytesIO()
    Image.new(mode, (size, size), value if mode == "L" else (value,) * 3).save(buffer, kind)
    return buffer.getvalue()


PICTURES = {
    "cat/b.png": picture(2),
    "cat/a.PNG": picture(1),
    "ant/z.bmp": picture(0, kind="BMP"),
    "dog/grey.png": picture(3, mode="L"),
    "dog/readme.txt": b"not a picture",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in PICTURES.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(content)
    return tmp_path / "set"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in PICTURES.items():
            file.writestr(name, content)
    return path


@pytest.mark.parametrize("found", [True, False])
def test_digits_are_the_real_ones_scaled(found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from scikit-learn's file, or by scikit-learn where that lies elsewhere."""
    from sklearn.datasets import load_digits as original

    if not found:
        monkeypatch.setattr(digits.Path, "is_file", lambda path: False)
    x, y = load_digits()
    assert x.shape == (1797, 1, 8, 8) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert float(x.min()) == -1 and float(x.max()) == 1
    assert torch.equal(to_pixels(x), torch.from_numpy(original().data).float())
    assert torch.equal(x[:, 0], torch.from_numpy(original().images).float() / 8 - 1)
    assert torch.equal(y, torch.from_numpy(original().target))


OPENED = """
import sys
from soflow_fast.data import open_source
from soflow_fast.config.presets import preset
assert len(open_source(preset("digits"))) == 1797
assert not any(name.split(".")[0] in ("sklearn", "scipy") for name in sys.modules)
"""


def test_the_digits_are_opened_without_scikit_learn(environment: dict[str, str]) -> None:
    """Which takes a second to import, on the way to what is wrong with a checkpoint."""
    subprocess.run([sys.executable, "-c", OPENED], env=environment, check=True)


@pytest.mark.parametrize("where", ["folder", "archive"])
def test_images_of_a_folder_and_of_a_zip(where: str, request: pytest.FixtureRequest) -> None:
    images, labels = load_images(request.getfixturevalue(where), 4)
    assert images.shape == (4, 3, 4, 4) and images.dtype == torch.uint8
    assert images[:, :, 0, 0].tolist() == [[0] * 3, [1] * 3, [2] * 3, [3] * 3]  # ant, cat/a, cat/b, dog
    assert labels.tolist() == [0, 1, 1, 2]


def test_channels_and_rows_stay_in_place(tmp_path: Path) -> None:
    pixels = torch.arange(48, dtype=torch.uint8).reshape(4, 4, 3)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels.numpy()).save(tmp_path / "a" / "x.png")
    images, _ = load_images(tmp_path, 4)
    assert torch.equal(images[0], pixels.permute(2, 0, 1))


def test_gray_of_16_bits_is_scaled(tmp_path: Path) -> None:
    """Its ends to the ends, and no level further off than half a level of 8 bits."""
    pixels = np.arange(16).reshape(4, 4) * 4369
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels.astype(np.uint16)).save(tmp_path / "a" / "x.png")
    with Image.open(tmp_path / "a" / "x.png") as written:
        assert np.array_equal(np.asarray(written), pixels)
    images, _ = load_images(tmp_path, 4)
    assert torch.equal(images[0, 0].int(), torch.arange(16).reshape(4, 4).int() * 17)
    assert torch.equal(images[0, 0], images[0, 1]) and torch.equal(images[0, 0], images[0, 2])
    x, _ = open_source(images_config(tmp_path)).batch(0)
    assert float(x.min()) == -1 and float(x.max()) == 1
    Image.fromarray((pixels + 100).clip(0, 65535).astype(np.uint16)).save(tmp_path / "a" / "x.png")
    images, _ = load_images(tmp_path, 4)
    off = images[0, 0].double() / 255 - torch.from_numpy((pixels + 100).clip(0, 65535)) / 65535
    assert float(off.abs().max()) <= 0.5 / 255


def test_linked_folders_and_files_are_followed(folder: Path, tmp_path: Path) -> None:
    whole, labels = load_images(folder, 4)
    elsewhere, linked = tmp_path / "elsewhere", tmp_path / "linked"
    (folder / "cat").rename(elsewhere)
    (folder / "cat").symlink_to(elsewhere, target_is_directory=True)
    (folder / "dog" / "grey.png").rename(tmp_path / "grey.png")
    (folder / "dog" / "grey.png").symlink_to(tmp_path / "grey.png")
    linked.symlink_to(folder, target_is_directory=True)
    for place in (folder, linked):
        images, again = load_images(place, 4)
        assert torch.equal(images, whole) and torch.equal(again, labels)


def test_two_links_to_one_folder_are_two_classes(folder: Path) -> None:
    (folder / "eel").symlink_to(folder / "cat", target_is_directory=True)
    assert load_images(folder, 4)[1].tolist() == [0, 1, 1, 2, 3, 3]


def test_links_that_lead_back_are_not_followed(folder: Path) -> None:
    whole, labels = load_images(folder, 4)
    (folder / "cat" / "up").symlink_to(folder, target_is_directory=True)
    (folder / "dog" / "here").symlink_to(".", target_is_directory=True)
    images, again = load_images(folder, 4)
    assert torch.equal(images, whole) and torch.equal(again, labels)
    (folder / "cat" / "self").symlink_to("self")
    images, again = load_images(folder, 4)
    assert torch.equal(images, whole) and torch.equal(again, labels)


def test_nothing_is_left_out_in_silence(folder: Path) -> None:
    (folder / "cat" / "lost.png").symlink_to(folder / "nowhere.png")
    with pytest.raises(DataError, match=r"cat/lost.png is no file, or a link to none$"):
        load_images(folder, 4)
    (folder / "cat" / "lost.png").unlink()
    (folder / "cat" / "self.png").symlink_to("self.png")
    with pytest.raises(DataError, match=r"cat/self.png is no file, or a link to none$"):
        load_images(folder, 4)
    (folder / "cat" / "self.png").unlink()
    os.mkfifo(folder / "cat" / "pipe.png")
    with pytest.raises(DataError, match=r"cat/pipe.png is no file, or a link to none$"):
        load_images(folder, 4)


def test_a_folder_that_cannot_be_listed_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "cat":
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"cannot be read \(.*cat'\)$"):
        load_images(folder, 4)


def test_a_zip_that_holds_a_name_twice_is_refused(archive: Path) -> None:
    with zipfile.ZipFile(archive, "a") as file, pytest.warns(UserWarning, match="Duplicate name"):
        file.writestr("cat/b.png", picture(9))
    with pytest.raises(DataError, match=r"set.zip: cat/b.png is in it twice$"):
        load_images(archive, 4)


def images_config(path: object, **changes: object) -> Config:
    fields = {"model.input_size": 4, "model.num_classes": 3, "data": str(path), "batch_size": 4, **changes}
    return override(preset("cifar10"), fields)


def test_source_of_images_is_scaled_to_the_unit_range(folder: Path) -> None:
    x, y = open_source(images_config(folder, **{"data.flip": False})).batch(0)
    assert x.dtype == torch.float32 and x.shape == (4, 3, 4, 4)
    assert torch.allclose(x[:, 0, 0, 0].sort().values, torch.arange(4) / 127.5 - 1)
    assert sorted(y.tolist()) == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cat/bad.png", b"junk", "cat/bad.png is no readable image"),
        ("cat/bad.png", picture(9)[:45], "cat/bad.png is no readable image"),
    ],
    ids=["junk", "cut off"],
)
def test_a_bad_image_is_named(folder: Path, archive: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(name, content)
    for path in (folder, archive):
        with pytest.raises(DataError) as error:
            load_images(path, 4)
        assert str(error.value).startswith(f"--data {path}: ") and message in str(error.value)
        assert "\n" not in str(error.value)


def test_every_damaged_byte_of_a_zip_ends_in_one_line_or_in_the_same_images(archive: Path) -> None:
    whole, _ = load_images(archive, 4)
    content = archive.read_bytes()
    refusals = 0
    for position in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[position] ^= 0x55
        archive.write_bytes(damaged)
        try:
            images, _ = load_images(archive, 4)
            assert all(any(torch.equal(image, other) for other in whole) for image in images)
        except DataError as error:
            assert str(error).startswith(f"--data {archive}: "), error
            refusals += 1
    assert refusals > len(content) // 12


def test_a_file_that_unpacks_to_much_more_than_an_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/x.png", bytes(LARGEST_FILE + 1))
    with pytest.raises(DataError, match=r"a/x.png unpacks to 64 MiB"):
        load_images(path, 4)


def test_what_does_not_fit_is_refused(tmp_path: Path, folder: Path) -> None:
    junk, empty = tmp_path / "junk.zip", tmp_path / "empty"
    junk.write_bytes(b"PK\x03\x04 junk")
    empty.mkdir()
    cases = [
        (images_config(tmp_path / "nowhere"), "no such file or folder"),
        (images_config(junk), "cannot be read"),
        (images_config(empty), "holds no images"),
        (images_config(""), "--data is missing: preset cifar10"),
        (images_config(folder, **{"model.num_classes": 2}), "3 classes, the model 2"),
        (images_config(folder, **{"model.in_channels": 4}), "set model.in_channels"),
        (override(preset("digits"), {"data": "x"}), "--data x: the digits come with scikit-learn"),
        (override(preset("digits"), {"model.input_size": 16}), "set model.in_channels and model.input_size"),
        (override(preset("digits"), {"model.num_classes": 9}), "10 classes, the model 9"),
        (preset("imagenet256-b4"), "--data is missing: preset imagenet256-b4 needs latents"),
        (override(preset("imagenet256-b4"), {"data": str(folder)}), "these are images: encode them first"),
    ]
    for config, message in cases:
        with pytest.raises(DataError) as error:
            fitted(config, open_source(config), NOTHING_LEFT)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_a_model_without_classes_takes_any_labels(folder: Path) -> None:
    assert len(open_source(images_config(folder, **{"model.num_classes": 0}))) == 4


def numbers(n: int, batch_size: int, seed: int = 0, flip: bool = False) -> Source:
    """Images [n, 1, 1, 2] that are their own index, then minus one."""
    images = torch.stack([torch.arange(n).float(), torch.full((n,), -1.0)], 1).reshape(n, 1, 1, 2)
    return Source(InMemory(images, torch.arange(n)), seed=seed, batch_size=batch_size, flip=flip)


@pytest.mark.parametrize(("n", "batch_size"), [(12, 4), (10, 4), (9, 20), (9, 9)])
def test_every_epoch_is_a_fresh_permutation_of_the_whole_set(n: int, batch_size: int) -> None:
    source = numbers(n, batch_size)
    seen = torch.cat([source.indices(step) for step in range(6 * n // batch_size + 6)])
    epochs = seen[: len(seen) // n * n].reshape(-1, n)
    assert len(epochs) >= 6
    assert torch.equal(epochs.sort(1).values, torch.arange(n).expand_as(epochs))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == len(epochs)


@pytest.mark.parametrize("world", [2, 3, 4, 5])
def test_the_order_does_not_depend_on_the_number_of_ranks(world: int) -> None:
    source = numbers(37, 12)
    for step in range(8):
        parts = [source.indices(step, rank, world) for rank in range(world)]
        assert torch.equal(torch.cat(parts), source.indices(step))


def test_a_batch_is_a_function_of_its_arguments() -> None:
    first, second = numbers(37, 12, flip=True), numbers(37, 12, flip=True)
    forward = [first.batch(step, 1, 2) for step in range(10)]
    backward = [second.batch(step, 1, 2) for step in reversed(range(10))][::-1]
    for (x, y), (x_again, y_again) in zip(forward, backward, strict=True):
        assert torch.equal(x, x_again) and torch.equal(y, y_again)
    assert not torch.equal(numbers(37, 12, seed=1).indices(0), first.indices(0))


def test_ranks_share_one_order_and_one_set_of_mirrored_images() -> None:
    source = numbers(37, 12, flip=True)
    for step in range(5):
        whole = source.batch(step)
        for world in (2, 3):
            parts = [source.batch(step, rank, world) for rank in range(world)]
            assert all(torch.equal(torch.cat(p), w) for p, w in zip(zip(*parts, strict=True), whole, strict=True))


def test_images_keep_their_labels_and_half_are_mirrored() -> None:
    source = numbers(100, 50, flip=True)
    mirrored = 0
    for step in range(20):
        x, y = source.batch(step)
        turned = x[:, 0, 0, 0] == -1
        assert torch.equal(torch.where(turned, x[:, 0, 0, 1], x[:, 0, 0, 0]), y.float())
        mirrored += int(turned.sum())
    assert 400 < mirrored < 600

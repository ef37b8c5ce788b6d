"""Images in folders and zips: which files are images, of which class, and what is refused, left out and said."""

import io
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import WANTED, Files, archive, folder, picture, refusal, values
from PIL import Image

from soflow_fast.data import images
from soflow_fast.data.dataset import Contents, Wanted
from soflow_fast.data.images import image_set, listing, load, recognises
from soflow_fast.data.images.listing import LARGEST_FILE
from soflow_fast.errors import DataError


def test_what_is_found(made: Any) -> None:
    place = made({"dog/b.png": picture(3), "cat/x.jpg": picture(2), "cat/a/deep/er.bmp": picture(1, "BMP")})
    found = load(place, WANTED)
    assert found.shape == (3, 4, 4) and len(found) == 3 and found.labels.dtype == torch.int64
    assert values(found) == [1, 2, 3] and found.labels.tolist() == [0, 0, 1]
    kind = "zip of images" if place.suffix else "folder of images"
    assert found.contents == Contents(kind, ("cat", "dog"), checksum=found.contents.checksum)
    assert found.read(torch.tensor([2, 0, 2])).dtype == torch.uint8
    assert found.read(torch.tensor([2, 0, 2]))[:, 0, 0, 0].tolist() == [3, 1, 3]
    assert torch.equal(
        found.decoded(found.read(torch.tensor([2])), torch.zeros).unique(), torch.tensor([3 / 127.5 - 1])
    )
    assert found.read(torch.empty(0, dtype=torch.int64)).shape == (0, 3, 4, 4)
    assert recognises(place)


def test_folder_and_zip_are_the_same_set(tmp_path: Path) -> None:
    files = {f"{i % 3}/{i}.png": picture(i) for i in range(20)}
    one, two = (load(make(tmp_path / "set", files), WANTED) for make in (folder, archive))
    assert one.contents.checksum == two.contents.checksum and torch.equal(one.labels, two.labels)
    moved = load(folder(tmp_path / "other", files), WANTED)
    assert moved.contents.checksum == one.contents.checksum
    for changed in ({**files, "0/0.png": picture(9, size=(9, 9))}, {**files, "0/y.png": picture()}):
        other = load(folder(tmp_path / f"other{len(changed)}", changed), WANTED)
        assert other.contents.checksum != one.contents.checksum


@pytest.mark.parametrize("names", [["a/x.png", "b/x.png"], ["x.png", "y.png", "dataset.json"]])
def test_a_wrapper_is_no_part_of_the_identity(made: Any, tmp_path: Path, names: list[str]) -> None:
    labels = b'{"labels": [["x.png", 0], ["y.png", 1]]}'
    files = {name: picture(i) if name.endswith("png") else labels for i, name in enumerate(names)}
    plain = load(folder(tmp_path / "plain", files), WANTED)
    wrapped = load(made({f"outer/v1/{name}": content for name, content in files.items()}), WANTED)
    assert wrapped.contents.checksum == plain.contents.checksum and wrapped.contents.classes == plain.contents.classes


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_and_mirrored_samples(made: Any, channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    buffers = [io.BytesIO() for _ in pixels]
    for image, buffer in zip(pixels, buffers, strict=True):
        Image.fromarray(image).save(buffer, "PNG")
    found = load(made({f"a/{i}.png": b.getvalue() for i, b in enumerate(buffers)}), Wanted(4, channels))
    whole = found.read(torch.arange(5))
    if channels == 3:
        assert torch.equal(whole, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    else:
        luminance = pixels @ np.array([0.299, 0.587, 0.114])
        assert np.abs(whole[:, 0].numpy() - luminance).max() <= 0.51
    mirrored = torch.tensor([True, False, False, True, False])
    turned = found.read(torch.arange(5), mirrored)
    assert torch.equal(turned, torch.where(mirrored[:, None, None, None], whole.flip(3), whole))
    for channels in (2, 4):
        assert "set model.in_channels" in refusal(made({"a/x.png": picture()}), Wanted(4, channels))


def test_sizes(made: Any) -> None:
    place = made({"a/x.png": picture(7, size=(40, 9)), "a/y.png": picture(8, size=(3, 5))})
    for resize in (False, True):
        assert values(load(place, Wanted(6, 3, resize))) == [7, 8]


# Files, and the classes and labels that they have.
TREES: dict[str, tuple[list[str], tuple[str, ...], list[int]]] = {
    "flat": (["b.png", "a.png"], (), [0, 0]),
    "classes": (["b/x.png", "a/x.png", "a/y.png"], ("a", "b"), [0, 0, 1]),
    "numbers": (["10/x.png", "9/x.png", "b/x.png", "007/x.png"], ("007", "9", "10", "b"), [0, 2, 1, 3]),
    "deep": (["a/1/2/x.png", "a/y.png", "b/1/z.png"], ("a", "b"), [0, 0, 1]),
    "one class": (["a/x.png", "a/y.png"], ("a",), [0, 0]),
    "wrapped": (["set/b/x.png", "set/a/x.png"], ("a", "b"), [0, 1]),
    "wrapped twice": (["set/v1/b/x.png", "set/v1/a/x.png", "set/README.md", "LICENSE"], ("a", "b"), [0, 1]),
    "a wrapped split": (["train/a/x.png", "train/b/x.png"], ("a", "b"), [0, 1]),
    "wrapped beside what is nobody's": (["set/b/x.png", "set/a/x.png", "__MACOSX/set/x.png"], ("a", "b"), [0, 1]),
    "a class called train": (["train/x.png", "car/x.png"], ("car", "train"), [0, 1]),
    "splits in classes": (["a/train/x.png", "a/val/x.png", "b/x.png"], ("a", "b"), [0, 0, 1]),
}


@pytest.mark.parametrize("tree", TREES)
def test_the_first_folder_is_the_class(made: Any, tree: str) -> None:
    names, classes, labels = TREES[tree]
    found = load(made({name: picture() if name.endswith(".png") else b"text" for name in names}), WANTED)
    assert found.contents.classes == classes and found.labels.tolist() == labels


# Files, and what must be said of them.
REFUSED: dict[str, tuple[list[str], str]] = {
    "splits": (["train/a/x.png", "val/a/x.png"], "holds train and val side by side"),
    "other splits": (["Validation/x.png", "test/x.png", "a/x.png"], "holds Validation and test side by side"),
    "wrapped splits": (["set/train/a/x.png", "set/valid/a/x.png"], "holds set/train and set/valid side by side"),
    "an image beside classes": (["a/x.png", "y.png"], "y.png lies beside the classes' folders"),
    "a wrapped one": (["set/a/x.png", "set/y.png"], "set/y.png lies beside the classes' folders"),
    "an empty class": (["a/x.png", "b/"], "b is a class without an image"),
    "a class of texts": (["a/x.png", "b/x.txt"], "b is a class without an image"),
    "an empty class with a folder": (["a/x.png", "b/c/"], "b is a class without an image"),
    "a class of hidden files": (["a/x.png", "b/._x.png"], "b is a class without an image"),
    "nothing": (["a/"], "holds no images"),
    "texts": (["a/x.txt"], "holds no images"),
    "hidden": (["a/._x.png", ".b/x.png"], "holds no images"),
}


@pytest.mark.parametrize("tree", REFUSED)
def test_trees_that_are_no_classes(made: Any, tree: str) -> None:
    names, said = REFUSED[tree]
    text = refusal(made({name: picture() for name in names}))
    assert said in text, text


def test_splits_come_with_a_hint(tmp_path: Path) -> None:
    files = {"train/a/x.png": picture(1), "val/a/x.png": picture(2), "val/b/x.png": picture(3)}
    place = folder(tmp_path / "set", files)
    assert refusal(place).endswith(f"name one, --data {place}/train")
    assert refusal(archive(place, files)).endswith("a zip of one of them is needed")
    assert values(load(place / "val", WANTED)) == [2, 3]


NOBODYS = [".ipynb_checkpoints/x.png", "._x.png", "a/._y.png", ".DS_Store", "a/.DS_Store", "__MACOSX/a/._x.png",
           "a/@eaDir/x.png/SYNO.jpg", "a/Thumbs.db", "Thumbs.db", ".git/objects/x.png", "a/.x/y/z.png"]  # fmt: skip


def test_what_is_nobodys_is_left_out_and_counted(made: Any) -> None:
    found = load(made({"a/x.png": picture(1), "b/x.png": picture(2), **dict.fromkeys(NOBODYS, picture(9))}), WANTED)
    assert values(found) == [1, 2] and found.contents.classes == ("a", "b")
    assert found.contents.left_out == Counter(hidden=len(NOBODYS))


def test_what_is_not_read_is_counted_by_its_ending(made: Any) -> None:
    others = ["README", "a/LICENSE", "a/x.txt", "b.TXT", "x.csv", "a/x.xyz", "a/metadata.json", "b/y.avif"]
    found = load(made({"a/x.png": picture(1), "b/x.png": picture(2), **dict.fromkeys(others, b"text")}), WANTED)
    endings = {"no ending": 2, ".txt": 2, ".csv": 1, ".xyz": 1, ".json": 1, ".avif": 1}
    assert found.contents.left_out == endings and values(found) == [1, 2]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF"])
def test_the_content_says_what_a_file_is(made: Any, kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    names = ["jpg", "JPEG", "jfif", "png", "bmp", "gif", "tif", "tiff", "webp", "img", "pic.large"]
    files = {f"a/x.{ending}": picture(77, kind, **options) for ending in names} | {
        "a/bare": picture(77, kind, **options)
    }
    found = load(made(files), WANTED)
    assert values(found) == [77] * 12 and not found.contents.left_out


def test_only_six_formats_are_read(made: Any) -> None:
    for kind in ("ICO", "PPM", "TGA", "JPEG2000", "EPS", "PDF", "ICNS", "DDS"):
        content = picture(0, kind, size=(16, 16))
        assert "a/x.png is no readable image (UnidentifiedImageError)" in refusal(made({"a/x.png": content}))
        assert load(made({"a/x.png": picture(), "a/x.img": content}), WANTED).contents.left_out == {".img": 1}


# Damage by the name of the image, and what is said after it.
BAD: dict[str, tuple[bytes, str]] = {
    "text": (b"hello", "is no readable image (UnidentifiedImageError)"),
    "nothing": (b"", "is no readable image"),
    "cut": (picture(1, size=(64, 64))[:70], "is no readable image"),
    "cut JPEG": (picture(1, "JPEG", size=(640, 640))[:-300], "is no readable image (OSError: image file is truncated"),
    "cut GIF": (picture(1, "GIF", size=(64, 64))[:-20], "is no readable image"),
    "cut TIFF": (picture(1, "TIFF")[:-20], "is no readable image"),
    "cut WebP": (picture(1, "WEBP")[:-8], "is no readable image"),
    "cut BMP": (picture(1, "BMP")[:-8], "is no readable image"),
    "too many pixels": (
        picture(1, size=(2**14, 2**13), mode="1"),
        "has 16384 x 8192 pixels, and at most 67108864 are read",
    ),
    "too long": (bytes(LARGEST_FILE + 1), " 64 MiB (67108865 bytes), and at most 64 MiB are read"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_image_is_named_or_left_out(made: Any, case: str, tmp_path: Path) -> None:
    content, said = BAD[case]
    place = made({"a/bad.png": content, "a/good.png": picture(7), "b/x.png": picture(8)})
    text = refusal(place)
    if case == "too long":
        said = ("unpacks to" if place.suffix else "has") + said
    assert text.startswith(f"a/bad.png {said}"), text
    found = load(place, WANTED._replace(skip_bad=True))
    assert values(found) == [7, 8] and found.labels.tolist() == [0, 1] and len(found) == 2
    assert found.contents.left_out == {f"bad: {text}": 1}
    assert found.contents.notes == [f"1 bad image is left out: {text}"]
    good = folder(tmp_path / "good", {"a/good.png": picture(7), "b/x.png": picture(8)})
    assert found.contents.checksum == load(good, WANTED).contents.checksum


def test_many_bad_images(made: Any) -> None:
    place = made({f"a/{i:03}.png": picture(i) if i % 2 else b"junk" for i in range(100)})
    assert refusal(place).startswith("a/000.png is no readable image") and refusal(place).endswith(
        "50 bad images of 100"
    )
    found = load(place, WANTED._replace(skip_bad=True))
    assert values(found) == list(range(1, 100, 2)) and found.contents.left_out.total() == 50
    assert len(found.contents.notes) == 1 and found.contents.notes[0].startswith(
        "50 bad images are left out: a/000.png"
    )
    place = made({"a/x.png": b"junk"} | {f"a/{i:03}.png": b"junk" for i in range(100)})
    assert refusal(place, WANTED._replace(skip_bad=True)) == "holds no image that can be read"


def test_a_class_whose_images_are_all_bad(made: Any) -> None:
    place = made({"a/x.png": picture(), "b/x.png": b"junk", "b/y.png": b"junk", "c/x.png": picture()})
    assert refusal(place, WANTED._replace(skip_bad=True)) == "b is a class without an image that can be read"


def test_transparency_and_animations_are_said_once(made: Any) -> None:
    frames = [Image.new("RGB", (4, 4), (v,) * 3) for v in (1, 2, 3)]
    moving = io.BytesIO()
    frames[0].save(moving, "GIF", save_all=True, append_images=frames[1:])
    clear = picture(0, mode="RGBA")
    found = load(made({"a/x.gif": moving.getvalue(), "a/y.png": clear, "a/z.png": clear}), WANTED)
    notes = ["2 transparent images: laid over white", "1 animation: the first frame is taken"]
    assert found.contents.notes == notes and values(found) == [1, 127, 127]


def test_names_of_any_kind(made: Any) -> None:
    names = ["a/\n.png", "a/ä.png", "a/\x1b[2J.png", "日本/x.png", "a/ .png"]
    found = load(made({name: picture(i) for i, name in enumerate(sorted(names))}), WANTED)
    assert values(found) == list(range(5)) and found.contents.classes == ("a", "日本")
    assert "a/\\n.png is no readable image" in refusal(made({"a/\n.png": b"junk"}))


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "set" / "a").mkdir(parents=True)
    name = os.fsdecode(b"\xff\xfe\xc3.png")
    (tmp_path / "set" / "a" / name).write_bytes(picture(3))
    assert values(load(tmp_path / "set", WANTED)) == [3]
    (tmp_path / "set" / "a" / name).write_bytes(b"junk")
    assert refusal(tmp_path / "set").isprintable()


def test_a_class_whose_name_is_a_long_number(tmp_path: Path) -> None:
    found = load(archive(tmp_path / "set", {"9" * 5000 + "/x.png": picture(1), "7/x.png": picture(2)}), WANTED)
    assert found.contents.classes == ("7", "9" * 5000) and found.labels.tolist() == [0, 1]


def test_what_is_recognised(tmp_path: Path) -> None:
    yes = [
        folder(tmp_path / "a", {"x.png": picture()}),
        folder(tmp_path / "b", {"c/d/x": picture(), "x.txt": b""}),
        archive(tmp_path / "c", {"a/x.jpg": picture(), "x.txt": b""}),
        folder(tmp_path / "d", {"x.jpg": b"junk"}),
    ]
    no = [
        folder(tmp_path / "e", {"x.npy": b"", ".x.png": picture(), "y.safetensors": b"", ".git/x.png": picture()}),
        archive(tmp_path / "f", {"x.npy": b"", "__MACOSX/x.png": b""}),
        folder(tmp_path / "g", {"x/": b""}),
        folder(tmp_path, {"h.png": picture()}) / "h.png",
        tmp_path / "nothing",
        tmp_path / ("x" * 300),
    ]
    os.mkfifo(tmp_path / "pipe")
    np.savez(tmp_path / "i.npz", images=np.zeros(3))
    assert [place for place in yes if not recognises(place)] == []
    assert [place for place in [*no, tmp_path / "pipe", tmp_path / "i.npz"] if recognises(place)] == []


def test_places_that_are_nothing(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nothing") == "no such file or folder"
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe") == "cannot be read (neither a folder nor a file)"
    (tmp_path / "file").write_bytes(picture())
    assert refusal(tmp_path / "file") == "is one image: name the folder that it lies in"
    (tmp_path / "empty.tar").write_bytes(bytes(10240))
    assert refusal(tmp_path / "empty.tar") == "is empty, or no kind of file that is read (docs/data.md lists them)"
    (tmp_path / "x.zip").write_bytes(b"PK")
    assert refusal(tmp_path / "x.zip").startswith("cannot be read (it is no zip, or its end is missing")


@pytest.mark.parametrize("wrapper", ["", "w/"])
def test_links_to_other_classes_do_not_multiply_images(tmp_path: Path, wrapper: str) -> None:
    """A folder is entered once for each class, by its own name rather than by a link; two classes may be one folder."""
    count = 6
    place = folder(tmp_path / "set", {f"{wrapper}c{i}/sub/x.png": picture(i) for i in range(count)})
    for i in range(count):
        for j in range(count):
            (place / f"{wrapper}c{i}/l{j}").symlink_to(f"../c{j}")
    (place / f"{wrapper}again").symlink_to("c0")
    found = load(place, WANTED)
    assert found.contents.classes == ("again", *(f"c{i}" for i in range(count)))
    assert found.labels.bincount().tolist() == [count] * (count + 1)
    assert values(found)[count : 2 * count] == [*range(1, count), 0]


def test_a_path_that_is_too_long_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder(tmp_path / "set", {"a/x.png": picture(), "b/x.png": picture()})
    monkeypatch.chdir(place / "a")
    for _ in range(45):
        os.mkdir("x" * 100)
        os.chdir("x" * 100)
    Path("y.png").write_bytes(picture())
    assert "File name too long" in refusal(place)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read all")
@pytest.mark.parametrize("closed", ["a", "."])
def test_a_folder_that_may_not_be_searched_is_said(tmp_path: Path, closed: str) -> None:
    place = folder(tmp_path / "set", {"a/x.png": picture(), "b/x.png": picture()})
    (place / closed).chmod(0o444)
    said = refusal(place)
    (place / closed).chmod(0o755)
    assert "Permission denied" in said


class Given:
    """Encoded images of any other kind."""

    def __init__(self, contents: Files) -> None:
        self.names, self._contents = list(contents), list(contents.values())
        self.sizes = np.array([len(content) for content in self._contents], np.int64)

    def read(self, number: int) -> bytes:
        if self.names[number] == "lost":
            raise images.Unreadable("is lost")
        return self._contents[number]


def test_other_formats_make_sets_of_images() -> None:
    files = Given({"b": picture(1), "a": picture(2, mode="RGBA"), "lost": b""})
    labels = torch.tensor([1, 0, 1])
    about: dict[str, Any] = {"kind": "shards", "left_out": Counter({".cls": 3}), "notes": ["x"], "where": "here"}
    with pytest.raises(DataError, match=r"^--data here: lost is lost$"):
        image_set(files, labels, ("x", "y"), WANTED, **about)
    found = image_set(files, labels, ("x", "y"), WANTED._replace(skip_bad=True), **about)
    assert found.labels.tolist() == [1, 0] and found.contents.classes == ("x", "y") and found.contents.kind == "shards"
    assert found.contents.left_out == {".cls": 3, "bad: lost is lost": 1} and about["left_out"] == {".cls": 3}
    assert found.contents.notes == [
        "x",
        "1 bad image is left out: lost is lost",
        "1 transparent image: laid over white",
    ]
    assert found.read(torch.tensor([0]))[0, 0, 0, 0] == 1
    with pytest.raises(DataError, match="holds no image that can be read"):
        image_set(Given({}), torch.empty(0, dtype=torch.int64), (), WANTED, **about)


def test_endings_are_in_one_list() -> None:
    assert not listing.IMAGES & listing.OTHERS

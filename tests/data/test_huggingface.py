"""Data sets of Hugging Face: by a stand-in for their package, and by the package itself where it is installed."""

import io
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from soflow_fast.data import huggingface
from soflow_fast.data.dataset import Dataset, Wanted
from soflow_fast.data.huggingface import Rows
from soflow_fast.errors import DataError

WANTED = Wanted(size=4, channels=3)


def picture(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


class Column(list):
    """An Arrow column."""

    def to_pylist(self) -> list[Any]:
        return list(self)

    def __getitem__(self, number: Any) -> Any:
        return Scalar(super().__getitem__(number))


class Scalar:
    def __init__(self, value: Any) -> None:
        self.value = value

    def as_py(self) -> Any:
        return self.value


class Table:
    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self.columns = columns

    def column(self, name: str) -> Column:
        return Column(self.columns[name])

    def select(self, names: list[str]) -> "Table":
        return Table({name: self.columns[name] for name in names})

    def validate(self, *, full: bool) -> None:
        assert full and len({len(values) for values in self.columns.values()}) == 1


class FakeSet:
    """What is used of `datasets.Dataset`."""

    def __init__(self, columns: dict[str, list[Any]], features: dict[str, Any]) -> None:
        self.columns, self.features = columns, features
        self.format = ""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def with_format(self, kind: str) -> "FakeSet":
        found = FakeSet(self.columns, self.features)
        found.format = kind
        return found

    def __getitem__(self, rows: Any) -> Table:
        assert self.format == "arrow"
        chosen = rows if isinstance(rows, slice) else slice(rows, rows + 1)
        return Table({name: values[chosen] for name, values in self.columns.items()})


class ImageFeature:
    pass


class ClassLabel:
    def __init__(self, names: list[str]) -> None:
        self.names = names


class Fake:
    """The package, whose data set is `found`; `asked` is what it was to open."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.columns: dict[str, list[Any]] = {
            "image": [{"bytes": picture(10 * i), "path": None} for i in range(4)],
            "label": [1, 0, 1, 0],
        }
        self.features: dict[str, Any] = {"image": ImageFeature(), "label": ClassLabel(["cat", "dog"])}

    def open(self, what: Any) -> FakeSet:
        self.asked.append(what)
        return FakeSet(self.columns, self.features)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    found = Fake()
    package, arrow, compute = ModuleType("datasets"), ModuleType("pyarrow"), ModuleType("pyarrow.compute")
    package.Image, package.ClassLabel = ImageFeature, ClassLabel
    package.load_from_disk = found.open
    package.Dataset = type("Dataset", (), {"from_parquet": staticmethod(found.open)})
    package.disable_progress_bars = package.enable_progress_bars = package.is_progress_bar_enabled = lambda: None
    package.logging = ModuleType("datasets.logging")
    package.logging.get_verbosity = package.logging.set_verbosity = lambda *level: None
    compute.struct_field = lambda column, name: Column(None if value is None else value[name] for value in column)
    compute.binary_length = lambda column: Column(None if x is None else len(x) for x in column.to_pylist())
    arrow.compute = compute
    for module in (package, arrow, compute):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


def saved(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (folder / "data-00000-of-00001.arrow").write_bytes(b"x")
    return folder


def parquet(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"PAR1 and so on")
    return folder


def message(place: Path) -> str:
    with pytest.raises(DataError) as error:
        huggingface.load(place, WANTED)
    line = str(error.value)
    assert line.startswith(f"--data {place}: ") and line.isprintable(), line
    return line


def check(data: Dataset) -> None:
    assert data.read(torch.arange(4))[:, 0, 0, 0].tolist() == [0, 10, 20, 30]
    assert data.labels.tolist() == [1, 0, 1, 0] and data.labels.dtype == torch.int64
    assert data.contents.classes == ("cat", "dog")


def test_a_saved_data_set(fake: Fake, tmp_path: Path) -> None:
    place = saved(tmp_path / "set")
    assert huggingface.recognises(place)
    data = huggingface.load(place, WANTED)
    check(data)
    assert fake.asked == [str(place)] and data.contents.kind == "data set of Hugging Face"
    assert data.contents.notes == [] and data.contents.checksum


def test_splits_side_by_side_are_refused(fake: Fake, tmp_path: Path) -> None:
    place = tmp_path / "set"
    saved(place / "train")
    saved(place / "test")
    (place / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert huggingface.recognises(place)
    assert f"holds the splits train, test: name one of them, as {place / 'train'}" in message(place)
    check(huggingface.load(place / "test", WANTED))
    (place / "dataset_dict.json").write_text('{"splits": ["train"]}')
    check(huggingface.load(place, WANTED))
    assert fake.asked == [str(place / "test"), str(place / "train")]
    for text in ("", "[]", "{}", '{"splits": ["../train"]}', '{"splits": [3]}', "[" * 100000, '{"splits": "train"}'):
        (place / "dataset_dict.json").write_text(text)
        assert "dataset_dict.json" in message(place)


def test_a_saved_data_set_that_points_elsewhere_is_refused(fake: Fake, tmp_path: Path) -> None:
    place = saved(tmp_path / "set")
    for name in ("../x.arrow", "/etc/passwd", "", "..", 3, None):
        (place / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        assert "state.json names a file that is not in the folder" in message(place)
    for text in ("", "[]", '{"_data_files": 3}', '{"_data_files": [3]}'):
        (place / "state.json").write_text(text)
        message(place)
    assert fake.asked == []


def test_parquet_files(fake: Fake, tmp_path: Path) -> None:
    told: list[str] = []
    for names in (
        ["train-00001-of-00002.parquet", "train-00000-of-00002.parquet"],
        ["data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet"],
        ["train/0001.parquet", "train/0000.parquet"],
        ["b.parquet", "a.parquet"],
    ):
        place = parquet(tmp_path / names[0].replace("/", "-"), *names)
        assert huggingface.recognises(place)
        data = huggingface.load(place, WANTED._replace(say=told.append))
        check(data)
        assert fake.asked.pop() == [str(place / name) for name in reversed(names)]
        assert data.contents.kind == "2 parquet files" and "cache folder" in data.contents.notes[0]
        one = place / names[0]
        assert huggingface.recognises(one) and huggingface.load(one, WANTED).contents.kind == "1 parquet file"
    assert told == ["reading 2 parquet files"] * 4


@pytest.mark.parametrize(
    "names",
    [
        ["train-0.parquet", "test-0.parquet"],
        ["data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"],
        ["train/0000.parquet", "test/0000.parquet"],
    ],
)
def test_parquet_files_of_several_splits_are_refused(names: list[str], fake: Fake, tmp_path: Path) -> None:
    line = message(parquet(tmp_path / "set", *names))
    assert "holds the splits t" in line and "name one of them" in line and fake.asked == []


def test_labels_of_other_kinds(fake: Fake, tmp_path: Path) -> None:
    place = saved(tmp_path / "set")

    def load(labels: list[Any], feature: Any = None, column: str = "label") -> Dataset:
        fake.columns = {"image": fake.columns["image"], column: labels}
        fake.features = {"image": fake.features["image"], column: feature}
        return huggingface.load(place, WANTED)

    data = load([2, 0, 1, 0])
    assert data.contents.classes == ("0", "1", "2") and data.labels.tolist() == [2, 0, 1, 0]
    data = load(["b", "10", "9", "b"])
    assert data.contents.classes == ("9", "10", "b") and data.labels.tolist() == [2, 1, 0, 2]
    data = load([1, 0, 0, 0], ClassLabel(["cat", "dog"]), "fine_label")
    assert data.contents.notes == ["the labels are those of the column fine_label"]
    data = load([1, 0, 0, 0], ClassLabel(["cat", "dog"]), "animal")
    assert data.contents.classes == ("cat", "dog")
    for nothing in (load([-1] * 4, ClassLabel(["cat", "dog"])), load([None] * 4), load([1, 2, 3, 4], None, "weight")):
        assert nothing.contents.classes == () and nothing.labels.tolist() == [0] * 4
        assert "no sample has a label" in nothing.contents.notes
    for labels, feature, said in (
        ([0, 1, None, 0], None, "row 2 has no label, others have one"),
        ([0, 1, 2, 0], ClassLabel(["cat", "dog"]), "row 2 has the label 2, not one of 0..1"),
        ([0, 0, 0, 0], ClassLabel(["cat", "dog"]), "dog is a class without an image"),
        ([0, 1, -2, 0], None, "row 2 has the label -2, not one of 0..99999"),
        ([0, 10**6, 0, 0], None, "row 1 has the label 1000000, not one of"),
        ([0, 1.5, 0, 0], None, "row 1 has the label 1.5, not one of"),
        ([0, "cat", 0, 0], None, "row 1 has the label 'cat', not one of"),
        ([[0], [1], [0], [0]], None, "row 0 has the label [0], not one of"),
    ):
        with pytest.raises(DataError) as error:
            load(labels, feature)
        assert said in str(error.value)


def test_columns_of_images(fake: Fake, tmp_path: Path) -> None:
    place = saved(tmp_path / "set")
    rows, label = fake.columns["image"], fake.columns["label"]
    fake.columns, fake.features = {"photo": rows, "label": label}, {"photo": {"bytes": 0, "path": 0}, "label": None}
    assert len(huggingface.load(place, WANTED)) == 4
    fake.columns["mask"], fake.features["mask"] = rows, ImageFeature()
    assert "has several columns of images (photo, mask)" in message(place)
    fake.columns["image"], fake.features["image"] = rows, ImageFeature()
    assert len(huggingface.load(place, WANTED)) == 4
    fake.columns, fake.features = {"a\nb": label}, {"a\nb": None}
    assert "has no column of images, but (a\\nb)" in message(place)
    for row in (None, {"bytes": None, "path": "/etc/passwd"}):
        fake.columns, fake.features = {"image": [rows[0], row]}, {"image": ImageFeature()}
        assert "row 1 holds no image, or only the path of one" in message(place)
    fake.columns = {"image": []}
    assert "holds no images" in message(place)


def test_whatever_the_package_raises_ends_in_one_line(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: str) -> None:
        raise KeyError("a\nb" + "c" * 1000)

    monkeypatch.setattr(sys.modules["datasets"], "load_from_disk", fails)
    line = message(saved(tmp_path / "set"))
    assert "cannot be read by `datasets` (KeyError: " in line and len(line) < 400


def test_without_the_package_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for place in (saved(tmp_path / "set"), parquet(tmp_path / "files", "a.parquet")):
        assert huggingface.recognises(place)
        assert message(place).endswith("pip install datasets")


def test_what_is_no_data_set_is_not_taken_for_one(fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").mkdir()
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "b.parquet").write_bytes(b"text")
    os.mkfifo(tmp_path / "pipe")
    for name in ("", "a.parquet", "b", "b/b.parquet", "pipe", "nowhere"):
        assert not huggingface.recognises(tmp_path / name), name
    assert "holds no data set of Hugging Face" in message(tmp_path / "nowhere")


def test_rows_are_named_by_their_numbers() -> None:
    rows = Rows(3)
    assert list(rows) == ["row 0", "row 1", "row 2"] and rows[-1] == "row 2" and rows[1:] == ["row 1", "row 2"]
    with pytest.raises(IndexError):
        rows[3]


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A data set as the package itself makes one."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    package = pytest.importorskip("datasets")
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    package.disable_progress_bars()
    features = package.Features({"image": package.Image(), "label": package.ClassLabel(names=["cat", "dog"])})
    rows = [{"bytes": picture(10 * i), "path": None} for i in range(4)]
    return package.Dataset.from_dict({"image": rows, "label": [1, 0, 1, 0]}, features=features)


REAL = "ignore::Warning"  # of the package, and of those that it stands on


@pytest.mark.filterwarnings(REAL)
def test_the_package_itself(real: Any, tmp_path: Path) -> None:
    package = sys.modules["datasets"]
    real.save_to_disk(str(tmp_path / "set"))
    real.select([3, 2, 1, 0]).sort("label").save_to_disk(str(tmp_path / "sorted"))
    package.DatasetDict({"train": real, "test": real}).save_to_disk(str(tmp_path / "both"))
    (tmp_path / "files").mkdir()
    for i in range(2):
        real.select(range(2 * i, 2 * i + 2)).to_parquet(str(tmp_path / "files" / f"train-{i}.parquet"))
    for name in ("set", "both/train", "files"):
        assert huggingface.recognises(tmp_path / name)
        check(huggingface.load(tmp_path / name, WANTED))
    data = huggingface.load(tmp_path / "sorted", WANTED)
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert sorted(data.read(torch.arange(4))[:, 0, 0, 0].tolist()) == [0, 10, 20, 30]
    assert "holds the splits train, test" in message(tmp_path / "both")
    real.select([3, 3]).to_parquet(str(tmp_path / "files" / "train-0.parquet"))
    changed = huggingface.load(tmp_path / "files", WANTED)
    assert changed.labels.tolist() == [0, 0, 1, 0], "the cache is of a file that was changed"


@pytest.mark.filterwarnings(REAL)
def test_files_of_the_package_that_are_damaged_end_in_one_line_or_in_images(real: Any, tmp_path: Path) -> None:
    place = tmp_path / "set"
    real.save_to_disk(str(place))
    for file in sorted(place.iterdir()):
        content = file.read_bytes()
        step = max(1, len(content) // 40)
        for at in range(0, len(content), step):
            for bad in (content[:at], content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :]):
                file.unlink()  # the data set before is still mapped
                file.write_bytes(bad)
                try:
                    huggingface.load(place, WANTED)
                except DataError as error:
                    assert str(error).startswith(f"--data {place}: ") and str(error).isprintable(), error
        file.unlink()
        file.write_bytes(content)

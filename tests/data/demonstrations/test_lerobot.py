"""`data.demonstrations.lerobot`: data sets of both layouts, written here by pyarrow, and damaged ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from soflow_fast.data.demonstrations import open_demonstrations
from soflow_fast.data.demonstrations.lerobot import read_lerobot
from soflow_fast.errors import ConfigError, DataError

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

LENGTHS = (3, 2, 4)
FEATURES: dict[str, Any] = {
    "observation.state": {"dtype": "float32", "shape": [2], "names": ["x", "y"]},
    "observation.images.top": {"dtype": "video", "shape": [3, 8, 8], "names": None},
    "observation.environment_state": {"dtype": "float32", "shape": [1], "names": None},
    "action": {"dtype": "float32", "shape": [3], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "next.done": {"dtype": "bool", "shape": [1], "names": None},
}


def frames() -> dict[str, np.ndarray]:
    """The columns of all episodes, in order."""
    total = sum(LENGTHS)
    number = np.arange(total, dtype=np.float32)
    return {
        "observation.state": np.stack([number, number**2], 1),
        "observation.environment_state": -number,
        "action": np.stack([number, 10 + number, 0.5 * number], 1),
        "episode_index": np.repeat(np.arange(len(LENGTHS)), LENGTHS),
        "frame_index": np.concatenate([np.arange(n) for n in LENGTHS]),
        "next.done": np.zeros(total, dtype=bool),
    }


def table(columns: dict[str, np.ndarray], rows: np.ndarray, fixed: bool) -> Any:
    """Some rows as LeRobot has them: vectors are lists, of a fixed size or not, single numbers plain columns."""
    made = {}
    for name, values in columns.items():
        chosen = values[rows]
        if chosen.ndim == 2:
            kind = arrow.list_(arrow.float32(), chosen.shape[1] if fixed else -1)
            made[name] = arrow.array(chosen.tolist(), kind)
        else:
            made[name] = arrow.array(chosen)
    return arrow.table(made)


def write(folder: Path, version: str, columns: dict[str, np.ndarray] | None = None, **info: Any) -> Path:
    """A data set: a file for each episode in version 2, and two files with rows out of order in version 3."""
    columns = frames() if columns is None else columns
    episode = columns["episode_index"]
    (folder / "meta").mkdir(parents=True)
    (folder / "data" / "chunk-000").mkdir(parents=True)
    if version == "v3.0":
        order = np.arange(len(episode))
        parts = {"file-000": order[::-1][:5].copy(), "file-001": order[::-1][5:].copy()}
    else:
        parts = {f"episode_{k:06d}": np.flatnonzero(episode == k) for k in np.unique(episode)}
    for name, rows in parts.items():
        parquet.write_table(table(columns, rows, version == "v3.0"), folder / "data" / "chunk-000" / f"{name}.parquet")
    values = {"codebase_version": version, "total_frames": len(episode), "fps": 10, "features": FEATURES} | info
    (folder / "meta" / "info.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
def test_a_data_set_is_read_in_the_order_of_its_frames(tmp_path: Path, version: str):
    found, wanted = read_lerobot(write(tmp_path / "set", version)), frames()
    observations = np.column_stack([wanted["observation.state"], wanted["observation.environment_state"]])
    assert np.array_equal(found.observations.numpy(), observations) and found.observations.dtype == torch.float32
    assert np.array_equal(found.actions.numpy(), wanted["action"])
    assert found.ends.tolist() == [2, 2, 2, 4, 4, 8, 8, 8, 8]
    assert found.kind == f"3 episodes of a LeRobot data set ({version})"


def test_the_same_frames_are_the_same_data_in_either_layout(tmp_path: Path):
    two, three = (open_demonstrations(str(write(tmp_path / v, v)), 2, 0) for v in ("v2.1", "v3.0"))
    assert two.contents.checksum == three.contents.checksum
    assert torch.equal(two.read(torch.arange(9)), three.read(torch.arange(9)))
    assert two.shape == (1, 2, 3) and two.given(torch.tensor([0])).shape == (1, 3)
    changed = frames()
    changed["action"][4, 1] += 1
    assert read_lerobot(write(tmp_path / "other", "v3.0", changed)).checksum != two.contents.checksum


def test_a_single_number_is_a_column_of_its_own(tmp_path: Path):
    columns = frames() | {"action": np.arange(9, dtype=np.float32)}
    features = FEATURES | {"action": {"dtype": "float32", "shape": [1], "names": None}}
    found = read_lerobot(write(tmp_path / "set", "v3.0", columns, features=features))
    assert found.actions.tolist() == [[float(k)] for k in range(9)]


def without(*names: str) -> dict[str, Any]:
    return {name: feature for name, feature in FEATURES.items() if name not in names}


@pytest.mark.parametrize(
    "info, message",
    [
        ({"codebase_version": "v4.0"}, r"is of LeRobot's version 'v4.0'; read are v2.0, v2.1, v3.0"),
        ({"total_frames": 10}, r"holds 9 frames, meta/info.json says 10"),
        ({"features": without("action")}, r"has no action among its features; images alone are not learned from"),
        (
            {"features": without("observation.state", "observation.environment_state")},
            r"has no observation.state or observation.environment_state among its features",
        ),
        ({"features": FEATURES | {"action": {"shape": [4]}}}, r"has 3 numbers in a row, meta/info.json says 4"),
        ({"features": None}, "names no features"),
    ],
)
def test_info_that_does_not_fit_is_refused(tmp_path: Path, info: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message) as error:
        read_lerobot(write(tmp_path / "set", "v2.1", **info))
    assert str(error.value).startswith("--data ") and "\n" not in str(error.value)


def damaged_numbers() -> dict[str, np.ndarray]:
    columns = frames()
    columns["action"][7, 2] = np.nan
    return columns


def test_files_that_are_damaged_are_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"file-000.parquet: column action holds a number that is not finite"):
        read_lerobot(write(tmp_path / "nan", "v3.0", damaged_numbers()))
    columns = {name: values for name, values in frames().items() if name != "frame_index"}
    with pytest.raises(DataError, match=r"episode_000000.parquet: (has no column frame_index|cannot be read)"):
        read_lerobot(write(tmp_path / "column", "v2.1", columns))
    folder = write(tmp_path / "torn", "v2.1")
    file = folder / "data" / "chunk-000" / "episode_000001.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"episode_000001.parquet: cannot be read"):
        read_lerobot(folder)
    for file in folder.glob("data/*/*"):
        file.unlink()
    with pytest.raises(DataError, match=r"holds no data/\*/\*.parquet"):
        read_lerobot(folder)
    (folder / "meta" / "info.json").write_text("{")
    with pytest.raises(DataError, match=r"meta/info.json is no JSON"):
        read_lerobot(folder)


def test_rows_of_several_lengths_are_refused(tmp_path: Path):
    folder = write(tmp_path / "set", "v2.1")
    file = folder / "data" / "chunk-000" / "episode_000001.parquet"
    rows = parquet.read_table(file)
    ragged = arrow.array([[1.0, 2.0], [3.0, 4.0, 5.0, 6.0]], arrow.list_(arrow.float32()))
    place = rows.column_names.index("action")
    parquet.write_table(rows.set_column(place, "action", ragged), file)
    with pytest.raises(DataError, match=r"episode_000001.parquet: column action"):
        read_lerobot(folder)


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write(tmp_path / "set", "v2.1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"is read by pyarrow: pip install 'soflow-fast\[policy\]'"):
        read_lerobot(folder)


@pytest.mark.parametrize(
    ("row", "name", "value", "place"),
    [(1, "frame_index", 5, "frame 2 of episode 0"), (1, "frame_index", 0, "frame 0 of episode 0")],
    ids=["missing", "twice"],
)
def test_frames_that_do_not_follow_each_other_are_refused(row: int, name: str, value: int, place: str, tmp_path: Path):
    columns = frames()
    columns[name] = columns[name].copy()
    columns[name][row] = value
    with pytest.raises(DataError, match=f"{place} does not follow the frame before it"):
        read_lerobot(write(tmp_path / "data", "v2.1", columns))


def test_an_episode_that_is_no_whole_number_is_refused(tmp_path: Path):
    columns = frames() | {"episode_index": frames()["episode_index"] + 0.5}
    with pytest.raises(DataError, match="column episode_index is not of whole numbers"):
        read_lerobot(write(tmp_path / "data", "v3.0", columns))

"""Vectors beside samples: by name and in order, checked, in batches of a source and in folders of latents."""

import gc
import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from soflow_fast.config.presets import preset
from soflow_fast.config.schema import Config, DataChoices, override
from soflow_fast.data import Source, fitted, identity, open_source, webdataset
from soflow_fast.data import latents as latents_module
from soflow_fast.data._beside import conditions_of
from soflow_fast.data.conditions import Conditions, read_vectors
from soflow_fast.data.dataset import Wanted
from soflow_fast.data.images import load
from soflow_fast.data.latents import Header, Layout, Writer
from soflow_fast.errors import DataError
from soflow_fast.runs.batches.resident import Resident, on_device_bytes
from tests.data.pictures import WANTED, archive, folder, picture

E = 5
NAMES = ["b/2.png", "a/1.png", "b/1.png", "a/2.png"]
SORTED = sorted(NAMES)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def vectors(n: int = 4, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, E)).astype(dtype)


def images(place: Path, names: list[str] = NAMES) -> Path:
    return folder(place, {name: picture(i) for i, name in enumerate(names)})


def by_name(place: Path, names: Any = tuple(NAMES), values: np.ndarray | None = None) -> Path:
    np.savez(place, names=names, vectors=vectors(len(names)) if values is None else values)
    return place


def refusal(place: Path, file: Path | str = "") -> str:
    with pytest.raises(DataError) as error:
        conditions_of(load(place, WANTED), str(place), str(file))
    assert "\n" not in str(error.value)
    return str(error.value)


def configured(**changes: Any) -> Config:
    return override(preset("cifar10"), {"model.input_size": 4, "batch_size": 4, "data.flip": False, **changes})


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("as_zip", [False, True])
def test_each_image_has_the_vector_of_its_name(tmp_path: Path, as_zip: bool, dtype: Any) -> None:
    place = images(tmp_path / "images")
    by_name(place / "conditions.npz", values=vectors(dtype=dtype))
    given = ""
    if as_zip:
        files = {name: (place / name).read_bytes() for name in NAMES}
        given, place = str(place / "conditions.npz"), archive(tmp_path / "images", files)
    found = load(place, WANTED)
    conditions = conditions_of(found, str(place), given)
    assert conditions is not None and (len(conditions), conditions.size) == (4, E)
    got = conditions.rows(torch.tensor([3, 0]))
    wanted = vectors(dtype=dtype)[[NAMES.index(SORTED[3]), NAMES.index(SORTED[0])]]
    assert got.dtype == torch.from_numpy(wanted).dtype and np.array_equal(got.numpy(), wanted)
    assert not found.contents.left_out  # of the folder, which knows what the file is for
    assert f"conditions: vectors of 5 numbers, {np.dtype(dtype)}, from conditions.npz" in found.contents.notes


def test_the_folder_around_all_images_may_be_in_the_names_or_not(tmp_path: Path) -> None:
    place = images(tmp_path / "set" / "train")
    for names in (NAMES, [f"train/{name}" for name in NAMES]):
        found = load(tmp_path / "set", WANTED)
        assert found.wrapper == "train" and found.names is not None and found.names[0] == "train/a/1.png"
        conditions = conditions_of(found, str(place), str(by_name(tmp_path / "v.npz", names)))
        assert conditions is not None
        assert np.array_equal(conditions.rows(torch.tensor([1])).numpy()[0], vectors()[NAMES.index(SORTED[1])])


def test_vectors_of_no_image_are_said_and_left(tmp_path: Path) -> None:
    place = images(tmp_path / "images")
    by_name(place / "conditions.npz", [*NAMES, "c/1.png"])
    found = load(place, WANTED)
    assert conditions_of(found, str(place)) is not None
    assert "1 vectors of conditions.npz are of no sample" in found.contents.notes


def test_a_bad_image_takes_its_vector_along(tmp_path: Path) -> None:
    place = images(tmp_path / "images")
    (place / "a/2.png").write_bytes(picture()[:-30])
    by_name(place / "conditions.npz")
    found = load(place, WANTED._replace(skip_bad=True))
    conditions = conditions_of(found, str(place))
    assert conditions is not None and len(conditions) == len(found) == 3
    assert np.array_equal(conditions.rows(torch.tensor([1])).numpy()[0], vectors()[NAMES.index("b/1.png")])


def test_samples_of_tar_shards_are_in_order_and_a_bad_one_takes_its_vector_along(tmp_path: Path) -> None:
    contents = [picture(0), picture(1)[:-30], picture(2), picture(3)]
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as shard:
        for i, content in enumerate(contents):
            member = tarfile.TarInfo(f"{i}.png")
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    place = tmp_path / "shards"
    np.save(place / "conditions.npy", vectors())
    found = webdataset.load(place, WANTED._replace(skip_bad=True))
    conditions = conditions_of(found, str(place))
    assert conditions is not None and len(conditions) == len(found) == 3 and found.names is None
    assert np.array_equal(conditions.rows(torch.arange(3)).numpy(), vectors()[[0, 2, 3]])
    np.save(place / "conditions.npy", vectors(3))  # of those that are left
    conditions = conditions_of(found, str(place))
    assert conditions is not None and np.array_equal(conditions.rows(torch.arange(3)).numpy(), vectors(3))
    np.save(place / "conditions.npy", vectors(2))
    with pytest.raises(DataError, match=r"conditions\.npy: holds 2 vectors, the data 3 samples"):
        conditions_of(found, str(place))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"names": [*NAMES[:3], "x.png"]}, "holds no vector for a/2.png"),
        ({"names": ["x.png", "y.png"], "vectors": vectors(2)}, "holds no vector for a/1.png and 3 more of 4"),
        ({"names": [*NAMES, NAMES[0]], "vectors": vectors(5)}, "names b/2.png twice"),
        ({"names": NAMES[:3]}, "must have one name, text, for each of 4 vectors, got <U7, 3"),
        ({"names": [1, 2, 3, 4]}, "must have one name, text, for each of 4 vectors, got int64, 4"),
        ({"vectors": vectors(dtype=np.float64)}, "must be vectors, float16 or float32 [M, E], they are float64, 4 x 5"),
        ({"vectors": vectors()[0]}, "must be vectors, float16 or float32 [M, E], they are float32, 5"),
        ({"vectors": vectors(0)}, "must be vectors, float16 or float32 [M, E], they are float32, 0 x 5"),
        ({"vectors": np.where(np.eye(4, 5) > 0, np.nan, 1.0).astype("f")}, "the vector of b/2.png is not finite"),
        ({"vectors": np.array([[None]])}, "cannot be read (Object arrays cannot be loaded when allow_pickle=False)"),
    ],
)
def test_a_wrong_file_of_names_is_refused_by_name(tmp_path: Path, content: dict[str, Any], said: str) -> None:
    place = images(tmp_path / "images")
    np.savez(tmp_path / "v.npz", **{"names": NAMES, "vectors": vectors(), **content})
    assert refusal(place, tmp_path / "v.npz") == f"--conditions {tmp_path / 'v.npz'}: {said}"


def test_other_wrong_files_are_refused_by_name(tmp_path: Path) -> None:
    place, file = images(tmp_path / "images"), tmp_path / "v.npz"
    for content, said in (
        (b"", "is neither .npz nor .npy"),
        (pickle.dumps(vectors()), "is neither .npz nor .npy"),
        (b"PK\3\4 and no more", "cannot be read (File is not a zip file)"),
        (b"\x93NUMPY and no more", "cannot be read ("),
    ):
        file.write_bytes(content)
        assert refusal(place, file).startswith(f"--conditions {file}: {said}")
    gc.collect()  # a file that was left open would be noticed by another test
    np.savez(file, latents=vectors())
    assert refusal(place, file) == f"--conditions {file}: must hold names and vectors, it has latents"
    assert refusal(place, tmp_path / "none.npz") == f"--conditions {tmp_path / 'none.npz'}: No such file or directory"
    assert "Is a directory" in refusal(place, tmp_path)
    np.save(tmp_path / "v.npy", vectors())
    said = "has no names, and these images have: write conditions.npz with names and vectors"
    assert refusal(place, tmp_path / "v.npy") == f"--conditions {tmp_path / 'v.npy'}: {said}"
    by_name(place / "conditions.npz")
    np.save(place / "conditions.npy", vectors())
    assert "holds conditions.npz and conditions.npy: remove one" in refusal(place)


def digits(file: Path, **changes: Any) -> Source:
    return open_source(
        override(preset("digits"), {"condition_size": E, "conditions": file, "batch_size": 8, **changes})
    )


def test_batches_have_vectors_in_the_place_of_labels(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", vectors(1797, np.float16))
    source = digits(tmp_path / "v.npy")
    index = source.indices(3)
    x, y = source.batch(3)
    assert x.shape == (8, 1, 8, 8) and y.dtype == torch.float16
    assert np.array_equal(y.numpy(), vectors(1797, np.float16)[index.numpy()])
    halves = [source.batch(3, rank, 2)[1] for rank in range(2)]
    assert torch.equal(torch.cat(halves), y)
    resident = Resident(source, torch.device("cpu"))
    assert torch.equal(resident.of(3)[1], y) and torch.equal(resident.of(3, 1, 2)[1], halves[1])
    assert on_device_bytes(source) == 1797 * (64 * 4 + E * 2)


def test_what_the_model_and_the_data_do_not_agree_on_is_one_line(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", vectors(1796))
    place = images(tmp_path / "images")
    by_name(tmp_path / "named.npz")
    for changes, said in (
        (
            {"conditions": tmp_path / "v.npy"},
            f"--conditions {tmp_path / 'v.npy'}: holds 1796 vectors, the data 1797 samples",
        ),
        ({}, "the digits have no conditions, the model takes vectors of 5: give --conditions FILE"),
        (
            {"conditions": tmp_path / "named.npz"},
            f"--conditions {tmp_path / 'named.npz'}: has names, and these samples have none: write conditions.npy, "
            "vectors in their order",
        ),
    ):
        with pytest.raises(DataError) as error:
            open_source(override(preset("digits"), {"condition_size": E, **changes}))
        assert str(error.value) == said
    with pytest.raises(DataError) as error:
        open_source(override(preset("digits"), {"conditions": tmp_path / "v.npy"}))
    assert str(error.value).endswith("the model takes labels; give --condition-size 5 too")
    with pytest.raises(DataError) as error:
        open_source(configured(data=place, condition_size=E))
    assert str(error.value) == (
        f"--data {place}: has no conditions, the model takes vectors of 5: put conditions.npz or conditions.npy into "
        "the folder, or give --conditions FILE"
    )
    by_name(place / "conditions.npz")
    with pytest.raises(DataError) as error:
        open_source(configured(data=place, condition_size=6))
    said = "has vectors of 5 numbers, --condition-size is 6"
    assert str(error.value) == f"--conditions {place / 'conditions.npz'}: {said}"
    source = open_source(configured(data=place, condition_size=E))
    assert fitted(configured(condition_size=E), source, DataChoices(classes_fixed=False)).model.num_classes == 0
    assert open_source(configured(data=place)).dataset.conditions is None  # nobody asked


def test_a_file_that_changes_during_a_run_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", vectors(1797))
    source = digits(tmp_path / "v.npy")
    np.save(tmp_path / "v.npy", vectors(3))
    with pytest.raises(DataError, match=r"v\.npy: has changed during the run"):
        source.batch(0)


def test_vectors_are_part_of_the_identity(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", vectors(1797))
    np.save(tmp_path / "b.npy", -vectors(1797))
    a, b = (identity.identify(digits(tmp_path / name).dataset) for name in ("a.npy", "b.npy"))
    none = identity.identify(open_source(preset("digits")).dataset)
    assert identity.from_json(identity.to_json(a)) == a and len(a.conditions) == 64 and none.conditions == ""
    assert identity.changes(a, b) == ["other vectors"]
    assert identity.changes(none, a) == ["vectors for labels"] and identity.changes(a, none) == ["no vectors"]
    assert identity.changes(a, a) == []
    # by name and in order, of the same numbers in the same order
    place = images(tmp_path / "images")
    by_name(place / "conditions.npz")
    found = conditions_of(load(place, WANTED), str(place))
    order = [NAMES.index(name) for name in SORTED]
    np.save(tmp_path / "sorted.npy", vectors()[order])
    assert found is not None and Conditions(read_vectors(tmp_path / "sorted.npy")).checksum == found.checksum


def write_latents(place: Path, file: Path | None) -> Path:
    """A folder of four latents, with the vectors of a file."""
    conditions = None if file is None else Conditions(read_vectors(file))
    checksum = "" if conditions is None else conditions.checksum
    writer = Writer(place, Header(Layout(2, 4, 4, False), 4, 3, conditions=checksum))
    if conditions is not None:
        writer.put_conditions(conditions)
    if writer.done < 4:
        writer.append(torch.rand(4, 2, 4, 4), torch.zeros(4))
    writer.close()
    return place


def opened(place: Path) -> latents_module.Latents:
    found = latents_module.load(place, Wanted(0, 0))
    found.conditions = conditions_of(found, str(place))
    return found


def test_a_folder_of_latents_keeps_them(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", vectors(dtype=np.float16))
    place = write_latents(tmp_path / "latents", tmp_path / "v.npy")
    found = opened(place)
    assert found.conditions is not None
    assert np.array_equal(found.given(torch.arange(4)).numpy(), vectors(dtype=np.float16))
    before = (place / "conditions.npy").stat().st_mtime_ns
    write_latents(place, tmp_path / "v.npy")  # which is whole
    assert (place / "conditions.npy").stat().st_mtime_ns == before
    content = bytearray((place / "conditions.npy").read_bytes())
    content[-3] ^= 1
    (place / "conditions.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"conditions\.npy: is not what came with these latents, its checksum differs"):
        opened(place)
    write_latents(place, tmp_path / "v.npy")  # and writes it anew
    assert opened(place).conditions is not None
    (place / "conditions.npy").unlink()
    with pytest.raises(DataError, match=r"conditions\.npy is missing, which came with these latents"):
        opened(place)
    np.save(tmp_path / "v.npy", -vectors())
    with pytest.raises(DataError, match="is written with other conditions, or without"):
        write_latents(place, tmp_path / "v.npy")


def test_vectors_may_be_put_into_a_folder_of_latents_later(tmp_path: Path) -> None:
    place = write_latents(tmp_path / "latents", None)
    assert opened(place).conditions is None
    np.save(place / "conditions.npy", vectors())
    assert torch.equal(opened(place).given(torch.tensor([2])), torch.from_numpy(vectors()[2:3]))
    manifest = (place / "latents.json").read_text().replace(' "conditions": "",\n', "")
    (place / "latents.json").write_text(manifest)  # as earlier versions have written it
    assert '"conditions"' not in manifest and opened(place).conditions is not None

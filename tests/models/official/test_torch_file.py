"""Files of torch.save: what is read of them without running any of it, and what is refused."""

import argparse
import datetime
import os
import pickle
import types
import zipfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from soflow_fast import load_official
from soflow_fast.errors import CheckpointError
from soflow_fast.models.official.torch_file import Unmade, read

MADE: list[str] = []


class Noisy:
    """An object that tells when it is made or filled."""

    def __new__(cls) -> "Noisy":
        MADE.append("new")
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        MADE.append("state")


def saved(content: Any, path: Path, **settings: Any) -> str:
    torch.save(content, path, **settings)
    return str(path)


@pytest.mark.parametrize("settings", [{}, {"_use_new_zipfile_serialization": False}], ids=["archive", "older"])
def test_tensors_of_every_kind_are_as_they_were_saved(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = torch.randn(6, 8)
    content = {
        **{str(kind): base.to(kind) for kind in (torch.float32, torch.float64, torch.float16, torch.bfloat16)},
        **{str(kind): (base * 9).to(kind) for kind in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)},
        "bool": base > 0,
        "transposed": base.t(),
        "part": base[2:4, 1::3],
        "shared": base.view(-1)[5:],
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "parameter": nn.Parameter(base),
        "odd": torch.arange(3, dtype=torch.uint8)[1:],
        "list": [base, (base[0], 1)],
    }
    found = read(saved(content, tmp_path / "x.pt", **settings))
    assert found.keys() == content.keys()
    for name, value in content.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value) and found[name].dtype == value.dtype, name
            assert found[name].stride() == value.stride()
    assert torch.equal(found["list"][1][0], base[0]) and found["list"][1][1] == 1


def test_kinds_that_only_a_newer_form_can_hold(tmp_path: Path) -> None:
    value = torch.tensor([[0, 1, 2], [3, 4, 60_000]], dtype=torch.uint16)
    found = read(saved({"x": value, "y": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "x.pt"))
    assert torch.equal(found["x"], value) and found["x"].dtype == torch.uint16
    assert torch.equal(found["y"].float(), torch.ones(4))


def test_plain_extras_are_allowed(tmp_path: Path) -> None:
    content = {
        "args": argparse.Namespace(lr=1e-4, out=Path("a/b"), nested=types.SimpleNamespace(k=[1, 2])),
        "best": np.float64(2.5),
        "count": np.int64(7),
        "history": np.arange(6.0).reshape(2, 3).T,
        "by label": defaultdict(list, {3: [1.5], 4: []}),
        "counter": Counter("abca"),
        "ordered": OrderedDict([("b", 1), ("a", (None, True, "text", b"bytes"))]),
        "size": torch.zeros(2, 3).shape,
        "device": torch.device("cuda", 1),
        "dtype": torch.bfloat16,
        "large": 2**80,
    }
    found = read(saved(content, tmp_path / "x.pt"))
    assert (
        found["args"]["lr"] == 1e-4 and str(found["args"]["out"]) == "a/b" and found["args"]["nested"] == {"k": [1, 2]}
    )
    assert (found["best"], found["count"], found["large"]) == (2.5, 7, 2**80)
    np.testing.assert_array_equal(found["history"], content["history"])
    assert found["by label"] == {3: [1.5], 4: []} and found["counter"] == {"a": 2, "b": 1, "c": 1}
    assert list(found["ordered"].items()) == list(content["ordered"].items())
    assert found["size"] == (2, 3) and found["device"] == "cuda" and found["dtype"] == Unmade("torch.bfloat16")


def test_objects_of_other_classes_are_not_made(tmp_path: Path) -> None:
    path = saved({"x": torch.ones(2), "config": Noisy(), "module": nn.Linear(1, 1)}, tmp_path / "x.pt")
    MADE.clear()
    found = read(path)
    assert MADE == [] and torch.equal(found["x"], torch.ones(2))
    assert found["config"] == Unmade(f"{__name__}.Noisy")
    assert found["module"].name == "torch.nn.modules.linear.Linear"
    torch.load(path, weights_only=False)
    assert MADE == ["new", "state"] or MADE == ["new"], "the object of this test does not tell"


class Trap:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_call_is_an_error_that_names_it(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    for content in ({"more": Trap(trap)}, {"a": [{"b": Trap(trap)}]}, {"when": datetime.datetime(2026, 1, 1)}):
        with pytest.raises(CheckpointError, match=r"x\.pt: not a checkpoint of plain weights \(it asks to call "):
            read(saved(content, tmp_path / "x.pt"))
    torch.save({"more": Trap(trap)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="nor plain weights of a torch before") as error:
        read(str(tmp_path / "x.pt"))
    assert "weights_only" not in str(error.value)  # torch's own text says how to run it
    assert not trap.exists()


def rewritten(path: Path, change: Any) -> None:
    """The archive with `change(name, content)` for the content of each of its files."""
    with zipfile.ZipFile(path) as old:
        contents = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in contents.items():
            after = change(name, content)
            if after is not None:
                new.writestr(name, after)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, content: content[:-4] if "/data/" in name else content, "cut short"),
        (lambda name, content: None if "/data/" in name else content, "storage 0 is missing"),
        (lambda name, content: b"big" if name.endswith("byteorder") else content, "big-endian"),
        (lambda name, content: content[:-9] if name.endswith("data.pkl") else content, "is a damaged pickle"),
        (lambda name, content: pickle.dumps([1]) if name.endswith("data.pkl") else content, "holds a list"),
        (lambda name, content: None if name.endswith("data.pkl") else content, "holds no data.pkl"),
        (lambda name, content: content.replace(b"K\x07", b"K\x09") if "pkl" in name else content, "beyond its storage"),
    ],
)
def test_a_file_that_is_not_as_torch_writes_it_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"x": torch.zeros(14).view(2, 7).t()}, path)
    rewritten(path, lambda name, content: content)
    assert torch.equal(read(str(path))["x"], torch.zeros(7, 2))
    rewritten(path, change)
    with pytest.raises(CheckpointError, match=message) as error:
        read(str(path))
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_small_file_that_unfolds_to_a_large_one_is_refused_soon(tmp_path: Path) -> None:
    tuples, mappings = (1,), {"x": 1}
    for _ in range(60):
        tuples, mappings = (tuples, tuples), {"a": mappings, "b": mappings}
    path = saved({"extra": tuples}, tmp_path / "x.pt")
    assert read(path).keys() == {"extra"}
    with pytest.raises(CheckpointError, match="holds more than 10000 mappings"):
        load_official(saved(mappings, tmp_path / "x.pt"))


def test_what_is_not_used_is_not_read(tmp_path: Path) -> None:
    path = saved({"ema": torch.ones(4), "optimizer": {"state": {0: torch.ones(2**24)}}}, tmp_path / "x.pt")

    def own_memory() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssFile")))

    before = own_memory()
    found = read(path)
    assert float(found["ema"].sum()) == 4
    assert own_memory() - before < 2**24, "64 MiB were read for 16 bytes"
    found["ema"].zero_()  # whoever writes, writes to memory of his own
    assert float(read(path)["ema"].sum()) == 4

"""The benchmark of reading: sets that can be opened, rows of what was timed."""

import pytest
import torch

from benchmarks.report import record
from benchmarks.studies import reading


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(reading, "AMOUNTS", {"png": 20, "jpeg": 12, "latents": 20})
    monkeypatch.setattr(reading, "BATCH", 4)
    monkeypatch.setattr(reading, "STEP_BATCH", 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small = {"hidden_size": 16, "depth": 1, "num_heads": 2}
    monkeypatch.setattr(reading, "NETWORK", reading.NETWORK | {f"model.{name}": n for name, n in small.items()})


@pytest.mark.parametrize(("name", "shape"), [("png", (3, 32, 32)), ("jpeg", (3, 256, 256)), ("latents", (8, 32, 32))])
def test_a_set_is_what_it_is_called(name, shape, tmp_path):
    source = reading.opened(name, tmp_path)
    samples, labels = source.raw(0)
    assert samples.shape == (4, *shape) and len(source.dataset.contents.classes) == 10
    assert samples.dtype == (torch.float16 if name == "latents" else torch.uint8) and labels.max() < 10
    row = reading.measure(name, source, 0)
    assert len(row["seconds"]) == 3 and min(row["seconds"]) > 0


def test_the_record_has_every_set_and_the_wait(capsys):
    threads = torch.get_num_threads()
    reading.main(["--seconds", "0"])
    torch.set_num_threads(threads)
    (path,) = record.RECORDS.iterdir()
    rows = record.read(path)["rows"]
    assert [row["way"] for row in rows] == ["read by one process"] * 3 + ["step", "wait for its batch"]
    step, wait = rows[-2:]
    assert all(0 < b < a for a, b in zip(step["seconds"], wait["seconds"], strict=True))
    said = capsys.readouterr().out
    assert said.count("samples/s") == 3 and "% of a step is waiting for its batch" in said

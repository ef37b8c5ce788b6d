"""Photographs for the studies that take them, and what their records say is missing while they grow."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from benchmarks.harness import command
from benchmarks.report import record
from benchmarks.studies import equal_work_problems


@pytest.fixture
def missing(monkeypatch, tmp_path, committed):
    """What a growing record says is missing each time it is kept; its command's workers are one thread."""
    kept = []
    monkeypatch.setattr(record, "RECORDS", tmp_path)
    monkeypatch.setattr(record.Growing, "keep", lambda self, rows, missing=(): kept.append([*missing]))
    monkeypatch.setattr(command, "workers", lambda number: ThreadPoolExecutor(1))
    return kept


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """A folder of noise as photographs of ten classes, and judges that take few of them."""
    from PIL import Image

    source = np.random.default_rng(0)
    for k in range(10):
        folder = tmp_path / "photographs" / str(k)
        folder.mkdir(parents=True)
        for n in range(5):
            Image.fromarray(source.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{n}.png")
    monkeypatch.setattr(equal_work_problems, "PHOTOGRAPHS", 20)
    monkeypatch.setattr(equal_work_problems, "REFERENCE", 30)
    for cached in (equal_work_problems._dataset, equal_work_problems._real):
        cached.cache_clear()
    yield str(tmp_path / "photographs")
    for cached in (equal_work_problems._dataset, equal_work_problems._real):
        cached.cache_clear()

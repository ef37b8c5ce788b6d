"""Fixtures of the tests of data sets."""

from collections.abc import Callable
from pathlib import Path

import pytest
from pictures import Files, archive, folder


@pytest.fixture(params=[folder, archive], ids=["folder", "zip"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Files], Path]:
    """Makes a folder or a zip of files by their names; those that end in / are folders."""
    return lambda files: request.param(tmp_path / "set", files)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    return place / "soflow-fast" / "images"

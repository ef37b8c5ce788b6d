"""Files: read with limits, written for good, kept aside."""

import os
from pathlib import Path

import pytest

from soflow_fast import files


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert files.read_file(path, 5) == b"12345"
    with pytest.raises(OSError, match="has 5 bytes, more than 4"):
        files.read_file(path, 4)


def test_a_link_is_followed_on_request_only(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1")
    (tmp_path / "link").symlink_to("x")
    assert files.read_file(tmp_path / "link", 9, follow=True) == b"1"
    with pytest.raises(OSError, match="is a link"):
        files.read_file(tmp_path / "link", 9)


@pytest.mark.parametrize("follow", [True, False])
def test_what_is_no_file_is_refused_at_once(follow: bool, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match=r"is no regular file|Is a directory") as error:
            files.read_file(path, 9, follow=follow)
        assert error.value.filename == str(path)
    with pytest.raises(FileNotFoundError):
        files.read_file(tmp_path / "nothing", 9, follow=follow)


def test_memory_that_is_not_there_is_an_error_of_the_file(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.truncate(2**42)  # 4 TiB without a block on the disk
    with pytest.raises(OSError, match="does not fit into memory"):
        files.read_file(tmp_path / "x", 2**43)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    files.write_file(path, b"old")

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*/x'"):
        files.write_file(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]


def test_nothing_that_was_set_aside_is_overwritten(tmp_path: Path) -> None:
    for k in range(3):
        (tmp_path / "x").write_text(str(k))
        files.set_aside(tmp_path / "x")
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"x.aside": "0", "x.aside-2": "1", "x.aside-3": "2"}


def test_of_a_link_the_link_is_removed(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("1")
    (tmp_path / "link").symlink_to("folder")
    files.remove(tmp_path / "link")
    assert os.listdir(tmp_path) == ["folder"]
    files.remove(tmp_path / "folder")
    files.remove(tmp_path / "nothing")
    assert os.listdir(tmp_path) == []


def test_writes_that_may_fail_are_one_warning_in_a_row() -> None:
    warnings: list[str] = []
    optional = files.OptionalWrites(warnings.append)
    for number in (0, 28, 28, 0, 5):
        with optional(f"grid {number}"):
            if number:
                raise OSError(number, os.strerror(number))
    assert warnings == [f"grid {k} not written: [Errno {k}] {os.strerror(k)}" for k in (28, 5)]
    with pytest.raises(RuntimeError, match="ours"), optional("grid"):
        raise RuntimeError("ours")

"""What ranks other than 0 would print goes to their files."""

import os
import tempfile
from io import StringIO
from pathlib import Path

import pytest

from soflow_fast.runs.progress import Progress
from soflow_fast.runs.ranks.notes import MOST_KEPT, Notes


def test_lines_before_and_after_there_is_a_folder(tmp_path: Path) -> None:
    notes = Notes(3)
    print("before", file=notes)
    notes.write("a warning\n  of two lines\n")
    assert not list(tmp_path.iterdir())
    notes.keep_in(tmp_path)
    notes.write("half a ")
    notes.write("line\x1b[2J\n")
    lines = (tmp_path / "warnings-rank-00003.txt").read_text().splitlines()
    assert [line.partition(" ")[2] for line in lines] == ["before", "a warning   of two lines", "half a line\\x1b[2J"]


def test_no_file_without_a_line_and_no_end_of_lines_without_a_file(tmp_path: Path) -> None:
    notes = Notes(1)
    for number in range(2 * MOST_KEPT):
        notes.note(str(number))
    notes.keep_in(tmp_path)
    assert len((tmp_path / notes.name).read_text().splitlines()) == MOST_KEPT
    (empty := tmp_path / "empty").mkdir()
    Notes(2).keep_in(empty)
    assert not list(empty.iterdir())


def test_lines_that_have_no_folder_yet_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work := tmp_path / "work").mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    notes = Notes(3)
    assert notes.kept_apart() == ""
    notes.note("Traceback\n  KeyError")
    name = f"soflow-rank-3-{os.getpid()}.txt"
    assert notes.kept_apart() == str(work / name)
    assert "KeyError" in (work / name).read_text()
    assert notes.kept_apart() == str(tmp_path / name)  # as if the current folder took nothing
    notes.keep_in(work)
    notes.note("more")
    assert notes.kept_apart() == ""


def test_a_folder_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    notes = Notes(1)
    notes.keep_in(tmp_path / "gone")
    notes.note("lost")


def test_only_rank_0_shows_progress(tmp_path: Path) -> None:
    for rank in (0, 1):
        stream, notes = StringIO(), Notes(rank)
        notes.keep_in(tmp_path)
        marks: list[int] = []
        progress = Progress(10, stream, notes=notes, at_work=lambda marks=marks: marks.append(1))
        progress.say("hello")
        progress.warn("careful")
        progress.count(10, 1.0, 0.0)
        assert bool(stream.getvalue()) == (rank == 0)
        assert len(marks) == 3  # each rank is seen to be at work
        assert (tmp_path / notes.name).exists() == (rank == 1)
    assert "warning: careful" in (tmp_path / "warnings-rank-00001.txt").read_text()

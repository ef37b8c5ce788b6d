"""What ranks other than 0 would print goes to their files."""

from io import StringIO
from pathlib import Path

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


def test_a_folder_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    notes = Notes(1)
    notes.keep_in(tmp_path / "gone")
    notes.note("lost")


def test_only_rank_0_shows_progress(tmp_path: Path) -> None:
    for rank in (0, 1):
        stream, notes = StringIO(), Notes(rank)
        notes.keep_in(tmp_path)
        progress = Progress(10, stream, notes=notes)
        progress.say("hello")
        progress.warn("careful")
        progress.count(10, 1.0, 0.0)
        assert bool(stream.getvalue()) == (rank == 0)
        assert (tmp_path / notes.name).exists() == (rank == 1)
    assert "warning: careful" in (tmp_path / "warnings-rank-00001.txt").read_text()

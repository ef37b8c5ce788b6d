"""Records: written whole, read with suspicion, chosen, shown side by side, and rendered into pages."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.report import compare, pages, record
from benchmarks.report.blocks import layout
from soflow_fast.errors import StorageError

pytestmark = pytest.mark.usefixtures("committed")


def written(folder: Path, name: str, given: list[dict], **changes: object) -> str:
    path = record.write(given, "a command", folder, "sampling")
    values = json.loads(path.read_text()) | changes
    path.unlink()
    (folder / f"{name}.json").write_text(json.dumps(values))
    return name


ROWS = [
    {"case": "tiny", "way": way, "batch": 1, "seconds": seconds}
    for way, seconds in (("fp32", [0.1, 0.2, 0.3]), ("bf16", [0.1]))
]


def test_compare(tmp_path, capsys):
    slower = [{**ROWS[0], "seconds": [0.5, 0.5]}, {**ROWS[0], "way": "new"}]
    a = written(tmp_path, "a", ROWS, device="one", versions={"torch": "2.12", "numpy": "2"})
    written(tmp_path, "b", slower, device="other", versions={"torch": "2.13", "numpy": "2"})
    assert pages.main(["--compare", a, str(tmp_path / "b.json")], tmp_path, tmp_path) == 0
    out = capsys.readouterr().out
    assert "| device | one | other |" in out and "| versions.torch | 2.12 | 2.13 |" in out and "numpy" not in out
    assert "| tiny, 1, fp32 | 200.0 | 500.0 | 2.50x |" in out
    assert "Only in a.json: 1 rows." in out and "Only in b.json: 1 rows." in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


@pytest.mark.parametrize(
    ("changes", "rows", "what"),
    [
        ({"benchmark": "step"}, ROWS, "a.json is of sampling, b.json of step"),
        ({}, [{**ROWS[0], "case": "another"}], "a.json and b.json have no row in common that has times"),
        ({}, [{**ROWS[0], "seconds": []}], "a.json and b.json have no row in common that has times"),
        ({"rows": 3}, ROWS, "{}/b.json: rows is missing, empty, or is not a list of objects"),
        ({"versions": 3}, ROWS, "{}/b.json: versions is missing, or is not an object"),
        ({"date": "yesterday"}, ROWS, "{}/b.json: date is none: 'yesterday'"),
        (
            {},
            [{**ROWS[0], "seconds": [0.1, 0]}],
            "{}/b.json: row 0: seconds must be numbers from 1e-09 to 1e+09, got 0",
        ),
        ({}, [{**ROWS[0], "seconds": [-1]}], "{}/b.json: row 0: seconds must be numbers from 1e-09 to 1e+09, got -1"),
        ({}, [{**ROWS[0], "seconds": "1"}], '{}/b.json: row 0: seconds must be numbers from 1e-09 to 1e+09, got "1"'),
        (
            {},
            [{**ROWS[0], "seconds": [float("nan")]}],
            "{}/b.json: row 0: seconds must be numbers from 1e-09 to 1e+09, got NaN",
        ),
        (
            {},
            [{**ROWS[0], "seconds": float("inf")}],
            "{}/b.json: row 0: seconds must be numbers from 1e-09 to 1e+09, got Infinity",
        ),
        ({}, [{**ROWS[0], "seconds": True}], "{}/b.json: row 0: seconds must be numbers from 1e-09 to 1e+09, got true"),
        ({}, [{**ROWS[0], "way": ["fp32"]}], "b.json: row 0: way must be text or a number"),
    ],
)
def test_records_that_cannot_be_compared(tmp_path, capsys, changes, rows, what):
    a, b = written(tmp_path, "a", ROWS), written(tmp_path, "b", rows, **changes)
    assert pages.main(["--compare", a, b], tmp_path, tmp_path) == 2
    assert capsys.readouterr() == ("", f"benchmarks.report: {what.format(tmp_path)}\n")


BROKEN = {
    "": "is no JSON: Expecting value: line 1 column 1 (char 0)",
    "{": "is no JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    "[1, 2]": "is no record: holds list, not an object",
    "3": "is no record: holds int, not an object",
    '{"benchmark": "sampling"}': "date is missing, or is not text",
    "[" * 100_000: "is nested too deeply",
}


@pytest.mark.parametrize("text", BROKEN, ids=lambda text: text[:10])
def test_a_damaged_file_is_named(text, tmp_path, capsys):
    """In --compare, and in the folder that pages are made of."""
    a = written(tmp_path, "a", ROWS)
    (tmp_path / "damaged.json").write_text(text)
    for arguments in (["--compare", a, "damaged"], [], ["--check"]):
        assert pages.main(arguments, tmp_path, tmp_path) == 2
        assert capsys.readouterr() == ("", f"benchmarks.report: {tmp_path}/damaged.json: {BROKEN[text]}\n")


@pytest.mark.parametrize("name", ["absent", "", "no\0name", "x" * 5000])
def test_a_record_that_is_not_there(name, tmp_path, capsys):
    a = written(tmp_path, "a", ROWS)
    assert pages.main(["--compare", a, name], tmp_path, tmp_path) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("benchmarks.report: ") and err.count("\n") == 1


def test_a_file_that_is_no_record_is_not_compared(tmp_path, capsys):
    a = written(tmp_path, "a", ROWS)
    (tmp_path / "other.json").write_text('{"kernels": []}')
    assert pages.main(["--compare", a, "other"], tmp_path, tmp_path) == 2
    assert capsys.readouterr() == ("", "benchmarks.report: other: is no record of a benchmark\n")
    assert record.newest(tmp_path, "sampling") is not None  # and does not stand in anyone's way


def test_rows_of_another_benchmark_are_named(tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "performance.md").write_text("<!-- benchmark:digits -->\n<!-- /benchmark:digits -->\n")
    written(tmp_path, "a", ROWS, benchmark="digits")
    assert pages.main([], tmp_path, tmp_path) == 2
    out, err = capsys.readouterr()
    assert not out and err == "benchmarks.report: a.json: its rows are not those of digits (KeyError: 'nfe')\n"


def test_what_an_interrupted_record_lacks_is_named(tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "why-it-works.md"
    page.write_text("<!-- benchmark:book-samples -->\n<!-- /benchmark:book-samples -->\n")
    written(tmp_path, "a", [{"kind": "losses"}], benchmark="book", unfinished=True)
    assert pages.main([], tmp_path, tmp_path) == 2
    out, err = capsys.readouterr()
    found = "a.json: it is not finished, and lacks rows that the block book-look-ahead is made of; "
    assert not out and err == f"benchmarks.report: {found}measure them, or take the file away (StopIteration)\n"


def point(step: int, seconds: float, frechet: float) -> dict:
    return {"step": step, "seconds": seconds, "frechet": frechet, "accuracy": 0.9}


def test_quality_for_time_compares_methods(tmp_path, capsys):
    rows = [
        {"method": "ours", "seed": seed, "points": [point(5, 1.0, 99.0), point(10, 2.0, frechet)]}
        for seed, frechet in ((0, 30.0), (1, 32.0))
    ]
    later = [{"method": "ours", "seed": 0, "points": [point(20, 2.0, 62.0)]}, {**rows[0], "method": "theirs"}]
    a = written(tmp_path, "a", rows, benchmark="quality-for-time")
    b = written(tmp_path, "b", later, benchmark="quality-for-time")
    assert pages.main(["--compare", a, b], tmp_path, tmp_path) == 0
    out = capsys.readouterr().out
    assert "| ours: ms per step | 200.0 | 100.0 | 0.50x |" in out and "theirs" not in out
    assert "| ours: Frechet at the end | 31.00 | 62.00 | 2.00x |" in out
    assert "a.json: 10 steps, seeds 0 1." in out and "b.json: 20 steps, seeds 0." in out
    for points in ([], 3, [3], [{}], [point(10, 0, 1.0)], [point(10, 1.0, float("nan"))]):
        written(tmp_path, "b", [{**rows[0], "points": points}], benchmark="quality-for-time")
        assert pages.main(["--compare", a, b], tmp_path, tmp_path) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("benchmarks.report: b.json: row 0: its last point needs ")


@pytest.mark.parametrize("kind", ["step", "digits", "increments", "sampling", "sweeps", "kernels"])
def test_records_that_are_here_compare_with_themselves(kind):
    run = record.newest(benchmark=kind)
    if run is None:
        pytest.skip(f"no record of {kind}")
    text = compare.compare(run, run)
    assert ", batch 64, 64" not in text
    timed = [row for row in run["rows"] if row["seconds"]]  # others say why they were not run
    assert text.count("| 1.00x |") == len(timed) and "Only in" not in text


def test_a_record_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = record.write(ROWS, "one", tmp_path)
    before = path.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(record.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        record.write(ROWS, "two", tmp_path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
    # What a kill leaves behind is none of the files that are read.
    (tmp_path / f".{path.name}.1.tmp").write_text("{")
    assert latest(tmp_path)["command"] == "one"


def test_what_is_not_finished_takes_no_finished_record_away(tmp_path):
    whole = record.write(ROWS, "yesterday's", tmp_path)
    begun = record.begin(tmp_path)
    parts = [record.write(ROWS[:k], "today's", tmp_path, begun=begun, finished=False) for k in (1, 2)]
    assert parts[0] == parts[1] != whole and len(json.loads(parts[0].read_text())["rows"]) == 2
    assert latest(tmp_path)["command"] == "yesterday's"
    whole.unlink()
    left = latest(tmp_path)
    assert left["command"] == "today's" and "Not everything passed or was reached" in layout.measured(left, "")
    assert record.write(ROWS, "today's", tmp_path, begun=begun) == whole and [*tmp_path.glob("*.json")] == [whole]
    assert "Not everything" not in layout.measured(latest(tmp_path), "")


def test_a_gpu_goes_before_a_cpu_and_then_the_latest(tmp_path):
    written(tmp_path, "cpu", ROWS, date="2026-03-01T00:00:00+00:00")
    cpu = record.newest(tmp_path, "sampling")
    assert cpu is not None and cpu["file"] == "cpu.json"
    for name, date in (("old", "2026-01-01T00:00:00+00:00"), ("new", "2026-02-01T00:00:00+00:00")):
        written(tmp_path, name, ROWS, date=date, gpu={"memory": 1})
    gpu = record.newest(tmp_path, "sampling")
    assert gpu is not None and gpu["file"] == "new.json"


def test_a_folder_is_parsed_once_for_all_who_look_through_it(tmp_path, monkeypatch):
    parsed: list[str] = []
    plain = json.loads
    monkeypatch.setattr(record.json, "loads", lambda text: parsed.append(text) or plain(text))
    record._parsed.cache_clear()
    for block in pages.BLOCKS.values():
        assert record.newest(record.HOME, block.benchmark, block.gpu) is not None
    assert 0 < len(parsed) <= len([*record.HOME.glob("*.json")])
    for command in ("one", "two"):  # of one length, a moment apart
        record.write(ROWS, command, tmp_path)
        assert latest(tmp_path)["command"] == command


def test_no_block_changes_a_record():
    """Rows are shared: what one block sorted or dropped, the next one would show."""
    runs = {name: record.newest(record.HOME, block.benchmark, block.gpu) for name, block in pages.BLOCKS.items()}
    for name, run in runs.items():
        assert run is not None
        pages.BLOCKS[name].render(run)
        assert record.digest(run) == record.digest(json.loads((record.HOME / run["file"]).read_text())), name


def test_the_command_is_what_was_typed(monkeypatch):
    typed = record.command("benchmarks.precision", ["--recipes", "bf16, increments", "--steps", "3"])
    assert typed == "python -m benchmarks.precision --recipes 'bf16, increments' --steps 3"
    monkeypatch.setattr(sys, "argv", ["/somewhere/sampling.py", "--seconds", "0.01"])
    assert record.command("benchmarks.sampling") == "python -m benchmarks.sampling --seconds 0.01"
    assert shlex.split(typed)[4] == "bf16, increments"


def latest(folder: Path) -> dict:
    run = record.newest(folder)
    assert run is not None
    return run


def git(root: Path, *arguments: str) -> None:
    names = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(root), *names, *arguments], check=True, capture_output=True)


def test_what_the_report_renders_makes_no_tree_dirty(tmp_path, capsys, monkeypatch):
    monkeypatch.undo()
    names = ("README.md", "docs/page.md", "benchmarks/records/old.json", "benchmarks/harness/race.py", "docs.py")
    git(tmp_path, "init")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    assert record.commit(tmp_path) is None  # nothing is committed yet
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "all")
    clean = record.commit(tmp_path)
    assert len(clean) == 12
    for name in names[:3]:
        (tmp_path / name).write_text("2")
    (tmp_path / "untracked").write_text("2")
    assert record.commit(tmp_path) == clean
    for name in names[3:]:
        (tmp_path / name).write_text("2")
        assert record.commit(tmp_path) == f"{clean}-dirty"
        (tmp_path / name).write_text("1")

    monkeypatch.setattr(record, "commit", lambda: "abc-dirty")
    record.begin(tmp_path)
    assert "(abc-dirty): not a record to hand in" in capsys.readouterr().err
    record.write(ROWS, "pytest", tmp_path)
    assert "not a record to hand in" in capsys.readouterr().err
    monkeypatch.setattr(record, "commit", lambda: "abc")
    record.write(ROWS, "pytest", tmp_path, begun=record.begin(tmp_path))
    assert not capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_is_said_before_anything_is_measured(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StorageError, match=r"SOFLOW_RECORDS: .*file: "):
        record.begin(file)
    with pytest.raises(StorageError, match=r"SOFLOW_RECORDS: .*below: Not a directory"):
        record.begin(file / "below")
    assert record.begin(tmp_path / "new") and not [*(tmp_path / "new").iterdir()]


@pytest.mark.parametrize(("given", "wanted"), [("here", "here"), ("", None), (None, None)])
def test_another_folder_for_records_is_absolute(given, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert record.folder_of(given) == (tmp_path / wanted if wanted else record.HOME)
    assert record.folder_of(os.environ.get("SOFLOW_RECORDS")) == record.RECORDS


def test_clocks_are_those_of_the_gpu_that_is_in_use(monkeypatch):
    """They are asked for by its UUID, else by its place on the bus, as CUDA_VISIBLE_DEVICES renumbers torch's."""
    card = SimpleNamespace(
        uuid="ab-cd", pci_domain_id=0, pci_bus_id=0x81, pci_device_id=0, total_memory=1, major=9, minor=0
    )
    asked: list[str] = []

    def query(command, **_):
        asked.append(command[1])
        if "GPU" in command[1]:
            raise subprocess.CalledProcessError(6, command)
        return SimpleNamespace(stdout="1980 MHz\n")

    cuda = record.torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "current_device", lambda: 3)
    monkeypatch.setattr(cuda, "get_device_properties", lambda index: card if index == 3 else None)
    monkeypatch.setattr(cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(record.subprocess, "run", query)
    assert record.clocks() == "1980 MHz" and asked == ["--id=GPU-ab-cd", "--id=00000000:81:00.0"]
    assert record.environment()["device"] == "GPU 3"


def test_clocks_at_both_ends(tmp_path, monkeypatch):
    found = iter(["at first", "at last"])
    monkeypatch.setattr(
        record, "environment", lambda: {"device": "x", "versions": {}, "commit": None, "gpu": {}, "clocks": next(found)}
    )
    monkeypatch.setattr(record, "clocks", lambda: next(found))
    path = record.write(ROWS, "a command", tmp_path, begun=record.begin(tmp_path))
    run = record.read(path)
    assert (run["clocks_at_start"], run["clocks"]) == ("at first", "at last")


QUALITY = [{"method": "ours", "seed": 0, "points": [point(5, 1.0, 99.0), point(10, 2.0, 30.0)]}]


@pytest.fixture
def site(tmp_path):
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "performance.md"
    page.write_text("<!-- benchmark:quality-for-time -->\n<!-- /benchmark:quality-for-time -->\n")
    written(tmp_path, "a", QUALITY, benchmark="quality-for-time")
    assert pages.main([], tmp_path, tmp_path) == 0
    return tmp_path


def test_check_knows_whose_page_it_is(site, capsys):
    assert pages.main(["--check"], site, site) == 0
    page = site / "docs" / "performance.md"
    page.write_text(page.read_text().replace("30.0", "29.0"))
    assert pages.main(["--check"], site, site) == 1
    assert capsys.readouterr().err == "docs/performance.md differs from a.json\n"


def test_check_knows_a_block_whose_record_is_gone(site, capsys):
    page = site / "docs" / "performance.md"
    empty = "<!-- benchmark:digits -->\n\n<!-- /benchmark:digits -->\n"
    filled = "<!-- benchmark:step-gpu -->\n| a table |\n<!-- /benchmark:step-gpu -->\n"
    unknown = "<!-- benchmark:other -->\n| a table |\n<!-- /benchmark:other -->\n"
    page.write_text(page.read_text() + empty)
    assert pages.main(["--check"], site, site) == 0  # nobody has measured digits yet
    (site / "docs" / "more").mkdir()
    (site / "docs" / "more" / "page.md").write_text(unknown + page.read_text())  # it belongs to another page
    text = page.read_text() + filled
    page.write_text(text)
    assert pages.main([], site, site) == 0 and page.read_text() == text  # which nothing can bring up to date
    assert pages.main(["--check"], site, site) == 1
    assert capsys.readouterr().err.splitlines() == [
        "docs/more/page.md: the block other has text, but no benchmark makes it here",
        "docs/more/page.md: the block quality-for-time has text, but no benchmark makes it here",
        f"docs/performance.md: the block step-gpu has text, but no record of step on a GPU is in {site}",
    ]


def test_check_misses_a_record_that_was_deleted(site, capsys):
    scores = {"accuracy": 0.99, "frechet": 29.0, "near_copies": 0.0}
    written(site, "b", [{"seed": 3, "seconds": 99.6, "samples": 4, "nfe": {"1": scores}}], benchmark="digits")
    page = site / "docs" / "performance.md"
    page.write_text(page.read_text() + "<!-- benchmark:digits -->\n<!-- /benchmark:digits -->\n")
    assert pages.main([], site, site) == 0 and pages.main(["--check"], site, site) == 0
    (site / "b.json").unlink()
    assert pages.main(["--check"], site, site) == 1
    said = f"docs/performance.md: the block digits has text, but no record of digits is in {site}\n"
    assert capsys.readouterr() == ("", said)

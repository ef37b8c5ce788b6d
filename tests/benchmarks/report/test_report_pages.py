"""Pages: the tables and plots that are made of records, and what --check finds."""

from benchmarks.baselines.authors import AUTHORS
from benchmarks.harness.race import speed_ups
from benchmarks.report import pages, record
from benchmarks.report.blocks import quality

BEGIN, END = "<!-- benchmark:step -->", "<!-- /benchmark:step -->"


def test_pages_round_trip(race_rows, tmp_path, capsys):
    rows = race_rows
    page, records = tmp_path / "docs" / "performance.md", tmp_path / "records"
    page.parent.mkdir()
    text = f"before\n{BEGIN}\n{END}\nafter\n"
    page.write_text(text)
    assert pages.main([], tmp_path, records) == 2  # no record yet

    path = record.write(rows, "pytest benchmarks/ --record", records)
    newest = record.newest(records)
    assert newest is not None and newest["rows"] == rows and newest["file"] == path.name
    assert pages.main(["--check"], tmp_path, records) == 1
    assert page.read_text() == text
    assert pages.main([], tmp_path, records) == 0
    assert pages.main(["--check"], tmp_path, records) == 0
    rendered = page.read_text()
    assert rendered.startswith(f"before\n{BEGIN}\n| ") and rendered.endswith(f"{END}\nafter\n")
    assert f"{speed_ups(rows)[AUTHORS.name]:.2f}x" in rendered and path.name in rendered
    assert len({line.count("|") for line in rendered.splitlines() if line.startswith("|")}) == 1

    page.write_text("no markers")
    assert pages.main([], tmp_path, records) == 2
    assert "docs/performance.md: needs one" in capsys.readouterr().err


def test_digits_table(tmp_path):
    scores = {"accuracy": 0.9912, "frechet": 29.04, "near_copies": 0.0}
    rows = [{"seed": 3, "seconds": 99.6, "samples": 4000, "nfe": {"1": scores, "2": scores}}]
    record.write(rows, "python -m benchmarks.digits --seeds 3", tmp_path, "digits")
    assert record.newest(tmp_path) is None  # no record of a step
    run = record.newest(tmp_path, "digits")
    assert run is not None
    text = quality.digits(run)
    assert "| 3 | 1 | 0.9912 | 29.0 | 0.0000 | 100 |" in text and run["file"] in text
    page = tmp_path / "docs" / "performance.md"
    page.parent.mkdir()
    page.write_text("<!-- benchmark:digits -->\n<!-- /benchmark:digits -->\n")
    assert pages.main([], tmp_path, tmp_path) == 0 and text in page.read_text()


def test_precision_tables_and_plot(tmp_path):
    scores = [{nfe: {"frechet": f, "accuracy": 0.9, "near_copies": 0.0} for nfe in ("1", "2")} for f in (30.0, 32.0)]
    quality = {"kind": "quality", "r_end": 0.002, "seconds": 1.0}
    last = {"sc_mse": 0.5, "sc_weight": 2.0}
    rows = [{"kind": "error", "r": 0.1, "way": way, "error": 0.5, "cosine": 0.9} for way in ("a pair", "increments")]
    rows += [{**quality, "recipe": "float32", "seed": k, "last": last, "nfe": scores[k]} for k in (0, 1)]
    rows += [{**quality, "recipe": "literal", "seed": 0, "last": {"failed": "nan"}, "nfe": {}}]
    record.write(rows, "python -m benchmarks.precision", tmp_path, "precision")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "precision.md"
    names = ("precision-errors", "precision-quality")
    page.write_text("".join(f"<!-- benchmark:{name} -->\n<!-- /benchmark:{name} -->\n" for name in names))
    pages.main([], tmp_path, tmp_path)
    text = page.read_text()
    assert "| 0.1 | 5.0e-01 / 0.90000 | 5.0e-01 / 0.90000 |" in text
    assert "| float32 | 0.002 | 31.0 (30.0 to 32.0) | 31.0 (30.0 to 32.0) | 0.9000 (0.9000 to 0.9000) |" in text
    assert "| literal (1 of 1 not finite, left out) | 0.002 | not finite |" in text
    assert pages.main(["--check"], tmp_path, tmp_path) == 0


def test_the_pages_show_the_newest_records():
    assert pages.main(["--check"]) == 0


def test_every_block_of_the_pages_has_a_record():
    kept = {run.get("benchmark") for run in map(record.read, record.RECORDS.glob("*.json"))}
    assert {block.benchmark for block in pages.BLOCKS.values()} <= kept

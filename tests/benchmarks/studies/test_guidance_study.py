"""A network for a range of guidance scales beside one for each, two steps of two of them."""

from benchmarks.report import pages, record
from benchmarks.studies import guidance


def test_guidance(tmp_path, monkeypatch):
    monkeypatch.setattr(guidance, "SAMPLES", 100)
    rows = [row for trained in (guidance.RANGE, "2") for row in guidance.run(trained, 0, 1, tmp_path)]
    assert [(row["trained"], row["guidance"]) for row in rows] == [
        ("1 to 4", 1),
        ("1 to 4", 2),
        ("1 to 4", 4),
        ("2", 2),
    ]
    record.write(rows, "python -m benchmarks.guidance", tmp_path, "guidance")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "sampling.md"
    page.write_text("<!-- benchmark:guidance -->\n<!-- /benchmark:guidance -->\n")
    pages.main([], tmp_path, tmp_path)
    lines = [line.split(" | ")[:2] for line in page.read_text().splitlines() if line.startswith(("| 1", "| 2", "| 4"))]
    assert lines == [["| 1", "1 to 4"], ["| 2", "1 to 4"], ["| 2", "2"], ["| 4", "1 to 4"]]

"""Sweeps: one number at a time, most worth first, ended when time is up."""

import pytest
import torch

from benchmarks.report import figures, pages, record, tables
from benchmarks.studies import sweeps


@pytest.fixture(scope="module")
def sweep_rows():
    config = sweeps.network("cpu", batch=4, hidden=16, depth=1, heads=2, side=4)
    points = sweeps.Sweep(config, (4, 8), (1, 4), (1, 2)).points()
    for config in {point.config.model: point.config for point in points}.values():
        sweeps.check(config)
    return [row for point in points for row in sweeps.measure(point, 0.0)]


def test_sweeps_change_one_number_at_a_time(sweep_rows):
    ours = [row for row in sweep_rows if row["recipe"] == sweeps.OURS.name]
    assert len(sweep_rows) == 2 * len(ours) and all(len(row["seconds"]) == 3 for row in sweep_rows)
    cases = [row["case"].removeprefix("sweep: ") for row in ours]
    assert cases == [
        "hidden 16, depth 1, 4 tokens, batch 4",
        "hidden 16, depth 1, 4 tokens, batch 8",
        "hidden 16, depth 1, 1 tokens, batch 4",
        "hidden 16, depth 1, 4 tokens, batch 4",
        "hidden 16, depth 1, 4 tokens, batch 4",
        "hidden 16, depth 2, 4 tokens, batch 4",
    ]
    with pytest.raises(AssertionError, match="squares"):
        sweeps.Sweep(sweeps.sweep().config, (), (3,), ()).points()


def test_points_come_in_order_of_worth():
    config = sweeps.network("cpu", batch=4, hidden=16, depth=1, heads=2, side=4)
    points = sweeps.in_order_of_worth(sweeps.Sweep(config, (4, 8, 16), (1,), (1, 2)).points())
    assert [(point.axis, point.value) for point in points] == [
        *(("batch", 4), ("batch", 8), ("tokens", 1), ("depth", 1), ("depth", 2), ("batch", 16))
    ]


@pytest.mark.parametrize("within", [None, "0"])
def test_sweeps_end_when_time_is_up(within, tmp_path, monkeypatch, capsys):
    config = sweeps.network("cpu", batch=4, hidden=16, depth=1, heads=2, side=4)
    monkeypatch.setattr(sweeps, "sweep", lambda: sweeps.Sweep(config, (4, 8, 16), (1,), ()))
    monkeypatch.setattr(sweeps.record, "write", lambda rows, *_, **__: written.append(rows) or tmp_path)
    monkeypatch.setattr(sweeps.record, "RECORDS", tmp_path)
    written: list[list[dict]] = []
    sweeps.main(["--seconds", "0", *([f"--within={within}"] if within else [])])
    points = [(row["axis"], row["value"]) for row in written[-1]][::2]
    assert points == ([("batch", 4), ("batch", 8), ("batch", 16), ("tokens", 1)] if within is None else [("batch", 4)])
    assert ("time is up: left out: batch 8; tokens 1; batch 16" in capsys.readouterr().out) == (within is not None)


def test_shipped_sweeps_can_be_built():
    points = sweeps.sweep().points()
    assert {point.axis for point in points} == set(tables.AXES)
    for point in points:
        tokens = (point.config.model.input_size // point.config.model.patch_size) ** 2
        wanted = {"batch": point.config.batch_size, "tokens": tokens, "depth": point.config.model.depth}
        assert wanted[point.axis] == point.value


def test_resident_peak_sees_what_came_and_went():
    rose = sweeps.resident_peak()
    if rose is None:
        pytest.skip("the peak of resident memory cannot be read here")
    size = 2**26
    held = torch.ones(size, dtype=torch.uint8)
    del held
    # A page here and there may have been resident before, or is the interpreter's own.
    assert 0.9 * size < rose() < 1.5 * size


def test_out_of_memory_is_a_row(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("none left")

    point = sweeps.Sweep(sweeps.network("cpu", 4, 16, 1, 2, 4), (4,), (), ()).points()[0]
    monkeypatch.setattr(sweeps, "memory", fail)
    rows = sweeps.measure(point, 0.0)
    assert [(row["why_not"], row["seconds"]) for row in rows] == [("out of memory", [])] * 2
    assert tables.sweep_table(rows).count("out of memory") == 2


def test_sweep_page_and_plot(sweep_rows, tmp_path):
    record.write(sweep_rows, "python -m benchmarks.sweeps", tmp_path, "sweeps")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "performance.md"
    page.write_text("<!-- benchmark:sweeps -->\n<!-- /benchmark:sweeps -->\n")
    pages.main([], tmp_path, tmp_path)
    text = page.read_text()
    assert "| 8 images in a batch | soflow-fast, fp32 |" in text and text.count("authors' recipe, fp32") == 6
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    base = "The network in the middle: hidden 16, depth 1, 4 tokens, batch 4; the parts change its"
    assert f"{base} batch, tokens and depth." in text

    script = record.ROOT / "docs" / "figures" / "sweeps.py"
    assert "<svg" in figures.drawn(script, figures.DARK, tmp_path)[:500]


def test_the_base_of_a_sweep_is_read_off_its_rows(sweep_rows):
    batches = [row for row in sweep_rows if row["axis"] == "batch"]
    wanted = "The network in the middle: hidden 16, depth 1, 4 tokens; the parts change its batch."
    assert tables.sweep_base(batches) == wanted
    other = [row | {"case": row["case"].replace("batch 4", "batch 64")} for row in sweep_rows if row["axis"] == "depth"]
    rest = [row for row in sweep_rows if row["axis"] == "tokens"]
    wanted = "The parts: tokens at hidden 16, depth 1, batch 4; depth at hidden 16, 4 tokens, batch 64."
    assert tables.sweep_base(rest + other) == wanted

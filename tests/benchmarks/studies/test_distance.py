"""What rounding makes of a difference: the study on a few steps, and the page's sentences against its record."""

from itertools import pairwise

import pytest
import torch

from benchmarks.report import record
from benchmarks.report.blocks import numerics
from benchmarks.studies import distance
from tests.benchmarks import prose


@pytest.fixture
def rows():
    threads = torch.get_num_threads()
    name, config = next(iter(distance.networks(steps=20, wide_steps=1).items()))
    yield distance.measure(name, config, samples=32)
    torch.set_num_threads(threads)


def test_rounding_grows_as_the_ends_draw_together(rows, tmp_path):
    found = {(row["method"], row["distance"], row["way"]): row for row in rows}
    assert len(found) == len(rows) == 3 * (len(distance.DISTANCES) + len(distance.HALF_WIDTHS))
    for method, ends in (("look-ahead", distance.DISTANCES), ("central difference", (0.1, 0.01, 0.001))):
        pairs, increments = ([found[method, d, way] for d in ends] for way in ("bf16 pair", "bf16 increments"))
        assert all(a["slope_error"] < b["slope_error"] for a, b in pairwise(pairs[1:]))
        assert all(a["signal"] > b["signal"] for a, b in pairwise(pairs))
        assert max(row["slope_error"] for row in increments[1:]) < 0.01 < pairs[-1]["slope_error"]
        assert all(found[method, d, "float32 pair"]["residual_cosine"] > 0.9999 for d in ends)
    record.write(rows, "python -m benchmarks.distance", tmp_path, "distance")
    run = record.newest(tmp_path, "distance")
    assert run is not None
    text = numerics.distance(run)
    assert text.count("| look-ahead |") == text.count("| central difference |") == 1 and "20 steps" in text


def test_the_two_ends_are_where_their_times_say(rows):
    """On a network whose output is x and t themselves: the slope is known."""

    class Known(torch.nn.Module):
        def forward(self, x, t, s, y):
            return 3 * x + t[:, None, None, None] ** 2 - s[:, None, None, None]

    t = torch.tensor([0.4, 0.8], dtype=torch.float64)
    at = distance.Points(torch.ones(2, 1, 1, 1).double(), torch.full((2, 1, 1, 1), 2.0).double(), t, t / 2, t.long())
    value, change = distance.ends("", Known(), at, -0.1, 0.1)  # pyright: ignore[reportArgumentType]
    assert torch.allclose(value.flatten(), 3 * (1 - 0.2) + (t - 0.1) ** 2 - t / 2)
    assert torch.allclose(change.flatten(), 3 * 0.4 + 0.4 * t)


def test_the_page_says_what_the_record_says():
    run = record.newest(record.HOME, "distance")
    assert run is not None
    text = prose.page("precision.md")

    def span(method: str, apart: float, way: str, what: str, digits: int, unit: float = 1.0) -> str:
        wanted = (method, apart, way)
        values = [row[what] for row in run["rows"] if (row["method"], row["distance"], row["way"]) == wanted]
        return " to ".join(f"{unit * value:.{digits}f}" for value in sorted(values))

    tim, near = ("central difference", 0.01), ("look-ahead", 0.001)
    assert f"off by {span(*tim, 'bf16 pair', 'slope_error', 0, 100)} % of the slope" in text
    assert f"a cosine of {span(*tim, 'bf16 pair', 'residual_cosine', 2)} with the exact one" in text
    assert f"of SoFlow's schedule ({span(*near, 'bf16 pair', 'residual_cosine', 2)})" in text
    assert f"off by {span('central difference', 0.1, 'float32 pair', 'slope_error', 0, 100)} % however" in text
    assert {span(*tim, way, "residual_cosine", 2) for way in distance.WAYS[1:]} == {"1.00 to 1.00"}
    assert max(row["slope_error"] for row in run["rows"] if row["way"] == "bf16 increments" and row["distance"] < 0.1)
    times = 0.01 / (distance.R_END * run["rows"][0]["median_interval"])
    assert 9 <= times < 10 and "nine times as far" in text
    assert 100 * max(float(e) for e in span(*tim, "bf16 increments", "slope_error", 4).split(" to ")) < 0.4

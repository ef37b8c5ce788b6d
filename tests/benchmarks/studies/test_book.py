"""The study behind the first chapters, tiny: its rows are what their kinds say."""

import math

import pytest
import torch

from benchmarks.exact.mixture import ring
from benchmarks.report import pages, record
from benchmarks.studies import book
from soflow_fast.errors import UserError
from tests.benchmarks import prose

SIZE = book.Size(shown=6, judged=20, starts=3, times=4, side=3, points=8, draws=4)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "commit", lambda: "0123456789ab")
        patch.setattr(record, "RECORDS", folder)
        patch.setattr(book, "RATIOS", (0.3, 0.1))
        book.main(["--steps", "3"], SIZE)
    (path,) = folder.glob("*.json")
    return record.read(path)["rows"]


def of(rows, kind, **given):
    return [row for row in rows if row["kind"] == kind and given.items() <= row.items()]


def test_every_row_is_there(rows):
    assert {row["way"] for row in of(rows, "samples")} == {way for ways in book.WAYS.values() for way, _ in ways}
    assert all(len(row["points"]) == 2 * SIZE.shown for row in of(rows, "samples") + of(rows, "progress"))
    assert [row["step"] for row in of(rows, "progress")] == [0, 1, 3]
    assert [len(row["fm_mse"]) for row in of(rows, "losses")] == [3, 3]
    assert len(of(rows, "map")[0]["points"]) == 2 * SIZE.side**2
    assert len(of(rows, "solution bias")) == 4 and len(of(rows, "quotient bias")) == 2
    assert len(of(rows, "weights")) == 18


def test_at_first_one_call_stays_where_it_is(rows):
    """The network's output is 0 at first, so f(x, 1, 0) = x; three places are kept."""
    points = torch.tensor(of(rows, "progress", step=0)[0]["points"], dtype=torch.float64).reshape(-1, 2)
    torch.testing.assert_close(points, book.start(SIZE.judged, 0)[: SIZE.shown], rtol=0, atol=6e-4)


def test_trajectories_begin_at_the_noise(rows):
    (row,) = of(rows, "trajectories")
    points = torch.tensor(row["points"], dtype=torch.float64).reshape(SIZE.starts, SIZE.times, 2)
    torch.testing.assert_close(points[:, 0], book.start(SIZE.judged, 0)[: SIZE.starts], rtol=0, atol=6e-4)
    assert (points[:, 0] - points[:, -1]).norm(dim=1).min() > 0


def test_the_exact_flow_would_be_on_the_ring_and_at_no_distance():
    """Within three deviations lie 98.9 % of a Gaussian in the plane; of 500 samples, within five standard errors."""

    class Exact(torch.nn.Module):
        num_classes = 0

        def __init__(self):
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x, t, s, y):
            points = x[:, :, 0, 0].double()
            return book.images((ring().solution(points, t.double(), s.double()) - points) / (s - t)[:, None])

    found = book.drawn(book.SolutionFlow(Exact()), book.start(500, 0), {"nfe": 1}, SIZE)
    assert found["on_the_ring"] == pytest.approx(0.989, abs=0.025) and found["distance_to_exact"] < 1e-4


def test_the_ring_ends_three_deviations_from_its_means(monkeypatch):
    """Of points at 2.9 and 3.1 deviations the first is on it."""

    class Velocity:
        solves = False

    mean = ring().means[0]
    ends = torch.stack([mean + torch.tensor([0.2 * far, 0.0]) for far in (2.9, 3.1)])

    def sample(flow, noise, nfe):
        assert torch.equal(noise[0], book.images(book.start(2, 0))) and len(noise) == 1
        return book.images(ends)

    monkeypatch.setattr(book, "sample", sample)
    found = book.drawn(Velocity(), book.start(2, 0), {"nfe": 10}, SIZE)
    assert found["on_the_ring"] == 0.5
    torch.testing.assert_close(torch.tensor(found["points"]), ends.flatten().float(), rtol=0, atol=6e-4)


def test_the_summary_is_of_both_ways():
    draws = torch.tensor([3.0, 4.0]) + 0.1 * torch.randn(20, 40, 2, generator=torch.Generator().manual_seed(0))
    found = book.summary(torch.tensor([[0.0, 2.0], [0.0, 2.0], [0.0, 4.0]]), draws)
    assert found["mean_velocity"] == {"median": 2.0, "rms": pytest.approx(8**0.5, rel=1e-2)}
    drawn = found["drawn_velocity"]
    assert drawn["median"] == pytest.approx(5, abs=0.1) and drawn["rms"] == pytest.approx(5, abs=5 * drawn["error"])


def on_the_path(x: torch.Tensor, t: torch.Tensor, far: float) -> bool:
    """Whether points lie as far out as data of mean square `far` and noise at their times; in five standard errors."""
    off = x.square().sum(1) - (1 - t) ** 2 * far - t**2 * x.shape[1]
    return bool(off.mean().abs() < 5 * off.std() / len(x) ** 0.5)


def test_a_bias_is_what_lies_between_the_loss_and_the_exact_solution(monkeypatch):
    """Put 5 away along the mean velocity and 1 along drawn ones; quotients of 2 and of 3."""

    def moved(mixture, x, t, s, by):
        one = torch.ones(len(x), dtype=torch.float64)
        return mixture.solution(x, t * one, s * one, steps=256) + torch.tensor(by, dtype=torch.float64)

    def quotient(mixture, x, t, s, r, draws=0, source=None):
        assert on_the_path(x, t, 4 + 2 * 0.04) and (s < t).all() and r == 0.1
        return torch.full_like(x, 3.0 if draws else 2.0) / 2**0.5

    monkeypatch.setattr(book, "fixed_point", lambda mixture, x, t, s, r: moved(mixture, x, t, s, [3.0, 4.0]))
    monkeypatch.setattr(
        book,
        "drawn_fixed_point",
        lambda mixture, x, t, s, r, draws, source: moved(mixture, x, t, s, [0.6, 0.8]).expand(draws, -1, -1),
    )
    monkeypatch.setattr(book, "quotient_bias", quotient)
    halfway, whole, q = book.biases(0.1, SIZE._replace(points=200), 0)
    for row, straight, drawn in ((halfway, 5, 1), (whole, 5, 1), (q, 2, 3)):
        assert row["mean_velocity"] == {"median": straight, "rms": straight}
        assert row["drawn_velocity"] == {"median": drawn, "rms": drawn, "error": pytest.approx(0, abs=1e-12)}
    assert [(row["t"], row["s"]) for row in (halfway, whole)] == [(1, 0.5), (1, 0)]


def test_weighted_velocities_are_relative_to_the_exact_one(monkeypatch):
    powers = []

    def weighted(mixture, x, t, p, eps, draws, source):
        powers.append(p)
        mean = (mixture.weights[:, None] * (mixture.means**2 + mixture.deviations**2)).sum().item()
        assert on_the_path(x, t, mean) and eps == 0.01
        return (1 + p) * mixture.velocity(x, t), None

    monkeypatch.setattr(book, "weighted_velocity", weighted)
    rows = book.weights(SIZE._replace(points=200), 0)
    assert [row["relative"] for row in rows] == [row["p"] for row in rows] == powers == [*book.POWERS] * 6


def test_a_mistake_is_one_line():
    with pytest.raises(UserError, match="--steps"):
        book.main(["--steps", "0"], SIZE)


def test_the_record_makes_its_tables(rows, tmp_path):
    record.write(rows, "python -m benchmarks.book", tmp_path, "book")
    names = ("book-samples", "book-look-ahead", "book-weights")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "why-it-works.md"
    page.write_text("".join(f"<!-- benchmark:{name} -->\n<!-- /benchmark:{name} -->\n" for name in names))
    assert pages.main([], tmp_path, tmp_path) == 0
    lines = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert len(lines) == (2 + 5) + (2 + 2) + (2 + 6)  # heads, and ways, ratios, problems
    bias = of(rows, "solution bias", r=0.1)[0]["mean_velocity"]["median"]
    assert f"| 0.1 | {bias:.2g} |" in page.read_text()
    assert "| soflow | 2 calls |" in page.read_text() and "| 64 | 0.9 |" in page.read_text()


def test_the_page_says_what_the_record_says():
    run = record.newest(record.HOME, "book")
    assert run is not None
    text = prose.page("why-it-works.md")
    found: dict[float, dict[float, dict]] = {}
    for row in of(run["rows"], "solution bias"):
        found.setdefault(row["s"], {})[row["r"]] = row

    def over_mean(row: dict) -> float:
        return row["drawn_velocity"]["median"] / row["mean_velocity"]["median"]

    ratios = [0.3, 0.1, 0.03, 0.01, 0.003, 0.001]
    assert [*found[0.0]] == [*found[0.5]] == ratios
    assert all(1.25 < over_mean(row) < 1.42 for row in found[0.5].values()) and "costs about a third more" in text
    higher = [over_mean(row) for row in found[0.0].values()]
    assert 4.5 <= min(higher) < 5.5 and 16.5 <= max(higher) < 17.5 and "five to seventeen times higher" in text
    medians, roots = ([row["drawn_velocity"][what] for row in found[0.0].values()] for what in ("median", "rms"))
    assert 2.5 < medians[-2] / medians[-1] < 3.5 < 8 < medians[-3] / medians[-2] and "below $r = 0.003$" in text
    assert 9.5 < roots[0] / roots[-1] < 10.5 and "by a factor of 10 where $r$ falls by 300" in text
    of_q = [row["mean_velocity"]["median"] for row in of(run["rows"], "quotient bias")]
    drawn_q = [row["drawn_velocity"]["median"] for row in of(run["rows"], "quotient bias")]
    assert all(200 < q[0] / q[-1] < 400 for q in (of_q, drawn_q)) and "its median is of first order throughout" in text
    (one,) = of(run["rows"], "samples", objective="soflow", way="1 call")
    drawn = found[0.0][0.01]["drawn_velocity"]
    assert drawn["rms"] < one["distance_to_exact"]
    said = f"The {one['distance_to_exact']:.3f} of one call is to be held against"
    assert f"{said} {drawn['rms']:.2f} ± {drawn['error']:.2f}" in text
    near = {row["dimensions"]: row["relative"] for row in of(run["rows"], "weights", p=1.0) if row["t"] == 0.9}
    assert f"in 64 dimensions ({near[64]:.2f}) by more than in 16 ({near[16]:.2f})" in text
    inside = 1 - math.exp(-(3**2) / 2)  # of a Gaussian in the plane, within three standard deviations
    assert f"of the data {inside:.3f} lies on the ring" in text

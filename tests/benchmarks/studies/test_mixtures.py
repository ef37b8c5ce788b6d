"""The study on mixtures: what the losses tend to, measures that know an exact network, a few steps of each part."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from benchmarks import mixtures as typed
from benchmarks import mixtures_central as typed_central
from benchmarks.exact import look_ahead
from benchmarks.exact.estimates import root_mean_square
from benchmarks.exact.mixture import Mixture, ring
from benchmarks.harness import command
from benchmarks.report import mixture_tables, pages, record
from benchmarks.studies import mixtures, mixtures_central
from benchmarks.studies.mixtures import measures, minimisers, problems, trainings
from benchmarks.studies.mixtures.settings import SETTINGS
from benchmarks.studies.mixtures.slopes import slopes
from soflow_fast.config.validation import validate
from soflow_fast.errors import UserError
from soflow_fast.flow import SolutionFlow

BASE = "base: p = 0, r from 0.1 to 0.01"


def one_gaussian() -> Mixture:
    mean = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    return Mixture(torch.ones(1, dtype=torch.float64), mean, torch.tensor([[0.5, 2.0]], dtype=torch.float64))


def test_the_bias_of_wide_gaussians_is_of_first_order():
    """Eightfold r, about eightfold distance, of the deterministic recursion; pairs add to it."""
    rows = minimisers.biases(minimisers.WIDE, points=600, rates=(0.16, 0.02))
    marginal = rows[0]["marginal"] / rows[1]["marginal"]
    assert 6 < marginal < 11
    assert rows[0]["pair"] > 1.2 * rows[0]["marginal"] and rows[0]["pair"] > rows[1]["pair"]


def test_weighted_velocities_say_what_is_not_known():
    """More draws leave less unknown; decided points are hardly moved."""
    few, many = (minimisers.weighted(points=60, pairs=pairs, sizes=())[-1] for pairs in (50, 800))
    assert many["unknown"] < 0.5 * few["unknown"] and many["unknown"] < 0.1 * many["velocity"]
    assert 0 < many["undecided"] < 1 and many["velocity_undecided"] > many["velocity"]


def test_weighted_velocities_are_in_units_of_the_exact_one(one_thread, monkeypatch):
    """Moved by three times the exact one where it is undecided and nowhere else, from a mean that is off by one of it;
    at points of the path, which lie as far out as their times say, within five standard errors."""
    parts, out = [], []

    def weighted_velocity(data, x, t, p, eps, draws, source):
        exact, undecided = data.velocity(x, t), data.responsibilities(x, t).amax(1) <= 0.99
        length = exact.square().sum(1)
        parts.append((undecided.double().mean().item(), (length[undecided].sum() / length.sum()).sqrt().item()))
        out.append(x.square().sum(1) - (1 - t) ** 2 * (4 + 2 * 0.04) - 2 * t**2)
        return (2 + 3 * undecided[:, None]) * exact, 2 * exact

    monkeypatch.setattr(minimisers, "weighted_velocity", weighted_velocity)
    for row, (share, length) in zip(minimisers.weighted(points=400, pairs=2, sizes=()), parts, strict=True):
        assert row["undecided"] == pytest.approx(share) and 0.1 < share < 0.9
        assert row["unknown"] == pytest.approx(1) and row["velocity_undecided"] == pytest.approx(3)
        assert row["velocity"] == pytest.approx(3 * length)
    assert out[0].mean().abs() < 5 * out[0].std() / 400**0.5


class Exact(torch.nn.Module):
    """N of the exact solution and velocity."""

    num_classes = 0

    def __init__(self, data: Mixture) -> None:
        super().__init__()
        self.data, self.scale = data, torch.nn.Parameter(torch.ones(()))

    def forward(self, x, t, s, y):
        flat, t, s = x[:, :, 0, 0].double(), t.double(), s.double()
        if torch.equal(t, s):
            found = self.data.velocity(flat, t)
        else:
            found = (self.data.solution(flat, t, s, steps=64) - flat) / (s - t)[:, None]
        return self.scale * found[:, :, None, None].to(x.dtype)


def test_an_exact_network_has_no_error():
    at, flow = problems.held("ring", 40, 400), SolutionFlow(Exact(problems.mixture("ring")))
    assert all(value < 2e-3 for value in measures.errors(flow, at).values())
    rows = {(row["method"], row["calls"]): row for row in measures.by_calls(flow, at)}
    floor = measures.floor(problems.mixture("ring"), at, sets=4)
    for (method, _), row in rows.items():
        if method != "euler":
            assert row.get("error", 0) < 5e-3 and row["distance"] < 3 * floor
    assert rows["euler", 1]["error"] > rows["euler", 4]["error"] > rows["euler", 10]["error"] > 0.02
    assert rows["euler", 1]["distance"] > 5 * floor


class Shifted(Exact):
    """The exact N and a constant: f is off by (t - s) times its length, the velocity by its length."""

    constant = (0.3, 0.4)

    def forward(self, x, t, s, y):
        return super().forward(x, t, s, y) + torch.tensor(self.constant, dtype=x.dtype)[:, None, None]


def test_a_network_of_a_known_error_has_that():
    at, flow = problems.held("ring", 40, 400), SolutionFlow(Shifted(problems.mixture("ring")))
    found = measures.errors(flow, at)
    spread = (at.data - at.data.mean(0)).square().sum(1).mean().sqrt().item()
    interval = (at.within.t - at.within.s).square().mean().sqrt().item()
    assert found["one_step"] == pytest.approx(0.5 / spread, rel=1e-2)
    assert found["within"] == pytest.approx(0.5 * interval / spread, rel=1e-2)
    assert found["velocity"] == pytest.approx(0.5 / at.velocity.square().sum(1).mean().sqrt().item(), rel=1e-3)
    row = next(row for row in measures.by_calls(flow, at) if (row["method"], row["calls"]) == ("renoise", 1))
    assert row["error"] == pytest.approx(found["one_step"], rel=1e-3)
    directions = torch.randn(2, 10_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shift = (torch.tensor(Shifted.constant, dtype=torch.float64) @ (directions / directions.norm(dim=0))).abs().mean()
    assert row["distance"] == pytest.approx(shift.item() / spread, rel=0.35)  # 64 directions, and a floor below it


def test_a_training_is_judged_against_the_data(one_thread, monkeypatch):
    """Of a network that gives the data themselves the distance is 0, of one that gives the noise it is not."""
    at = problems.held("ring", 40, 400)
    monkeypatch.setattr(trainings, "held", lambda name: at)
    monkeypatch.setattr(trainings, "errors", lambda flow, at: {})
    for ends, judge in ((at.data, lambda d: d == 0), (at.noise, lambda d: d > 0.1)):
        monkeypatch.setattr(trainings, "solved", lambda flow, x, t, s, ends=ends: ends)
        assert judge(trainings.judged("lambda: lambda = 0.25", "ring", 0, 1)[0]["distance"])


def test_the_standard_error_of_a_bias_is_that_of_other_noises():
    """Of both ways, over disjoint sets of noises."""
    held = problems.held("ring", 600, 600).one_step
    data, found = ring(), []
    for k in range(0, 600, 25):
        noise, exact = held.x[k : k + 25], held.exact[k : k + 25]
        a, b = minimisers.means(data, noise, 0.3, torch.Generator().manual_seed(k))
        straight = look_ahead.fixed_point(data, noise, 1.0, 0.0, 0.3) - exact
        found.append((root_mean_square(a - exact, b - exact), root_mean_square(straight)))
    for way in zip(*found, strict=True):
        roots, errors = torch.tensor(way).T
        assert roots.std() == pytest.approx(errors.mean().item(), rel=0.5)


def test_biases_are_of_the_held_noises(monkeypatch):
    """f_r put a known distance away is that far, in units of the spread, as is its error; of two means the product
    counts."""
    at = problems.held("ring", 40, 400)
    monkeypatch.setattr(minimisers, "held", lambda name: at)
    shift = torch.linspace(0.5, 1.5, 20, dtype=torch.float64)[:, None] * torch.tensor([0.3, 0.4], dtype=torch.float64)
    exact = at.one_step.exact[:20]
    monkeypatch.setattr(minimisers, "means", lambda data, noise, *rest: (exact + shift, exact + 4 * shift))
    monkeypatch.setattr(minimisers, "fixed_point", lambda *given: exact - 3 * shift)
    (row,) = minimisers.biases("ring", points=20, rates=(0.1,))
    for way, ends in {"pair": (shift, 4 * shift), "marginal": (-3 * shift,)}.items():
        found, error = root_mean_square(*ends)
        assert row[way] == pytest.approx(found / at.spread)
        assert row[f"{way}_standard_error"] == pytest.approx(error / at.spread) and error > 0.01
    assert row["points"] == 20 and row["chains"] == minimisers.chains(0.1) == 10


def test_the_points_that_networks_are_judged_at():
    """Within the path: s below t and its share of t anywhere, x as far out as t says and made of data and noise of its
    own; all within five standard errors. The exact solutions are those of these points."""
    held = problems.held("ring", 200, 400)
    x, t, s, exact = held.within
    assert (s < t).all() and (s / t).mean() == pytest.approx(0.5, abs=5 * (1 / 12 / 200) ** 0.5)
    for product in (
        x.square().sum(1) - (1 - t) ** 2 * (4 + 2 * 0.04) - 2 * t**2,
        (x * held.data[:200]).sum(1),
        (x * held.noise[:200]).sum(1),
    ):
        assert product.mean().abs() < 5 * product.std() / 200**0.5
    torch.testing.assert_close(exact, ring().solution(x, t, s), rtol=0, atol=1e-9)
    assert torch.equal(held.one_step.x, held.noise[:200])
    torch.testing.assert_close(held.velocity, ring().velocity(x, t))
    other = problems.held("scattered", 4, 400)  # whose mean is not 0
    assert other.spread == pytest.approx(minimisers.spread(problems.mixture("scattered")), rel=0.03)


def test_the_distance_from_the_fixed_point_is_that_of_its_means(one_thread, monkeypatch):
    """Of two means of f_r the product counts, in the bias and in a network's distance from it."""
    at = problems.held("ring", 40, 400)
    monkeypatch.setattr(trainings, "held", lambda name: at)
    axis = torch.tensor([1.0, 0.0], dtype=torch.float64)
    both = [at.one_step.exact + k * axis for k in (0.5, 2.0)]
    monkeypatch.setattr(trainings, "fixed_point", lambda name, r: both)
    monkeypatch.setattr(trainings, "solved", lambda flow, x, t, s: at.one_step.exact + 4.5 * axis)
    row = trainings.long("ring", 0.1, 0, 1, 1)[0]
    assert row["bias"] == pytest.approx(1 / at.spread)
    assert row["points"][0]["from_fixed_point"] == pytest.approx((4 * 2.5) ** 0.5 / at.spread)


def test_the_unit_of_distances_is_the_datas_spread():
    """Of one Gaussian the root of its variances' sum; of two points that of the distance between them as well. A floor
    is in that unit."""
    assert minimisers.spread(one_gaussian()) == pytest.approx((0.5**2 + 2.0**2) ** 0.5)
    weights, means = torch.tensor([0.75, 0.25], dtype=torch.float64), torch.tensor([[1.0], [5.0]], dtype=torch.float64)
    two = Mixture(weights, means, torch.tensor([[0.1], [0.3]], dtype=torch.float64))
    assert minimisers.spread(two) == pytest.approx((3.0 + 0.75 * 0.01 + 0.25 * 0.09) ** 0.5)
    held = problems.held("ring", 40, 400)
    assert held.spread == pytest.approx(minimisers.spread(ring()), rel=0.03)  # 400 points, all about as far out
    shifted = held._replace(data=held.data + 1, spread=held.spread / 2)
    floor, moved = (measures.floor(ring(), at, sets=2) for at in (held, held._replace(spread=held.spread / 2)))
    assert moved == pytest.approx(2 * floor) and measures.floor(ring(), shifted, sets=2) > 2 * floor


def test_the_distance_of_shifted_samples_is_the_shift():
    x = torch.randn(100, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert measures.sliced_distance(x, x + 0.3) == pytest.approx(0.3)
    assert measures.sliced_distance(x, x.flip(0)) == 0


FACTORS = (
    {"p"},
    {"fm_fraction"},
    {"teacher", "teacher_decay"},
    {"r_init", "r_end", "r_schedule"},  # where r goes, and how
    {"kind", "p"},  # flow matching alone, with weights of its own
)
"""Fields of the objective that may differ from the base's together."""


def test_every_setting_differs_from_the_base_in_one_factor():
    configs = {name: problems.configuration("ring", 0, 10, **one.changes) for name, one in SETTINGS.items()}
    base = configs.pop(BASE)
    for name, config in configs.items():
        validate(config)
        one = SETTINGS[name]
        assert config != base or one.target is not None or one.recipe is not SETTINGS[BASE].recipe
        assert config.model == base.model and config.optim == base.optim and config.steps == base.steps
        changed = {field for field, value in vars(config.objective).items() if value != getattr(base.objective, field)}
        assert any(changed <= factor for factor in FACTORS), name


def test_a_setting_trains_as_it_says(one_thread):
    """Its own step and its own way to the quotient: after the same steps on the same data no two have the same
    weights."""
    names = (BASE, "difference: central, r from 0.1 to 0.01", "precision: bf16 pair, r to 0.01")
    made = {name: trainings.trained(SETTINGS[name], "ring", 0, 2)[0] for name in names}
    found = [torch.cat([p.flatten() for p in state.flow.parameters()]) for state in made.values()]
    for k, j in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(found[k], found[j])
    assert made[names[2]].target == SETTINGS[names[2]].target != made[BASE].target
    again = trainings.base("ring", 2)
    assert torch.equal(found[0], torch.cat([p.flatten() for p in again.flow.parameters()]))


def test_everything_measured_is_on_the_page(one_thread, monkeypatch, tmp_path):
    for module in (trainings, minimisers):
        monkeypatch.setattr(module, "held", lambda name: problems.held(name, 40, 400))
    rows = minimisers.biases("ring", points=20, rates=(0.2, 0.1))
    rows += minimisers.weighted(points=10, pairs=20, sizes=(2, 4))
    rows += [{"kind": "floor", "problem": "ring", "distance": 0.01}]
    rows += slopes("ring", 3, batches=1)
    for name in (BASE, "flow matching: p = 1", "difference: central, r = 0.1"):
        rows += trainings.judged(name, "ring", 0, 3)
    rows += trainings.long("ring", 0.1, 0, 4, 2)
    central = trainings.long("ring", 0.1, 0, 4, 2, central=True)
    assert central[0]["bias"] == rows[-1]["bias"]
    for point, other in zip(central[0]["points"], rows[-1]["points"], strict=True):  # whose times differ in any case
        assert point["step"] == other["step"] and point["one_step"] != other["one_step"]
    record.write(central, "python -m benchmarks.mixtures_central", tmp_path, "mixtures-central")
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    found = {(row["r"], row["way"]): row["error"] for row in rows if row.get("precision") == "fp64"}
    assert all(found[r, "central"] < found[r, "ahead"] for r in (0.3, 0.1, 0.03))
    record.write(rows, "python -m benchmarks.mixtures", tmp_path, "mixtures")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "open-questions.md"
    names = ["mixtures-central", *(f"mixtures-{name}" for name in mixture_tables.TABLES)]
    page.write_text("".join(f"<!-- benchmark:{name} -->\n<!-- /benchmark:{name} -->\n" for name in names))
    pages.main([], tmp_path, tmp_path)
    text = page.read_text()
    assert "| ring, 2-D | 0.1 |" in text and "| ring, 2-D | base: p = 0, r from 0.1 to 0.01 |" in text
    assert "flow matching: p = 1 |  |  |" in text and "|  |  | euler | 10 |" in text


def test_the_page_says_what_the_records_say():
    run, central = (record.newest(record.HOME, name) for name in ("mixtures", "mixtures-central"))
    assert run is not None and central is not None
    text = " ".join((record.ROOT / "docs" / "open-questions.md").read_text(encoding="utf-8").split())
    bias = {(row["problem"], row["r"]): row for row in run["rows"] if row["kind"] == "bias"}
    for problem, times in (("ring", "costs {:.0f} times"), ("scattered", "on these 300 noises {:.0f} times in 16")):
        row = bias[problem, 0.002]
        assert times.format(row["pair"] / row["marginal"]) in text and f"{row['pair']:.4f} beside" in text
    long = {(row["problem"], row["r"]): row for row in run["rows"] if row["kind"] == "long"}
    for problem in ("ring", "scattered"):
        row, last = long[problem, 0.1], long[problem, 0.1]["points"][-1]
        assert f"at {last['one_step']:.3f} " in text and f"{row['bias']:.3f}" in text
        assert abs(last["one_step"] - row["bias"]) < 0.03 and last["from_fixed_point"] < 0.4 * row["bias"]
        other = next(found for found in central["rows"] if found["problem"] == problem)["points"][-1]
        assert f"{other['one_step']:.3f}" in text and other["from_fixed_point"] > 2 * last["from_fixed_point"]
    rows = [row for row in run["rows"] if row["kind"] == "training"]

    def mean(problem: str, setting: str, what: str) -> str:
        each = [
            row[what] for row in rows if (row["problem"], f"{row['factor']}: {row['setting']}") == (problem, setting)
        ]
        return f"{sum(each) / len(each):.3f}"

    p = [mean("ring", f"flow matching: p = {p}", "velocity") for p in ("0", "0.5", "1")]
    assert f"{p[0]}, {p[1]} and {p[2]} off on the ring" in text
    one, base = mean("scattered", "p: p = 1", "one_step"), mean("scattered", BASE, "one_step")
    assert f"{one} against {base} of the base" in text
    ways = [mean("ring", f"precision: {way}, r to 0.0003", "one_step") for way in ("bf16 pair", "fp16 pair")]
    assert f"the errors are {ways[0]} (bf16 pair), {ways[1]} (fp16 pair)" in text


def test_the_command_keeps_what_it_has_and_names_what_is_missing(monkeypatch, tmp_path, committed):
    monkeypatch.setattr(record, "RECORDS", tmp_path)
    monkeypatch.setattr(command, "workers", ThreadPoolExecutor)
    made = [mixtures.Job(name, lambda k: [{"kind": "x", "value": k}], (k,)) for k, name in enumerate("abb")]
    monkeypatch.setattr(mixtures, "jobs", lambda seeds, steps: [*made])
    mixtures.main(["--workers", "1", "--seeds", "1"])
    (path,) = tmp_path.iterdir()
    run = record.read(path)
    assert sorted(row["value"] for row in run["rows"]) == [0, 1, 2] and "unfinished" not in run
    assert run["command"] == "python -m benchmarks.mixtures --workers 1 --seeds 1"
    path.unlink()
    mixtures.main(["--workers", "1", "--within", "0"])
    (path,) = tmp_path.iterdir()
    run = record.read(path)
    assert run["missing"] == ["2 b"] and [row["value"] for row in run["rows"]] == [0]


def test_long_trainings_by_a_central_difference_are_a_record_of_their_own(monkeypatch, tmp_path, committed):
    def long(problem: str, r: float, seed: int, steps: int, every: int, central: bool) -> list[dict]:
        point = {"step": steps, "cpu_seconds": 1.0, "one_step": 0.5, "from_fixed_point": 0.1}
        return [{"kind": "long", "problem": problem, "r": r, "seed": seed, "steps": every, "points": [point]}]

    monkeypatch.setattr(record, "RECORDS", tmp_path)
    monkeypatch.setattr(command, "workers", ThreadPoolExecutor)
    monkeypatch.setattr(mixtures_central, "long", long)
    mixtures_central.main(["--workers", "1", "--steps", "32"])
    (path,) = tmp_path.iterdir()
    run = record.read(path)
    made = [(row["problem"], row["seed"], row["steps"]) for row in run["rows"]]
    assert made == [("ring", 0, 2), ("scattered", 0, 2), ("ring", 1, 2), ("scattered", 1, 2)]
    assert run["command"] == "python -m benchmarks.mixtures_central --workers 1 --steps 32" and "unfinished" not in run


@pytest.mark.parametrize("words", ["--seeds 0 0", "--steps 0", "--workers 0", "--within -1"])
def test_mistakes_are_one_line_that_names_the_flag(words, monkeypatch):
    monkeypatch.setattr(record, "begin", None)  # whoever calls it fails
    with pytest.raises(UserError) as error:
        mixtures.main(words.split())
    assert words.split()[0] in str(error.value) and "\n" not in str(error.value)


def test_the_command_keeps_its_name():
    assert typed_central.main is mixtures_central.main
    assert typed.main is mixtures.main and "python -m benchmarks.mixtures" in str(mixtures.__doc__)
    made = mixtures.jobs([0, 1], 100)
    assert mixtures.missing(made)[-1].endswith("trainings of seed 1")

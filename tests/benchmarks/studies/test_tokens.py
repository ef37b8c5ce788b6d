"""More tokens at equal work, on images of 8 x 8 pixels and a few steps."""

import pytest
import torch

from benchmarks.exact.images import bands, photographs, to_coefficients, to_images
from benchmarks.report import pages, record
from benchmarks.report.tokens_tables import compared_runs
from benchmarks.studies import tokens
from benchmarks.studies.tokens import Way
from soflow_fast.errors import UserError
from tests.benchmarks import prose

SIDE = 8
WAYS = (Way("base", 4, 8, 8), Way("fewer steps", 2, 8, 8), Way("smaller batch", 1, 8, 2))


@pytest.fixture(scope="module")
def rows():
    threads = torch.get_num_threads()
    work = 6 * tokens.step_flops(WAYS[0], SIDE)
    try:
        found = [tokens.run(way, seed, lr, work, SIDE) for way in WAYS for seed in (0, 1) for lr in (1e-3, 1e-2)]
    finally:
        torch.set_num_threads(threads)
    return tokens.references(SIDE) + found


class Exact(torch.nn.Module):
    """In a flow's place: the exact solution and velocity."""

    def solution(self, x, t, s):
        f = photographs(SIDE).solution(to_coefficients(x.double()), t.double(), s.double(), steps=tokens.SOLVER_STEPS)
        return to_images(f, SIDE).float()

    def velocity(self, x, t):
        return to_images(photographs(SIDE).velocity(to_coefficients(x.double()), t.double()), SIDE).float()


def test_the_exact_flow_has_no_error():
    """But for the rounding of points and values to float32."""
    for found in tokens.errors(Exact(), SIDE).values():
        assert len(found) == 1 + len(bands(SIDE)) and max(found) < 1e-4


def test_errors_are_relative_to_their_own_band():
    exact = torch.randn(3, SIDE**2, generator=torch.Generator().manual_seed(0))
    coarse = bands(SIDE)[0]
    whole, *by_band = tokens.relative(exact + exact * coarse, exact, SIDE)
    assert by_band == [pytest.approx(1), *[0] * (len(bands(SIDE)) - 1)]
    assert whole == pytest.approx(float(exact[:, coarse].norm() / exact.norm()))


def test_the_points_of_the_velocity_are_on_the_path():
    """They lie as far out as data and noise at their times, within five standard errors."""
    held, mixture = tokens.held(SIDE), photographs(SIDE)
    far = (mixture.weights[:, None] * (mixture.means**2 + mixture.deviations**2)).sum()
    off = held.x.square().sum(1) - (1 - held.t) ** 2 * far - held.t**2 * SIDE**2
    assert off.mean().abs() < 5 * off.std() / tokens.HELD**0.5
    assert 0 < held.t.min() < 0.02 and 0.98 < held.t.max() < 1


def test_a_run_sees_fresh_data_and_judges_the_average(one_thread, monkeypatch):
    seen, judged = [], []

    def step(state, x, y):
        seen.append((state, x))
        state.step += 1

    monkeypatch.setattr(tokens, "step_flops", lambda way, side: 10)
    monkeypatch.setattr(tokens, "train_step", step)
    monkeypatch.setattr(tokens, "errors", lambda flow, side: judged.append(flow) or {})
    for seed in (0, 1):
        tokens.run(WAYS[0], seed, 1e-3, 20, SIDE)
    batches = [x for _, x in seen]
    assert len(batches) == 4 and len({float(x.sum()) for x in batches}) == 4
    assert [flow is state.ema for flow, (state, _) in zip(judged, seen, strict=True)] == [True] * 4


def test_errors_fall_in_training_and_work_is_equal(rows):
    runs = [row for row in rows if row["kind"] == "run"]
    assert [row["tokens"] for row in runs] == [4] * 4 + [16] * 4 + [64] * 4
    for row in runs:
        work = row["step_flops"] * row["steps"]
        assert abs(work - 6 * runs[0]["step_flops"]) <= row["step_flops"] / 2
        assert row["points"][-1]["flops"] == work
        assert row["points"][0]["cpu_seconds"] <= row["points"][-1]["cpu_seconds"]
    base = [row for row in runs if row["name"] == "base" and row["lr"] == 1e-2]
    for row in base:
        assert row["points"][-1]["velocity"][0] < row["points"][0]["velocity"][0]
    assert base[0]["points"] != base[1]["points"]


def test_attention_is_counted():
    """Four times the tokens are more than four times the FLOPs of a network that is the same."""
    few, many = (tokens.step_flops(Way("", patch, 8, 2), 16) for patch in (2, 1))
    assert many > 5 * few


def test_references(rows):
    flat, gaussian, solver = rows[:3]
    assert flat["solution"][0] == pytest.approx(1, abs=0.2) and gaussian["solution"][0] < 0.5
    assert gaussian["velocity"][0] < 0.5 and solver["error"] < 1e-6
    noise, ones = tokens.held(SIDE).noise[:4], torch.ones(4, dtype=torch.float64)
    error = photographs(SIDE).solution_error(noise, ones, 0 * ones, steps=tokens.SOLVER_STEPS)
    assert solver["error"] == pytest.approx(error / tokens.held(SIDE).solution.norm(dim=1).mean().item())


def test_the_record_makes_its_table(rows, tmp_path, committed):
    runs = [row for row in rows if row.get("lr") != 1e-2]
    rates = [row | {"kind": "rate"} for row in rows if row["kind"] == "run"]
    record.write(runs + rates, "python -m benchmarks.tokens", tmp_path, "tokens")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "open-questions.md"
    page.write_text("<!-- benchmark:tokens -->\n<!-- /benchmark:tokens -->\n")
    assert pages.main([], tmp_path, tmp_path) == 0
    text = page.read_text()
    assert text.count("\n| base |") == 1 and "| exact for one Gaussian |" in text and "f, below 4" in text
    assert "2 seeds, the better of 2 learning rates on another seed" in text


def test_the_tuning_seed_chooses_the_rate_and_is_not_compared():
    def row(kind, seed, lr, error):
        return {"kind": kind, "name": "base", "tokens": 4, "seed": seed, "lr": lr, "points": [{"solution": [error]}]}

    rate = [row("rate", tokens.TUNING_SEED, 0.1, 0.5), row("rate", tokens.TUNING_SEED, 0.2, 0.4)]
    runs = [row("run", 3, 0.2, 0.9), row("run", 4, 0.2, 0.6)]
    assert tokens.chosen(rate + runs) == {("base", 4): 0.2}
    assert compared_runs(rate + runs) == [runs]
    diverged = row("rate", tokens.TUNING_SEED, 1.0, float("nan"))
    assert tokens.chosen([diverged, *rate]) == {("base", 4): 0.2}


@pytest.mark.parametrize(
    ("typed", "flag"),
    [
        ("--seeds 0 0", "--seeds"),
        ("--seeds 0 1000", "--seeds"),
        ("--rates 0", "--rates"),
        ("--rates 0.1 0.1", "--rates"),
        ("--gflop x", "--gflop"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_recorded(typed, flag, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RECORDS", tmp_path / "records")
    with pytest.raises(UserError) as found:
        tokens.main(typed.split())
    assert flag in str(found.value) and "\n" not in str(found.value)
    assert not (tmp_path / "records").exists()


def test_an_unfinished_record_names_what_is_missing(monkeypatch, missing):
    monkeypatch.setattr(tokens, "references", lambda: [])

    def run(way, seed, lr, work):
        points = [{"solution": [lr], "velocity": [0.0], "cpu_seconds": 0.0}]
        return {"tokens": tokens.tokens_of(way), "name": way.name, "lr": lr, "seed": seed, "steps": 1, "points": points}

    monkeypatch.setattr(tokens, "run", run)
    tokens.main(["--seeds", "0", "1", "--rates", "0.002", "0.001"])
    assert [len(left) for left in missing] == [*range(4 * len(tokens.WAYS))][::-1]
    last = tokens.WAYS[-1]
    what = f"{last.name}, patches of {last.patch}"
    assert f"{what}, seed 1000, lr 0.002" in missing[0] and f"{what}, seed 1" in missing[0]
    assert missing[-2] == [f"{what}, seed 1, lr 0.001"]  # the better rate of the two


def test_the_page_says_what_the_record_says():
    run = record.newest(record.HOME, "tokens")
    assert run is not None and "unfinished" not in run
    text = prose.page("open-questions.md")
    ends = {
        (runs[0]["name"], runs[0]["tokens"]): [each["points"][-1]["solution"] for each in runs]
        for runs in compared_runs(run["rows"])
    }
    assert all(len(found) == 3 for found in ends.values())
    mean = {way: [sum(band) / 3 for band in zip(*found, strict=True)] for way, found in ends.items()}
    base, few = mean["base", 64], mean["smaller batch", 256]
    assert min(mean.values()) == base and sorted(mean.values())[1] == few
    assert f"at {few[0]:.3f} beside {base[0]:.3f}" in text
    assert min(found[0] for (_, many), found in mean.items() if many == 1024) > max(
        found[0] for (_, many), found in mean.items() if many < 1024
    )
    narrow = mean["width", 1024]
    assert f"a little better than 64 ({few[-1]:.2f} beside {base[-1]:.2f})" in text and few[-1] < base[-1]
    assert f"({narrow[-2]:.2f} beside {base[-2]:.2f}), by less than the seeds differ" in text
    spread = max(found[-2] for found in ends["width", 1024]) - min(found[-2] for found in ends["width", 1024])
    assert 0 < base[-2] - narrow[-2] < spread
    (known,) = [row["solution"] for row in run["rows"] if row.get("name") == "exact for one Gaussian"]
    assert all(mine > best for found in mean.values() for mine, best in zip(found, known, strict=True))

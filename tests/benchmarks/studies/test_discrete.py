"""Discrete values by continuous relaxation: the figures of known samples, a few steps of each training, the tables."""

import itertools
from typing import Any

import pytest
import torch

from benchmarks.exact.levels import COUNT, KINDS, Code, digit_levels
from benchmarks.report import pages, record
from benchmarks.studies import discrete
from soflow_fast.data.digits import load_digits
from soflow_fast.errors import UserError
from tests.benchmarks import prose


@pytest.fixture(scope="module")
def rows():
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(discrete, "SAMPLES", 40)
        patch.setattr(discrete, "HELD", 60)
        patch.setattr(discrete, "SOLVER_STEPS", 64)
        discrete.held.cache_clear()
        found = discrete.references()
        for kind in KINDS:
            code = Code(kind, 1.0)
            found += [discrete.digits(code, 4, objective, 0, 2) for objective in discrete.CALLS]
            found += [discrete.pixel(code, 0, 8, p, 8) for p in discrete.POWERS]
        found.append(discrete.digits(Code("one-hot", 2.0), 2, "soflow", 0, 2))
        discrete.held.cache_clear()
    torch.set_num_threads(threads)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_data_themselves_are_judged_right(kind):
    code, (levels, labels) = Code(kind, 1.0), digit_levels()
    x = discrete.read_back(code, load_digits()[0]) if kind == "grey" else code.encode(levels)
    assert torch.equal(code.decode(x), levels)
    found = discrete.judged(code, x, labels)
    assert found["accuracy"] > 0.99 and found["frechet"] < 1 and found["variation"] == 0 and found["near"] == 1
    if kind != "grey":
        assert found["entropy"] < 1e-4


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_undecided_samples_are_seen(scale):
    flat = torch.full((2, COUNT, 3, 3), scale * (2 / COUNT - 1))  # every level with the same share
    found = discrete.decided(Code("one-hot", scale), flat)
    assert found["near"] == 0 and found["largest"] == pytest.approx(1 / COUNT)
    assert found["entropy"] == pytest.approx(4, abs=1e-5)
    assert sum(found["largest_histogram"]) == pytest.approx(1)
    assert discrete.decided(Code("one-hot", scale), 2 * flat + scale)["largest"] == pytest.approx(2 / COUNT)
    assert discrete.decided(Code("bits", scale), torch.zeros(2, 4, 3, 3))["entropy"] == pytest.approx(4, abs=1e-5)


def test_variation():
    p, q = torch.eye(COUNT)[0], torch.eye(COUNT)[1]
    assert discrete.variation(p, q) == 1 and discrete.variation(p, p) == 0
    levels = torch.tensor([[[0, 1]], [[0, 2]]])
    found = discrete.histogram(levels)
    assert found.shape == (2, COUNT) and found[0, 0] == 1 and found[1, 1] == found[1, 2] == 0.5


def test_each_training_is_recorded(rows):
    digits = [row for row in rows if row["kind"] == "digits"]
    assert [list(row["calls"]) for row in digits[:2]] == [["1", "2", "4"], ["10"]]
    pixels = [row for row in rows if row["kind"] == "pixel"]
    assert len(pixels) == 6 and all([point["step"] for point in row["points"]] == [1, 2, 4, 8] for row in pixels)
    for row in pixels:
        assert row["exact_near"] > 0.95 and row["solver_error"] < 0.1
    (curve,) = {tuple(row["curve"]["exact"]) for row in pixels if row["code"] == "grey"}
    assert all(a <= b + 1e-6 for a, b in itertools.pairwise(curve)), "the flow of a line keeps its order"


def test_one_pixel_is_held_against_the_exact_map(one_thread, monkeypatch):
    """A network that gives the exact ends has no error; one that gives the mean of the data for every noise has the
    error 1, and is at no level."""
    code = Code("bits", 1.5)
    monkeypatch.setattr(discrete, "HELD", 60)
    monkeypatch.setattr(discrete, "SOLVER_STEPS", 64)
    discrete.held.cache_clear()
    noise, exact, error = discrete.held(code)
    few, ones = noise[:50], torch.ones(50, dtype=torch.float64)
    unsolved = code.mixture(discrete.level_frequencies()).solution_error(few, ones, 0 * ones, steps=64)
    assert error == pytest.approx(unsolved / (2 * 1.5))
    frequencies = discrete.level_frequencies()
    mean = (frequencies[:, None] * code.points.double()).sum(0)

    def step(state, x, y):
        state.step += 1

    monkeypatch.setattr(discrete, "train_step", step)
    found = []
    for ends in (exact, mean.expand_as(exact)):
        monkeypatch.setattr(discrete, "one_call", lambda flow, noise, ends=ends: ends)
        found.append(discrete.pixel(code, 0, 1, 0.0, 8))
    discrete.held.cache_clear()
    learned, blurred = (row["points"][-1] for row in found)
    row = found[0]
    assert (learned["error"], learned["same_level"], learned["near"]) == (0, 1, row["exact_near"])
    assert learned["variation"] == row["exact_variation"] > 0
    (level,) = code.decode(mean[None, :, None, None]).flatten().tolist()
    share = (code.decode(exact[..., None, None]) == level).double().mean().item()
    assert blurred["error"] == pytest.approx(1) and blurred["near"] == 0
    assert blurred["same_level"] == pytest.approx(share) and share < 0.9
    assert blurred["variation"] == pytest.approx(1 - frequencies[level].item())
    assert discrete.one_pixel_configuration(code, 0, 1, 1.0, 8).objective.p == 1


def test_one_pixel_is_learned():
    """With the plain squared error a few hundred steps bring a small network near the exact map of bits."""
    row = discrete.pixel(Code("bits", 1.0), 0, 160, 0.0, 32)
    assert row["points"][-1]["variation"] < row["points"][0]["variation"]
    assert row["points"][-1]["error"] < 1


def test_the_record_makes_its_tables(rows, tmp_path, committed):
    record.write(rows, "python -m benchmarks.discrete", tmp_path, "discrete")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "open-questions.md"
    names = ("discrete", "discrete-pixel")
    page.write_text("".join(f"<!-- benchmark:{name} -->\n<!-- /benchmark:{name} -->\n" for name in names))
    assert pages.main([], tmp_path, tmp_path) == 0
    text = page.read_text()
    assert text.count("| SoFlow, 1 call |") == 4 and text.count("| flow matching, 10 calls |") == 3
    assert "| one-hot, scale 2, patches of 2 |" in text and text.count("| four bits | 1 |") == 1


@pytest.mark.parametrize(
    ("typed", "flag"), [("--seeds 1 1", "--seeds"), ("--steps 0", "--steps"), ("--pixel-steps x", "--pixel-steps")]
)
def test_a_mistake_is_one_line_and_nothing_is_recorded(typed, flag, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RECORDS", tmp_path / "records")
    with pytest.raises(UserError) as found:
        discrete.main(typed.split())
    assert flag in str(found.value) and "\n" not in str(found.value)
    assert not (tmp_path / "records").exists()


def test_an_unfinished_record_names_what_is_missing(monkeypatch, missing):
    monkeypatch.setattr(discrete, "references", lambda: [])
    monkeypatch.setattr(discrete, "digits", lambda *job: {})
    monkeypatch.setattr(discrete, "pixel", lambda *job: {})
    discrete.main(["--seeds", "0"])
    assert [len(left) for left in missing] == [*range(len(missing))][::-1] and len(missing) > 10
    assert missing[-2] == ["a pixel as one-hot, p = 1, seed 0"]
    assert "digits as one-hot of scale 4, patches of 4, soflow, seed 0" in missing[0]


def test_the_page_says_what_the_record_says():
    run = record.newest(record.HOME, "discrete")
    assert run is not None and "unfinished" not in run
    text = prose.page("open-questions.md")

    def figures(kind: str, patch: int, scale: float, objective: str, calls: int, what: str) -> list[float]:
        key = {"code": kind, "patch": patch, "scale": scale, "objective": objective, "kind": "digits"}
        return [row["calls"][str(calls)][what] for row in run["rows"] if key.items() <= row.items()]

    def mean(*given: Any) -> float:
        found = figures(*given)
        return sum(found) / len(found)

    bits, grey = (mean(kind, 4, 1.0, "soflow", 1, "accuracy") for kind in ("bits", "grey"))
    assert f"In one call {100 * bits:.0f} % of the digits of bits are recognised, where {100 * grey:.0f} %" in text
    bits, grey = (mean(kind, 4, 1.0, "soflow", 1, "frechet") for kind in ("bits", "grey"))
    assert f"at a Frechet distance of {bits:.1f} beside {grey:.1f};" in text
    one_hot = figures("one-hot", 4, 2.0, "soflow", 1, "accuracy")
    assert f"Of one-hot digits {100 * sum(one_hot) / 3:.0f} % are recognised in one call" in text
    assert f"a range of {100 * min(one_hot):.0f} to {100 * max(one_hot):.0f} % over three seeds" in text
    assert f"at a Frechet distance of {mean('one-hot', 4, 2.0, 'soflow', 1, 'frechet'):.0f}. It is not" in text
    assert f"is worse, at {100 * mean('one-hot', 4, 2.0, 'flow-matching', 10, 'accuracy'):.0f} %" in text
    variation = [mean(kind, 4, 1.0, "soflow", 1, "variation") for kind in ("grey", "bits")]
    assert 2.5 < variation[0] / variation[1] < 3.5 and "three times nearer to the data's frequencies" in text
    by_scale = [mean("one-hot", 4, scale, "soflow", 1, "accuracy") for scale in (1.0, 2.0, 4.0)]
    assert max(by_scale) == by_scale[1] and "it is 2 that does best" in text
    near = [mean("one-hot", 2, 2.0, *way, "near") for way in (("soflow", 1), ("flow-matching", 10))]
    assert (
        near[0] > 1 / 3 and 0.85 < near[1] < 0.95 and "more than a third are, and nine of ten by flow matching" in text
    )
    assert mean("one-hot", 2, 2.0, "soflow", 1, "accuracy") < 0.15
    pixels = {(row["code"], row["p"]): row["points"][-1] for row in reversed(run["rows"]) if row["kind"] == "pixel"}
    said = [f"{pixels[kind, 1.0]['variation']:.2f}" for kind in ("grey", "bits")]
    assert f"the levels it draws are {said[0]} and {said[1]} in total variation" in text

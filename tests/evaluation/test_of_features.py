"""KID, precision and recall, and the Inception Score against their definitions, written out."""

import math

import pytest
import torch
from torch import Tensor

from soflow_fast.evaluation import Gaussian, frechet, inception_score, kernel_distance, neighbours, precision_recall


def normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def squared_discrepancy(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate, one pair at a time."""
    kernel = lambda u, v: (float(u.double() @ v.double()) / len(u) + 1) ** 3  # noqa: E731
    m = len(x)
    same = [sum(kernel(z[i], z[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1)) for z in (x, y)]
    return sum(same) - 2 * sum(kernel(u, v) for u in x for v in y) / m**2


def test_kid_is_the_unbiased_discrepancy() -> None:
    x, y = normal(12, 5, 0), normal(12, 5, 1) + 0.5
    found = kernel_distance(x, y)
    assert found.mean == pytest.approx(squared_discrepancy(x, y), rel=1e-12) and found.deviation is None


def test_kid_of_subsets_is_seeded_and_about_the_same() -> None:
    x, y, z = normal(600, 8, 0), normal(500, 8, 1), normal(500, 8, 2) + 0.3
    far, again = (kernel_distance(x, z, subsets=20, size=200, seed=3) for _ in range(2))
    assert far == again != kernel_distance(x, z, subsets=20, size=200, seed=4)
    near = kernel_distance(x, y, subsets=20, size=200)
    assert near.deviation is not None and far.deviation is not None
    # An unbiased estimate of 0: within five deviations of its mean over 20 subsets, which overlap.
    assert abs(near.mean) < 5 * near.deviation and far.mean > 0.1 > abs(near.mean)
    assert far.mean == pytest.approx(kernel_distance(x[:500], z).mean, rel=0.2)
    with pytest.raises(ValueError, match="at least 2 samples of each, got 1 and 500"):
        kernel_distance(x[:1], y)


def fraction_within(x: Tensor, centres: Tensor, k: int) -> float:
    inside = 0
    for sample in x:
        for i, centre in enumerate(centres):
            others = sorted(float((centre - other).norm()) for j, other in enumerate(centres) if j != i)
            if float((sample - centre).norm()) <= others[k - 1]:
                inside += 1
                break
    return inside / len(x)


@pytest.mark.parametrize("entries", [neighbours.ENTRIES, 100])
def test_precision_and_recall_are_their_definition(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "ENTRIES", entries)  # rows that are held at a time
    samples, reference = normal(40, 3, 0) * 0.6 + 0.4, normal(50, 3, 1)
    found = precision_recall(samples, reference)
    assert found.precision == fraction_within(samples, reference, 3)
    assert found.recall == fraction_within(reference, samples, 3)
    assert 0.5 < found.recall < found.precision < 1


def test_precision_and_recall_of_extremes() -> None:
    """A mean a thousand times the deviations, as features may have it, changes nothing."""
    x, y = normal(100, 16, 0), normal(100, 16, 1)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, y + 100) == (0, 0)
    assert precision_recall(x[:10] * 1e-3, y).precision == 1  # in the midst of the others
    assert precision_recall(x[:10] * 1e-3, y).recall == 0
    shifted = precision_recall(x + 1000, y + 1000)
    assert shifted == pytest.approx(precision_recall(x, y), abs=0.02)  # the samples themselves are rounded by 6e-5
    with pytest.raises(ValueError, match="more than 3 samples of each, got 3 and 100"):
        precision_recall(x[:3], y)


def test_the_inception_score_of_known_classifiers() -> None:
    sure = torch.eye(5).repeat(200, 1) * 1000  # of each class as many, though not in each split
    found = inception_score(sure, splits=1)
    assert found.mean == pytest.approx(5, rel=1e-12) and found.deviation == 0
    assert inception_score(torch.zeros(100, 7)).mean == pytest.approx(1, rel=1e-12)
    assert inception_score(torch.zeros(100, 7) + 1e4 * torch.eye(7)[0]).mean == pytest.approx(1, rel=1e-12)
    ordered = inception_score(torch.eye(5).repeat_interleave(200, 0) * 1000)  # one after the other, as folders lie
    assert 4.8 < ordered.mean < 5 and 0 < ordered.deviation < 0.1
    with pytest.raises(ValueError, match="10 splits need as many images, got 9"):
        inception_score(torch.zeros(9, 3))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_are_no_figures(value: float) -> None:
    x, y = normal(20, 4, 0), normal(20, 4, 1)
    broken = x.clone()
    broken[3, 1] = value
    for figure in (precision_recall, kernel_distance):
        for pair in ((broken, y), (y, broken)):
            with pytest.raises(ValueError, match="features are not finite"):
                figure(*pair)
    with pytest.raises(ValueError, match="logits are not finite"):
        inception_score(broken)
    right, wrong = Gaussian.of(x), Gaussian.of(x)
    wrong.mean[0] = value
    for pair in ((right, wrong), (wrong, right)):
        with pytest.raises(ValueError, match="a mean or a covariance is not finite"):
            frechet(*pair)


def test_the_inception_score_is_its_definition() -> None:
    logits = normal(30, 4, 0) * 3
    p = logits.double().softmax(1)
    mean = p.mean(0)
    total = sum(float(row[k] * (row[k].log() - mean[k].log())) for row in p for k in range(4))
    assert inception_score(logits, splits=1).mean == pytest.approx(math.exp(total / 30), rel=1e-12)
    assert inception_score(logits, seed=1) == inception_score(logits, seed=1) != inception_score(logits, seed=2)

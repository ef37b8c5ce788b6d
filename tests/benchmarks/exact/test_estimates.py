"""Root mean squares of noisy vectors."""

import pytest
import torch

from benchmarks.exact.estimates import halves, root_mean_square


def test_noise_has_no_part_in_the_root_mean_square():
    """Vectors of length 5 with as much scatter: 5 within five of its errors, not 7."""
    draws = torch.tensor([3.0, 4.0]) + 5 * torch.randn(21, 4000, 2, generator=torch.Generator().manual_seed(0))
    found, error = root_mean_square(*halves(draws))
    assert found == pytest.approx(5, abs=5 * error) and 0 < error < 0.05


def test_halves_are_of_equal_size():
    a, b = halves(torch.tensor([[1.0], [3.0], [10.0], [20.0], [99.0]]))
    assert a.item() == 2 and b.item() == 15


def test_known_vectors():
    """Lengths 3 and 4: mean square 12.5, whose standard error of two points is 7 / 2."""
    found, error = root_mean_square(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    assert found == pytest.approx(12.5**0.5) and error == pytest.approx(3.5 / (2 * 12.5**0.5))


def test_noise_alone():
    a, b = torch.randn(2, 1000, 3, generator=torch.Generator().manual_seed(5))
    while (a * b).sum(1).mean() > 0:
        a = a.roll(1, 0)
    found, error = root_mean_square(a, b)
    assert found == 0 and error == pytest.approx((3 / 1000) ** 0.25, rel=0.1)

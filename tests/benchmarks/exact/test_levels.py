"""Levels as points: codes are read back, and one value alone goes to a corner where the exact flow takes it."""

import pytest
import torch

from benchmarks.exact.levels import COUNT, KINDS, Code, digit_levels, to_digits
from soflow_fast.data.digits import load_digits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_a_code_is_read_back(kind, scale):
    code, levels = Code(kind, scale), torch.arange(COUNT).reshape(1, 4, 4)
    x = code.encode(levels)
    assert x.shape == (1, code.channels, 4, 4) and x.abs().max() == scale
    assert len(set(map(tuple, code.points.tolist()))) == COUNT
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    close = x + 0.09 * code.spacing * noise.clamp(-1, 1)
    assert torch.equal(code.decode(close), levels) and code.near(close).all()
    assert not code.near(x + 0.2 * code.spacing).any()
    one = torch.zeros(code.channels, 1, 1).index_fill_(0, torch.tensor(0), 0.2 * code.spacing)
    assert not code.near(x + one).any(), "one channel is enough"
    assert code.points[:, 0].unique().diff().tolist() == pytest.approx(
        [code.spacing] * (COUNT - 1 if kind == "grey" else 1)
    )


def test_the_nearest_point_is_read():
    for kind in KINDS:
        code = Code(kind, 1.5)
        x = 3 * torch.randn(500, code.channels, generator=torch.Generator().manual_seed(1))
        nearest = torch.cdist(x, code.points).argmin(1)
        assert torch.equal(code.decode(x[..., None, None])[:, 0, 0], nearest)


def test_the_digits_at_16_levels():
    images, labels = load_digits()
    levels, same = digit_levels()
    assert torch.equal(labels, same) and levels.min() == 0 and levels.max() == COUNT - 1
    back = to_digits()(levels)
    assert back.shape == images.shape
    dark = levels < COUNT - 1
    assert torch.equal(back[:, 0][dark], images[:, 0][dark])
    assert back.mean() == pytest.approx(float(images.mean()), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_value_goes_to_its_levels_as_often_as_they_are(kind):
    """The exact flow takes N(0, I) to the data: each level as often as it is, within five standard errors."""
    code, frequencies = Code(kind, 1.0), torch.arange(1.0, COUNT + 1, dtype=torch.float64)
    mixture = code.mixture(frequencies)
    noise = torch.randn(400, code.channels, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(len(noise), dtype=torch.float64)
    end = mixture.solution(noise, ones, 0 * ones, steps=256)[..., None, None]
    assert code.near(end).double().mean() > 0.99
    found = torch.bincount(code.decode(end).flatten(), minlength=COUNT) / len(noise)
    p = frequencies / frequencies.sum()
    assert ((found - p).abs() < 5 * (p * (1 - p) / len(noise)).sqrt()).all()

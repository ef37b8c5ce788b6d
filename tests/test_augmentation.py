"""EDM's augmentation: exact where it must be, its labels, its probabilities, and no image depends on its neighbours."""

import math

import pytest
import torch
from torch import Tensor

from soflow_fast.augmentation import Changes, augmented
from soflow_fast.rng import generator

SIDE = 32


def images(n: int = 2, side: int = SIDE, dtype: torch.dtype = torch.float64) -> Tensor:
    """Smooth images of three colours, without any symmetry."""
    y, x = torch.meshgrid(*[torch.linspace(0, 1, side, dtype=dtype)] * 2, indexing="ij")
    waves = [torch.sin(5 * x + k) * torch.cos(4 * y - k) + 0.3 * x * k for k in range(3 * n)]
    return torch.stack(waves).view(n, 3, side, side)


def changes(n: int = 2, **values: float) -> Changes:
    given = {name: torch.full((n,), values.get(name, 0.0), dtype=torch.float64) for name in Changes._fields}
    return Changes(**given)


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def test_no_change_gives_the_images_back() -> None:
    x = images()
    assert relative(augmented(x, changes()), x) < 1e-9  # the filter is known to 1e-12
    assert not changes().labels.any()
    single = augmented(x.float(), Changes(*(value.float() for value in changes())))
    assert single.dtype == torch.float32 and relative(single, x.float()) < 1e-5


def test_mirrors_are_exact() -> None:
    x = images()
    assert relative(augmented(x, changes(mirror=1)), x.flip(3)) < 1e-9
    assert relative(augmented(x, changes(upside_down=1)), x.flip(2)) < 1e-9


def test_quarter_turns_and_whole_pixels() -> None:
    x = images()
    turned = augmented(x, changes(angle=math.pi / 2))
    inner = slice(3, -3)
    assert relative(turned[..., inner, inner], x.rot90(1, (2, 3))[..., inner, inner]) < 2e-2  # bilinear, doubled
    moved = augmented(x, changes(right=0.5, down=-0.25))  # 2 and -1 pixels of 32
    assert relative(moved[..., 2:-3, 4:-2], x[..., 3:-2, 2:-4]) < 1e-9


@pytest.mark.parametrize(("scale", "stretch", "axis"), [(1.0, 0.0, 0.0), (0.0, 1.5, 0.0), (0.0, 1.5, math.pi / 2)])
def test_a_line_is_where_the_formula_says(scale: float, stretch: float, axis: float) -> None:
    """Of a linear image the values are those of the plane at the point of which each pixel is made."""
    v = torch.arange(SIDE, dtype=torch.float64) - (SIDE - 1) / 2
    x = torch.stack([v.expand(SIDE, SIDE), v[:, None].expand(SIDE, SIDE)]).view(1, 2, SIDE, SIDE)
    got = augmented(x, changes(1, scale=scale, stretch=stretch, axis=axis))[0]
    zoom = 2 ** (0.2 * scale)
    longer = 2 ** (0.2 * stretch)
    across = (longer, 1 / longer) if axis == 0 else (1 / longer, longer)
    inner = slice(8, -8)  # the mirrored surroundings have a crease at the border
    for axis_wanted, wanted in ((0, x[0, 0] / zoom / across[0]), (1, x[0, 1] / zoom / across[1])):
        error = (got[axis_wanted] - wanted)[inner, inner].abs().max()
        assert error < 0.02  # of a pixel: what the filter's phase leaves


def test_nothing_lies_beyond_the_mirrored_neighbours() -> None:
    x = torch.ones(1, 1, 8, 8, dtype=torch.float64)
    assert augmented(x, changes(1, right=8.0))[0, 0].abs().max() > 0.9  # by its side: the mirrored one
    assert augmented(x, changes(1, right=40.0)).abs().max() == 0


def test_labels_are_those_of_edm() -> None:
    made = changes(1, mirror=1, upside_down=1, scale=0.5, angle=0.4, stretch=2.0, axis=0.3, right=0.7, down=-0.2)
    cos, sin = math.cos, math.sin
    wanted = [1, 1, 0.5, cos(0.4) - 1, sin(0.4), 2 * cos(0.3), 2 * sin(0.3), 0.7, -0.2]
    assert made.labels.tolist() == [pytest.approx(wanted)]
    assert torch.equal(Changes.of(made.stacked).labels, made.labels)


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    x = images(3).float()
    drawn = Changes.drawn(3, 1.0, generator(0, 0, 0, "augmentation"))
    whole = augmented(x, drawn)
    for k in range(3):
        alone = augmented(x[k : k + 1], Changes.of(drawn.stacked[k : k + 1]))
        assert torch.allclose(whole[k : k + 1], alone, atol=1e-6)


def test_each_change_has_its_probability() -> None:
    n, p = 20_000, 0.12
    drawn = Changes.drawn(n, p, generator(1, 2, 0, "augmentation"))
    wanted = {"mirror": 0.5, "upside_down": p / 2, "axis": 0.5} | dict.fromkeys(
        ("scale", "angle", "stretch", "right", "down"), p
    )
    for name, probability in wanted.items():
        share = float((getattr(drawn, name) != 0).double().mean())
        assert abs(share - probability) < 4.5 * math.sqrt(probability * (1 - probability) / n), name
    assert torch.equal(drawn.right != 0, drawn.down != 0)
    assert abs(float(drawn.scale[drawn.scale != 0].std()) - 1) < 0.1
    assert float(drawn.angle.abs().max()) <= math.pi + 1e-6
    assert torch.equal(drawn.stacked, Changes.drawn(n, p, generator(1, 2, 0, "augmentation")).stacked)

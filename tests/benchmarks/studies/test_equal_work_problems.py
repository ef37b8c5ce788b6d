"""The judges of equal work: distances by two features, from photographs that are not judged themselves."""

import pytest
import torch

from benchmarks.studies import equal_work_problems
from soflow_fast.errors import UserError
from soflow_fast.evaluation import Gaussian, frechet


def test_as_many_real_photographs_are_nearer_than_noise_of_another_kind(photographs):
    floor = equal_work_problems.floor(photographs)
    black = torch.zeros(20, 3, 32, 32, dtype=torch.uint8)
    found = equal_work_problems.distances(black, photographs)
    assert all(0 <= floor[name] < found[name] for name in floor)


def test_coarse_pixels_are_means_of_blocks():
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    images[0, 0, :4, :4] = 255
    images[0, 1, 4:6, :4] = 255
    found = equal_work_problems.coarse(images).reshape(3, 8, 8)
    assert found[0, 0, 0] == 1 and found[1, 1, 0] == 0 and (found == -1).sum() == 3 * 64 - 2


def test_distances_are_of_their_own_features_and_from_the_reference(photographs):
    """Of 50 photographs in a random order the first 30 are the reference, the next 20 the floor."""
    dataset = equal_work_problems._dataset(photographs)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    reference, others = dataset.read(order[:30]), dataset.read(order[30:])
    wanted = {
        name: frechet(Gaussian.of(features(others)), Gaussian.of(features(reference)))
        for name, features in (
            ("fd_random", equal_work_problems.convolved),
            ("fd_pixels", equal_work_problems.coarse),
        )
    }
    assert wanted["fd_random"] != pytest.approx(wanted["fd_pixels"], rel=0.1)
    assert equal_work_problems.floor(photographs) == pytest.approx(wanted, rel=1e-6)


def test_too_few_photographs_are_one_line(photographs, monkeypatch):
    monkeypatch.setattr(equal_work_problems, "REFERENCE", 40)
    with pytest.raises(UserError, match=r"--data .*photographs: 60 photographs at least are needed, .* it has 50"):
        equal_work_problems.floor(photographs)

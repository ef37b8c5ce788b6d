"""Batches of a source: latents drawn, and what a run takes from its data."""

from dataclasses import replace

import pytest
import torch

from soflow_fast.config.presets import preset
from soflow_fast.config.schema import DataChoices
from soflow_fast.data import Contents, Dataset, Source, fitted
from soflow_fast.errors import DataError
from tests.data.numbered import Numbers


def source(dataset: Dataset, **settings: object) -> Source:
    return Source(dataset, seed=3, batch_size=6, **settings)  # type: ignore[arg-type]


class Distributions(Numbers):
    """Each sample is its mean 0 and a deviation of 1."""

    def decoded(self, raw: torch.Tensor, noise: object) -> torch.Tensor:
        return noise(raw.shape)  # type: ignore[operator]


def test_the_noise_of_latents_belongs_to_the_place_in_the_batch() -> None:
    latents = source(Distributions(20))
    for step in range(3):
        whole = latents.batch(step)[0]
        for world in (2, 3):
            assert torch.equal(torch.cat([latents.batch(step, rank, world)[0] for rank in range(world)]), whole)
    assert not torch.equal(latents.batch(0)[0], latents.batch(1)[0])
    assert torch.equal(latents.batch(2)[0], source(Distributions(20)).batch(2)[0])


def test_a_run_takes_classes_and_steps_from_its_data() -> None:
    config = preset("cifar10", batch_size=6)
    left = fitted(config, source(Numbers(20)), DataChoices(classes_fixed=False, epochs=3))
    assert left.model.num_classes == 2 and left.steps == 10
    with pytest.raises(DataError, match=r"the data has 2 classes, the model 10: set model.num_classes"):
        fitted(config, source(Numbers(20)), DataChoices())
    bare = Numbers(20)
    bare.contents = Contents("numbers")
    with pytest.raises(DataError, match="the data has no classes, the model 10"):
        fitted(config, source(bare), DataChoices())
    assert fitted(config, source(bare), DataChoices(classes_fixed=False)).model.num_classes == 0
    unlabelled = replace(config, model=replace(config.model, num_classes=0))
    assert fitted(unlabelled, source(Numbers(20)), DataChoices()) == unlabelled

"""The labels of images that are drawn."""

import pytest
import torch

from soflow_fast.commands.labels import BLOCK, labels_of, parsed_labels
from soflow_fast.errors import ConfigError


def test_labels_are_balanced_random_or_listed() -> None:
    assert parsed_labels("balanced", 3, ()) == "balanced" and parsed_labels("random", 3, ()) == "random"
    assert parsed_labels("2, null,0", 3, ()) == [2, 3, 0]
    assert parsed_labels("random", 3, ("a", "random", "c")) == [1]
    assert parsed_labels("balanced", 0, ()) == "balanced" and labels_of("balanced", 0, 5, 0) is None
    with pytest.raises(ConfigError, match="--labels random: the model has no classes"):
        parsed_labels("random", 0, ())
    with pytest.raises(ConfigError, match="--labels evenly: no class of this run"):
        parsed_labels("evenly", 2, ("a", "b"))
    for text, what in (("0,,1", "a class"), ("0, ", "a class"), ("", "it"), (" ", "it")):
        for num_classes, names in ((2, ("a", "b")), (2, ()), (0, ())):
            with pytest.raises(ConfigError, match=f"^--labels '{text}': {what} is empty$"):
                parsed_labels(text, num_classes, names)
    assert parsed_labels("b,,b", 2, ("", "b")) == [1, 0, 1]
    balanced, listed = labels_of("balanced", 3, 7, 0), labels_of([2, 3], 3, 5, 0)
    assert balanced is not None and balanced.tolist() == [0, 1, 2, 0, 1, 2, 0] and balanced.dtype == torch.int64
    assert listed is not None and listed.tolist() == [2, 3, 2, 3, 2]


def test_random_labels_are_of_the_seed_and_the_image_alone() -> None:
    many, few, other = (labels_of("random", 10, n, seed) for n, seed in ((20 * BLOCK, 4), (BLOCK + 3, 4), (BLOCK, 5)))
    assert many is not None and few is not None and other is not None
    assert torch.equal(many[: BLOCK + 3], few) and not torch.equal(many[:BLOCK], other)
    assert not torch.equal(many[:BLOCK], many[BLOCK : 2 * BLOCK])
    # 2048 of each class, with a standard deviation of 43: five of these are met once in a million
    assert (many.bincount(minlength=10) - 2 * BLOCK).abs().max() < 5 * (2 * BLOCK * 0.9) ** 0.5

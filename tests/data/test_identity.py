"""Which data a run learns from: kept, compared and described."""

from dataclasses import replace

import pytest
import torch

from soflow_fast.data import Contents, InMemory, identity
from soflow_fast.data.dataset import LatentSpace

IMAGES = torch.arange(24, dtype=torch.uint8).reshape(6, 1, 2, 2)
INFINITE = '{"kind": "x", "checksum": "y", "shape": [1, 2, 3], "count": 1e400}'
LABELS = torch.tensor([0, 0, 1, 2, 2, 2])


def dataset(kind: str = "folder of images", **changes: object) -> InMemory:
    found = InMemory(IMAGES.clone(), LABELS.clone(), Contents(kind, ("ant", "bee", "cat")))
    found.contents.left_out.update({".txt": 3, "hidden": 1})
    found.contents.notes.append("2 animations: the first frame is taken")
    return found


def test_the_same_content_is_the_same_whatever_it_lies_in() -> None:
    a, b = identity.identify(dataset()), identity.identify(dataset("zip of images"))
    assert identity.changes(a, b) == []
    assert identity.from_json(identity.to_json(a)) == a


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"count": 7}, ["6 samples -> 7"]),
        ({"shape": (3, 2, 2)}, ["shape 1 x 2 x 2 -> 3 x 2 x 2"]),
        ({"classes": ("ant", "bee", "dog")}, ["3 classes -> 3: without cat, with dog"]),
        ({"classes": ("bee", "ant", "cat")}, ["3 classes -> 3: in another order"]),
        ({"counts": (2, 2, 2)}, ["samples of bee: 1 -> 2, cat: 3 -> 2"]),
        ({"checksum": "other"}, ["other names, sizes or labels of samples"]),
    ],
)
def test_what_differs_is_said(change: dict, said: list[str]) -> None:
    found = identity.identify(dataset())
    assert identity.changes(found, replace(found, **change)) == said


def test_latents_are_the_same_data_as_what_they_were_converted_from() -> None:
    space = LatentSpace("a/vae", 0.5, 0.0)
    foreign = replace(identity.identify(dataset()), checksum="theirs", space=space)
    ours = replace(foreign, checksum="ours", source="theirs")
    assert identity.from_json(identity.to_json(ours)) == ours
    assert identity.changes(foreign, ours) == identity.changes(ours, foreign) == []
    for other in (replace(ours, source="another"), replace(ours, source="")):
        assert identity.changes(foreign, other) == identity.changes(other, foreign) == ["other latents or labels"]
    assert identity.changes(ours, replace(ours, checksum="of another VAE")) == ["other latents or labels"]
    assert identity.changes(replace(foreign, checksum=""), replace(ours, source="")) == ["other latents or labels"]
    assert identity.changes(foreign, replace(ours, count=7)) == ["6 samples -> 7"]
    text = identity.to_json(foreign).replace('"source": ""', '"later": 1')  # as it was written before
    assert identity.from_json(text) == foreign


def test_the_checksum_is_of_samples_and_labels() -> None:
    found = identity.identify(dataset()).checksum
    other = InMemory(IMAGES + 1, LABELS, Contents("x", ("ant", "bee", "cat")))
    labels = InMemory(IMAGES, LABELS.flip(0), Contents("x", ("ant", "bee", "cat")))
    assert len({found, identity.identify(other).checksum, identity.identify(labels).checksum}) == 3


def test_the_block_before_a_training() -> None:
    data = dataset()
    found = identity.identify(data)
    assert identity.describe(data, found, "set") == [
        "data: folder of images at set, 6 samples of 1 x 2 x 2",
        "  3 classes: ant 2, bee 1, cat 3",
        "  left out: 3 .txt, 1 hidden",
        "  2 animations: the first frame is taken",
        f"  identity: {found.checksum[:16]}",
    ]
    data.contents.left_out.update({f"bad: a/{i}.png is cut off": 1 for i in range(20)})
    assert "  all that are bad: run/left-out.txt" in identity.describe(data, found, "set", "run/left-out.txt")
    many = InMemory(IMAGES, LABELS, Contents("x", tuple(f"c{k}" for k in range(20))))
    assert identity.describe(many, identity.identify(many), "")[1].endswith("c11 0 and 8 more, of 0 to 3")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"kind": 1}', '{"kind": "x", "checksum": "y", "shape": [1]}', INFINITE, "[" * 9999]
)
def test_damaged_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no identity of a data set"):
        identity.from_json(text)

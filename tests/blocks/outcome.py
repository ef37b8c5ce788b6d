"""What must hold when all blocks of a page have run, in its folder and with the names that its code has made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from soflow_fast.data._beside import conditions_of
from soflow_fast.data.dataset import Wanted
from soflow_fast.data.images import load

ROOT = Path(__file__).resolve().parents[2]


def authors(space: dict[str, Any]) -> None:
    """The step beside theirs had both parts of a batch, dropped labels and a gradient."""
    assert space["n"] == 15 and space["dropped"].any() and space["metrics"]["grad_norm"] > 0


def conditions(space: dict[str, Any]) -> None:
    """Images were drawn, and a vector tells colour and place of its own image; those of CLIP have length 1."""
    assert {path.name for path in Path("out").glob("0*.png")} == {"00000.png", "00001.png"}
    found = load(Path("squares"), Wanted(8, 3))
    vectors = conditions_of(found, "squares")
    assert vectors is not None and found.names is not None
    for number, name in ((0, "0.png"), (1, "1.png"), (2, "10.png")):
        assert found.names[number] == name
        y = vectors.rows(torch.tensor([number])).numpy()[0]
        x, row = (int(2 * (v + 1)) for v in y[3:])
        pixel = found.read(torch.tensor([number]))[0, :, row, x].numpy()
        assert np.abs(pixel - 255 * (y[:3] + 1) / 2).max() <= 1
    captioned = conditions_of(load(Path("photos"), Wanted(4, 3)), "photos")
    assert captioned is not None and captioned.size == 512 and captioned.dtype == np.float16
    caption = Path("photos/a/0.txt").read_text()
    assert np.array_equal(captioned.rows(torch.tensor([0])).numpy(), np.float32(space["embedded"]([caption])))
    texts = np.load("texts.npy")
    assert texts.shape == (2, 512) and texts.dtype == np.float16
    assert np.allclose(np.linalg.norm(texts.astype(float), axis=1), 1, atol=2e-3)
    assert space["images"].shape == space["none"].shape == (3, 1, 8, 8)
    assert float(space["metrics"]["fm_loss"]) > 0


def sampling(space: dict[str, Any]) -> None:
    assert space["images"].shape == (10, 1, 8, 8) and float(space["metrics"]["fm_loss"]) > 0


def policies(space: dict[str, Any]) -> None:
    assert space["action"].shape == (2, 3)


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "docs/authors.md": authors,
    "docs/conditions.md": conditions,
    "docs/sampling.md": sampling,
    "docs/policies.md": policies,
}

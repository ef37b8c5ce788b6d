"""docs/conditions.md: its examples run, but for the one that needs the weights of CLIP."""

import ast
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from soflow_fast.data._beside import conditions_of
from soflow_fast.data.dataset import Wanted
from soflow_fast.data.images import load
from tests.data.pictures import folder, picture

PAGE = (Path(__file__).parents[1] / "docs/conditions.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
CLIP, SQUARES, ENGINE = (text for kind, text in BLOCKS if kind == "python")


def test_the_small_example_runs(call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    exec(SQUARES, {})
    (block,) = [text for kind, text in BLOCKS if not kind and "--data squares" in text]
    train, sample = block.replace("\\\n", " ").strip().splitlines()
    for line, changes in ((train, ["--steps", "3", "--device", "cpu"]), (sample, ["--device", "cpu"])):
        _, _, module, *flags = shlex.split(line)
        result = call(module.removeprefix("soflow_fast."), *flags, *changes)
        assert (result.code, result.err) == (0, ""), line
    assert "conditions: 2 of wanted.npy" in result.out
    assert {path.name for path in Path("out").glob("0*.png")} == {"00000.png", "00001.png"}
    found = load(Path("squares"), Wanted(8, 3))
    conditions = conditions_of(found, "squares")
    assert conditions is not None and found.names is not None
    for number, name in ((0, "0.png"), (1, "1.png"), (2, "10.png")):  # a vector tells the colour of its own image
        assert found.names[number] == name
        y = conditions.rows(torch.tensor([number])).numpy()[0]
        x, row = (int(2 * (v + 1)) for v in y[3:])
        pixel = found.read(torch.tensor([number]))[0, :, row, x].numpy()
        assert np.abs(pixel - 255 * (y[:3] + 1) / 2).max() <= 1


def test_the_engine_takes_vectors_as_it_says() -> None:
    space: dict[str, Any] = {}
    exec(ENGINE, space)
    assert space["images"].shape == space["none"].shape == (3, 1, 8, 8)
    assert float(space["metrics"]["fm_loss"]) > 0


def test_the_example_of_clip_writes_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its model in the place of CLIP's: all but two calls of `transformers`."""
    names = ["b/2.jpg", "a/1.jpg"]
    folder(tmp_path / "photos", {name: picture(kind="JPEG") for name in names})
    for name in names:
        (tmp_path / "photos" / name).with_suffix(".txt").write_text(name)
    monkeypatch.chdir(tmp_path)
    tree = ast.parse(CLIP)
    kept = [node for node in tree.body if not (isinstance(node, ast.ImportFrom) and node.module == "transformers")]
    tree.body = kept
    space: dict[str, Any] = {"CLIPTextModelWithProjection": Model, "CLIPTokenizer": Tokenizer}
    exec(compile(tree, "clip", "exec"), space)
    found = load(Path("photos"), Wanted(4, 3))
    conditions = conditions_of(found, "photos")
    assert conditions is not None and conditions.size == 512 and conditions.dtype == np.float16
    wanted = space["embedded"](["a/1.jpg"])
    assert np.array_equal(conditions.rows(torch.tensor([0])).numpy(), wanted)
    assert np.load("texts.npy").shape == (2, 512)


class Tokenizer:
    """Numbers of letters."""

    @classmethod
    def from_pretrained(cls, name: str) -> "Tokenizer":
        return cls()

    def __call__(self, texts: list[str], **settings: Any) -> dict[str, Any]:
        assert settings == {"padding": True, "truncation": True, "return_tensors": "pt"}
        return {"input_ids": torch.tensor([[sum(map(ord, text))] for text in texts])}


class Model:
    """A vector for each sum of letters."""

    @classmethod
    def from_pretrained(cls, name: str) -> "Model":
        return cls()

    def eval(self) -> "Model":
        return self

    def __call__(self, input_ids: Any) -> Any:
        drawn = [torch.randn(512, generator=torch.Generator().manual_seed(int(i))) for i in input_ids[:, 0]]
        return SimpleNamespace(text_embeds=torch.stack(drawn))

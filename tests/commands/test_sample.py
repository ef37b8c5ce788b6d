"""`sample`: its ways from noise to data, its labels, its batches, and the folder that it goes on with."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from soflow_fast import load, sample
from soflow_fast.commands.labels import labels_of
from soflow_fast.config.presets import preset
from soflow_fast.config.schema import override
from soflow_fast.runs.checkpoint import export
from soflow_fast.runs.images import png, to_adm_uint8, to_uint8
from soflow_fast.sample import parser
from soflow_fast.sampling import BATCH, Drawing
from soflow_fast.training.state import build_flow

Call = Callable[..., Any]


def pngs(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("0*.png"))]


@pytest.mark.parametrize(
    ("flags", "way"),
    [
        (["--times", "1, 0.6,0.25"], {"times": [1, 0.6, 0.25]}),
        (["--nfe", "3", "--method", "consecutive"], {"nfe": 3, "method": "consecutive"}),
        (["--times", "1,0.3", "--nfe", "2", "--method", "euler"], {"times": [1, 0.3], "method": "euler"}),
    ],
)
def test_times_and_methods(flags: list[str], way: Any, finished: Any, call: Call, tmp_path: Path) -> None:
    result = call("sample", finished.folder, "--out", tmp_path / "out", "--n", "5", *flags)
    calls = way.get("nfe") or len(way["times"])
    assert result.code == 0 and f"5 images of {calls} network calls each" in result.out, result
    x = sample(load(finished.folder), torch.arange(5), seed=0, **way)
    assert pngs(tmp_path / "out") == [png(image) for image in to_uint8(x)]


def test_a_flow_that_knows_the_velocity_alone_goes_along_it(call: Call, refused: Call, tmp_path: Path) -> None:
    config = preset("digits", **{"model.hidden_size": 16, "model.depth": 1, "model.num_heads": 2})
    config = override(config, {"objective.kind": "flow-matching"})
    flow = build_flow(config).to_empty(device="cpu")
    with torch.no_grad():
        for k, value in enumerate(flow.state_dict().values()):
            value.normal_(std=0.3, generator=torch.Generator().manual_seed(k))
    export(flow, config, tmp_path / "run")
    result = call("sample", tmp_path / "run", "--out", tmp_path / "out", "--n", "3")
    assert (result.code, result.err) == (0, "") and "3 images of 10 network calls each" in result.out
    x = sample(load(tmp_path / "run"), torch.arange(3), nfe=10, method="euler", seed=0)
    assert pngs(tmp_path / "out") == [png(image) for image in to_uint8(x)]
    line = refused("sample", tmp_path / "run", "--out", tmp_path / "out", "--method", "renoise")
    assert "--method must be euler, got 'renoise': the flow was trained by flow-matching" in line


def test_arrays_in_the_layout_of_adm(finished: Any, call: Call, tmp_path: Path) -> None:
    result = call("sample", finished.folder, "--out", tmp_path, "--n", "70", "--labels", "random", "--format", "npz")
    assert (result.code, result.err) == (0, "") and result.out.endswith(f": {tmp_path / 'samples.npz'}\n")
    assert sorted(os.listdir(tmp_path)) == [".lock", "grid.png", "samples.json", "samples.npz"]
    y = labels_of("random", 10, 70, 0)
    assert y is not None and len(y.unique()) == 10
    with np.load(tmp_path / "samples.npz") as found:
        assert found["arr_0"].shape == (70, 8, 8, 1) and (found["arr_1"] == y.numpy()).all()
        assert (found["arr_0"] == to_adm_uint8(sample(load(finished.folder), y, seed=0)).numpy()).all()


def test_images_are_the_same_in_batches_of_any_size_up_to_rounding(finished: Any, call: Call, tmp_path: Path) -> None:
    """Sums of float32 in another order: a byte differs by one where it is within 2e-5 of the next, at most one in 390.

    Samples themselves differ by less than 2e-5 (docs/sampling.md); a byte is 8e-3 wide.
    """
    drawn = {}
    for size in (1, 256):
        flags = ["--n", "40", "--nfe", "2", "--format", "npz", "--batch-size", size]
        assert call("sample", finished.folder, "--out", tmp_path / str(size), *flags).code == 0
        with np.load(tmp_path / str(size) / "samples.npz") as found:
            drawn[size] = found["arr_0"].astype(int)
    difference = np.abs(drawn[1] - drawn[256])
    assert difference.max() <= 1 and (difference > 0).mean() < 4e-3
    flow, y = load(finished.folder), torch.arange(40) % 10
    for method in ("renoise", "consecutive", "euler"):
        one, many = (sample(flow, y, nfe=2, method=method, seed=0, batch_size=size) for size in (1, 256))
        assert (one - many).abs().max() < 2e-5, method


def test_the_same_command_goes_on_and_another_is_refused(
    finished: Any, call: Call, refused: Call, files: Call, tmp_path: Path
) -> None:
    flags = ["sample", finished.folder, "--out", tmp_path / "out", "--n", "9", "--batch-size", "4"]
    assert call(*flags).code == 0
    before = files(tmp_path / "out")
    (tmp_path / "out" / "00005.png").unlink()
    again = call(*flags)
    assert again.code == 0 and again.out.startswith("5 of 9 are there already\n")
    assert files(tmp_path / "out") == before
    for more, text in (
        (["--seed", "1"], "seed 0, not 1"),
        (["--times", "1,0.5"], "times [1.0], not [1.0, 0.5]"),
        (["--method", "euler", "--nfe", "1"], "method 'renoise', not 'euler'"),
        (["--labels", "3"], "labels 'balanced', not '3'"),
        (["--batch-size", "8"], "batch_size 4, not 8"),
        (["--n", "12"], "n 9, not 12"),
    ):
        line = refused(*flags, *more)
        assert f"--out {tmp_path / 'out'}: holds images of another command ({text}); give another folder" in line
    assert files(tmp_path / "out") == before
    (tmp_path / "out" / "note.txt").write_text("mine")
    assert call(*flags, "--n", "2", "--overwrite").code == 0
    names = {".lock", "00000.png", "00001.png", "grid.png", "note.txt", "samples.json"}
    assert set(files(tmp_path / "out")) == names
    line = refused("sample", finished.folder, "--out", tmp_path, "--n", "2")
    assert f"--out {tmp_path}: holds " in line and "which is not of this command" in line


def test_other_weights_are_another_command(run_dir: Path, call: Call, refused: Call, tmp_path: Path) -> None:
    flags = ["--out", tmp_path / "out", "--n", "2"]
    checkpoints = [run_dir / "checkpoints" / f"step-000000{step}" for step in (15, 20)]
    assert call("sample", checkpoints[1], *flags).code == 0
    assert call("sample", run_dir, *flags).code == 0  # the same weights
    assert "of another command (of other weights)" in refused("sample", checkpoints[0], *flags)
    kept = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert kept["settings"]["labels"] == "balanced" and kept["made_by"]["run"] == "digits"


def test_a_long_drawing_says_how_far_it_is(
    finished: Any, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = call("sample", finished.folder, "--out", tmp_path / "quick", "--n", "80", "--labels", "3")
    assert [line.split()[0] for line in quick.out.splitlines()] == ["classes:", "80"]
    monkeypatch.setattr("soflow_fast.runs.progress.PLAIN_LINE_EVERY", 0.0)
    slow = call("sample", finished.folder, "--out", tmp_path / "slow", "--n", "80", "--labels", "3")
    lines = slow.out.splitlines()
    assert all(re.fullmatch(r"\d+/80 images  \d+:\d\d left  \d+ img/s", line) for line in lines[:2])
    assert lines[1].startswith("80/80 images  0:00 left") and len(lines) == 4


def test_a_batch_is_as_large_as_the_help_says(call: Call, finished: Any, tmp_path: Path, monkeypatch: Any) -> None:
    assert parser().get_default("batch_size") == str(BATCH)
    sizes: list[int] = []
    plain = Drawing.batch

    def batch(self: Drawing, *given: Any) -> torch.Tensor:
        made = plain(self, *given)
        sizes.append(len(made))
        return made

    monkeypatch.setattr(Drawing, "batch", batch)
    assert call("sample", finished.folder, "--out", tmp_path / "a", "--n", "5").code == 0
    assert call("sample", finished.folder, "--out", tmp_path / "b", "--n", "5", "--batch-size", "3").code == 0
    assert sizes == [64, 3, 3]

"""`evaluate` against a reference, of images and of times: what it prints, and how it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from soflow_fast.evaluation import Extracted, judge
from tests.evaluation.small import Small, pictures, save_folder, save_npz

Call = Callable[..., Any]
SAMPLES = ["--n", "100", "--nfe", "1", "--json"]


@pytest.fixture
def small_inception(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """A small network in the place of Inception. Returns the files that were asked for."""
    asked: list[dict[str, str]] = []

    def networks(names: Any, **files: str) -> Any:
        asked.append(files)
        return {name: Small() for name in names}

    monkeypatch.setattr(judge, "open_networks", networks)
    return asked


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return save_folder(pictures(120, 0), tmp_path / "reference", into=3)


def test_images_against_a_reference(small_inception: Any, reference: Path, call: Call, tmp_path: Path) -> None:
    ours = save_npz(pictures(110, 1), tmp_path / "ours.npz")
    result = call("evaluate", ours, "--reference", reference)
    assert (result.code, result.err) == (0, "")
    figures, end = result.out.strip().split("; ")
    assert [part.split(" ")[0] for part in figures.split(", ")] == ["FID", "sFID", "IS", "precision", "recall", "KID"]
    assert end == f"of 110 images, fewer than 50000, against {reference} (120 images)"
    assert small_inception == [{"inception": "", "dinov2": ""}]
    flags = ["--metrics", "fid,fd-dinov2", "--inception", "a.pth", "--dinov2", "b.pth", "--json"]
    values = json.loads(
        call("evaluate", save_folder(pictures(110, 1), tmp_path / "folder"), "--reference", reference, *flags).out
    )
    assert values["samples"] == 110 and values["few"] and values["images"] == str(tmp_path / "folder")
    assert values["reference"] == {"path": str(reference), "images": 120, "statistics": False, "size": 8}
    assert values["figures"].keys() == {"fid", "fd_dinov2"} and f"FID {values['figures']['fid']:.2f}" in result.out
    assert small_inception[-1] == {"inception": "a.pth", "dinov2": "b.pth"}


@pytest.mark.parametrize("metrics", ["fd-random", "kid-random", "precision-random"])
def test_features_that_are_not_finite_are_one_line(
    metrics: str, reference: Path, refused: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        name = "random"

        def on(self, device: torch.device) -> Any:
            return lambda images: Extracted(images.float().mean((2, 3)).log() / (images.amax() < 250))

    monkeypatch.setattr(judge, "open_networks", lambda names, **files: {"random": Broken()})
    dark, light = (save_npz(pictures(110, 1).clamp(1, most), tmp_path / f"{most}.npz") for most in (99, 255))
    light.write_bytes(save_npz(pictures(110, 1, light=200), tmp_path / "x.npz").read_bytes())
    for ours, theirs, where in ((light, dark, str(light)), (dark, light, f"--reference {light}")):
        line = refused("evaluate", ours, "--reference", theirs, "--metrics", metrics)
        assert line.strip().endswith(f"{where}: features of the network random are not finite"), line


def test_a_run_against_a_reference_is_its_samples_against_it(
    finished: Any, reference: Path, call: Call, tmp_path: Path
) -> None:
    """By random features, which need no weights: the command as it is, and twice the same way."""
    flags = ["--reference", reference, "--metrics", "fd-random,recall-random"]
    drawn = json.loads(call("evaluate", finished.folder, *flags, *SAMPLES).out)
    assert call("sample", finished.folder, "--n", "100", "--out", tmp_path / "out").code == 0
    of_files = json.loads(call("evaluate", tmp_path / "out", *flags, "--json").out)
    assert (tmp_path / "out" / "grid.png").exists() and of_files["samples"] == 100
    assert drawn["nfe"]["1"] == of_files["figures"] and drawn["seed"] == 0 and drawn["samples"] == 100
    assert drawn["reference"] == of_files["reference"]
    line = call("evaluate", finished.folder, *flags, "--n", "100", "--nfe", "1").out
    assert line.startswith(f"1 step : FD-random {drawn['nfe']['1']['fd_random']:.2f}, recall-random ")
    assert line.endswith(f"; of 100 images, fewer than 50000, against {reference} (120 images)\n")


def test_statistics_alone_are_a_reference(small_inception: Any, finished: Any, call: Call, tmp_path: Path) -> None:
    np.savez(tmp_path / "mu.npz", mu=np.zeros(224), sigma=np.eye(224))
    result = call("evaluate", finished.folder, "--reference", tmp_path / "mu.npz", "--n", "100", "--nfe", "1")
    assert result.out.startswith("1 step : FID ") and result.out.endswith(f"{tmp_path / 'mu.npz'} (its statistics)\n")
    assert ", IS " in result.out and "sFID" not in result.out and "recall" not in result.out


def test_times_that_are_given(finished: Any, call: Call) -> None:
    even = json.loads(call("evaluate", finished.folder, "--n", "100", "--nfe", "2", "--json").out)
    same = json.loads(call("evaluate", finished.folder, "--n", "100", "--times", "1,0.5", "--json").out)
    assert same["nfe"]["2"].pop("times") == [1, 0.5] and same["nfe"] == even["nfe"]
    assert even["reference"] == {"path": "digits", "images": 1797} and even["samples"] == 100 and even["few"] is True
    other = call("evaluate", finished.folder, "--n", "100", "--times", "1,0.7,0.2")
    assert other.out.startswith("times 1,0.7,0.2: 3 steps: 0.") and other.out.count("\n") == 1
    end = " within distance 4 of a training image (100 samples against 1797 real digits, fewer than 50000)\n"
    assert other.out.endswith(end)


def test_a_search_for_times_prints_its_table_and_measures_the_best_with_other_noise(
    finished: Any, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from soflow_fast.evaluation import times_search

    monkeypatch.setattr(times_search, "GRID", 2)
    monkeypatch.setattr(times_search, "WIDTH", 0.5)
    flags = ["--n", "100", "--times", "search", "--seed", "4"]
    lines = call("evaluate", finished.folder, *flags).out.splitlines()
    tried = [line.split(": Frechet distance ") for line in lines[:-3]]
    assert [times for times, _ in tried[:3]] == ["times 1,0.5", "times 1,0.333", "times 1,0.667"]
    best = min(tried, key=lambda one: float(one[1]))[0]
    assert lines[-3] == f"the least Frechet distance is that of {best}; with other noise, seed 5:"
    assert lines[-2].startswith("2 steps: 0.") and lines[-1].startswith(f"{best}: 2 steps: 0.")
    values = json.loads(call("evaluate", finished.folder, *flags, "--json").out)
    assert [f"times {','.join(f'{t:g}' for t in one['times'])}" for one in values["tried"]] == [one[0] for one in tried]
    assert values["best"]["seed"] == 5 and f"Frechet distance {values['best']['frechet']:.1f}" in lines[-1]
    again = json.loads(call("evaluate", finished.folder, "--n", "100", "--nfe", "2", "--seed", "5", "--json").out)
    assert again["nfe"]["2"] == {name: values["even"][name] for name in again["nfe"]["2"]}


def test_a_search_by_a_figure_of_a_reference(finished: Any, reference: Path, call: Call, monkeypatch: Any) -> None:
    from soflow_fast.evaluation import times_search

    monkeypatch.setattr(times_search, "GRID", 2)
    monkeypatch.setattr(times_search, "WIDTH", 0.5)
    flags = ["--n", "100", "--times", "search", "--reference", reference, "--metrics", "recall-random,fd-random"]
    values = json.loads(call("evaluate", finished.folder, *flags, "--json").out)
    assert values["distance"] == "FD-random" and len(values["tried"]) >= 3
    assert values["best"].keys() == {"times", "seed", "recall_random", "fd_random"}


WRONG = [
    (["RUN", "--metrics", "fid"], ["--metrics fid", "--reference PATH"]),
    (["RUN", "--dinov2", "x"], ["--dinov2 x", "--reference PATH"]),
    (["RUN", "--reference", "nowhere"], ["--reference nowhere", "no such file"]),
    (["RUN", "--reference", "IMAGES", "--metrics", "fidd"], ["--metrics fidd", "did you mean 'fid'?"]),
    (["RUN", "--reference", "IMAGES", "--metrics", "fd-dinov2"], ["--dinov2 FILE is needed"]),
    (["RUN", "--reference", "IMAGES", "--metrics", "fd-dinov2", "--dinov2", "no"], ["--dinov2 no", "No such file"]),
    (["RUN", "--reference", "IMAGES", "--n", "100", "--metrics", "recall-random", "--times", "search"], ["a distance"]),
    (["RUN", "--times", "1,x"], ["--times 1,x", "numbers"]),
    (["RUN", "--times", "0.9,0.5"], ["--times 0.9,0.5", "begin with 1"]),
    (["RUN", "--times", "1,0.5", "--nfe", "3"], ["--times 1,0.5", "--nfe"]),
    (["RUN", "--times", "search", "--nfe", "1"], ["--nfe 1", "from 2 to 10"]),
    (["RUN", "--times", "search", "--nfe", "2,3"], ["--nfe 2,3", "one number of calls"]),
    (["IMAGES"], ["IMAGES", "--reference PATH"]),
    (["IMAGES", "--reference", "IMAGES", "--nfe", "2"], ["--nfe 2", "none are drawn"]),
    (["IMAGES", "--reference", "IMAGES", "--seed", "0"], ["--seed 0", "none are drawn"]),
    (["IMAGES", "--reference", "IMAGES", "--guidance", "2"], ["--guidance 2", "none are drawn"]),
    (["mu.npz", "--reference", "IMAGES"], ["mu.npz", "no images"]),
    (["IMAGES", "--reference", "mu.npz", "--metrics", "kid"], ["--reference mu.npz", "no images"]),
    (["empty", "--reference", "IMAGES"], ["empty", "no checkpoint"]),
    (["cut.npz", "--reference", "IMAGES"], ["cut.npz: is a damaged .npz"]),
    (["IMAGES", "--reference", "cut.npz", "--metrics", "fd-random"], ["--reference cut.npz: is a damaged .npz"]),
]


@pytest.mark.parametrize(("arguments", "parts"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_wrong_input_is_one_line(
    arguments: list[str], parts: list[str], refused: Call, finished: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    save_folder(pictures(10, 0), tmp_path / "IMAGES")
    np.savez("mu.npz", mu=np.zeros(3), sigma=np.eye(3))
    Path("empty").mkdir()
    Path("cut.npz").write_bytes(Path("mu.npz").read_bytes()[:300])
    line = refused("evaluate", *(str(finished.folder) if text == "RUN" else text for text in arguments))
    assert all(part in line for part in parts) and len(line) < 300, line

"""Sets compared with a reference by the features of a small network: each figure is what its function says of them."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from soflow_fast import DiT, DiTConfig, SolutionFlow, sample
from soflow_fast.errors import ConfigError, DataError, Diverged
from soflow_fast.evaluation import (
    FEW,
    Extracted,
    Gaussian,
    Judge,
    RandomFeatures,
    finish_with,
    frechet,
    inception_score,
    judge,
    judge_for,
    kernel_distance,
    metrics_of,
    open_images,
    precision_recall,
)
from soflow_fast.runs.images import to_uint8
from soflow_fast.sampling import Drawing
from tests.evaluation.small import Small, pictures, save_folder, save_npz

CPU = torch.device("cpu")
ALL = ("fid", "sfid", "is", "precision", "recall", "kid")
REFERENCE, SAMPLES = pictures(200, 0), pictures(130, 1, light=20)


def extracted(images: torch.Tensor) -> Extracted:
    return Small().on(CPU)(images)


@pytest.fixture
def reference(tmp_path: Path) -> str:
    return str(save_folder(REFERENCE, tmp_path / "reference"))


def judged_by(reference: str, names: tuple[str, ...] = ALL, devices: int = 1, **settings: bool) -> Judge:
    networks = {"inception": Small(), "random": RandomFeatures()}
    opened = open_images(reference, flag="--reference ", size=8)
    return Judge(opened, metrics_of(names, networks), networks, [CPU] * devices, **settings)


def test_each_figure_is_that_of_the_features(reference: str, tmp_path: Path) -> None:
    ours, theirs = extracted(SAMPLES), extracted(REFERENCE)
    found = judged_by(reference).of_images(open_images(str(save_npz(SAMPLES, tmp_path / "x.npz"))))
    pair, kid = (f(ours.features, theirs.features) for f in (precision_recall, kernel_distance))
    score = inception_score(ours.logits)
    expected = {
        "fid": frechet(Gaussian.of(ours.features), Gaussian.of(theirs.features)),
        "sfid": frechet(Gaussian.of(ours.spatial), Gaussian.of(theirs.spatial)),
        "is": score.mean,
        "is_std": score.deviation,
        "precision": pair.precision,
        "recall": pair.recall,
        "kid": kid.mean,
        "kid_std": kid.deviation,
    }
    # Batches of 64 and all at once differ by the rounding of float32 convolutions.
    assert found.values == pytest.approx(expected, rel=1e-4) and list(found.values) == list(expected)
    assert (found.images, found.reference.images, found.reference.statistics) == (130, 200, False)
    assert 0 < found.values["precision"] < 1 and found.values["fid"] > 0.01


def test_the_line_holds_the_figures_their_count_and_the_reference(reference: str, tmp_path: Path) -> None:
    images = open_images(str(save_npz(SAMPLES, tmp_path / "x.npz")))
    line = judged_by(reference, ("fid", "kid", "recall")).of_images(images).line()
    start, end = line.split("; ")
    names = [part.split(" ")[0] for part in start.split(", ")]
    assert names == ["FID", "KID", "recall"] and " ± " in start.split(", ")[1]
    assert end == f"of 130 images, fewer than {FEW}, against {reference} (200 images)"
    larger = save_npz(pictures(10, 3, size=16), tmp_path / "larger.npz")
    assert (
        judged_by(str(larger), ("fid",))
        .of_images(images)
        .line()
        .endswith(f"against {larger} (10 images), 8 and 16 pixels high")
    )


def test_equal_sets_have_no_distance(reference: str) -> None:
    found = judged_by(reference).of_images(open_images(reference))
    # The least eigenvalues of a product of covariances are known to 1e-16 of the largest, and their roots to 1e-8.
    assert abs(found.values["fid"]) < 1e-8 * 224 and found.values["precision"] == found.values["recall"] == 1
    assert "FID 0.00," in found.line()


def test_statistics_of_adm_are_taken_for_gaussians_and_its_images_for_the_rest(tmp_path: Path) -> None:
    theirs, others = extracted(REFERENCE), extracted(pictures(50, 9))
    gaussian, spatial = Gaussian.of(theirs.features), Gaussian.of(theirs.spatial)
    statistics = {
        "mu": gaussian.mean, "sigma": gaussian.covariance, "mu_s": spatial.mean, "sigma_s": spatial.covariance
    }  # fmt: skip
    path = str(save_npz(pictures(50, 9), tmp_path / "VIRTUAL.npz", **statistics))
    ours = open_images(str(save_folder(SAMPLES, tmp_path / "x")))
    found = judged_by(path).of_images(ours)
    of_all = judged_by(str(save_folder(REFERENCE, tmp_path / "all"))).of_images(ours)
    for name in ("fid", "sfid", "is"):
        assert found.values[name] == pytest.approx(of_all.values[name], rel=1e-4)
    few = precision_recall(extracted(SAMPLES).features, others.features)
    assert (found.values["precision"], found.values["recall"]) == few
    assert found.line().endswith(f"against {path} (50 images and its statistics)")
    np.savez(tmp_path / "alone.npz", **statistics)
    alone = judged_by(str(tmp_path / "alone.npz"), ("fid", "sfid", "is")).of_images(ours)
    assert alone.values == pytest.approx({name: found.values[name] for name in alone.values})
    assert alone.line().endswith("alone.npz (its statistics)")


def test_metrics_that_a_reference_lacks_something_for(tmp_path: Path) -> None:
    np.savez(tmp_path / "mu.npz", mu=np.zeros(224), sigma=np.eye(224))
    path = str(tmp_path / "mu.npz")
    with pytest.raises(ConfigError, match=r"--reference .*mu.npz: holds statistics and no images, which recall needs"):
        judged_by(path, ("fid", "recall"))
    with pytest.raises(ConfigError, match="holds neither images nor mu_s, which sFID needs"):
        judged_by(path, ("sfid",))
    with pytest.raises(ConfigError, match="holds statistics and no images, which FD-random needs"):
        judged_by(path, ("fd-random",))
    np.savez(tmp_path / "mu.npz", mu=np.zeros(3), sigma=np.eye(3))
    ours = open_images(str(save_npz(SAMPLES, tmp_path / "x.npz")))
    with pytest.raises(DataError, match=r"x.npz and --reference .*: Gaussians of 224 and of 3 dimensions"):
        judged_by(path, ("fid",)).of_images(ours)
    few = open_images(str(save_npz(SAMPLES[:2], tmp_path / "few.npz")))
    with pytest.raises(DataError, match=r"few.npz and .*: neighbour 3 needs more than 3 samples of each, got 2"):
        judged_by(str(tmp_path / "x.npz"), ("recall",)).of_images(few)


def test_one_network_may_be_asked_for_several_figures_and_several_networks_at_once(reference: str) -> None:
    names = ("fd-random", "recall-random", "is")
    found = judged_by(reference, names).of_images(open_images(reference))
    assert list(found.values) == ["fd_random", "recall_random", "is", "is_std"]
    assert found.line().startswith("FD-random 0.00, recall-random 1.0000, IS ")


def test_names_of_metrics() -> None:
    found = metrics_of([" FID", "kid", "fid", "fd-mine"], ["mine", "inception"])
    assert [(m.name, m.figure, m.extractor) for m in found] == [
        *(("fid", "frechet", "inception"), ("kid", "kid", "inception"), ("fd-mine", "frechet", "mine")),
    ]
    with pytest.raises(ValueError, match=r"'fidd' is none of fid, sfid, .*did you mean 'fid'"):
        metrics_of(["fidd"], [])
    with pytest.raises(ValueError, match="'fd-other' is none of"):
        metrics_of(["fd-other"], ["mine"])


def test_of_a_large_set_a_part_is_kept_which_is_drawn_from_all(reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "MOST_KEPT", 40)
    measured = judge.Measured({"kid", "frechet"}, 200)
    rows = torch.arange(200.0)[:, None]
    for part in rows.split(64):
        measured.add(part, part[:, :0], part[:, :0])
    kept = measured.features()[:, 0]
    assert len(kept) == 40 and kept.max() > 100 > kept.min() and len(kept.unique()) == 40
    assert measured.gaussian("frechet").mean == pytest.approx(99.5)
    assert judged_by(reference, ("kid",)).of_images(open_images(reference)).images == 200


@pytest.fixture(scope="module")
def flow() -> SolutionFlow:
    torch.manual_seed(0)
    size = DiTConfig(input_size=8, patch_size=4, in_channels=3, hidden_size=16, depth=1, num_heads=2, num_classes=5)
    net = SolutionFlow(DiT(size)).requires_grad_(False)
    for parameter in net.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    return net


def test_samples_that_are_drawn_are_those_of_sample(flow: SolutionFlow, reference: str, tmp_path: Path) -> None:
    labels = torch.arange(130) % 5
    images = to_uint8(sample(flow, labels, nfe=2, seed=3)).permute(0, 3, 1, 2)
    saved = open_images(str(save_npz(images, tmp_path / "x.npz")))
    drawing = Drawing.of(flow, labels, nfe=2, seed=3)
    finish = finish_with(to_uint8, lambda device: None)
    expected = judged_by(reference).of_images(saved)
    ticks: list[tuple[int, int]] = []
    for settings in ({"devices": 1}, {"devices": 2}, {"threads": False, "tick": lambda *told: ticks.append(told)}):
        found = judged_by(reference, **settings).of_flow(flow, drawing, finish)
        assert found == expected, settings
    reference_told, samples_told = [(64, 200), (128, 200), (192, 200), (200, 200)], [(64, 130), (128, 130), (130, 130)]
    assert ticks == reference_told + samples_told
    only = judged_by(reference).of_flow(flow, drawing, finish, only=metrics_of(["fid"], [])[0])
    assert only.values == {"fid": expected.values["fid"]}


def test_samples_that_are_not_finite_are_not_measured(flow: SolutionFlow, reference: str) -> None:
    drawing = Drawing.of(flow, torch.zeros(4, dtype=torch.long), seed=0)
    with pytest.raises(Diverged, match="samples of 1 network calls are not finite"):
        judged_by(reference, ("fid",)).of_flow(broken(flow), drawing, finish_with(to_uint8, lambda device: None))


def broken(flow: SolutionFlow) -> SolutionFlow:
    other = copy.deepcopy(flow)
    next(other.parameters()).fill_(torch.nan)
    return other


def test_convolutions_are_exact_inside_and_as_before_outside(reference: str) -> None:
    seen = []

    class Watching(Small):
        def on(self, device: torch.device):
            seen.append(torch.backends.cudnn.allow_tf32)
            return super().on(device)

    before = torch.backends.cudnn.allow_tf32
    opened = open_images(reference, flag="--reference ", size=8)
    Judge(opened, metrics_of(["fid"], []), {"inception": Watching()}, [CPU])
    assert seen == [False] and torch.backends.cudnn.allow_tf32 == before


def test_a_judge_by_names(reference: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[list[str], dict[str, str]]] = []

    def networks(names, **files):
        asked.append((list(names), files))
        return {"inception": Small(), "dinov2": Small()}

    monkeypatch.setattr(judge, "open_networks", networks)
    opened = open_images(reference, flag="--reference ", size=8)
    assert [metric.name for metric in judge_for(opened, "", [CPU]).metrics] == list(ALL)
    found = judge_for(opened, "", [CPU], dinov2="file")
    assert [metric.name for metric in found.metrics] == [*ALL, "fd-dinov2"] and found.metrics[-1].written == "FD-DINOv2"
    assert asked[-1] == (["inception", "dinov2"], {"inception": "", "dinov2": "file"})
    np.savez(tmp_path / "mu.npz", mu=np.zeros(224), sigma=np.eye(224))
    alone = judge_for(open_images(str(tmp_path / "mu.npz")), "", [CPU])
    assert [metric.name for metric in alone.metrics] == ["fid", "is"]
    with pytest.raises(ConfigError, match="--metrics fid,nope: 'nope' is none of"):
        judge_for(opened, "fid,nope", [CPU])
    about = json.loads(json.dumps(found.about(100)))
    assert about["samples"] == 100 and about["few"] and about["reference"]["images"] == 200

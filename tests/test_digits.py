"""The promise of the default command, measured independently: digits in one network call, and how good they are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from soflow_fast import load, sample
from soflow_fast.data.digits import load_digits, to_pixels
from soflow_fast.evaluation import digit_scores, frechet_distance, measure_digits

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def real():
    images, labels = load_digits()
    return to_pixels(images).numpy().astype(np.float64), labels.numpy()


def frechet_by_square_root(a, b):
    """The definition, with a matrix square root of the product of the covariances."""
    from scipy.linalg import sqrtm

    A, B = (np.cov(x, rowvar=False) + 1e-3 * np.eye(x.shape[1]) for x in (a, b))
    root = sqrtm(A @ B)
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A + B - 2 * np.real(root))


def test_data_is_the_real_digits(real):
    from sklearn.datasets import load_digits as from_sklearn

    images, labels = load_digits()
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32
    assert images.min() == -1 and images.max() == 1
    assert np.array_equal(real[0], from_sklearn().data) and np.array_equal(labels, from_sklearn().target)


def test_frechet_distance(real):
    """Equal to its definition, 0 for equal sets, and 16 for two halves of the real digits."""
    pixels = real[0]
    order = np.random.default_rng(0).permutation(len(pixels))
    a, b = pixels[order[:898]], pixels[order[898:]]
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_by_square_root(a, b), rel=1e-5)
    assert 12 < frechet_distance(a, b) < 20
    assert frechet_distance(a, a + 3) == pytest.approx(9 * 64, rel=1e-6)


def test_scores_tell_good_from_bad():
    images, labels = load_digits()
    copies = digit_scores(images, labels)
    assert copies.accuracy == 1 and copies.frechet < 1e-6 and copies.near_copies == 1
    wrong = digit_scores(images, (labels + 1) % 10)
    assert wrong.accuracy == 0
    noise = digit_scores(torch.randn(500, 1, 8, 8, generator=torch.Generator().manual_seed(0)), labels[:500])
    assert noise.accuracy < 0.3 and noise.frechet > 500 and noise.near_copies == 0


def train(run, *flags):
    """`python -m soflow_fast.train` on the CPU; returns its output and the figures of `evaluation.json`."""
    command = [sys.executable, "-m", "soflow_fast.train", "--run-dir", str(run), "--device", "cpu", *flags]
    paths = [os.environ.get("PYTHONPATH", ""), str(ROOT), str(ROOT / "kernels")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((run / "evaluation.json").read_text())["nfe"]


def assert_told(out, figures, run):
    """The output ends with the figures of the file, and a picture lies beside it."""
    assert f"{figures['1']['accuracy']:.4f} classified as their label" in out
    assert f"Frechet distance {figures['2']['frechet']:.1f}" in out
    assert (run / "samples" / "final.png").stat().st_size > 1000


def test_default_command_learns_from_the_start(tmp_path):
    """A fiftieth of the default training, with its network, data and evaluation."""
    run = tmp_path / "run"
    assert_told(*train(run, "--steps", "60"), run)
    losses = [json.loads(line)["fm_mse"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    # One value every ten steps, each of one batch: from 1.48 at first to 1.06 on average at the end.
    assert len(losses) == 6 and sum(losses[-3:]) / 3 < 0.8 * losses[0]


@pytest.mark.slow
def test_one_network_draws_at_every_scale_of_its_range(tmp_path):
    """A fifth of the default training. More guidance: more samples are their label, and they are less like the data."""
    train(tmp_path / "run", "--steps", "600", "--guidance-range", "1,4")
    flow = load(tmp_path / "run")
    weak, middle, strong = (measure_digits(flow, 2000, 1, seed=1, guidance=w) for w in (1, 2, 4))
    assert weak.accuracy + 0.03 < middle.accuracy <= strong.accuracy and middle.accuracy > 0.98
    assert 1.1 * weak.frechet < middle.frechet < 0.8 * strong.frechet


@pytest.mark.slow
def test_default_command_draws_digits_in_one_step(tmp_path, real):
    """`python -m soflow_fast.train`, then 4000 one-step samples judged without the package's own evaluation."""
    from sklearn.svm import SVC

    run = tmp_path / "run"
    out, figures = train(run)
    labels = torch.arange(4000) % 10
    pixels = to_pixels(sample(load(run), labels, nfe=1, seed=1)).numpy().astype(np.float64)
    judge = SVC(gamma=0.001, C=10).fit(*real)
    accuracy = (judge.predict(pixels) == labels.numpy()).mean()
    frechet = frechet_by_square_root(pixels, real[0])
    distance = torch.cdist(torch.from_numpy(pixels), torch.from_numpy(real[0])).amin(1)
    near = (distance < 4).double().mean().item()
    assert accuracy >= 0.98
    assert frechet <= 35
    assert near <= 0.1
    assert figures["1"]["accuracy"] == pytest.approx(accuracy, abs=0.01)
    assert figures["1"]["frechet"] == pytest.approx(frechet, rel=0.1)
    assert_told(out, figures, run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "calls", "accuracy", "frechet"),
    [("flow-matching", "10", 0.93, 45.0), ("meanflow", "1", 0.93, 75.0)],
)
def test_other_objectives_learn_the_digits(kind, calls, accuracy, frechet, tmp_path):
    """A quarter of the default training. Where MeanFlow's derivative counts as zero, the distance is 257 at its end."""
    run = tmp_path / "run"
    out, figures = train(run, "--objective", kind, "--steps", "800", "--precision", "fp32")
    found = figures[calls]
    assert f"{found['accuracy']:.4f} classified as their label" in out
    assert found["accuracy"] >= accuracy and found["frechet"] <= frechet and found["near_copies"] <= 0.1

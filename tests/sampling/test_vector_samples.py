"""Samples of a network that takes vectors: each has its own, and none is the null vector."""

import pytest
import torch

from soflow_fast import OneStep, sample
from tests.published import small_flow

E = 6


@pytest.fixture(scope="module")
def flow():
    flow = small_flow(condition_size=E)
    with torch.no_grad():
        flow.network.y_embedder.null.copy_(torch.linspace(-1, 1, E))
    return flow


@pytest.fixture(scope="module")
def vectors():
    return torch.randn(3, E, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def noise():
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_vectors_reach_the_network(flow, vectors, noise):
    t = torch.ones(3)
    with torch.no_grad():
        wanted = flow.solution(noise, t, 0 * t, vectors)
    assert torch.equal(sample(flow, vectors, noise=[noise]), wanted)
    assert torch.equal(sample(flow, vectors.tolist(), noise=[noise]), wanted)
    assert torch.equal(OneStep(flow)(noise, vectors), wanted)
    assert not torch.equal(sample(flow, vectors.flip(0), noise=[noise]), wanted)


def test_without_vectors_samples_have_the_null_one(flow, noise):
    null = flow.network.y_embedder.null.detach().expand(3, E)
    got = sample(flow, noise=[noise])
    assert torch.allclose(got, sample(flow, null, noise=[noise]), atol=1e-6)
    assert torch.equal(OneStep(flow)(noise), got)


def test_a_sample_depends_on_its_own_vector_alone(flow, vectors):
    all_three = sample(flow, vectors, seed=3, batch_size=2)
    assert torch.equal(sample(flow, vectors[:2], seed=3, batch_size=2), all_three[:2])
    assert all_three.shape == (3, 1, 8, 8)


def test_half_precision_is_taken(flow, vectors, noise):
    half = vectors.half()
    assert torch.equal(sample(flow, half, noise=[noise]), sample(flow, half.float(), noise=[noise]))


def test_what_has_no_vector_has_no_guidance(vectors):
    ranged = small_flow(condition_size=E, guidance_range=(1.0, 4.0))
    assert torch.equal(*(sample(ranged, seed=0, shape=(3, 1, 8, 8), guidance=w) for w in (1, 4)))
    assert not torch.equal(*(sample(ranged, vectors, seed=0, guidance=w) for w in (1, 4)))


def test_wrong_vectors_are_refused_in_one_line(flow, vectors, noise):
    wanted = r"y must be vectors \[B, 6\], floating, got "
    for given, said in (
        (vectors[:, :5], wanted + r"torch.float32 \[3, 5\]"),
        ([1, 2, 3], wanted + r"torch.int64 \[3\]"),
        (vectors.index_fill(0, torch.tensor([1]), torch.nan), "y must be finite, row 1 of it is not"),
    ):
        for draw in (lambda y: sample(flow, y, seed=0), lambda y: OneStep(flow)(noise, torch.as_tensor(y))):
            with pytest.raises(ValueError, match=said):
                draw(given)
    with pytest.raises(ValueError, match="y must hold 4 vectors, got 3"):
        sample(flow, vectors, seed=0, shape=(4, 1, 8, 8))
    with pytest.raises(ValueError, match=r"y must be \[B\] whole numbers, got torch.float32 \[3, 6\]"):
        sample(small_flow(), vectors, seed=0)


def test_a_network_without_a_null_vector_is_asked_with_one_each(vectors, noise):
    always = small_flow(condition_size=E, null_label=False)
    assert sample(always, vectors, noise=[noise]).shape == (3, 1, 8, 8)
    with pytest.raises(ValueError, match="y must be given"):
        sample(always, noise=[noise])

"""Samples choose the guidance scale of a network that was trained for a range of them, at no further calls."""

import numpy as np
import pytest
import torch

from soflow_fast import OneStep, sample
from soflow_fast.sampling import chosen_guidance
from tests.published import small_flow

RANGE = (1.0, 4.0)


@pytest.fixture(scope="module")
def flow():
    return small_flow(guidance_range=RANGE)


def test_the_scale_reaches_the_network(flow):
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 2, 3])
    t, w = torch.ones(3), torch.full((3,), 2.5)
    calls = []
    handle = flow.network.register_forward_pre_hook(lambda module, given: calls.append(given))
    got = sample(flow, labels, noise=[noise], guidance=2.5)
    handle.remove()
    assert len(calls) == 1
    assert torch.equal(got, flow.solution(noise, t, 0 * t, labels, w))
    assert not torch.equal(got, sample(flow, labels, noise=[noise], guidance=3))


def test_without_a_choice_it_is_the_middle_of_the_range(flow):
    assert chosen_guidance(flow, None) == 2.0
    assert torch.equal(sample(flow, [1, 2], seed=0), sample(flow, [1, 2], seed=0, guidance=2.0))


@pytest.mark.parametrize("nfe", [1, 2])
def test_what_has_no_label_has_no_guidance(flow, nfe):
    mixed = sample(flow, [1, 10], seed=0, nfe=nfe, guidance=4)
    other = sample(flow, [1, 10], seed=0, nfe=nfe, guidance=1)
    assert torch.equal(mixed[1], other[1]) and not torch.equal(mixed[0], other[0])
    shape = (2, 1, 8, 8)
    assert torch.equal(
        sample(flow, seed=0, shape=shape, guidance=4)[1], sample(flow, [1, 10], seed=0, guidance=1, shape=shape)[1]
    )


def test_one_step_samples_are_the_same(flow):
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 10])
    got = OneStep(small_flow(guidance_range=RANGE), precision="fp32", guidance=3)(noise, labels)
    assert torch.equal(got, sample(flow, labels, noise=[noise], guidance=3))
    with pytest.raises(ValueError, match="guidance must be from 1 to 4"):
        OneStep(small_flow(guidance_range=RANGE), guidance=4.5)


@pytest.mark.parametrize("guidance", [0.9, 4.1, float("nan"), "2", True])
def test_a_scale_that_the_network_was_not_trained_for_is_refused(flow, guidance):
    said = "must be a number" if isinstance(guidance, str | bool) else "must be from 1 to 4, as the network was trained"
    for call in ({"seed": 0}, {"noise": [torch.zeros(1, 1, 8, 8)]}):
        with pytest.raises(ValueError, match=f"guidance {said}"):
            sample(flow, [1], guidance=guidance, **call)


def test_a_network_for_one_scale_takes_none():
    with pytest.raises(ValueError, match="guidance must be left out, got 2: the network was trained for one scale"):
        sample(small_flow(), [1], seed=0, guidance=2)


def test_a_scale_may_be_any_kind_of_number_and_labels_must_fit_the_noise():
    flow = small_flow(guidance_range=(1.0, 4.0))
    wanted = sample(flow, [1, 2], seed=0, guidance=2.0)
    for same in (np.float32(2), torch.tensor(2.0), 2):
        assert torch.equal(sample(flow, [1, 2], seed=0, guidance=same), wanted)
    noise = torch.randn(3, 1, 8, 8)
    with pytest.raises(ValueError, match=r"y must be \[3\], got \[2\]"):
        sample(flow, [1, 2], noise=[noise])
    with pytest.raises(ValueError, match=r"y must be \[3\], got \[2\]"):
        OneStep(flow, precision="fp32")(noise, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"y must be in 0\.\.9"):
        OneStep(flow, precision="fp32")(noise, torch.tensor([1, 2, 20]))
    one_step = OneStep(flow, precision="fp32")
    assert torch.equal(one_step(noise, [1, 2, 3]), one_step(noise, torch.tensor([1, 2, 3])))

"""Drawing images: from a seed, whatever else is drawn with them, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import soflow_fast
from soflow_fast import DiT, DiTConfig, SolutionFlow, sample
from soflow_fast.sampling import image_noise, sample_batches

SHAPE = (1, 4, 4)


@pytest.fixture(scope="module")
def flow() -> SolutionFlow:
    config = DiTConfig(input_size=4, patch_size=2, in_channels=1, hidden_size=8, depth=1, num_heads=2, num_classes=3)
    flow = SolutionFlow(DiT(config)).eval()
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():  # the initial output is zero, which would hide mistakes
        for p in flow.parameters():
            p.copy_(torch.randn(p.shape, generator=source) * 0.3)
    return flow


class Recorder(nn.Module):
    """A network without a config that keeps what it is called with, and answers with a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = nn.Parameter(torch.tensor(0.5))
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls.append((x.clone(), t.clone(), s.clone(), y))
        return self.answer.expand_as(x)


def test_each_call_solves_to_the_data_and_renoises_to_the_next_time() -> None:
    network = Recorder()
    noise = [torch.full((2, *SHAPE), float(k)) for k in (3, 5, 7, 9)]
    out = sample(SolutionFlow(network), nfe=4, noise=noise)
    assert [float(t[0]) for _, t, _, _ in network.calls] == [1.0, 0.75, 0.5, 0.25]
    assert all(bool((s == 0).all()) for _, _, s, _ in network.calls)
    x = noise[0]
    for k, time in enumerate((1.0, 0.75, 0.5, 0.25)):
        torch.testing.assert_close(network.calls[k][0], x)
        solved = x - time * 0.5
        if k < 3:
            x = (1 - (time - 0.25)) * solved + (time - 0.25) * noise[k + 1]
    torch.testing.assert_close(out, solved)
    assert not out.requires_grad


def test_same_seed_same_images_however_many(flow: SolutionFlow) -> None:
    labels = torch.arange(70) % 3
    for nfe in (1, 2):
        many = sample(flow, labels, nfe=nfe, seed=5)
        few = sample(flow, labels[:7], nfe=nfe, seed=5)
        assert torch.equal(many[:7], few)
        assert torch.equal(many, sample(flow, labels, nfe=nfe, seed=5))
        assert not torch.equal(many, sample(flow, labels, nfe=nfe, seed=6))
        assert len({tuple(image.flatten().tolist()) for image in many}) == 70


def test_batches_are_drawn_when_they_are_asked_for(flow: SolutionFlow) -> None:
    labels = torch.arange(10) % 3
    parts = [*sample_batches(flow, labels, nfe=2, seed=5, batch_size=4)]
    assert [len(part) for part in parts] == [4, 4, 2] and not any(part.requires_grad for part in parts)
    assert torch.equal(torch.cat(parts), sample(flow, labels, nfe=2, seed=5, batch_size=4))
    network = Recorder()
    batches = sample_batches(SolutionFlow(network), nfe=3, shape=[10**12, *SHAPE], batch_size=4)
    assert len(network.calls) == 0
    next(batches)
    assert len(network.calls) == 3
    with pytest.raises(ValueError, match="y must hold 5 labels"):  # at once
        sample_batches(flow, labels, shape=[5, *SHAPE])


def test_the_network_always_runs_on_whole_batches() -> None:
    network = Recorder()
    sample(SolutionFlow(network), seed=0, shape=[10, *SHAPE], batch_size=4)
    assert [len(x) for x, *_ in network.calls] == [4, 4, 4]  # another size could round differently


def test_the_batch_size_changes_nothing_but_rounding(flow: SolutionFlow) -> None:
    labels = torch.arange(10) % 3
    torch.testing.assert_close(
        sample(flow, labels, nfe=2, seed=1, batch_size=3), sample(flow, labels, nfe=2, seed=1, batch_size=10)
    )


def test_a_seed_is_shorthand_for_the_noise_of_each_image(flow: SolutionFlow) -> None:
    noise = [torch.stack([image_noise(3, i, k, SHAPE) for i in range(2)]) for k in range(2)]
    drawn = sample(flow, [0, 2], nfe=2, seed=3, batch_size=2)
    assert torch.equal(sample(flow, [0, 2], nfe=2, noise=noise), drawn)


def test_labels_matter_and_none_is_the_null_label(flow: SolutionFlow) -> None:
    shape = [2, *SHAPE]
    null = sample(flow, None, seed=0, shape=shape)
    assert torch.equal(null, sample(flow, [3, 3], seed=0))
    assert not torch.equal(null, sample(flow, [0, 0], seed=0))


def test_it_runs_in_the_dtype_of_the_parameters(flow: SolutionFlow) -> None:
    import copy

    double = copy.deepcopy(flow).double()
    out = sample(double, [0, 1], nfe=2, seed=0)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out.float(), sample(flow, [0, 1], nfe=2, seed=0), atol=1e-5, rtol=1e-5)


def test_no_images_of_no_labels(flow: SolutionFlow) -> None:
    assert sample(flow, [], seed=0).shape == (0, *SHAPE)


NOISE = torch.zeros(2, *SHAPE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"y": [0], "nfe": 2.5, "seed": 0}, "nfe must be a whole number"),
        ({"y": [0], "times": "1,0.5", "seed": 0}, "times must be numbers"),
        ({"y": [0], "seed": 1.5}, "seed must be a whole number"),
        ({"y": [0], "seed": "a"}, "seed must be a whole number"),
        ({"y": None, "seed": 0, "shape": (-2, 1, 8, 8)}, "shape must be a whole number"),
        ({"y": [0], "nfe": 0, "seed": 0}, "nfe must be a whole number of at least 1"),
        ({"y": [0]}, "either noise"),
        ({"y": [0, 1], "seed": 0, "noise": [NOISE]}, "either noise"),
        ({"y": [0, 1], "nfe": 2, "noise": [NOISE]}, "one tensor per network call: 2, got 1"),
        ({"y": [0, 1], "nfe": 2, "noise": [NOISE, NOISE[:1]]}, "of one shape"),
        ({"y": [0], "noise": [NOISE]}, r"y must be \[2\]"),
        ({"y": [0, 1], "noise": [NOISE[:, :, :2]]}, "x must be"),
        ({"seed": 0}, "a seed needs a shape"),
        ({"y": [0], "seed": 0, "shape": [2, *SHAPE]}, "y must hold 2 labels, got 1"),
        ({"seed": 0, "shape": [1, 1, 8, 8]}, "x must be"),
        ({"y": [4], "seed": 0}, "y must be in 0..2"),
        ({"y": [-1], "seed": 0}, "y must be in 0..2"),
        ({"y": 1, "seed": 0}, r"y must be \[B\] whole numbers"),
        ({"y": [[0, 1]], "seed": 0}, r"y must be \[B\] whole numbers"),
        ({"y": [0], "seed": 0, "batch_size": 0}, "batch_size must be a whole number of at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(flow: SolutionFlow, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(flow, **arguments)


def test_a_seed_needs_a_shape_where_the_network_has_no_config() -> None:
    with pytest.raises(ValueError, match="a seed needs a shape"):
        sample(SolutionFlow(Recorder()), [0], seed=0)
    assert sample(SolutionFlow(Recorder()), [0], seed=0, shape=[1, *SHAPE]).shape == (1, *SHAPE)


def test_the_public_name_survives_the_command_line_of_the_same_name(flow: SolutionFlow) -> None:
    import soflow_fast.sample as module

    assert torch.equal(soflow_fast.sample(flow, [0], seed=0), sample(flow, [0], seed=0))
    assert torch.equal(module(flow, [0], seed=0), sample(flow, [0], seed=0))  # type: ignore[operator]


def test_labels_that_are_none_are_refused(flow: SolutionFlow) -> None:
    for wrong in ([0.5, 1.0], [True, False], [[1, 2]], [-1], [4]):
        with pytest.raises(ValueError, match=r"^y must be "):
            sample(flow, torch.tensor(wrong), seed=0, shape=(len(wrong), *SHAPE))
    config = DiTConfig(input_size=4, patch_size=2, in_channels=1, hidden_size=8, depth=1, num_heads=2, num_classes=0)
    with pytest.raises(ValueError, match="y must be 0 or left out: there are no classes, got 1 to 1"):
        sample(SolutionFlow(DiT(config)), torch.tensor([1]), seed=0)

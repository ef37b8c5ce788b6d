"""The increment of the sinusoids against float64, by the identity that does not cancel."""

import pytest
import torch

from soflow_kernels import testing
from soflow_kernels.increment import time_embedding, time_embedding_increment, time_embedding_increment_reference


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("dt", [0.3, -0.3, 1e-3, -1e-5, 1e-9, 0.0])
def test_sinusoids(dt, scale, device):
    """Also of times that a trainer scales by 1000, where float32 says less of an angle."""
    t = scale * torch.tensor([0.0, 1e-4, 0.3, 0.77, 1.0], device=device)
    s = 0.4 * t
    step = torch.full_like(t, scale * dt)
    with testing.poisoned():
        got = time_embedding_increment(t, step, s)
    assert got.shape == (2, 2, 5, 256)
    w = 10_000.0 ** (-torch.arange(128, device=device).double() / 128)
    u = torch.stack([t.double(), (t - s).double()])[..., None] * w
    h = step.double()[:, None] * w / 2
    value = torch.cat([u.cos(), u.sin()], -1)
    assert (got[0].double() - value).abs().max() <= 3e-7 * (1 if scale == 1 else 0.5 * scale)
    exact = torch.cat([-2 * (u + h).sin() * h.sin(), 2 * (u + h).cos() * h.sin()], -1)
    bound = 1e-6 if scale == 1 else 1e-4
    assert (got[1].double() - exact).norm() <= bound * exact.norm()
    reference = time_embedding_increment_reference(t, step, s)
    assert (got[1] - reference[1]).norm() <= bound * reference[1].norm()


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, mode, device):
    t, dt, s = (torch.tensor(v, device=device, dtype=dtype) for v in ([0.5, 0.7], [-0.01, -0.01], [0.1, 0.2]))
    exact = time_embedding_increment(t.double(), dt.double(), s.double(), frequencies=64)
    with testing.mode(mode):
        got = time_embedding_increment(t, dt, s, frequencies=64, dtype=torch.float32)
    for part, wanted in zip(got.double(), exact, strict=True):
        assert (part - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_empty_batch(mode, device):
    t = torch.zeros(0, device=device)
    with testing.mode(mode):
        assert time_embedding_increment(t, t, t, frequencies=8).shape == (2, 2, 0, 8)


def test_opcheck(device):
    t = torch.rand(3, device=device)
    torch.library.opcheck(time_embedding._time.library, (t, t, t, 16, 1e4, torch.float32))


def test_wrong_arguments_are_named(device):
    t = torch.rand(3).to(device)
    asks = t.clone().requires_grad_()
    cases = (
        ((t, t[:2], t), {}, r"dt must have shape \[3\]"),
        ((t, t, t), {"frequencies": 7}, "frequencies must be an even number"),
        ((asks, t, t), {}, "t must not require a gradient"),
        ((t, asks, t), {}, "dt must not require a gradient"),
        ((t, t, asks), {}, "s must not require a gradient"),
    )
    for given, settings, message in cases:
        with pytest.raises(ValueError, match=f"^time_embedding_increment: {message}"):
            time_embedding_increment(*given, **settings)


@pytest.mark.parametrize("period", [0, -1, None, 1e-30, True, "10"])
def test_periods_out_of_range_are_named(period, device):
    t = torch.tensor([0.5], device=device)
    with pytest.raises(ValueError, match="max_period must be a number in"):
        time_embedding_increment(t, -0.01 * t, 0.1 * t, frequencies=64, max_period=period)

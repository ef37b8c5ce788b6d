"""A network that sees a guidance scale beside its two times: w of each sample, through the embedder of 1 - 1/w."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from soflow_fast import DiT, DiTConfig, paired_forward
from soflow_fast.models.dit import TapedOutputs
from soflow_fast.training.precision import matmul_precision
from tests.networks import SIZES, assert_close, inputs

RANGED = replace(SIZES, guidance_range=(1.0, 4.0))
W = torch.tensor([1.0, 1.5, 2.5, 4.0])


def off_zero(config=RANGED):
    net = DiT(config)
    net.initialize(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return net


def gradients(net):
    *given, direction = inputs(4, net.pos_embed.dtype)
    out = net(*given, W.to(net.pos_embed.dtype))
    (out * direction).sum().backward()
    return {"output": out.detach()} | {name: p.grad for name, p in net.named_parameters()}


def test_without_a_range_nothing_is_there():
    plain, ranged = DiT(SIZES), DiT(RANGED)
    added = set(ranged.state_dict()) - set(plain.state_dict())
    assert added == {f"w_embedder.mlp.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")}
    assert plain.w_embedder is None and list(plain.state_dict()) == [n for n in ranged.state_dict() if n not in added]


def test_at_first_no_scale_changes_anything():
    """And the embedder's last layer has a gradient at once, as the adaLN layers have left zero."""
    net = off_zero()
    net.w_embedder = DiT(RANGED).w_embedder
    *given, direction = inputs(4)
    outs = [net(*given, w) for w in (W, W.flip(0))]
    assert torch.equal(*outs)
    (outs[0] * direction).sum().backward()
    assert net.w_embedder.mlp[2].weight.grad.norm() > 0


def test_the_conditioning_is_the_sum_of_four_embeddings():
    net = off_zero().double()
    _, t, s, y, _ = inputs(4, torch.float64)
    w = W.double()
    c = net.t_embedder(t) + net.s_embedder(t - s) + net.y_embedder(y) + net.w_embedder(1 - 1 / w)
    torch.testing.assert_close(net.conditioning(t, s, y, w), F.silu(c), rtol=1e-12, atol=1e-12)


def test_called_modules_and_fused_ones_agree_with_float64():
    exact = gradients(off_zero().double())
    fused = gradients(off_zero())
    called = off_zero()
    called.w_embedder.register_forward_hook(lambda module, given, out: None)  # a watched module is called
    assert called.changed_part() == "w_embedder"
    assert_close(fused, exact, 1e-5)
    assert_close(gradients(called), exact, 1e-5)
    assert exact["w_embedder.mlp.0.weight"].abs().amax() > 0


@pytest.mark.parametrize("taped", [False, True])
def test_increments_at_a_scale(taped):
    """The label and the scale are the same at both ends."""
    net = off_zero()
    exact = copy.deepcopy(net).double()
    x, t, s, y, v = inputs(4)
    dt = 0.01 * (s - t)
    dx = v * dt[:, None, None, None]
    with torch.no_grad():
        start = exact(x.double(), t.double(), s.double(), y, W.double())
        moved = (x.double() + dx.double(), t.double() + dt.double())
        wanted = exact(*moved, s.double(), y, W.double()) - start
    tape = TapedOutputs(slice(None)) if taped else None
    with matmul_precision("bf16", x.device):
        if tape is not None:
            net(x, t, s, y, W, tape=tape)
        value, increment = paired_forward(net, x, dx, t, dt, s, y, torch.bfloat16, w=W, tape=tape)
    assert (increment - wanted).norm() < 0.02 * wanted.norm()
    assert (value - start).norm() < 0.02 * start.norm()
    other = paired_forward(net, x, dx, t, dt, s, y, torch.float32, w=W.flip(0))[1]
    assert (other - wanted).norm() > 0.02 * wanted.norm()


def test_scales_that_are_missing_or_too_many_are_named():
    x, t, s, y, _ = inputs(4)
    with pytest.raises(ValueError, match="w must be given: the network sees a guidance scale for each sample, 1 to 4"):
        DiT(RANGED)(x, t, s, y)
    with pytest.raises(ValueError, match="w must be given"):
        paired_forward(DiT(RANGED), x, x, t, t, s, y)
    with pytest.raises(ValueError, match="w must be left out: the network has no embedder of guidance scales"):
        DiT(SIZES)(x, t, s, y, W)
    with pytest.raises(ValueError, match=r"w must be \[4\], got \[3\]"):
        DiT(RANGED)(x, t, s, y, W[:3])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"guidance_range": (0.5, 2.0)}, r"guidance_range must be none or two numbers a, b with 1 <= a < b <= 1000"),
        ({"guidance_range": (2.0, 2.0)}, "guidance_range must be none or two numbers"),
        ({"guidance_range": (2.0,)}, "guidance_range must be none or two numbers"),
        ({"guidance_range": (1.0, 4.0), "num_classes": 0}, "guidance_range must be none for a network without classes"),
        ({"guidance_range": (1.0, 4.0), "null_label": False}, "guidance_range must be none for a network without"),
    ],
)
def test_wrong_ranges_are_named(fields, said):
    with pytest.raises(ValueError, match=said):
        DiT(replace(DiTConfig(input_size=8, hidden_size=16, depth=1, num_heads=2), **fields))

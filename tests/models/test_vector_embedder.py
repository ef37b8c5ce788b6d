"""A network that takes vectors in the place of labels: their layer, the null vector, and increments."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from soflow_fast import DiT, paired_forward
from soflow_fast.flow import is_null, null_like
from soflow_fast.models.dit import TapedOutputs
from soflow_fast.training.precision import matmul_precision
from tests.networks import SIZES, assert_close, inputs

E = 7
VECTORS = replace(SIZES, num_classes=0, condition_size=E)
NAN = torch.full((E,), torch.nan)


def off_zero(config=VECTORS):
    net = DiT(config)
    net.initialize(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return net


def vectors(dtype=torch.float32):
    """Four, of which the second is missing."""
    y = torch.randn(4, E, generator=torch.Generator().manual_seed(2)).to(dtype)
    y[1] = torch.nan
    return y


def gradients(net):
    x, t, s, _, direction = inputs(4, net.pos_embed.dtype)
    out = net(x, t, s, vectors(net.pos_embed.dtype))
    (out * direction).sum().backward()
    return {"output": out.detach()} | {name: p.grad for name, p in net.named_parameters()}


def test_a_layer_and_a_null_vector_take_the_tables_place():
    labelled, net = DiT(SIZES).state_dict(), DiT(VECTORS).state_dict()
    assert net.keys() - labelled.keys() == {f"y_embedder.{name}" for name in ("proj.weight", "proj.bias", "null")}
    assert labelled.keys() - net.keys() == {"y_embedder.embedding_table.weight"}
    assert net["y_embedder.null"].shape == (E,) and not net["y_embedder.null"].any()
    assert net["y_embedder.proj.weight"].any()
    always = DiT(replace(VECTORS, null_label=False))
    assert "y_embedder.null" not in always.state_dict() and always.changed_part() is None


def test_the_conditioning_is_the_sum_of_three_embeddings():
    net = off_zero().double()
    _, t, s, _, _ = inputs(4, torch.float64)
    y = vectors(torch.float64)
    rows = torch.stack([net.y_embedder.null if row.isnan().all() else row for row in y])
    c = net.t_embedder(t) + net.s_embedder(t - s) + net.y_embedder.proj(rows)
    torch.testing.assert_close(net.conditioning(t, s, y), F.silu(c), rtol=1e-12, atol=1e-12)
    null = net.t_embedder(t) + net.s_embedder(t - s) + net.y_embedder.proj(net.y_embedder.null)
    torch.testing.assert_close(net.conditioning(t, s, None), F.silu(null), rtol=1e-12, atol=1e-12)


def test_called_modules_and_fused_ones_agree_with_float64():
    exact = gradients(off_zero().double())
    called = off_zero()
    called.y_embedder.register_forward_hook(lambda module, given, out: None)  # a watched module is called
    assert called.changed_part() == "y_embedder"
    assert_close(gradients(off_zero()), exact, 1e-5)
    assert_close(gradients(called), exact, 1e-5)
    assert all(exact[f"y_embedder.{name}"].abs().amax() > 0 for name in ("proj.weight", "proj.bias", "null"))
    assert all(torch.isfinite(value).all() for value in exact.values())


@pytest.mark.parametrize("taped", [False, True])
def test_increments_of_vectors(taped):
    net = off_zero()
    exact = copy.deepcopy(net).double()
    x, t, s, _, v = inputs(4)
    y = vectors()
    dt = 0.01 * (s - t)
    dx = v * dt[:, None, None, None]
    with torch.no_grad():
        start = exact(x.double(), t.double(), s.double(), y.double())
        wanted = exact(x.double() + dx.double(), t.double() + dt.double(), s.double(), y.double()) - start
    tape = TapedOutputs(slice(None)) if taped else None
    with matmul_precision("bf16", x.device):
        if tape is not None:
            net(x, t, s, y, tape=tape)
        value, increment = paired_forward(net, x, dx, t, dt, s, y, torch.bfloat16, tape=tape)
    assert (increment - wanted).norm() < 0.02 * wanted.norm()
    assert (value - start).norm() < 0.02 * start.norm()
    other = paired_forward(net, x, dx, t, dt, s, y.flip(0), torch.float32)[1]
    assert (other - wanted).norm() > 0.02 * wanted.norm()


def test_a_vector_of_which_only_a_part_is_no_number_is_seen():
    net = off_zero()
    x, t, s, _, _ = inputs(4)
    y = vectors()
    y[2, 3] = torch.nan
    with torch.no_grad():
        finite = torch.isfinite(net(x, t, s, y)).flatten(1).all(1)
    assert finite.tolist() == [True, True, False, True]


def test_no_condition_of_labels_and_of_vectors():
    labelled = DiT(SIZES)
    labels = torch.tensor([1, 5, 2])
    assert null_like(labelled, labels).tolist() == [5, 5, 5] and is_null(labelled, labels).tolist() == [0, 1, 0]
    y = torch.stack([torch.zeros(E), NAN, torch.cat([torch.zeros(1), NAN[1:]])])
    assert is_null(DiT(VECTORS), y).tolist() == [False, True, False]
    assert null_like(DiT(VECTORS), y).isnan().all() and null_like(DiT(VECTORS), y).shape == (3, E)


def test_labels_for_vectors_and_vectors_for_labels_are_named():
    x, t, s, labels, _ = inputs(4)
    y = vectors()
    with pytest.raises(ValueError, match=r"y must be \[4, 7\], got \[4\]"):
        DiT(VECTORS)(x, t, s, labels)
    with pytest.raises(ValueError, match=r"y must be \[4, 7\], got \[4, 6\]"):
        paired_forward(DiT(VECTORS), x, x, t, t, s, y[:, :6])
    with pytest.raises(ValueError, match=r"y must be \[4\], got \[4, 7\]"):
        DiT(SIZES)(x, t, s, y)
    with pytest.raises(ValueError, match=r"y must be vectors of 7 numbers, got torch.int64"):
        DiT(VECTORS)(x, t, s, torch.zeros(4, E, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"y must be labels, got torch.float32"):
        DiT(SIZES)(x, t, s, labels.float())


def test_export_with_a_dynamic_batch():
    net = off_zero().eval()
    x, t, s, _, _ = inputs(4)
    batch = torch.export.Dim("batch", min=2)
    given = (x, t, s, vectors())
    with torch.no_grad():
        exported = torch.export.export(net, given, dynamic_shapes=({0: batch},) * 4).module()
        fewer = tuple(value[:3] for value in given)
        assert torch.allclose(exported(*fewer), net(*fewer), atol=1e-5)

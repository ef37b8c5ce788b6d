"""A DiT that normalises queries and keys: what it computes, what it bounds, and that every way through it knows."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from soflow_fast import DiT, DiTConfig, TrainState, paired_forward, preset, train_step
from soflow_fast.models import fused_layers
from soflow_fast.models.paired_forward import missed_part
from soflow_fast.training.plan.parameters import parameter_groups
from soflow_fast.training.precision import round_parameters
from soflow_kernels import testing
from tests.models.test_fused_layers import kept_bytes
from tests.networks import SIZES, assert_close, gradients, inputs, network

HEADS, HEAD_DIM = SIZES.num_heads, SIZES.hidden_size // SIZES.num_heads
NORMS = {f"blocks.{k}.attn.{name}.weight" for k in range(SIZES.depth) for name in ("q_norm", "k_norm")}


def test_its_weights_have_the_public_names_and_begin_at_one():
    plain, normed = DiT(SIZES), DiT(dataclasses.replace(SIZES, qk_norm=True))
    assert normed.state_dict().keys() - plain.state_dict().keys() == NORMS
    assert [name for name, _ in normed.blocks[0].attn.named_children()] == ["qkv", "q_norm", "k_norm", "proj"]
    weights = [normed.get_parameter(name) for name in NORMS]
    assert all(weight.shape == (HEAD_DIM,) and (weight == 1).all() for weight in weights)
    with torch.no_grad():
        for weight in weights:
            weight.zero_()
    source = torch.Generator
    plain.initialize(source().manual_seed(3))
    normed.initialize(source().manual_seed(3))
    state = normed.state_dict()
    assert all((state[name] == 1).all() for name in NORMS)
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())  # nothing more is drawn


def attention_in_plain_words(x, attn):
    """As timm's Attention and LightningDiT's have it, with an RMSNorm."""
    B, T, D = x.shape
    q, k, v = attn.qkv(x).reshape(B, T, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
    q = F.rms_norm(q, (HEAD_DIM,), attn.q_norm.weight, 1e-6)
    k = F.rms_norm(k, (HEAD_DIM,), attn.k_norm.weight, 1e-6)
    a = (q @ k.mT / math.sqrt(HEAD_DIM)).softmax(-1) @ v
    return attn.proj(a.transpose(1, 2).reshape(B, T, D))


def test_attention_is_that_of_others():
    attn = network(torch.float64, qk_norm=True).blocks[0].attn
    x = torch.randn(2, 16, SIZES.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attn(x), attention_in_plain_words(x, attn), rtol=1e-10, atol=1e-12)


def watched(**named):
    net = network(qk_norm=True, **named)
    for module in net.modules():
        if not isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_: None)
    return net


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_called_modules_give_the_same_numbers(autocast):
    fused = gradients(network(qk_norm=True), autocast=autocast)
    called = gradients(watched(), autocast=autocast)
    assert torch.equal(called["output"], fused["output"])
    assert_close(called, fused, 1e-2 if autocast else 1e-5)


def test_beside_a_guidance_scale():
    """Both options at once, value and increment: against float64."""
    net = DiT(dataclasses.replace(SIZES, qk_norm=True, guidance_range=(1.0, 4.0)))
    net.initialize(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    x, t, s, y, v = inputs()
    w, dt = torch.tensor([1.0, 1.5, 2.5, 4.0]), 0.01 * (s - t)
    dx = v * dt[:, None, None, None]
    value, increment = paired_forward(net, x, dx, t, dt, s, y, w=w, dtype=torch.float32)
    wide = copy.deepcopy(net).double()
    given = [each.double() for each in (x, dx, t, dt, s)]
    with torch.no_grad():
        start = wide(given[0], given[2], given[4], y, w.double())
        end = wide(given[0] + given[1], given[2] + given[3], given[4], y, w.double())
    assert (value - start).norm() <= 1e-5 * start.norm()
    assert (increment - (end - start)).norm() <= 1e-4 * (end - start).norm()


@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
def test_gradients_are_those_of_autograd(recompute):
    wanted = gradients(watched(dtype=torch.float64))
    got = gradients(network(torch.float64, qk_norm=True, recompute=recompute))
    assert got.keys() >= NORMS and all(got[name].norm() > 0 for name in NORMS)
    assert_close(got, wanted, 1e-12)


def test_low_precision_gradients():
    """Of bf16 parameters, the norms' as well, as near to float64 as the plain composition in the same precision."""
    exact = gradients(network(torch.float64, qk_norm=True))
    plain = gradients(network(qk_norm=True, keep_norms=True), autocast=True)
    net = network(rounded=torch.bfloat16, qk_norm=True)
    assert {net.get_parameter(name).dtype for name in NORMS} == {torch.bfloat16}
    got = gradients(net, autocast=True)
    for name, value in exact.items():
        error, usual = ((each[name].double() - value).norm() for each in (got, plain))
        assert error <= 1.5 * usual + 3e-3 * value.norm(), name


@pytest.mark.parametrize(("recompute", "numbers"), [("none", 14), ("mlp", 10), ("block", 2)])
def test_kept_for_the_backward(recompute, numbers):
    """Two D more than without it: what attention takes is no longer what the product left."""
    config = dataclasses.replace(preset("imagenet256-b2").model, qk_norm=True)
    B, T, D, kept = 8, 256, config.hidden_size, {}
    for depth in (1, 2):
        with testing.as_on_gpu():  # of our own operations it is asked what their kernels return
            net = DiT(dataclasses.replace(config, depth=depth))
            round_parameters(net, net.low_precision_layers(), torch.bfloat16)
            net.recompute, net.keep_norms = recompute, False
            net.set_attention("sdpa-flash")
            x, t, y = torch.empty(B, 4, 32, 32), torch.empty(B), torch.zeros(B, dtype=torch.int64)

            def forward(net=net, given=(x, t, t, y)):
                with torch.autocast("cpu", torch.bfloat16):
                    return net(*given)

            kept[depth] = kept_bytes(forward)
    # Of rows: the means and deviations of two norms, attention's logarithms of sums; modulations.
    statistics = 0 if recompute == "block" else B * T * 4 * (2 * 2 + config.num_heads)
    per_block = kept[2] - kept[1] - statistics - B * 6 * D * 2
    assert per_block / (2 * B * T * D) == pytest.approx(numbers, abs=0.1)


@pytest.mark.parametrize("blown_up", [1.0, 1e3, 1e12])
def test_logits_stay_bounded_where_the_product_before_them_grows(blown_up):
    """Why it is there. Weights of q and k that grow in a run drive the softmax of a plain network to one key a query,
    and its gradient to nothing or to NaN; here the logits stay below sqrt(head_dim) times the norms' weights."""
    found = {}
    for qk_norm in (False, True):
        net, largest = network(qk_norm=qk_norm), []
        with torch.no_grad():
            for block in net.blocks:
                block.attn.qkv.weight[: 2 * SIZES.hidden_size].mul_(blown_up)
                for norm in block.attn.norms():
                    norm.weight.fill_(1.0)

        def attend(q, k, v, largest=largest):
            logits = (q.float() @ k.float().mT) * HEAD_DIM**-0.5
            largest.append(float(logits.detach().abs().max()))
            return (logits.softmax(-1) @ v.float()).to(v.dtype)

        net.set_attention(attend)
        got = gradients(net, autocast=True)
        found[qk_norm] = max(largest), got
    bound = 1.01 * HEAD_DIM**0.5
    largest, got = found[True]
    assert largest <= bound and all(value.isfinite().all() for value in got.values())
    queries = got["blocks.0.attn.qkv.weight"][: SIZES.hidden_size]
    assert queries.norm() > 0
    if blown_up > 1:
        assert not found[False][0] <= 10 * bound


def test_without_a_change_of_the_logits_a_blown_up_product_changes_nothing():
    """An epsilon aside, the norm does not see the size of q and k."""
    net, *given = network(torch.float64, qk_norm=True), *inputs(dtype=torch.float64)[:4]
    before = net(*given)
    with torch.no_grad():
        for block in net.blocks:
            for part in (block.attn.qkv.weight, block.attn.qkv.bias):
                part[: 2 * SIZES.hidden_size].mul_(1e3)
    torch.testing.assert_close(net(*given), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda attn: setattr(attn, "q_norm", nn.RMSNorm(HEAD_DIM)),
        lambda attn: attn.q_norm.register_forward_hook(lambda module, given, out: 2 * out),
        lambda attn: setattr(attn.q_norm, "forward", lambda x: x),
    ],
)
def test_a_norm_that_is_not_plain_is_called_and_named(change):
    net = network(qk_norm=True)
    given = inputs()[:4]
    assert net.changed_part() is None
    before = net(*given)
    change(net.blocks[1].attn)
    assert net.changed_part() == "blocks.1.attn.q_norm" and missed_part(net) == "net.blocks.1.attn.q_norm"
    assert not torch.allclose(net(*given), before, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"^net\.blocks\.1\.attn\.q_norm was replaced"):
        paired_forward(net, given[0], given[0], given[1], given[1], given[2])


def test_norms_in_a_network_that_has_none_are_a_change():
    net, other = network(), network(qk_norm=True)
    net.blocks[0] = other.blocks[0]
    assert net.changed_part() == "blocks.0.attn"


def test_forward_derivatives_are_exact():
    net = network(torch.float64, qk_norm=True)
    net.set_attention(lambda q, k, v: (q @ k.mT * HEAD_DIM**-0.5).softmax(-1) @ v)
    x, t, s, y, direction = inputs(dtype=torch.float64)
    tangent = torch.func.jvp(lambda x: net(x, t, s, y), (x,), (direction,))[1]
    with torch.no_grad():
        difference = (net(x + 1e-6 * direction, t, s, y) - net(x - 1e-6 * direction, t, s, y)) / 2e-6
    assert (tangent - difference).norm() <= 1e-7 * difference.norm()


def test_tensors_of_a_gpu_go_to_one_kernel_for_both():
    """And attention gets three tensors even from a package that takes q, k and v in one."""
    net = network(qk_norm=True)
    assert net.blocks[0].attn.parts(torch.bfloat16, torch.device("cuda")) == 3
    net.set_attention("flash2")
    assert net.blocks[0].attn.parts(torch.bfloat16, torch.device("cuda")) == 3
    seen = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "soflow":
                seen.append(func._overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with testing.as_on_gpu():
        net = DiT(dataclasses.replace(SIZES, qk_norm=True))
        x, t, y = torch.empty(4, 2, 8, 8), torch.empty(4), torch.zeros(4, dtype=torch.int64)
        with Seen():
            net(x, t, t, y).sum().backward()
            paired_forward(net, x, x, t, t, t, y, dtype=torch.float32)
    assert seen.count("qk_rms_norm") == 2 * SIZES.depth and seen.count("qk_rms_norm_backward") == SIZES.depth
    assert seen.count("qk_rms_norm_increment") == SIZES.depth


def test_norms_are_gathered_with_their_block():
    net = DiT(dataclasses.replace(SIZES, qk_norm=True))
    plain, normed = (parameter_groups(each).blocks[0] for each in (DiT(SIZES), net))
    assert normed.low and normed.numel == plain.numel + 2 * HEAD_DIM
    low = {id(p) for layer in net.low_precision_layers() for p in layer.parameters()}
    assert low >= {id(net.get_parameter(name)) for name in NORMS}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["soflow", "torch"])
def test_norms_are_trained_averaged_and_decayed_like_all_weights(precision, optimizer):
    """AdamW's decay is of every parameter here, as in the public recipe."""
    fields = {"model.hidden_size": 16, "model.depth": 1, "model.num_heads": 2, "model.qk_norm": True}
    config = preset("digits", device="cpu", precision=precision, batch_size=4, optimizer=optimizer, steps=20, **fields)
    states = [TrainState.build(dataclasses.replace(config, optim=dataclasses.replace(config.optim, weight_decay=decay)))
              for decay in (0.0, 0.5)]  # fmt: skip
    name = "network.blocks.0.attn.q_norm.weight"
    for state in states:
        for step in range(3):
            source = torch.Generator().manual_seed(step)
            train_step(state, torch.rand(4, 1, 8, 8, generator=source) * 2 - 1, torch.arange(4))
    weights = [state.weights()[name] for state in states]
    assert weights[0].dtype == torch.float32 and not torch.equal(weights[0], torch.ones(8))
    assert (weights[1] < weights[0]).all()
    assert not torch.equal(states[0].ema.state_dict()[name], torch.ones(8))


def test_the_kernels_epsilon_is_the_modules():
    q = 1e-4 * torch.randn(1, 2, SIZES.hidden_size, generator=torch.Generator().manual_seed(0))
    attn = network(qk_norm=True).blocks[0].attn
    norms = fused_layers.HeadNorms(attn.q_norm.weight, attn.k_norm.weight)
    got = fused_layers.normed_heads(q, q, norms)[0].unflatten(-1, (HEADS, -1))
    q = q.unflatten(-1, (HEADS, -1))
    assert torch.equal(got, attn.q_norm(q))
    torch.testing.assert_close(got, F.rms_norm(q, (HEAD_DIM,), attn.q_norm.weight, 1e-6))
    assert not torch.allclose(got, F.rms_norm(q, (HEAD_DIM,), attn.q_norm.weight, 1e-5), rtol=1e-2)


def test_a_network_without_data_is_built_and_asked():
    with FakeTensorMode():
        net = DiT(DiTConfig(8, 2, 2, 40, 2, 2, num_classes=5, qk_norm=True))
        x, t = torch.empty(3, 2, 8, 8), torch.empty(3)
        assert net(x, t, t, torch.zeros(3, dtype=torch.int64)).shape == x.shape

"""The products of a block: gradients of the plain composition, and how little is kept for the backward."""

import contextlib
import dataclasses
import gc

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from soflow_fast.config.presets import preset
from soflow_fast.models.dit import DiT, TapedOutputs
from soflow_fast.training.precision import round_parameters
from tests.networks import assert_close, gradients, inputs, network


@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
@pytest.mark.parametrize("B", [1, 4])
def test_gradients_are_those_of_autograd(B, recompute):
    plain = gradients(network(torch.float64, keep_norms=True), B)
    assert_close(gradients(network(torch.float64, recompute=recompute), B), plain, 1e-12)


@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
@pytest.mark.parametrize("rounded", [None, torch.bfloat16], ids=["float32 parameters", "bf16 parameters"])
def test_low_precision_gradients(recompute, rounded):
    """As near to float64 as the plain composition in the same precision, in the dtype of the parameters."""
    exact = gradients(network(torch.float64))
    plain = gradients(network(keep_norms=True), autocast=True)
    net = network(rounded=rounded, recompute=recompute)
    dtypes = {name: p.dtype for name, p in net.named_parameters()}
    got = gradients(net, autocast=True)
    for name, value in exact.items():
        assert got[name].dtype == dtypes.get(name, torch.float32), name
        error, usual = ((each[name].double() - value).norm() for each in (got, plain))
        assert error <= 1.5 * usual + 1e-3 * value.norm(), name


def test_recomputed_gradients_are_the_same_to_the_bit():
    kept = gradients(network())
    for recompute in ("mlp", "block"):
        again = gradients(network(recompute=recompute))
        assert all(torch.equal(again[name], value) for name, value in kept.items())


def test_second_derivatives_are_refused():
    net = network()
    *given, _ = inputs()
    given[0].requires_grad_()
    (first,) = torch.autograd.grad(net(*given).sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_forward_derivatives_are_exact():
    net = network(torch.float64)
    x, t, s, y, direction = inputs(dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        tangent = torch.autograd.forward_ad.unpack_dual(net(dual, t, s, y)).tangent
    with sdpa_kernel(SDPBackend.MATH):
        through_func = torch.func.jvp(lambda x: net(x, t, s, y), (x,), (direction,))[1]
    with torch.no_grad():
        difference = (net(x + 1e-6 * direction, t, s, y) - net(x - 1e-6 * direction, t, s, y)) / 2e-6
    for value in (tangent, through_func):
        assert (value - difference).norm() <= 1e-7 * difference.norm()


def storages():
    """Every storage that a tensor within Python's reach has."""
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter, FakeTensor):
            with contextlib.suppress(NotImplementedError):  # a wrapper that another test left behind
                found[thing.untyped_storage()._cdata] = thing
    return found


def kept_bytes(forward):
    """Bytes that stay from `forward` until its backward, each storage once: what autograd saves and closures hold."""
    before, saved = storages(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        out = forward()
    gc.collect()
    kept = storages() | {tensor.untyped_storage()._cdata: tensor for tensor in saved}
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in before)


@pytest.mark.parametrize(("recompute", "least", "most"), [("none", 11.9, 12.1), ("mlp", 7.9, 8.1), ("block", 1.9, 2.1)])
def test_kept_for_the_backward_at_xl_sizes(recompute, least, most):
    """Per block and token 12 D bf16 numbers, and the statistics of rows: with fake tensors, which hold no data."""
    config = preset("imagenet256-xl2").model
    B, T, D = 32, 256, config.hidden_size
    kept = {}
    with FakeTensorMode():
        for depth in (2, 6):  # the difference leaves out what is kept once
            net = DiT(dataclasses.replace(config, depth=depth))
            round_parameters(net, net.low_precision_layers(), torch.bfloat16)
            net.recompute, net.keep_norms = recompute, False
            net.set_attention(
                "sdpa-flash"
            )  # as on a GPU: on a CPU torch's own kernel is not always the one that is taken
            x, t, y = torch.empty(B, 4, 32, 32), torch.empty(B), torch.zeros(B, dtype=torch.int64)

            def forward(net=net, given=(x, t, t, y)):
                with torch.autocast("cpu", torch.bfloat16):
                    return net(*given)

            kept[depth] = kept_bytes(forward)
    per_block = (kept[6] - kept[2]) / 4
    heads = config.num_heads
    statistics = B * T * 4 * (2 * 2 + heads)  # two means and deviations, the attention's logarithms of sums; float32
    modulations = B * 6 * D * 2
    numbers = (per_block - (modulations if recompute == "block" else statistics + modulations)) / (2 * B * T * D)
    assert least <= numbers <= most


def test_without_gradient_nothing_is_kept_and_no_statistics_are_made():
    net = network()
    *given, _ = inputs()
    with torch.no_grad():
        quiet = net(*given)
    assert quiet.grad_fn is None and torch.allclose(quiet, net(*given), atol=1e-6)


@pytest.mark.parametrize("qk_norm", [False, True], ids=["", "qk_norm"])
def test_tape_holds_residuals_and_what_the_products_came_to(qk_norm):
    """Against the modules, called one by one and heard."""
    net = network(torch.float64, qk_norm=qk_norm)
    x, t, s, y, _ = inputs(dtype=torch.float64)
    tape = TapedOutputs(slice(1, 3))
    net(x, t, s, y, tape=tape)
    heard: dict[str, torch.Tensor] = {}
    for name, module in net.named_modules():
        module.register_forward_hook(
            lambda _m, given, got, name=name: heard.update({name: got, f"{name} in": given[0]})
        )
    net(x, t, s, y)
    pairs = {"last residual": (tape.residual, heard["final_layer in"]), "patches": (tape.patches, heard["final_layer"])}
    modulations = [*(f"blocks.{k}" for k in range(len(net.blocks))), "final_layer"]
    wanted = torch.cat([heard[f"{name}.adaLN_modulation"] for name in modulations], 1)
    pairs["modulations"] = (torch.cat(tape.modulations, 1), wanted)
    assert len(tape.blocks) == len(net.blocks)
    for k, block in enumerate(tape.blocks):
        tensors = [value for value in block if isinstance(value, torch.Tensor)]
        assert not any(value.requires_grad for value in tensors) and not any(block.deferred)
        pairs[f"{k} residual"] = (block.x1, heard[f"blocks.{k} in"])
        pairs[f"{k} qkv"] = (torch.cat([block.q, block.k, block.v], -1), heard[f"blocks.{k}.attn.qkv"])
        gate = heard[f"blocks.{k}.adaLN_modulation"].chunk(6, 1)[2].unsqueeze(1)
        pairs[f"{k} second residual"] = (block.x2, heard[f"blocks.{k} in"] + gate * heard[f"blocks.{k}.attn.proj"])
        for name, value in (("attn.proj", block.proj), ("mlp.fc1", block.fc1), ("mlp.fc2", block.fc2)):
            pairs[f"{k} {name}"] = (value, heard[f"blocks.{k}.{name}"])
        for name, value in (("q_norm", block.normed_q), ("k_norm", block.normed_k)):
            assert (value is not None) == qk_norm
            if value is not None:
                pairs[f"{k} {name}"] = (value, heard[f"blocks.{k}.attn.{name}"].flatten(2))
    for name, (got, right) in pairs.items():
        torch.testing.assert_close(got, right[1:3].detach(), rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize(("recompute", "kept"), [("none", True), ("mlp", False)])
def test_a_cpu_keeps_what_it_would_have_to_make_again(recompute, kept):
    count = {}
    for name, keep in (("plain", True), ("least", False), ("usual", None)):
        net = network(recompute=recompute, keep_norms=keep)
        *given, _ = inputs()
        count[name] = kept_bytes(lambda net=net, given=given: net(*given))
    assert count["least"] < count["plain"]
    assert count["usual"] == count["plain" if kept else "least"]

"""The engine on the kernels: the same outputs, losses, gradients and updates as on the references."""

import dataclasses

import pytest
import torch

from soflow_fast import DiTConfig, ObjectiveConfig, TrainState, preset, train_step
from soflow_kernels import testing

SIZES = DiTConfig(input_size=8, patch_size=2, in_channels=2, hidden_size=40, depth=2, num_heads=2, num_classes=5)


def build(device, keep_norms=False, qk_norm=False, sizes=SIZES):
    config = preset("digits", precision="fp32", device=str(device), batch_size=4)
    model = dataclasses.replace(sizes, qk_norm=qk_norm)
    state = TrainState.build(dataclasses.replace(config, model=model, objective=ObjectiveConfig()))
    state.flow.network.keep_norms = keep_norms
    with torch.no_grad():  # off the initial zeros, where half of the gradients vanish
        for i, p in enumerate(state.flow.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p))
    return state


def batch(device):
    source = torch.Generator().manual_seed(0)
    return torch.randn(4, 2, 8, 8, generator=source).to(device), torch.tensor([0, 4, 2, 3], device=device)


@pytest.mark.parametrize(("keep_norms", "qk_norm"), [(False, True), (True, False)])
def test_forward_and_gradients(keep_norms, qk_norm, device):
    state = build(device, keep_norms, qk_norm)
    (x, y), t = batch(device), torch.tensor([0.9, 0.5, 0.7, 0.3], device=device)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(device)

    def run(mode):
        state.flow.zero_grad()
        with testing.mode(mode):
            out = state.flow.network(x, t, 0.5 * t, y)
            (out * direction).sum().backward()
        return out.detach(), [p.grad.clone() for p in state.flow.parameters()]

    (out, gradients), (wanted, references) = run("auto"), run("reference")
    assert (out - wanted).norm() <= 1e-5 * wanted.norm()
    assert not torch.equal(out, wanted)  # the kernels did run
    for (name, _), got, reference in zip(state.flow.named_parameters(), gradients, references, strict=True):
        assert (got - reference).norm() <= 1e-4 * reference.norm(), name


def test_vectors_take_the_kernel_of_labels(device):
    """As a table with a row for each sample; one of them is the null vector."""
    sizes = dataclasses.replace(SIZES, num_classes=0, condition_size=6, depth=1)
    network = build(device, sizes=sizes).flow.network
    t = torch.tensor([0.9, 0.5, 0.7, 0.3], device=device)
    y, direction = (torch.randn(4, n, generator=torch.Generator().manual_seed(n)).to(device) for n in (6, 40))
    y[2] = torch.nan
    embedders = {name: p for name, p in network.named_parameters() if "_embedder.mlp" in name or "y_embedder" in name}
    found = []
    for mode in ("auto", "reference"):
        network.zero_grad()
        with testing.mode(mode):
            c = network.conditioning(t, 0.5 * t, y)
            (c * direction).sum().backward()
        found.append([c.detach(), *(p.grad.clone() for p in embedders.values())])
    assert not torch.equal(found[0][0], found[1][0])  # the kernel did run
    for name, got, wanted in zip(("c", *embedders), *found, strict=True):
        assert wanted.norm() > 0 and (got - wanted).norm() <= 1e-5 * wanted.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("qk_norm", [False, True], ids=["", "qk_norm"])
def test_training_step_in_low_precision(qk_norm, device):
    """Increments ride along on values that lack their biases, as on a GPU; rounding is all that differs."""
    states, found = [], []
    for mode in ("auto", "reference"):
        with testing.mode(mode):
            config = dataclasses.replace(build(device, qk_norm=qk_norm).config, precision="bf16")
            state = TrainState.build(dataclasses.replace(config, run=dataclasses.replace(config.run, recompute="none")))
            state.flow.network.keep_norms = False
            with torch.no_grad():
                for i, p in enumerate(state.flow.parameters()):
                    p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p))
            assert state.rides_along()
            found.append(train_step(state, *batch(device)))
            states.append(state)
    for name in ("fm_loss", "sc_loss", "grad_norm"):
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-2, atol=0, msg=name)
    pairs = zip(states[0].flow.named_parameters(), states[1].flow.parameters(), strict=True)
    for (name, p), q in pairs:
        assert (p.grad.float() - q.grad.float()).norm() <= 0.05 * q.grad.float().norm(), name


def test_training_step(device):
    states = [build(device) for _ in range(2)]
    found = []
    for state, mode in zip(states, ("auto", "reference"), strict=True):
        with testing.mode(mode):
            found.append(train_step(state, *batch(device)))
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("precision", "qk_norm"), [("fp32", False), ("tf32", False), ("bf16", False), ("bf16", True)], ids=str
)
def test_every_precision_trains_on_a_gpu(precision, qk_norm):
    config = preset("digits", precision=precision, device="cuda", batch_size=64, steps=30)
    model = dataclasses.replace(SIZES, qk_norm=qk_norm)
    state = TrainState.build(dataclasses.replace(config, model=model, objective=ObjectiveConfig()))
    x0 = torch.randn(64, 2, 8, 8, device="cuda")
    y = torch.randint(5, (64,), device="cuda")
    losses = [float(train_step(state, x0, y)["fm_mse"]) for _ in range(30)]
    assert all(loss == loss for loss in losses) and losses[-1] < losses[0]


def test_called_modules_run_kernels_too(device):
    """A hook that changes nothing: the same numbers by another path, biases included."""
    state = build(device)
    (x, y), t = batch(device), torch.tensor([0.9, 0.5, 0.7, 0.3], device=device)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(device)
    found = []
    for _ in range(2):
        state.flow.zero_grad()
        out = state.flow.network(x, t, 0.5 * t, y)
        (out * direction).sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in state.flow.parameters())])
        state.flow.network.blocks[1].mlp.register_forward_hook(lambda *_: None)
    for fused, called in zip(*found, strict=True):
        assert (fused - called).norm() <= 1e-4 * fused.norm()


def test_float8_layers_add_their_biases_once(device):
    pytest.importorskip("torchao.float8")
    from soflow_fast.models import float8

    network = build(device).flow.network
    float8.use_float8(network, emulate=True)
    with torch.no_grad():
        for block in network.blocks:  # biases that cannot be overlooked
            for layer in block.linears():
                layer.bias.mul_(10)
    (x, y), t = batch(device), torch.tensor([0.9, 0.5, 0.7, 0.3], device=device)
    found = {}
    for mode in ("auto", "reference"):
        for enabled in (True, False):
            low = torch.autocast(torch.device(device).type, torch.bfloat16)
            with testing.mode(mode), torch.set_grad_enabled(enabled), low:
                found[mode, enabled] = network(x, t, 0.5 * t, y).detach()
    exact = network(x, t, 0.5 * t, y).detach()  # float32 does not go through float8
    for out in found.values():
        assert (out - exact).norm() <= 0.1 * out.norm()

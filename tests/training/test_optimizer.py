"""The three optimisers agree step for step, read each other's state, and skip what is not finite."""

import dataclasses
import sys
import types
from itertools import pairwise

import pytest
import torch

from soflow_fast import DiTConfig, ObjectiveConfig, TrainState, preset, train_step
from soflow_fast.errors import ConfigError
from soflow_fast.runs import checkpoint
from soflow_fast.training.optimizer import ApexAdamW, TorchAdamW
from soflow_kernels import adamw as kernels

SIZES = DiTConfig(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=10)


class FusedAdam(torch.optim.Optimizer):
    """apex's FusedAdam with `capturable`, in plain operations: one count of steps for a group, which leaves
    out a skipped step at the next one; scale and overflow by the questions that it has for a gradient scaler."""

    def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode, capturable):
        assert adam_w_mode and capturable
        super().__init__(params, {"lr": torch.tensor(lr), "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.overflow = torch.zeros(1, dtype=torch.int)

    @torch.no_grad()
    def step(self, grad_scaler):
        for group in self.param_groups:
            device = group["params"][0].device
            group["step"] = group["step"] + (self.overflow != 1).int() if "step" in group else torch.tensor([1])
            self.overflow.copy_(grad_scaler._check_inf_per_device(self)[device])
            inverse = grad_scaler._get_scale_async().double().reciprocal().float()
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                assert p.grad.dtype == p.dtype == group["lr"].dtype == torch.float32
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                if self.overflow:
                    continue
                g, k = p.grad * inverse, group["step"]
                state["exp_avg"].lerp_(g, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
                denominator = (state["exp_avg_sq"] / (1 - beta2**k)).sqrt() + group["eps"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * (state["exp_avg"] / (1 - beta1**k)) / denominator)


@pytest.fixture
def apex(monkeypatch):
    """A stand-in for the package, and a CPU that passes for a GPU."""
    package = types.ModuleType("apex")
    package.__spec__ = types.SimpleNamespace()
    optimizers = types.ModuleType("apex.optimizers")
    optimizers.FusedAdam = FusedAdam
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)

    def build(kind, settings, network, masters, averages):
        if kind != "apex":
            return original(kind, settings, network, masters, averages)
        options = {name: getattr(settings, name) for name in ("lr", "betas", "eps", "weight_decay")}
        return ApexAdamW(list(network.parameters()), masters, [list(a.parameters()) for a in averages], **options)

    from soflow_fast.training import state

    original = state.build_optimizer
    monkeypatch.setattr(state, "build_optimizer", build)


def state(optimizer, precision="fp32", teacher="student", **fields):
    fields = {"optim.grad_clip": 0.5, "optim.weight_decay": 0.01, "optim.lr": 1e-3, **fields}
    config = preset("digits", precision=precision, device="cpu", batch_size=8, optimizer=optimizer, **fields)
    objective = ObjectiveConfig(teacher=teacher)
    run = TrainState.build(dataclasses.replace(config, model=SIZES, objective=objective))
    weights = {  # off the initial zeros, where half of the gradients vanish
        name: value + 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(i))
        for i, (name, value) in enumerate(run.weights().items())
    }
    run.load_weights(weights)
    for average in (run.ema, run.teacher):
        if average is not None:
            average.load_state_dict(weights)
    return run


def batch(seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(8, 1, 8, 8, generator=source), torch.randint(10, (8,), generator=source)


def flat(flow):
    return torch.cat([p.detach().flatten() for p in flow.parameters()])


def masters(state):
    return torch.cat([m.detach().flatten() for m in state.optimizer.masters])


@pytest.mark.parametrize("other", ["torch", "apex"])
@pytest.mark.parametrize("teacher", ["student", "ema"])
def test_step_for_step(other, teacher, apex):
    ours, theirs = state("soflow", teacher=teacher), state(other, teacher=teacher)
    first = flat(ours.flow)
    for seed in range(12):
        a, b = train_step(ours, *batch(seed)), train_step(theirs, *batch(seed))
        torch.testing.assert_close(a["grad_norm"], b["grad_norm"], rtol=1e-4, atol=1e-6)
        for mine, its in ((ours.flow, theirs.flow), (ours.ema, theirs.ema), (ours.teacher, theirs.teacher)):
            if mine is not None:
                moved = (flat(mine) - first).norm()
                assert moved > 1e-5 * first.norm()
                assert (flat(mine) - flat(its)).norm() <= 1e-3 * moved + 1e-7 * first.norm()


@pytest.mark.parametrize("kind", ["torch", "apex"])
def test_bf16_trains_by_masters(kind, apex):
    ours, theirs = state("soflow", "bf16"), state(kind, "bf16")
    first = masters(ours)
    for seed in range(3):
        a, b = train_step(ours, *batch(seed)), train_step(theirs, *batch(seed))
    torch.testing.assert_close(a["fm_mse"], b["fm_mse"], rtol=2e-2, atol=0)
    assert (masters(ours) - masters(theirs)).norm() <= 0.1 * (masters(ours) - first).norm()
    for p, m in zip(theirs.flow.parameters(), theirs.optimizer.masters, strict=True):
        assert torch.equal(p, m.to(p.dtype))


@pytest.mark.parametrize("kind", ["soflow", "torch", "apex"])
def test_what_is_not_finite_is_skipped(kind, apex):
    run, never = state(kind), state(kind)
    train_step(run, *batch(0))
    before, average = flat(run.flow), flat(run.ema)
    x0, y = batch(1)
    train_step(run, x0.fill_(torch.inf), y)
    assert torch.equal(flat(run.flow), before) and torch.equal(flat(run.ema), average)
    train_step(never, *batch(0))
    never.step = run.step  # the same draws
    for each in (run, never):
        train_step(each, *batch(2))
    torch.testing.assert_close(flat(run.flow), flat(never.flow), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("way", list(pairwise(["soflow", "torch", "apex", "soflow"])), ids=" to ".join)
def test_each_resumes_the_other(way, tmp_path, apex):
    first, second = (state(kind) for kind in way)
    for seed in range(3):
        train_step(first, *batch(seed))
    checkpoint.save(tmp_path, first, 2)
    assert checkpoint.resume(tmp_path, second, pytest.fail)
    assert second.step == 3 and torch.equal(flat(second.flow), flat(first.flow))
    before = flat(first.flow)
    for run in (first, second):
        train_step(run, *batch(3))
    assert (flat(first.flow) - flat(second.flow)).norm() <= 1e-4 * (flat(first.flow) - before).norm()


def test_a_missing_apex_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"^--optimizer apex: apex is not installed"):
        state("apex")


def test_torch_is_torchs():
    run = state("torch")
    assert isinstance(run.optimizer, TorchAdamW) and run.optimizer.param_groups[0]["fused"]


@pytest.mark.parametrize(("averages", "most"), [("student", 40), ("ema", 48)])
def test_bytes_a_parameter(averages, most, monkeypatch):
    """The bytes that the update reads and writes and the norm reads in a bf16 step, by the tensors that it is given."""
    run = state("soflow", "bf16", teacher=averages)
    model = dataclasses.replace(SIZES, hidden_size=256)  # as at shipped sizes, the blocks are nearly everything
    run = TrainState.build(dataclasses.replace(run.config, model=model))
    moved = []
    plain = kernels.adamw_ema_reference

    def noted(weights, grads, exp_avgs, exp_avg_sqs, steps, lr, **rest):
        low = rest["low_precision"] or []
        both_ways = [*weights, *exp_avgs, *exp_avg_sqs, *low, *(t for average in rest["emas"] for t in average)]
        once = [*grads, *grads]  # for the norm, and for the update
        moved.append(sum(2 * t.nbytes for t in both_ways) + sum(t.nbytes for t in once))
        return plain(weights, grads, exp_avgs, exp_avg_sqs, steps, lr, **rest)

    monkeypatch.setattr(kernels, "adamw_ema_reference", noted)
    train_step(run, *batch())
    assert len(moved) == 2  # parameters with and without a master
    assert 30 < sum(moved) / run.parameter_count() <= most

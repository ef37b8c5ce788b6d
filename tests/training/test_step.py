"""The training step: network calls, FLOPs, the split of the batch, and that it is the objective's own gradient."""

import copy
import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from soflow_fast import ObjectiveConfig, TrainState, preset, train_step
from soflow_fast.commands.dry_run import forward_flops, forwards_per_image
from soflow_fast.config.schema import DiTConfig
from soflow_fast.data import InMemory, Source
from soflow_fast.models.attention import flop_counter
from soflow_fast.objective import Objective
from soflow_fast.ranks import share, share_of_first
from soflow_fast.training.consistency_target import quotient_cosine
from soflow_fast.training.step import _micro_batch, draw, ema_decay, flow_matching_samples, gradient_norm, learning_rate

TINY = DiTConfig(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=10)


def build(objective=None, teacher="student", **fields):
    objective = dataclasses.replace(objective or ObjectiveConfig(), teacher=teacher)
    config = preset("digits", precision="fp32", device="cpu", batch_size=8)
    config = dataclasses.replace(config, model=TINY, objective=objective, **fields)
    return TrainState.build(config)


def batch(n=8, seed=0):
    source = torch.Generator().manual_seed(seed)
    x0 = torch.randn(n, 1, 8, 8, generator=source)
    return x0, torch.randint(10, (n,), generator=source)


def off_zero(state):
    """Move the weights off their initial zeros, where half of the gradients vanish."""
    with torch.no_grad():
        for i, p in enumerate(state.flow.parameters()):
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return state


def count_calls(state):
    calls = []
    state.flow.network.register_forward_pre_hook(lambda m, a: calls.append((len(a[0]), torch.is_grad_enabled())))
    return calls


def test_three_network_calls_with_guidance():
    state = build(batch_size=8)
    calls = count_calls(state)
    train_step(state, *batch())
    assert calls == [(8 + 2, False), (8, True), (2, False)]  # six samples of eight are flow matching


def test_no_labelled_guidance_where_the_mix_is_one():
    state = build(ObjectiveConfig(mix_ratio=1.0))
    calls = count_calls(state)
    train_step(state, *batch())
    assert calls == [(8, False), (8, True), (2, False)]


@pytest.mark.parametrize(
    "objective,labelled", [(ObjectiveConfig(guidance_scale=1.0), True), (ObjectiveConfig(), False)]
)
def test_two_network_calls_without_guidance(objective, labelled):
    state = build(objective)
    calls = count_calls(state)
    x0, y = batch()
    train_step(state, x0, y if labelled else None)
    assert calls == [(8, True), (2, False)]


@pytest.mark.parametrize(
    "objective,bound",
    [
        (ObjectiveConfig(), 4.55),
        (ObjectiveConfig(guidance_scale=1.0), 3.3),
        (preset("digits").objective, 4.55),
        (ObjectiveConfig(kind="meanflow"), 4.55),
        (ObjectiveConfig(kind="flow-matching"), 4.05),
    ],
    ids=["public recipe", "unguided", "digits", "MeanFlow", "flow matching"],
)
def test_flops_per_image_in_forwards(objective, bound):
    state = build(objective, batch_size=16)
    counter = flop_counter()
    with counter:
        train_step(state, *batch(16))
    forwards = counter.get_total_flops() / 16 / forward_flops(state)
    assert forwards == pytest.approx(forwards_per_image(state, state.config), rel=0.02)  # what --dry-run says
    assert bound - 0.35 < forwards <= bound  # counted at all, and no more than that


def test_flop_counter_sees_the_attention():
    """A counter blind to attention would flatter the figure above."""
    state = build()
    D, T = TINY.hidden_size, 16
    tokens = TINY.depth * T * (24 * D * D + 4 * T * D) + T * 2 * 2 * 4 * D
    per_image = TINY.depth * 12 * D * D + 4 * D * D + 2 * 2 * (256 * D + D * D)
    assert forward_flops(state) == tokens + per_image


@pytest.mark.parametrize(
    "objective",
    [
        ObjectiveConfig(),
        ObjectiveConfig(guidance_scale=1.0),
        ObjectiveConfig(mix_ratio=1.0),
        ObjectiveConfig(fm_fraction=0.0),
        ObjectiveConfig(fm_fraction=1.0),
        ObjectiveConfig(kind="flow-matching"),
        ObjectiveConfig(kind="meanflow"),
    ],
)
def test_step_has_the_gradient_of_the_objective(objective):
    """The three batched calls give what `flow_matching` and `consistency` give, weighted by their shares. Those of
    MeanFlow are closer, so that more is left of their rounding."""
    tolerance = 5e-3 if objective.kind == "meanflow" else 5e-4
    state = off_zero(build(objective))
    x0, y = batch()
    d = draw(state, x0.shape)
    flow, own = copy.deepcopy(state.flow), Objective(objective)
    n = d.n_fm
    loss = torch.zeros(())
    if n:
        fm = own.flow_matching(flow, x0[:n], d.x1[:n], d.t[:n], y[:n], d.label_dropped[:n])
        loss = loss + n / 8 * fm.loss
    if n < 8:
        parts = (v[n:] for v in (x0, d.x1, d.t, d.l, d.s, y, d.label_dropped))
        sc = own.consistency(flow, *parts)
        loss = loss + (8 - n) / 8 * sc.loss
    loss.backward()
    metrics = train_step(state, x0, y)
    for (name, mine), reference in zip(state.flow.named_parameters(), flow.parameters(), strict=True):
        assert (mine.grad - reference.grad).norm() <= tolerance * reference.grad.norm(), name
    if n:
        torch.testing.assert_close(metrics["fm_mse"], fm.mse, rtol=1e-5, atol=1e-6)
    if n < 8:
        torch.testing.assert_close(metrics["sc_mse"], sc.mse, rtol=tolerance / 5, atol=1e-6)
    assert ("fm_loss" in metrics, "sc_loss" in metrics) == (n > 0, n < 8)


@pytest.mark.parametrize(
    ("micro", "kind"), [*((n, "soflow") for n in (1, 2, 3, 8, 100)), (3, "meanflow"), (3, "flow-matching")]
)
def test_micro_batches_give_the_gradient_of_the_whole(micro, kind):
    objective, way = ObjectiveConfig(kind=kind, fm_fraction=0.6), {}
    if kind == "meanflow":  # du/dt of a pair of forwards has another rounding in each of them
        way["quotient"] = "increments"
    whole, parts = (off_zero(build(objective, micro_batch=m, **way)) for m in (0, micro))
    wanted, got = (train_step(state, *batch()) for state in (whole, parts))
    for a, b in zip(whole.flow.parameters(), parts.flow.parameters(), strict=True):
        assert (b.grad - a.grad).norm() <= 2e-4 * a.grad.norm()
    names = ("fm_loss", "fm_mse", "sc_mse", "fm_weight", "sc_weight")
    for name in names if kind != "flow-matching" else ("fm_loss", "fm_mse", "fm_weight"):
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1 / 3, 0.5, 0.75, 0.9, 1.0])
def test_both_losses_are_dealt_to_all_ranks(fraction):
    for B in (1, 2, 5, 8, 255, 256, 1000):
        first = flow_matching_samples(B, fraction)
        assert first == int(fraction * B + 0.5)
        for world in (1, 2, 3, 7, 8):
            parts = [share(B, first, rank, world) for rank in range(world)]
            assert torch.equal(torch.cat(parts).sort().values, torch.arange(B))
            for rank, part in enumerate(parts):
                n = share_of_first(B, first, rank, world)
                assert (part[:n] < first).all() and (part[n:] >= first).all() and part.diff().gt(0).all()
                assert len(part) == B * (rank + 1) // world - B * rank // world
                assert abs(n - first / world) < 2 and abs(len(part) - n - (B - first) / world) < 2


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("fraction", [0.25, 0.75])
def test_draws_belong_to_the_places_in_the_whole_batch(world, fraction):
    config = dataclasses.replace(build(batch_size=12).config, objective=ObjectiveConfig(fm_fraction=fraction))
    whole, shape = draw(TrainState.build(config), torch.Size((12, 1, 8, 8))), torch.Size((12 // world, 1, 8, 8))
    taken, n_fm = [], 0
    for rank in range(world):
        found, places = (
            draw(TrainState.build(config, rank=rank, world=world), shape),
            share(12, whole.n_fm, rank, world),
        )
        for got, wanted in zip(found[:5], whole[:5], strict=True):
            assert torch.equal(got, wanted[places])
        taken, n_fm = [*taken, *places.tolist()], n_fm + found.n_fm
    assert sorted(taken) == list(range(12)) and n_fm == whole.n_fm


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("micro", [0, 1, 2])
def test_the_gradients_of_ranks_average_to_those_of_one(world, micro):
    config = dataclasses.replace(build(batch_size=8).config, precision="fp32")
    source = Source(InMemory(*batch(8)), seed=5, batch_size=8, flip=True)
    source.dealt_first = flow_matching_samples(8, config.objective.fm_fraction)

    def gradients(rank, world, micro):
        state = off_zero(TrainState.build(dataclasses.replace(config, micro_batch=micro), rank=rank, world=world))
        found = []

        def observe(name, **values):
            if name == "update":
                found.extend(p.grad.clone() for p in state.flow.parameters())

        train_step(state, *source.batch(3, rank, world), observe=observe)
        return found

    wanted, each = gradients(0, 1, 0), [gradients(rank, world, micro) for rank in range(world)]
    for k, value in enumerate(wanted):
        mean = sum(found[k] for found in each) / world
        torch.testing.assert_close(mean, value, rtol=0, atol=5e-5 * float(value.abs().max()))


def test_draws_depend_on_seed_step_and_rank_alone():
    state, other = build(), build()
    torch.manual_seed(123)
    shape = torch.Size((8, 1, 8, 8))
    assert all(torch.equal(a, b) for a, b in zip(draw(state, shape)[:5], draw(other, shape)[:5], strict=True))
    state.world = other.world = 2
    other.rank = 1
    assert not torch.equal(draw(state, shape).x1, draw(other, shape).x1)
    state.world = other.world = 1
    other.rank, other.step = 0, 1
    assert not torch.equal(draw(state, shape).t, draw(other, shape).t)
    d = draw(state, shape)
    assert torch.equal(d.t[: d.n_fm], d.s[: d.n_fm])  # flow matching: s = t
    assert (d.s[d.n_fm :] < d.t[d.n_fm :]).all() and (d.l[d.n_fm :] < d.t[d.n_fm :]).all()


def test_same_seed_same_weights():
    states = [build(), build()]
    for state in states:
        for k in range(3):
            train_step(state, *batch(seed=k))
    for a, b in zip(states[0].ema.parameters(), states[1].ema.parameters(), strict=True):
        assert torch.equal(a, b)


def test_ema_follows_the_weights():
    state = off_zero(build())
    decay = state.config.optim.ema_decay
    before = [p.clone() for p in state.ema.parameters()]
    train_step(state, *batch())
    for old, new, p in zip(before, state.ema.parameters(), state.flow.parameters(), strict=True):
        torch.testing.assert_close(new, decay * old + (1 - decay) * p)
    warm = dataclasses.replace(state.config.optim, ema_warmup=True, ema_decay=0.999)
    state.config = dataclasses.replace(state.config, optim=warm)
    state.step = 0
    assert ema_decay(state) == pytest.approx(0.1)
    before = [p.clone() for p in state.ema.parameters()]
    train_step(state, *batch())
    for old, new, p in zip(before, state.ema.parameters(), state.flow.parameters(), strict=True):
        torch.testing.assert_close(new, 0.1 * old + 0.9 * p)
    state.step = 10**6
    assert ema_decay(state) == 0.999


def test_learning_rate_schedule():
    state = build(steps=100)
    optim = dataclasses.replace(state.config.optim, lr=1.0, lr_schedule="cosine", warmup_steps=10)
    state.config = dataclasses.replace(state.config, optim=optim)
    rates = []
    for step in (0, 4, 50, 99):
        state.step = step
        rates.append(learning_rate(state))
    assert rates[0] == pytest.approx(0.1, rel=1e-3) and rates[1] == pytest.approx(0.5, rel=1e-2)
    assert rates[2] == pytest.approx(0.5) and 0 < rates[3] < 1e-3


def test_update_is_adamw_with_clipping():
    state = off_zero(
        build(optim=dataclasses.replace(preset("digits").optim, grad_clip=0.01, lr=1e-3, lr_schedule="constant"))
    )
    reference = copy.deepcopy(state.flow)
    norm = train_step(state, *batch())["grad_norm"]
    gradient = [p.grad for p in state.flow.parameters() if p.grad is not None]
    assert norm > 0.01 and norm == pytest.approx(torch.stack([g.norm() for g in gradient]).norm())
    for p, g in zip(reference.parameters(), gradient, strict=True):
        p.grad = g * (0.01 / norm)
    c = state.config.optim
    torch.optim.AdamW(reference.parameters(), lr=c.lr, betas=c.betas, eps=c.eps, weight_decay=c.weight_decay).step()
    for mine, wanted in zip(state.flow.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-7)


def test_nothing_moves_where_a_gradient_is_not_finite():
    state = off_zero(build(teacher="ema"))
    x0, y = batch()
    train_step(state, x0, y)
    kept = [p.clone() for flow in (state.flow, state.ema, state.teacher) for p in flow.parameters()]
    moments = [v.clone() for entry in state.optimizer.state.values() for v in entry.values()]
    x0[3, 0, 2, 2] = torch.inf
    assert not train_step(state, x0, y)["grad_norm"].isfinite()
    assert all(map(torch.equal, kept, [p for f in (state.flow, state.ema, state.teacher) for p in f.parameters()]))
    assert all(map(torch.equal, moments, [v for e in state.optimizer.state.values() for v in e.values()]))


def test_bf16_takes_the_quotient_from_increments():
    """The student's products are bf16; a quotient of bf16 ends would have many times its own size in rounding error."""
    objective = ObjectiveConfig(r_init=0.002, r_end=0.002, guidance_scale=1.0)
    exact, low = (off_zero(build(objective, precision=p)) for p in ("fp32", "bf16"))
    seen = []
    low.flow.network.blocks[0].attn.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    x0, y = batch()
    got, wanted = (train_step(state, x0, y) for state in (low, exact))
    # The student, and a float32 pair: increments would not call what is watched.
    assert seen == [torch.bfloat16, torch.float32, torch.float32]
    plain = train_step(off_zero(build(objective, precision="bf16")), x0, y)
    torch.testing.assert_close(got["sc_mse"], plain["sc_mse"], rtol=6e-2, atol=0)
    got = plain
    # These random weights amplify what bf16 makes of the values; a bf16 pair is off by more than its own size.
    torch.testing.assert_close(got["sc_mse"], wanted["sc_mse"], rtol=6e-2, atol=0)
    torch.testing.assert_close(got["sc_weight"], wanted["sc_weight"], rtol=6e-2, atol=0)
    pair = train_step(off_zero(build(objective, precision="bf16", quotient="pair", quotient_precision="bf16")), x0, y)
    assert pair["sc_mse"] > 2 * wanted["sc_mse"]


@pytest.mark.parametrize(
    ("changes", "least", "most"),
    [
        ({}, 4.45, 4.55),  # the increments ride along on the student's forward
        ({"quotient_precision": "fp32"}, 4.7, 4.8),  # a pair of its own
        ({"quotient": "increments", "quotient_precision": "fp32"}, 4.7, 4.8),  # a pass of its own
        ({"quotient": "pair", "quotient_precision": "bf16"}, 4.45, 4.55),  # the student's own output is one end
        ({"teacher": "ema"}, 4.7, 4.8),
    ],
    ids=str,
)
def test_bf16_step_counts_its_forwards(changes, least, most):
    config = preset("digits", precision="bf16", device="cpu", batch_size=16, **changes)
    teacher = config.objective.teacher
    model = dataclasses.replace(TINY, hidden_size=256)  # products, not attention over 16 tokens, must rule the count
    state = TrainState.build(dataclasses.replace(config, model=model, objective=ObjectiveConfig(teacher=teacher)))
    counter = flop_counter()
    with counter:
        train_step(state, *batch(16))
    count = counter.get_total_flops() / 16 / forward_flops(state)
    assert least < count <= most
    assert forwards_per_image(state, state.config) == pytest.approx(count, abs=0.05)


def test_wrong_settings_are_refused():
    from soflow_fast.errors import ConfigError

    with pytest.raises(ConfigError, match="tf32"):
        TrainState.build(preset("digits", precision="tf32", device="cpu"))
    with pytest.raises(ConfigError, match="nowhere"):
        TrainState.build(preset("digits", device="nowhere"))
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        TrainState.build(preset("digits", **{"optim.lr": 0}))


def test_micro_batches_partition_any_batch():
    for B in range(1, 40):
        for n_fm in range(B + 1):
            for micro in range(1, B + 1):
                parts = -(-B // micro)
                found, counted = [], 0
                for k in range(parts):
                    index, n = _micro_batch(B, n_fm, k, parts, torch.device("cpu"))
                    index = torch.arange(B) if index is None else index
                    assert (index[:n] < n_fm).all() and (index[n:] >= n_fm).all() and len(index) <= micro
                    found.append(index)
                    counted += n
                assert counted == n_fm and torch.cat(found).sort().values.tolist() == list(range(B))


def test_draws_follow_the_schedule_and_the_label_drop():
    state = build(ObjectiveConfig(fm_fraction=0.5, r_init=0.5, r_end=0.01, label_drop=0.25), batch_size=4000, steps=100)
    shape, c = torch.Size((4000, 1, 2, 2)), Objective(state.config.objective)
    for step in (0, 99):
        state.step = step
        d = draw(state, shape)
        n = d.n_fm
        torch.testing.assert_close(d.l[n:], c.middle_time(d.t[n:], d.s[n:], step, 100))
        assert abs(d.label_dropped.float().mean() - 0.25) < 0.03
        assert abs(torch.stack([d.label_dropped.float(), d.t]).corrcoef()[0, 1]) < 0.06


def test_seed_decides_the_initial_weights():
    weights = [build(seed=seed).flow.network.blocks[0].mlp.fc1.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_wrong_batches_are_refused_by_name():
    state, (x0, y) = build(), batch()
    wrong = [(x0.to(torch.uint8), y), (x0[:0], y[:0]), (x0, y.float()), (x0, y[:3]), (x0, y + 10), (x0[0], y)]
    for images, labels in wrong:
        with pytest.raises(ValueError, match=r"^(x0|y) must be"):
            train_step(state, images, labels)
    train_step(state, x0.double(), y)  # cast to the network's dtype


def test_batch_must_split_over_the_ranks():
    from soflow_fast.errors import ConfigError

    with pytest.raises(ConfigError, match="batch_size"):
        TrainState.build(preset("digits", device="cpu", batch_size=7), world=2)


def test_the_backward_rounds_nothing_of_the_float32_ends():
    """In a bf16 step no operand of the patch embedding, the conditioning and the last layer is cast to bf16 in the
    backward. What the blocks take and give at their border is."""
    state = off_zero(TrainState.build(dataclasses.replace(build(batch_size=8).config, precision="bf16")))
    D, casts, inside = TINY.hidden_size, [], []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and inside and out.dtype == torch.bfloat16:
                casts.append(tuple(out.shape))
            return out

    def observe(name, **values):
        inside[:] = [name] if name == "backward" else []

    with Casts():
        train_step(state, *batch(), observe=observe)
    patches, last, times = {(8, 16, 4), (4, D)}, {(8, 16, 4), (4, D), (128, 4)}, {(8, 256), (D, 256), (D, D)}
    assert not (patches | last | times) & set(casts), casts
    gradient = state.flow.network.final_layer.linear.weight.grad
    assert gradient.dtype == torch.float32 and not torch.equal(gradient, gradient.bfloat16().float())


@pytest.mark.parametrize(("precision", "wanted"), [("tf32", "tf32"), ("fp32", "ieee"), ("bf16", "ieee")])
def test_the_products_of_the_backward_are_those_of_the_forward(precision, wanted):
    """On a GPU; here what they are told. tf32 is for the whole step, and a bf16 step leaves float32 products exact."""
    state, seen = off_zero(build()), []
    state.precision = precision
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision

    def note(where):
        seen.append((where, matmul.fp32_precision, torch.is_autocast_enabled("cpu")))

    def observe(name, **values):
        if name == "student":
            values["output"].register_hook(lambda gradient: note("backward"))

    patches = state.flow.network.x_embedder
    patches.register_forward_pre_hook(lambda *given: note("forward"))
    patches.proj.weight.register_hook(lambda gradient: note("backward"))
    train_step(state, *batch(), observe=observe)
    assert {entry for entry in seen if entry[0] == "backward"} == {("backward", wanted, False)}
    assert precision == "bf16" or ("forward", wanted, False) in seen
    assert matmul.fp32_precision == before


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16, torch.float32)], ids=str)
def test_the_gradient_norm_goes_by_dtype(dtypes):
    gradients = [
        torch.randn(5, k + 1, generator=torch.Generator().manual_seed(k)).to(dtypes[k % len(dtypes)]) for k in range(7)
    ]
    calls = []

    class Norms(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._foreach_norm.Scalar:
                calls.append({value.dtype for value in args[0]})
            return func(*args, **(kwargs or {}))

    with Norms():
        norm = gradient_norm(gradients)
    assert norm.dtype == torch.float32 and all(len(dtypes) == 1 for dtypes in calls) and len(calls) == len(dtypes)
    exact = torch.cat([value.double().flatten() for value in gradients]).norm()
    torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("fields", [{}, {"teacher": "ema"}, {"quotient": "pair"}], ids=str)
def test_the_measured_quotient_is_that_of_the_first_consistency_samples(fields):
    """And measuring it changes nothing in the step."""
    config = preset("digits", precision="bf16", device="cpu", batch_size=16)
    objective = dataclasses.replace(ObjectiveConfig(), teacher=fields.pop("teacher", "student"))
    config = dataclasses.replace(config, model=TINY, objective=objective, **fields)
    states = [
        off_zero(
            TrainState.build(dataclasses.replace(config, run=dataclasses.replace(config.run, check_quotient_every=n)))
        )
        for n in (0, 1)
    ]
    seen = {}
    plain = train_step(states[0], *batch(16), observe=lambda name, **values: seen.update({name: values}))
    measured = train_step(states[1], *batch(16))
    assert "q_cosine" not in plain and 0.9 < measured["q_cosine"] <= 1.0001
    for name, value in plain.items():
        assert torch.equal(measured[name], value), name
    points, value, increment = (seen["target"][name] for name in ("points", "value", "increment"))
    state = off_zero(TrainState.build(config))  # with the weights from before the update
    q = state.objective.quotient(state.flow, points, value, increment)
    wanted = quotient_cosine(state.target, state.objective, state.flow, state.teacher, points, q)
    torch.testing.assert_close(measured["q_cosine"], wanted, rtol=2e-3, atol=0)

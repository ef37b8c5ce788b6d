"""Vectors in the place of labels: the step's draws, guidance and losses, on one rank and several, and as a graph."""

import dataclasses

import pytest
import torch

from soflow_fast import DiTConfig, ObjectiveConfig, TrainState, preset, train_step
from soflow_fast.commands.dry_run import forwards_per_image
from soflow_fast.config.schema import override
from soflow_fast.config.validation import validate
from soflow_fast.launch import Launch
from soflow_fast.training import cuda_graph
from soflow_fast.training.memory_estimate import estimate_memory
from soflow_fast.training.parallel import join
from soflow_fast.training.plan.work import passes
from soflow_fast.training.step import draw, make_graph
from soflow_fast.training.time_estimate import count_step
from tests.forked import on_ranks
from tests.training.test_cuda_graph import graphs  # noqa: F401
from tests.training.test_step import TINY

E = 6
VECTORS = dataclasses.replace(TINY, num_classes=0, condition_size=E)


def build(objective=None, model=VECTORS, **fields):
    config = preset("digits", device="cpu", **{"precision": "fp32", "batch_size": 8, **fields})
    config = dataclasses.replace(config, model=model, objective=objective or ObjectiveConfig(label_drop=0.3))
    state = TrainState.build(config)
    with torch.no_grad():  # off its initial zeros, where half of the gradients vanish
        for i, p in enumerate(state.flow.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return state


def batch(n=8, seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=source), torch.randn(n, E, generator=source)


def gradients(state):
    return {name: p.grad.clone() for name, p in state.flow.named_parameters()}


@pytest.mark.parametrize("ranged", [None, (1.0, 4.0)])
def test_the_network_is_asked_with_vectors_and_with_the_null_one(ranged):
    state = build(model=dataclasses.replace(VECTORS, guidance_range=ranged))
    calls = []
    state.flow.network.register_forward_pre_hook(lambda module, given: calls.append(given[3:]))
    x0, y = batch()
    draws = draw(state, x0.shape)
    assert 0 < draws.label_dropped.sum() < 8
    train_step(state, x0, y, draws=draws)
    null = torch.full((8, E), torch.nan)
    given = torch.where(draws.label_dropped[:, None], null, y)
    sc = slice(draws.n_fm, 8)
    wanted = [torch.cat([null, given[sc]]), given, given[sc]]
    assert len(calls) == 3
    for (got, *w), y_wanted in zip(calls, wanted, strict=True):
        torch.testing.assert_close(got, y_wanted, rtol=0, atol=0, equal_nan=True)
        if ranged:
            assert bool(((w[0] == 1) | ~got.isnan().all(1)).all()) and bool((w[0] >= 1).all())


@pytest.mark.parametrize("kind", ["soflow", "meanflow", "flow-matching"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_on_one_hot_vectors_is_that_on_labels(kind, precision):
    """A linear layer on one-hot vectors is a table, and the null vector's embedding one more row of it."""
    n = 5
    objective = ObjectiveConfig(kind=kind, label_drop=0.3)
    labelled = build(objective, dataclasses.replace(TINY, num_classes=n), precision=precision)
    state = build(objective, dataclasses.replace(TINY, num_classes=0, condition_size=n), precision=precision)
    values = {name: value.clone() for name, value in labelled.weights().items()}
    table = values.pop("network.y_embedder.embedding_table.weight")
    null = torch.linspace(-1, 1, n)
    weight = table[:n].T.contiguous()
    values["network.y_embedder.proj.weight"] = weight
    values["network.y_embedder.proj.bias"] = torch.zeros(len(weight))
    values["network.y_embedder.null"] = null
    state.load_weights(values)
    table[n] = weight @ null
    labelled.load_weights({**labelled.weights(), "network.y_embedder.embedding_table.weight": table})
    y = torch.randint(n, (8,), generator=torch.Generator().manual_seed(2))
    x0, _ = batch()
    wanted = train_step(labelled, x0, y)
    got = train_step(state, x0, torch.nn.functional.one_hot(y, n).float())
    # The layer's bias has a gradient too, and the norm of all is another one.
    for name in wanted.keys() - {"grad_norm"}:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-5 if precision == "fp32" else 1e-2, atol=1e-6)
    if precision == "bf16":
        return
    of_table = labelled.flow.network.y_embedder.embedding_table.weight.grad
    of_layer = state.flow.network.y_embedder.proj.weight.grad
    torch.testing.assert_close(of_layer, of_table[:n].T + of_table[n][:, None] * null, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state.flow.network.y_embedder.proj.bias.grad, of_table.sum(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state.flow.network.y_embedder.null.grad, weight.T @ of_table[n], rtol=1e-4, atol=1e-6)
    others = {name: grad for name, grad in gradients(labelled).items() if "y_embedder" not in name}
    for name, grad in others.items():
        torch.testing.assert_close(gradients(state)[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_step_has_the_losses_of_one_call_at_a_time():
    state, other = build(), build()
    x0, y = batch()
    draws = draw(state, x0.shape)
    fm, sc = slice(0, draws.n_fm), slice(draws.n_fm, 8)
    objective, flow, dropped = other.objective, other.flow, draws.label_dropped
    wanted = objective.flow_matching(flow, x0[fm], draws.x1[fm], draws.t[fm], y[fm], dropped[fm])
    times = draws.t[sc], draws.l[sc], draws.s[sc]
    also = objective.consistency(flow, x0[sc], draws.x1[sc], *times, y[sc], dropped[sc])
    metrics = train_step(state, x0, y, draws=draws)
    for name, term in (("fm", wanted), ("sc", also)):
        for part, value in zip(term._fields, term, strict=True):
            torch.testing.assert_close(metrics[f"{name}_{part}"], value.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("teacher", ["student", "ema"])
def test_micro_batches_and_called_modules_have_the_same_gradients(precision, teacher):
    objective = ObjectiveConfig(label_drop=0.3, teacher=teacher)
    whole, parted, called = (
        build(objective, precision=precision, micro_batch=size, quotient_precision="fp32") for size in (0, 4, 0)
    )
    called.flow.network.y_embedder.register_forward_hook(lambda module, given, out: None)
    for state in (whole, parted, called):
        train_step(state, *batch())
    for other, bound in ((parted, 1e-5), (called, 1e-5)):
        wanted = gradients(whole)
        bound = bound if precision == "fp32" else 3e-2
        for name, grad in gradients(other).items():
            assert (grad - wanted[name]).norm() <= bound * wanted[name].norm() + 1e-7, name
    assert gradients(whole)["network.y_embedder.null"].norm() > 0


def test_without_a_vector_a_step_is_unconditional():
    state = build(ObjectiveConfig(label_drop=0.0))
    calls = []
    state.flow.network.register_forward_pre_hook(lambda module, given: calls.append(given[3]))
    train_step(state, batch()[0], None)
    assert calls == [None, None]  # no guidance, as there is nothing between which it could be


def test_wrong_vectors_are_refused_in_one_line():
    state, labelled = build(), build(model=TINY)
    x0, y = batch()
    vectors = "vectors of the model's condition_size"
    for given, said in (
        (y[:, :5], rf"y must be floating \[8, 6\], {vectors}, got torch.float32 \[8, 5\]"),
        (torch.zeros(8, dtype=torch.int64), rf"y must be floating \[8, 6\], {vectors}, got torch.int64 \[8\]"),
        (y[:7], rf"y must be floating \[8, 6\], {vectors}, got torch.float32 \[7, 6\]"),
        (y.index_fill(0, torch.tensor([3]), torch.nan), "y must be finite, row 3 of it is not"),
        (y.index_fill(0, torch.tensor([2]), torch.inf), "y must be finite, row 2 of it is not"),
    ):
        with pytest.raises(ValueError, match=said):
            train_step(state, x0, given)
    with pytest.raises(ValueError, match=r"y must be int64 \[8\], got torch.float32 \[8, 6\]"):
        train_step(labelled, x0, y)
    assert state.step == labelled.step == 0


def test_vectors_that_nobody_looked_at_stop_the_update(monkeypatch):
    """Those on a GPU: the device finds them itself."""
    state = build()
    monkeypatch.setattr("soflow_fast.training.step.on_gpu", lambda tensor: True)
    before = {name: p.clone() for name, p in state.flow.named_parameters()}
    x0, y = batch()
    y[1] = torch.nan
    train_step(state, x0, y)
    refused = state.guard.read()
    assert (refused.skipped, refused.place) == (1, "input")
    assert all(torch.equal(p, before[name]) for name, p in state.flow.named_parameters())


def test_half_precision_is_taken():
    state, other = build(), build()
    x0, y = batch()
    y = y.half()
    a, b = train_step(state, x0, y), train_step(other, x0, y.float())
    assert all(torch.equal(value, b[name]) for name, value in a.items())


def test_a_graph_has_vectors_among_its_inputs(graphs, monkeypatch):  # noqa: F811
    plain, recorded = build(), build()
    for state in (plain, recorded):
        for group in state.optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"])
    make_graph(recorded)
    for seed in range(cuda_graph.WARM_UP + 3):
        wanted, got = train_step(plain, *batch(seed=seed)), train_step(recorded, *batch(seed=seed))
        assert all(torch.equal(got[name], value) for name, value in wanted.items()), seed
    assert len(graphs) == 1 and graphs[0].replays == 3


def ranked(launch: Launch | None, kind: str, steps: int, quotient: str):
    config = override(preset("digits", precision="fp32", device="cpu", batch_size=8), {"run.parallel": kind})
    parallel = None if launch is None else join(launch, config.run, torch.device("cpu"))
    config = dataclasses.replace(config, model=VECTORS, objective=ObjectiveConfig(label_drop=0.3), seed=3)
    config = override(config, {"optim.lr": 1e-3, "quotient": quotient})
    state = TrainState.build(config, parallel=parallel)
    found = []
    for step in range(steps):
        x0, y = batch(seed=step)
        n = draw(state, (8 // state.world, 1, 8, 8)).n_fm
        first = 6 // state.world
        assert n == first
        mine = [*range(state.rank * first, (state.rank + 1) * first)]
        rest = 2 // state.world
        mine += range(6 + state.rank * rest, 6 + (state.rank + 1) * rest)
        found.append({name: float(v) for name, v in train_step(state, x0[mine], y[mine]).items()})
    weights = {n: (v.full_tensor() if hasattr(v, "full_tensor") else v).clone() for n, v in state.weights().items()}
    return found, weights


@pytest.mark.parametrize(("kind", "quotient"), [("ddp", "pair"), ("fsdp", "pair"), ("fsdp", "increments")])
def test_two_ranks_learn_what_one_does(kind, quotient):
    metrics, weights = ranked(None, "ddp", 12, quotient)
    for got, others in on_ranks(2, ranked, kind, 12, quotient):
        for a, b in zip(got, metrics, strict=True):
            for name, value in b.items():
                assert abs(a[name] - value) <= 1e-4 * max(abs(value), 1e-2), name
        for name, value in weights.items():  # a bias of keys has no gradient but rounding, of which Adam makes steps
            assert (others[name] - value).abs().max() < 1e-4, name
    assert weights["network.y_embedder.null"].abs().max() > 1e-3  # which was zero


def test_what_is_predicted_of_a_step():
    vectors, labelled = build(), build(model=TINY)
    assert forwards_per_image(vectors, vectors.config) == forwards_per_image(labelled, labelled.config)
    assert passes(vectors.config, vectors.target, "fp32", 8) == passes(labelled.config, labelled.target, "fp32", 8)
    wide = dataclasses.replace(VECTORS, condition_size=4096)
    peaks = [estimate_memory(dataclasses.replace(vectors.config, model=m)).peak for m in (VECTORS, wide)]
    assert peaks[1] - peaks[0] > 4 * 4 * 4090 * TINY.hidden_size  # weights, moments and averages of the layer
    counted = [len(count_step(state.config)) for state in (vectors, labelled)]
    assert 0 < counted[0] - counted[1] < 60  # the vectors' layer, its backward, and the null vector's place


def test_a_network_of_vectors_has_no_classes():
    assert preset("digits", condition_size=E).model == dataclasses.replace(
        preset("digits").model, num_classes=0, condition_size=E
    )
    config = preset("digits")
    both = dataclasses.replace(config.model, condition_size=E)
    with pytest.raises(ValueError, match=r"model.num_classes must be 0 beside a condition_size, of vectors, got 10"):
        validate(dataclasses.replace(config, model=both))
    with pytest.raises(ValueError, match="condition_size must be a whole number of at least 0, got -1"):
        validate(dataclasses.replace(config, model=DiTConfig(num_classes=0, condition_size=-1)))
    assert DiTConfig(num_classes=0, condition_size=3).conditional and DiTConfig().conditional
    assert not DiTConfig(num_classes=0).conditional

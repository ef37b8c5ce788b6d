"""Coming from the authors' trainer, going on, and back: their files and directories as runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.baselines import authors as recipe
from soflow_fast import DiT, SolutionFlow, TrainState, load, load_official, preset, sample, train_step
from soflow_fast.config import authors, presets, schema
from soflow_fast.config.authors import from_authors, read_yaml
from soflow_fast.config.schema import Config, difference, override
from soflow_fast.errors import CheckpointError
from soflow_fast.launch import Launch
from soflow_fast.models.official import read_start
from soflow_fast.runs import checkpoint
from soflow_fast.runs.checkpoint.authors import as_authors, export_authors
from tests.forked import on_ranks
from tests.ranked_states import CHANGES, joined, state_of
from tests.states import advance, build

STEPS = 20
"""After which ours and theirs are compared."""


@pytest.fixture
def tiny_size(monkeypatch: pytest.MonkeyPatch) -> Config:
    """A size beside the public ones, at which nothing costs much, on the classes and latents of ImageNet."""
    monkeypatch.setitem(schema.DIT_SIZES, "T/2", (1, 16, 2, 2))
    monkeypatch.setitem(authors.SIZES, "DiT-T-2", "T/2")
    monkeypatch.setitem(presets.GUIDANCE, "T/2", 3.0)
    config = presets.imagenet256("T/2")
    changes = {"model.input_size": 4, "batch_size": 4, "steps": 40, "run.device": "cpu", "precision": "fp32"}
    return override(config, changes)


def batch(step: int, config: Config) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(step)
    model = config.model
    shape = (config.batch_size, model.in_channels, model.input_size, model.input_size)
    return torch.randn(shape, generator=source), torch.randint(model.num_classes, shape[:1], generator=source)


class Theirs:
    """Their trainer: torch's AdamW over all parameters of their network, whose positions are one, the first."""

    def __init__(self, config: Config) -> None:
        self.state = recipe.build(config)
        flow = self.state.flow
        self.parameters = {"network.pos_embed": nn.Parameter(flow.network.pos_embed, requires_grad=False)}
        self.parameters |= dict(flow.named_parameters())
        optim = config.optim
        self.state.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        )

    def train(self, steps: int) -> None:
        """On by some steps, with the draws that a run of ours has."""
        for _ in range(steps):
            recipe.train_step(self.state, *batch(self.state.step, self.state.config))

    def file(self) -> dict[str, Any]:
        """What they save, with names in the order of their parameters."""
        model, ema = self.state.flow.state_dict(), self.state.ema.state_dict()
        return {
            "model": {name: model[name].clone() for name in self.parameters},
            "ema_model": {name: ema[name].clone() for name in self.parameters},
            "optimizer": self.state.optimizer.state_dict(),
            "finished_steps": self.state.step,
            "finished_epochs": 0,
        }


def trained(config: Config, steps: int, path: Path) -> Theirs:
    theirs = Theirs(config)
    with torch.no_grad():  # what begins at zero has no gradient behind it
        for p in theirs.state.flow.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    theirs.train(steps)
    torch.save(theirs.file(), path)
    return theirs


def going_on(path: Path, config: Config) -> TrainState:
    start = read_start(str(path), config, with_moments=True)
    state = TrainState.build(config, weights=start.network, averages=start.average)
    checkpoint.begin_with(state, start, str(path))
    return state


@pytest.mark.parametrize("optimizer", ["soflow", "torch"])
def test_the_next_steps_are_theirs(optimizer: str, tiny_size: Config, tmp_path: Path) -> None:
    theirs = trained(tiny_size, 3, tmp_path / "3.pt")
    numbers = torch.load(tmp_path / "3.pt", weights_only=True)["optimizer"]["state"]
    assert min(numbers) == 1 and len(numbers) == len(theirs.parameters) - 1  # the positions are counted, not trained
    state = going_on(tmp_path / "3.pt", replace(tiny_size, run=replace(tiny_size.run, optimizer=optimizer)))
    assert state.step == 3
    for _ in range(STEPS):
        train_step(state, *batch(state.step, tiny_size))
    theirs.train(STEPS)
    for ours, other in ((state.flow, theirs.state.flow), (state.ema, theirs.state.ema)):
        for (name, a), b in zip(ours.named_parameters(), other.parameters(), strict=True):
            if name.endswith("qkv.bias"):  # softmax does not see the keys' bias: AdamW moves it by what is rounded
                a, b = (torch.cat([value[:16], value[32:]]) for value in (a, b))
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)
    moments = state.optimizer.state_dict()["state"]
    for index, entry in theirs.state.optimizer.state_dict()["state"].items():
        assert float(moments[index - 1]["step"]) == float(entry["step"]) == 3 + STEPS
        for part in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(moments[index - 1][part], entry[part], rtol=1e-3, atol=1e-5)


def test_without_their_moments_the_steps_are_others(tiny_size: Config, tmp_path: Path) -> None:
    """So that the test above can fail."""
    theirs = trained(tiny_size, 3, tmp_path / "3.pt")
    start = read_start(str(tmp_path / "3.pt"), tiny_size)
    state = TrainState.build(tiny_size, weights=start.network, averages=start.average)
    state.step = 3
    for _ in range(STEPS):
        train_step(state, *batch(state.step, tiny_size))
    theirs.train(STEPS)
    apart = [(a - b).abs().max() for a, b in zip(state.flow.parameters(), theirs.state.flow.parameters(), strict=True)]
    assert max(apart) > 1e-4


def test_names_decide_and_not_the_order_of_theirs(tiny_size: Config, tmp_path: Path) -> None:
    """Both time embedders have weights of the same shapes: an order of our own would exchange them in silence."""
    theirs = trained(tiny_size, 2, tmp_path / "a.pt")
    file = theirs.file()
    names = list(theirs.parameters)
    moved = sorted(names, key=lambda name: (name != "network.pos_embed", ".s_embedder." in name, names.index(name)))
    state = file["optimizer"]["state"]
    file["optimizer"]["state"] = {moved.index(names[k]): entry for k, entry in state.items()}
    for kind in ("model", "ema_model"):
        file[kind] = {name: file[kind][name] for name in moved}
    torch.save(file, tmp_path / "b.pt")
    a, b = (read_start(str(tmp_path / f"{name}.pt"), tiny_size, with_moments=True) for name in "ab")
    assert a.moments.keys() == b.moments.keys() == dict(theirs.state.flow.named_parameters()).keys()
    for name, entry in a.moments.items():
        assert all(torch.equal(value, b.moments[name][part]) for part, value in entry.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("optimizer"), "holds no state of an optimiser"),
        (lambda f: f.pop("finished_steps"), "does not say how many steps"),
        (lambda f: f["optimizer"]["state"].clear(), "holds no moments of an optimiser, after 1 steps"),
        (lambda f: f["optimizer"]["state"].pop(3), "the optimiser's state of t_embedder.mlp.0.weight is missing"),
        (lambda f: f["optimizer"]["state"][1].pop("exp_avg_sq"), "exp_avg_sq of x_embedder.proj.weight is no AdamW"),
        (
            lambda f: f["optimizer"]["param_groups"][0].update(params=[1, 2]),
            "optimiser of 2 weights, the network has 26",
        ),
        (lambda f: f["optimizer"]["state"].update({99: {}}), "99 is no weight of it"),
    ],
)
def test_a_file_that_no_run_can_go_on_with_is_refused(
    change: Any, message: str, tiny_size: Config, tmp_path: Path
) -> None:
    path = tmp_path / "1.pt"
    file = trained(tiny_size, 1, path).file()
    change(file)
    torch.save(file, path)
    read_start(str(path), tiny_size)  # its weights are fine
    with pytest.raises(CheckpointError) as error:
        read_start(str(path), tiny_size, with_moments=True)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


def on_rank(launch: Launch, kind: str, path: Path) -> dict[str, Tensor]:
    """What a rank has, whole, once it goes on with a file."""
    state = state_of(joined(launch, kind))
    start = read_start(str(path), state.config, with_moments=True)
    checkpoint.begin_with(state, start, str(path))
    parts = {f"network {k}": v for k, v in state.weights().items()}
    parts |= {f"ema {k}": v for k, v in state.ema.state_dict().items()}
    for index, entry in state.optimizer.state_dict()["state"].items():
        parts |= {f"{index} {k}": v for k, v in entry.items()}
    assert state.step == 2
    return {name: v.full_tensor() if hasattr(v, "full_tensor") else v.clone() for name, v in parts.items()}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_several_ranks_go_on_with_a_file(kind: str, tmp_path: Path) -> None:
    state = advance(build(**CHANGES), 2)
    checkpoint.save(tmp_path / "run", state)
    whole = checkpoint.load_whole(tmp_path / "run")
    torch.save(as_authors(whole), tmp_path / "2.pt")
    expected = {f"network {k}": v for k, v in whole.network.items()} | {f"ema {k}": v for k, v in whole.ema.items()}
    for index, name in enumerate(name for name, _ in state.flow.named_parameters()):
        expected |= {f"{index} {part}": value for part, value in whole.moments[name].items()}
    for got in on_ranks(2, on_rank, kind, tmp_path / "2.pt"):
        assert got.keys() == expected.keys()
        assert [name for name, value in expected.items() if not torch.equal(got[name], value)] == []


# Back


def test_the_round_trip_is_exact(tiny_size: Config, tmp_path: Path) -> None:
    before = trained(tiny_size, 2, tmp_path / "2.pt").file()
    state = going_on(tmp_path / "2.pt", tiny_size)
    checkpoint.save(tmp_path / "run", state)
    file = export_authors(checkpoint.load_whole(tmp_path / "run"), tmp_path / "out")
    assert file == tmp_path / "out" / "ckpts" / "2.pt"
    after = torch.load(file, weights_only=True)
    assert after.keys() == before.keys() and after["finished_steps"] == 2
    for kind in ("model", "ema_model"):
        assert list(after[kind]) == list(before[kind])
        assert all(torch.equal(after[kind][name], value) for name, value in before[kind].items())
    mine, theirs = after["optimizer"], before["optimizer"]
    assert mine["state"].keys() == theirs["state"].keys() and mine["param_groups"] == theirs["param_groups"]
    for index, entry in theirs["state"].items():
        assert all(torch.equal(mine["state"][index][part], value) for part, value in entry.items())
    known = from_authors(read_yaml((tmp_path / "out" / "config.yaml").read_text()))
    assert difference(replace(tiny_size, precision="auto"), known) == []
    again = Theirs(tiny_size)  # as their train.py takes it
    again.state.optimizer.load_state_dict(after["optimizer"])
    again.state.flow.load_state_dict(after["model"])
    again.state.ema.load_state_dict(after["ema_model"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.pt", "out", "run"]


def test_what_is_exported_is_read_with_its_configuration(tiny_size: Config, tmp_path: Path) -> None:
    config = override(tiny_size, {"flow.path": "trig", "flow.coefficients": "trig"})
    state = TrainState.build(config)
    checkpoint.save(tmp_path / "run", state)
    file = export_authors(checkpoint.load_whole(tmp_path / "run"), tmp_path / "out")
    for flow in (load_official(file), load_official(file, tmp_path / "out" / "config.yaml"), load(tmp_path / "out")):
        assert (flow.path, flow.coefficients) == ("trig", "trig") and flow.network.config == config.model
        for a, b in zip(flow.parameters(), load(tmp_path / "run").parameters(), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(CheckpointError, match=r"path 'linear' was given, its config\.yaml says 'trig'"):
        load_official(file, path="linear")
    _, known, data = checkpoint.load_with_data(tmp_path / "out")
    assert known.data.kind == "latents" and data is not None and data.space is not None
    assert data.space == ("stabilityai/sd-vae-ft-mse", 0.18215, 0.0)


def test_a_null_label_that_was_never_trained_is_left_out(tiny_size: Config, tmp_path: Path) -> None:
    config = override(tiny_size, {"objective.label_drop": 0, "objective.guidance_scale": 1})
    state = TrainState.build(config)
    train_step(state, *batch(0, config))
    checkpoint.save(tmp_path / "run", state)
    file = export_authors(checkpoint.load_whole(tmp_path / "run"), tmp_path / "out")
    table = "network.y_embedder.embedding_table.weight"
    content = torch.load(file, weights_only=True)
    assert torch.equal(content["model"][table], state.flow.state_dict()[table][:1000])
    index = list(content["model"]).index(table)
    assert content["optimizer"]["state"][index]["exp_avg"].shape == (1000, 16)
    flow = load_official(file)
    assert flow.network.config == replace(config.model, null_label=False)


def test_an_exported_directory_has_weights_alone(tiny_size: Config, tmp_path: Path) -> None:
    state = TrainState.build(tiny_size)
    checkpoint.export(state.ema, tiny_size, tmp_path / "exported")
    whole = checkpoint.load_whole(tmp_path / "exported")
    file = export_authors(whole, tmp_path / "out")
    content = torch.load(file, weights_only=True)
    assert content["optimizer"]["state"] == {} and content["finished_steps"] == 0
    assert all(torch.equal(content["model"][name], value) for name, value in state.ema.state_dict().items())


# Networks that are never asked without a label


def test_a_table_without_a_null_row_is_not_read_off_by_one(tiny_size: Config, tmp_path: Path) -> None:
    whole = replace(tiny_size.model, null_label=False)
    state = SolutionFlow(DiT(whole)).state_dict()
    table = state["network.y_embedder.embedding_table.weight"]
    assert len(table) == 1000
    for given in (None, tiny_size.model, whole):
        flow = load_official(state, given)
        assert flow.network.config == whole and torch.equal(flow.network.y_embedder.embedding_table.weight, table)
    x, t = torch.randn(2, 4, 4, 4), torch.tensor([0.7, 0.9])
    for call in (
        lambda: sample(flow, None, seed=0, shape=(2, 4, 4, 4)),
        lambda: flow.velocity(x, t),
        lambda: flow.solution(x, t, t * 0, None),
        lambda: sample(flow, [1000, 3], seed=0),
    ):
        with pytest.raises(ValueError, match="no null label"):
            call()
    assert sample(flow, [0, 999], seed=0).shape == (2, 4, 4, 4)
    torch.save({"ema_model": state}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"has no row for the null label; give --set model\.null_label=false"):
        read_start(str(tmp_path / "x.pt"), tiny_size)


def test_such_a_network_is_trained_without_dropping_labels(tiny_size: Config) -> None:
    changes = {"model.null_label": False, "objective.label_drop": 0, "objective.guidance_scale": 1}
    state = TrainState.build(override(tiny_size, changes))
    x, y = batch(0, tiny_size)
    assert torch.isfinite(train_step(state, x, y)["fm_loss"])
    with pytest.raises(ValueError, match=r"y must be labels in 0\.\.999"):
        train_step(state, x, torch.full_like(y, 1000))
    with pytest.raises(ValueError, match="no null label"):
        train_step(state, x, None)


def test_a_wrong_number_of_heads_is_refused(tmp_path: Path) -> None:
    config = preset("imagenet256-b4").model
    with torch.device("meta"):
        state = SolutionFlow(DiT(replace(config, input_size=8))).state_dict()
    wrong = replace(config, input_size=8, num_heads=6)
    with pytest.raises(CheckpointError, match=r"says 6 heads; the public DiT of depth 12 and hidden size 768 has 12"):
        load_official({name: torch.empty_like(value, device="cpu") for name, value in state.items()}, wrong)


def test_a_configuration_of_another_table_is_refused(tiny_size: Config, tmp_path: Path) -> None:
    torch.save({"ema_model": SolutionFlow(DiT(tiny_size.model)).state_dict()}, tmp_path / "x.pt")
    (tmp_path / "config.yaml").write_text("model_type: DiT-T-2\ndata_size: 4\n")  # with labels that are never dropped
    with pytest.raises(CheckpointError, match=r"config\.yaml asks for a label table of 1000 rows, which it has not"):
        load_official(tmp_path / "x.pt")
    (tmp_path / "config.yaml").write_text("model_type: DiT-T-2\ndata_size: 4\ncfg_scal: 3.0\n")
    with pytest.raises(CheckpointError, match=r"config\.yaml: unknown field 'cfg_scal'"):
        load_official(tmp_path / "x.pt")
    (tmp_path / "config.yaml").write_text("a:\n  b: {c: 1}\n")  # of something else
    assert load_official(tmp_path / "x.pt").network.config == tiny_size.model
    with pytest.raises(CheckpointError, match=r"nowhere\.yaml: No such file"):
        load_official(tmp_path / "x.pt", tmp_path / "nowhere.yaml")

"""A range of guidance scales from the command line: trained, drawn, measured, begun with, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from soflow_fast import TrainState, load, load_official, preset
from soflow_fast.config.authors import to_authors
from soflow_fast.errors import CheckpointError, ConfigError
from soflow_fast.runs import checkpoint
from soflow_fast.runs.trainer import beginning
from tests.published import small_flow
from tests.states import advance, build

Call = Callable[..., Any]
TINY = ["--set", "model.hidden_size=16", "--set", "model.depth=1", "--set", "model.num_heads=2", "--steps", "2"]
RANGE = {"model.guidance_range": (1.0, 4.0)}


@pytest.fixture
def ranged(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "ranged", advance(build(**RANGE), 1))
    return tmp_path / "ranged"


def test_one_flag_trains_for_a_range_and_another_chooses(call: Call, files: Call, tmp_path: Path) -> None:
    result = call("train", "digits", *TINY, "--guidance-range", "1,4", "--run-dir", tmp_path / "run")
    assert (result.code, result.err) == (0, "")
    assert "evaluating 4000 samples at guidance 2" in result.out
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["guidance"] == 2.0
    assert load(tmp_path / "run").network.config.guidance_range == (1.0, 4.0)
    result = call("evaluate", tmp_path / "run", "--n", "100", "--nfe", "1", "--guidance", "4", "--json")
    assert json.loads(result.out)["guidance"] == 4.0
    small_flow(guidance_range=(1.0, 4.0)).save_pretrained(tmp_path / "given")  # of which a pixel shows the scale
    drawn = {}
    for w in ("1", "2", "4", ""):
        flag = ["--guidance", w] if w else []
        result = call("sample", tmp_path / "given", "--out", tmp_path / f"at{w}", "--n", "4", *flag)
        assert (result.code, result.err) == (0, "")
        drawn[w] = files(tmp_path / f"at{w}")
    assert drawn["1"] != drawn["2"] != drawn["4"] and drawn[""] == drawn["2"]


def test_a_dry_run_counts_the_embedder(call: Call) -> None:
    rows = [call("train", "digits", *TINY, "--dry-run", *flags).out for flags in ([], ["--guidance-range", "1,4"])]
    counts = [next(float(row.split()[1]) for row in text.splitlines() if row.startswith("parameters")) for text in rows]
    assert counts[1] > counts[0]


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_a_scale_outside_of_the_range_is_refused_in_one_line(
    command: str, ranged: Path, refused: Call, tmp_path: Path
) -> None:
    out = ["--out", tmp_path / "out"] if command == "sample" else []
    said = "--guidance must be from 1 to 4, as the network was trained, got"
    assert f"{said} 4.5" in refused(command, ranged, *out, "--guidance", "4.5")
    assert "--guidance must be a number, got 'much'" in refused(command, ranged, *out, "--guidance", "much")
    checkpoint.save(tmp_path / "plain", advance(build(), 1))
    line = refused(command, tmp_path / "plain", *out, "--guidance", "2")
    assert "--guidance must be left out, got 2: the network was trained for one scale" in line
    assert not (tmp_path / "out").exists()


def test_a_network_that_sees_no_scale_is_begun_with_and_its_output_is_unchanged(tmp_path: Path) -> None:
    state = advance(build(), 2)
    checkpoint.save(tmp_path / "plain", state)
    config = build(**RANGE, init=str(tmp_path / "plain")).config
    start = beginning(config, tmp_path / "new")
    assert start is not None
    begun = TrainState.build(config, weights=start.network, averages=start.average)
    x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([0.9, 0.5, 0.7]), torch.tensor([1, 2, 10])
    plain = load(tmp_path / "plain")
    for w in (1.0, 2.5, 4.0):
        for flow in (begun.flow, begun.ema):
            assert torch.equal(flow.network(x, t, 0.5 * t, y, torch.full((3,), w)), plain.network(x, t, 0.5 * t, y))
    before = begun.flow.network.w_embedder.mlp[2].weight.clone()
    advance(begun, 1)
    assert not torch.equal(begun.flow.network.w_embedder.mlp[2].weight, before)  # and learns at once


def test_a_network_for_another_range_is_begun_with_and_one_without_is_not_made_of_it(
    ranged: Path, tmp_path: Path
) -> None:
    wider = build(**{"model.guidance_range": (1.0, 6.0)}, init=str(ranged)).config
    start = beginning(wider, tmp_path / "new")
    assert start is not None and all(torch.equal(start.network[n], p) for n, p in load(ranged).named_parameters())
    with pytest.raises(ConfigError, match=r"of another network: model\.guidance_range differs"):
        beginning(build(init=str(ranged)).config, tmp_path / "new")


def test_the_authors_files(ranged: Path, tmp_path: Path) -> None:
    """They are begun with; nobody goes on with them, and none is written."""
    file = tmp_path / "theirs.pt"
    torch.save({"model": build().flow.state_dict(), "ema_model": build().ema.state_dict()}, file)
    config = build(**RANGE, init=str(file)).config
    start = beginning(config, tmp_path / "new")
    assert start is not None and not start.network["network.w_embedder.mlp.2.weight"].any()
    going_on = replace(config, run=replace(config.run, init="", resume_official=str(file)))
    with pytest.raises(ConfigError, match="its network sees no guidance scale; with --guidance-range give --init"):
        beginning(going_on, tmp_path / "new")
    with pytest.raises(ValueError, match=r"^model\.guidance_range: their network has no embedder of a guidance scale"):
        to_authors(preset("imagenet256-b4", guidance_range="1,4"), "out")
    weights = load(ranged).state_dict()
    with pytest.raises(CheckpointError, match="sees guidance scales; give a DiTConfig with guidance_range"):
        load_official(weights)
    assert load_official(weights, load(ranged).network.config).network.config.guidance_range == (1.0, 4.0)

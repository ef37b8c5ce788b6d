"""Runs of each objective by the command lines: what they print, draw and refuse."""

import json
from typing import Any

import pytest

from soflow_fast.runs import samples

SMALL = ("--steps", "3", "--device", "cpu", "--precision", "fp32", "--batch-size", "8", "--set", "model.depth=1")
SMALL = (*SMALL, "--set", "model.hidden_size=16", "--set", "model.num_heads=2")


@pytest.mark.parametrize(
    ("kind", "calls", "shown"),
    [("flow-matching", ("10",), ("fm ",)), ("meanflow", ("1", "2"), ("fm ", "mf ", "mean error^2 "))],
)
def test_a_run_is_judged_and_drawn_as_its_objective_asks(
    kind: str, calls: tuple[str, ...], shown: tuple[str, ...], call: Any, tmp_path: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(samples, "EVALUATION_SAMPLES", 200)
    run = tmp_path / "run"
    trained = call("train", "digits", "--objective", kind, "--run-dir", run, *SMALL)
    assert (trained.code, trained.err) == (0, "")
    line = next(line for line in trained.out.splitlines() if line.startswith("step 3/3"))
    assert all(f"  {name}" in line for name in shown) and ("sc " in line, "q^2" in line) == (False, False)
    assert tuple(json.loads((run / "evaluation.json").read_text())["nfe"]) == calls
    again = call("train", "digits", "--objective", kind, "--run-dir", run, *SMALL)
    assert again.code == 0
    other = call("train", "digits", "--run-dir", run, *SMALL)
    assert other.code == 2 and f"objective.kind: '{kind}' -> 'soflow'" in other.err
    judged = call("evaluate", run, "--n", "100", "--device", "cpu", "--json")
    assert tuple(json.loads(judged.out)["nfe"]) == calls
    drawn = call("sample", run, "--out", tmp_path / "out", "--n", "2", "--device", "cpu")
    assert f"2 images of {calls[0]} network call" in drawn.out
    if kind == "flow-matching":
        line = call("sample", run, "--out", tmp_path / "no", "--method", "renoise", "--device", "cpu").err
        assert "--method must be euler, got 'renoise': the flow was trained by flow-matching" in line
        refused = call("train", "digits", "--objective", kind, "--teacher", "ema", *SMALL)
        assert (refused.code, refused.err.count("\n")) == (2, 1) and "--teacher must be student" in refused.err

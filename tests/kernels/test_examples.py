"""The training loop of kernels/examples learns digits, with nothing but the kernels and torch."""

import ast
import runpy
from pathlib import Path

import pytest
import torch

import soflow_kernels
from soflow_kernels import testing

TRAIN = Path(soflow_kernels.__file__).parent.parent / "examples" / "train.py"


@pytest.mark.parametrize(
    ("steps", "at_least"),
    # A guess is right for 10 of 100; six seeds gave 34 to 45 after 60 steps.
    [(60, 25), pytest.param(400, 90, marks=pytest.mark.slow)],
)
def test_samples_in_one_step_are_of_the_class_that_was_asked_for(steps, at_least, monkeypatch):
    train = runpy.run_path(str(TRAIN))["train"]
    with torch.random.fork_rng(), testing.mode("reference"), monkeypatch.context() as patch:
        patch.setattr(torch, "compile", None)  # a CPU compiles nothing
        torch.manual_seed(0)
        assert train(steps) >= at_least


def test_it_is_short_and_its_own():
    text = TRAIN.read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(text)))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} == {"torch", "sklearn", "soflow_kernels"}  # sklearn has the digits
    assert sum(bool(line.strip()) for line in text.splitlines()) < 65
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)} & set(soflow_kernels.OPERATIONS)
    assert {"layernorm_modulate", "linear_gelu", "dual_time_embedding", "consistency_loss", "euler_lookahead"} <= used
    assert "AdamWEMA" in text and "soflow_fast" not in text

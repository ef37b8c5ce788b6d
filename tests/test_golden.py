"""Every number of tests/data: outputs, losses and gradients of the authors' public implementation, on tiny networks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from soflow_fast import DiT, DiTConfig, Objective, ObjectiveConfig, SolutionFlow, sample

DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "cases.json").read_text())
LOSS_CASES = [name for name in CASES if "loss" in CASES[name]]


def build(name, dtype):
    model = CASES[name]["model"]
    fields = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")
    net = DiT(DiTConfig(**{field: model[field] for field in fields}))
    flow = SolutionFlow(net, path=model["noising"].lower(), coefficients=model["coefficient"].lower()).to(dtype)
    with np.load(DATA / f"{name}.npz") as arrays:
        golden = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    flow.load_state_dict({k.removeprefix("weights/"): v for k, v in golden.items() if k.startswith("weights/")})
    return flow, {k: v.to(dtype) if v.is_floating_point() else v for k, v in golden.items()}


def build_objective(name):
    loss = CASES[name]["loss"]
    config = ObjectiveConfig(
        guidance_scale=loss["cfg_scale"],
        guidance_decay_time=loss["cfg_decay_time"],
        mix_ratio=loss["mix_ratio"],
        p=loss["p"],
        eps=loss["eps"],
        r_schedule=loss["schedule"].lower(),
        r_init=loss["r_init"],
        r_end=loss["r_end"],
    )
    return Objective(config), loss


def assert_near(got, wanted, tolerance, what):
    assert got.shape == wanted.shape, what
    error = (got - wanted).norm() / wanted.norm().clamp_min(1e-30)
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", LOSS_CASES)
def test_outputs(name, dtype):
    flow, golden = build(name, dtype)
    x, t, s, y = (golden[key] for key in ("x0", "t", "s", "y"))
    with torch.no_grad():
        got = {
            "F_tts": flow.network(x, t, s, y),
            "F_null": flow.network(x, t, t, None),
            "velocity": flow.velocity(x, t, y),
            "solution": flow.solution(x, t, s, y),
        }
        got["x_t"], got["v_t"] = flow.point(x, golden["x1"], t)
    objective, loss = build_objective(name)
    got["guidance_decay"] = objective.guidance_decay(t)
    got["l"] = objective.middle_time(t, s, loss["step"], loss["total_steps"])
    for key, value in got.items():
        assert value.dtype == dtype, key
        assert_near(value, golden[key], 3e-5, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("term", ["fm", "sc"])
@pytest.mark.parametrize("name", LOSS_CASES)
def test_losses_and_gradients(name, term, dtype):
    flow, golden = build(name, dtype)
    objective, loss = build_objective(name)
    x0, x1, t, l, s = (golden[key] for key in ("x0", "x1", "t", "l", "s"))
    y = golden["y"] if loss["conditional"] else None
    if term == "fm":
        got = objective.flow_matching(flow, x0, x1, t, y, golden["label_dropped"])
    else:
        got = objective.consistency(flow, x0, x1, t, l, s, y, golden["label_dropped"])
    got.loss.backward()
    for part in ("loss", "mse", "weight"):
        assert_near(getattr(got, part), golden[f"{term}_{part}"], 2e-4, part)
    compared = 0
    for key, parameter in flow.network.named_parameters():
        wanted = golden[f"{term}_grad/{key}"]
        assert parameter.grad is not None, key
        assert_near(parameter.grad, wanted, 5e-4, key)
        compared += bool(wanted.norm() > 0)
    assert compared >= 35


def test_sampler():
    flow, golden = build("sample_2nfe", torch.float32)
    got = sample(flow, golden["y"], nfe=CASES["sample_2nfe"]["nfe"], noise=list(golden["noise"]))
    assert_near(got, golden["sample"], 3e-5, "sample")

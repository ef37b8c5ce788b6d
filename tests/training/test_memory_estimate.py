"""The memory that a step is predicted to need, and the micro-batches that follow from it."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from soflow_fast import TrainState, preset, train_step
from soflow_fast.config.presets import PRESETS
from soflow_fast.config.schema import AUTO, Config, DiTConfig, difference, from_json, override, to_json
from soflow_fast.errors import ConfigError
from soflow_fast.runs import trainer
from soflow_fast.training import memory_estimate
from soflow_fast.training.memory_estimate import (
    BLOCK,
    USABLE,
    MemoryEstimate,
    Storages,
    estimate_memory,
    largest_micro_batch,
    measure_step,
    summary,
)
from soflow_kernels import on_gpu, use_kernel
from soflow_kernels.testing import as_on_gpu, mode

TINY = DiTConfig(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=10)
GIB = 2**30
# The cards that presets are named after.
CARDS = {name: int(name.rpartition("-")[2][:-2]) for name in PRESETS if name.endswith("gb")}


def tiny(**changes: Any) -> Config:
    config = dataclasses.replace(preset("digits", device="cpu", precision="fp32", batch_size=8), model=TINY)
    return override(config, changes)


def measured(config: Config) -> MemoryEstimate:
    """The same count of a real step."""
    with Storages() as storages:
        return measure_step(TrainState.build(config), storages)


# The prediction


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"run.recompute": "mlp", "precision": "bf16", "micro_batch": 4},
        {"run.recompute": "block", "model.num_classes": 0, "objective.fm_fraction": 1.0, "micro_batch": 3},
        {"run.optimizer": "torch", "precision": "bf16", "teacher": "ema"},
        {"model.qk_norm": True, "precision": "bf16"},
    ],
    ids=str,
)
def test_tensors_without_data_count_like_real_ones(changes: dict[str, Any]) -> None:
    """To the byte: both ways go through the same operations."""
    config = tiny(**changes)
    assert estimate_memory(config, device="cpu") == measured(config)


@pytest.mark.parametrize(("device", "precision"), [("cpu", "fp32"), ("cpu", "bf16"), ("cuda", "bf16")])
def test_what_lasts_is_numbers_times_bytes(device: str, precision: str) -> None:
    config = tiny(precision=precision, **{"model.hidden_size": 128, "objective.teacher": "ema"})
    state = TrainState.build(config)
    numbers = state.parameter_count() + sum(b.numel() for b in state.flow.buffers())
    copied = sum(p.numel() for p in state.flow.parameters() if p.dtype == torch.bfloat16)
    parameters = len(list(state.flow.parameters()))
    found = estimate_memory(config, device=device)
    # Blocks round up: every storage by less than one. The optimiser counts the steps of each parameter besides.
    slack = BLOCK * parameters
    for size, exact, factor in (
        (found.weights + found.masters, 4 * numbers + 2 * copied, 2),
        (found.masters, 4 * copied, 1),
        (found.moments, 8 * state.parameter_count(), 3),
        (found.averages, 8 * numbers, 3),
    ):
        assert exact <= size <= exact + factor * slack
    assert bool(copied) == (precision == "bf16")


def test_the_parts_add_up_and_the_peak_grows_with_the_batch() -> None:
    peaks = []
    for batch in (8, 16, 32):
        found = estimate_memory(tiny(precision="bf16"), batch=batch)
        assert sum(found.parts().values()) == found.peak and min(found.parts().values()) >= 0
        assert (found.batch, found.micro_batch) == (batch, batch)
        peaks.append(found.peak)
    assert peaks == sorted(set(peaks))


@pytest.mark.parametrize(("qk_norm", "numbers"), [(False, 12), (True, 14)])
def test_activations_are_what_the_blocks_keep(qk_norm: bool, numbers: int) -> None:
    """12 D values a token and block in bf16, 14 D where q and k are normalised. Statistics and the ends come on top,
    and the peak lies a little into the backward, when the last block has gone: one of six has a few operations of its
    own, 5 % in all."""
    config = override(preset("imagenet256-b2"), {"model.depth": 6, "model.qk_norm": qk_norm})
    one, two = (estimate_memory(config, batch=n).activations for n in (16, 32))
    model, tokens = config.model, 256
    exact = 16 * tokens * model.depth * numbers * model.hidden_size * 2
    assert two - one == pytest.approx(exact, rel=0.05)


def test_recomputing_saves_memory() -> None:
    kept = [
        estimate_memory(tiny(precision="bf16", **{"run.recompute": r}), batch=64).peak for r in ("none", "mlp", "block")
    ]
    assert kept == sorted(set(kept), reverse=True)


def test_tensors_without_data_go_the_ways_of_a_gpu() -> None:
    real = torch.zeros(2)
    before = use_kernel(real)
    with pytest.raises(RuntimeError, match="torn down"), as_on_gpu():
        x = torch.zeros(2)
        assert on_gpu(x) and use_kernel(x) and not use_kernel(x.double())
        with mode("reference"):
            assert on_gpu(x) and not use_kernel(x)
        with pytest.raises(AssertionError, match="Fake"):
            torch.add(real, 1)
        raise RuntimeError("torn down")
    assert not on_gpu(real) and use_kernel(real) == before


def test_every_backward_is_announced() -> None:
    places: list[str] = []
    state = TrainState.build(tiny(micro_batch=3))
    train_step(state, *batch(), observe=lambda name, **values: places.append(name) if name == "backward" else None)
    assert places == ["backward"] * 3


def test_auto_precision_on_a_gpu_that_is_not_here() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here, and its own precision counts")
    assert estimate_memory(tiny(precision="auto")).precision == "bf16"
    assert estimate_memory(tiny(precision="tf32")).precision == "tf32"
    assert estimate_memory(tiny(precision="auto"), device="cpu").precision == "fp32"


@pytest.mark.parametrize(
    "changes",
    [
        {"run.optimizer": "apex", "quotient_precision": "fp16"},
        {"precision": "tf32"},
        {"precision": "fp8", "run.cuda_graph": True, "run.compile": True},
    ],
    ids=str,
)
def test_what_only_a_gpu_can_do_is_counted(changes: dict[str, Any]) -> None:
    found = estimate_memory(tiny(**{"precision": "bf16", **changes}))
    assert found.peak > 0 and found.precision == changes.get("precision", "bf16")


def test_a_wrong_configuration_is_refused() -> None:
    for changes, batch, named in (({}, 0, "batch_size"), ({"steps": 0}, 8, "steps")):
        with pytest.raises(ConfigError, match=rf"^{named} must be in "):
            estimate_memory(tiny(**changes), batch=batch)


def test_the_summary_names_every_part() -> None:
    found = estimate_memory(tiny(precision="bf16", micro_batch=4))
    line = summary(found)
    assert "at its peak, bf16, batch 8 in micro-batches of 4: weights" in line
    assert all(f"{name} {size / 1e9:.2f}" in line for name, size in found.parts().items() if size)


# Presets for cards


@pytest.mark.slow
@pytest.mark.parametrize("name", CARDS)
def test_presets_fit_their_cards_and_the_next_power_of_two_does_not(name: str) -> None:
    config = preset(name)
    usable = USABLE * CARDS[name] * GIB
    assert config.batch_size == 256 and config.micro_batch in {2**k for k in range(9)}
    assert estimate_memory(config).peak <= usable
    if config.micro_batch < config.batch_size:
        assert estimate_memory(dataclasses.replace(config, micro_batch=2 * config.micro_batch)).peak > usable


# --micro-batch auto


def test_auto_is_the_largest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    cached = functools.cache(estimate_memory)
    monkeypatch.setattr(memory_estimate, "estimate_memory", cached)
    config = tiny(precision="bf16", batch_size=48)
    peaks = {size: cached(dataclasses.replace(config, micro_batch=size)).peak for size in (1, 4, 5, 48)}
    assert largest_micro_batch(config, int(peaks[48] / USABLE) + 1) == 48
    assert largest_micro_batch(config, int(peaks[4] / USABLE) + 1) == 4  # 12 parts; 10 parts have 5
    assert largest_micro_batch(config, int(peaks[5] / USABLE) - 1) == 4
    with pytest.raises(ConfigError, match=r"^--micro-batch auto: single images need "):
        largest_micro_batch(config, int(peaks[1] / USABLE) - 1)


def test_auto_takes_few_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they would be: nearly affine, with a step where gradients of several micro-batches are added up."""
    asked = []

    def affine(config: Config) -> Any:
        size = -(-config.batch_size // -(-config.batch_size // config.micro_batch))
        asked.append(size)
        return type("Estimate", (), {"peak": 1000 + 13 * size + size % 3 + (300 if size < config.batch_size else 0)})

    monkeypatch.setattr(memory_estimate, "estimate_memory", affine)
    for batch in (1, 7, 256, 1000):
        config = tiny(batch_size=batch)
        sizes = sorted({-(-batch // parts) for parts in range(1, batch + 1)})
        for memory in range(1600, 5000, 137):
            asked.clear()
            fits = [n for n in sizes if affine(dataclasses.replace(config, micro_batch=n)).peak <= 0.9 * memory]
            asked.clear()
            assert largest_micro_batch(config, memory) == max(fits)
            assert len(asked) <= 7


def test_auto_in_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(micro_batch="auto")
    assert config.micro_batch == AUTO
    assert from_json(to_json(config)) == config == from_json('{"micro_batch": "auto"}', config)
    assert trainer.resolved(config).micro_batch == 0  # on the CPU: the whole batch
    assert difference(config, dataclasses.replace(config, micro_batch=4)) == []
    for wrong in ("many", "1.5", "AUTO"):
        with pytest.raises(ValueError, match=r"^micro_batch must be a whole number or auto, got "):
            tiny(micro_batch=wrong)
    peak = estimate_memory(dataclasses.replace(config, micro_batch=2)).peak
    monkeypatch.setattr(trainer, "resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(peak / USABLE) + 1, 80 * GIB))
    assert trainer.resolved(config).micro_batch == 2


# Out of memory


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    return torch.randn(8, 1, 8, 8, generator=source), torch.randint(10, (8,), generator=source)


def out_of_memory_once(state: TrainState, where: str, at: int = 1) -> None:
    """Let the forward or backward number `at` of the network with gradient run out of memory, one time."""
    count = 0

    def fail(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            if where == "backward":
                output.register_hook(fail)
            else:
                fail()

    state.flow.network.register_forward_hook(hook)


def contents(state: TrainState) -> list[torch.Tensor]:
    """All that a step changes."""
    assert state.teacher
    moments = [value for kept in state.optimizer.state.values() for value in kept.values()]
    averages = [*state.ema.parameters(), *state.teacher.parameters()]
    return [
        value.detach().clone() for value in (*state.flow.parameters(), *state.optimizer.masters, *moments, *averages)
    ]


@pytest.mark.parametrize(("where", "micro", "at"), [("forward", 0, 1), ("backward", 0, 1), ("backward", 4, 2)])
def test_a_step_that_runs_out_of_memory_changes_nothing_and_is_repeated(
    where: str, micro: int, at: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(precision="bf16", micro_batch=micro, **{"objective.teacher": "ema"})
    failing, again, whole = (TrainState.build(config) for _ in range(3))
    for state in (failing, again, whole):
        train_step(state, *batch())
    before = contents(failing)
    out_of_memory_once(failing, where, at)
    with pytest.raises(torch.OutOfMemoryError):
        train_step(failing, *batch())
    assert failing.step == 1 and all(map(torch.equal, contents(failing), before))

    out_of_memory_once(again, where, at)
    trainer.step_in_memory(again, *batch(), print)
    smaller = (micro or 8) // 2
    assert again.config.micro_batch == smaller and again.step == 2
    assert capsys.readouterr().out == f"out of memory at step 2: again, in micro-batches of {smaller}\n"
    whole.config = dataclasses.replace(config, micro_batch=smaller)
    train_step(whole, *batch())
    assert all(map(torch.equal, contents(again), contents(whole)))


def test_out_of_memory_at_one_image_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "train_step", fail)
    with pytest.raises(ConfigError, match=r"^--batch-size 8: out of memory"):
        trainer.train(override(tiny(), {"run_dir": str(tmp_path / "run")}))
    said = [line.rpartition(" ")[2] for line in capsys.readouterr().out.splitlines() if "again" in line]
    assert said == ["4", "2", "1"]


def test_an_update_that_runs_out_of_memory_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some weights may have moved."""
    calls = []

    def fail(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("soflow_kernels.AdamWEMA.step", fail)
    with pytest.raises(ConfigError, match=r"^--batch-size 8: out of memory"):
        trainer.train(override(tiny(), {"run_dir": str(tmp_path / "run")}))
    assert calls == [1]


def test_another_micro_batch_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soflow_fast.runs.samples.EVALUATION_SAMPLES", 64)
    config = tiny(run_dir=str(tmp_path / "run"), steps=2, checkpoint_every=1, **{"run.sample_every": 0})
    trainer.train(config)
    state = trainer.train(dataclasses.replace(config, micro_batch=4))
    assert state.step == 2 and state.config.micro_batch == 4

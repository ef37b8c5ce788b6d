"""float32 or bf16 on a CPU: what is measured, what is kept, and that a run keeps what it began in."""

import dataclasses
import json

import pytest
import torch

from soflow_fast import preset
from soflow_fast.config.schema import override
from soflow_fast.runs import trainer
from soflow_fast.training import cpu_precision
from soflow_fast.training.cpu_precision import Choice, choose, measure

WIDE = override(
    preset("digits", device="cpu", batch_size=4),
    {"model.hidden_size": 256, "model.num_heads": 4, "model.depth": 3, "steps": 2},
)


class Clock:
    """Seconds that pass from one look to the next, as given for float32 and bf16 in turn."""

    def __init__(self, *steps):
        self.steps, self.now, self.looks = steps, 0.0, 0

    def __call__(self):
        if self.looks % 2:
            self.now += self.steps[self.looks // 2 % len(self.steps)]
        self.looks += 1
        return self.now


@pytest.fixture
def capable(monkeypatch):
    monkeypatch.setattr(cpu_precision, "has_products", lambda: True)


@pytest.mark.parametrize(("fp32", "bf16", "taken"), [(2.0, 1.0, "bf16"), (1.05, 1.0, "fp32"), (1.0, 2.0, "fp32")])
def test_the_faster_is_taken_if_it_is_clearly_faster(fp32, bf16, taken):
    found = measure(WIDE, Clock(fp32, bf16))
    assert found.precision == taken
    assert (found.fp32, found.bf16) == (pytest.approx(fp32), pytest.approx(bf16))


def test_it_is_measured_once(capable, tmp_path):
    clock, path = Clock(2.0, 1.0), tmp_path / "choices.json"
    first = choose(WIDE, clock, path)
    looks = clock.looks
    assert first.precision == "bf16" and looks == 4 * (1 + cpu_precision.ROUNDS)
    assert choose(WIDE, Clock(1.0, 9.0), path) == first
    assert choose(dataclasses.replace(WIDE, batch_size=8), Clock(1.0, 9.0), path).precision == "fp32"  # another shape
    path.write_text("{", encoding="utf-8")
    assert choose(WIDE, Clock(1.0, 9.0), path).precision == "fp32"
    path.write_text(json.dumps({cpu_precision._key(WIDE): {"precision": "bf16"}}), encoding="utf-8")
    assert choose(WIDE, Clock(1.0, 9.0), path).precision == "fp32"


def test_nothing_is_measured_where_it_cannot_win(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_precision, "measure", lambda *given: pytest.fail("measured"))
    unmeasured = Choice("fp32", 0.0, 0.0)
    monkeypatch.setattr(cpu_precision, "has_products", lambda: False)
    assert choose(WIDE, Clock(1.0), tmp_path / "a") == unmeasured
    monkeypatch.setattr(cpu_precision, "has_products", lambda: True)
    assert choose(preset("digits", device="cpu"), Clock(1.0), tmp_path / "a") == unmeasured


def test_what_this_cpu_has_is_what_torch_says(monkeypatch):
    for bf16, amx in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda bf16=bf16: bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert cpu_precision.has_products() == (bf16 or amx)


@pytest.mark.parametrize("began", ["fp32", "bf16"])
def test_a_run_keeps_the_precision_in_which_it_began(began, tmp_path, monkeypatch, capsys):
    config = override(WIDE, {"precision": "auto", "run_dir": str(tmp_path / "run")})
    other = {"fp32": "bf16", "bf16": "fp32"}[began]
    monkeypatch.setattr(cpu_precision, "choose", lambda *given: Choice(began, 1.0, 0.5))
    chosen, said = trainer.choose_precision(config)
    assert chosen.precision == began
    assert said == f"{began}: a step of 2 blocks takes 1 s in float32 and 0.5 s in bf16 here"
    monkeypatch.setattr("soflow_fast.runs.samples.EVALUATION_SAMPLES", 64)
    first = trainer.train(dataclasses.replace(config, steps=2))
    assert first.precision == began and said in capsys.readouterr().out
    monkeypatch.setattr(cpu_precision, "choose", lambda *given: Choice(other, 1.0, 2.0))
    again, said = trainer.choose_precision(config)
    assert again.precision == began and said == ""
    assert trainer.train(dataclasses.replace(config, steps=2)).step == 2
    forced = dataclasses.replace(config, precision=other)
    assert trainer.choose_precision(forced) == (forced, "")

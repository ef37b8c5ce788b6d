"""The host's part of a step: all of a GPU's ways are gone, no launch is made, and the count says what a block costs."""

import itertools

import pytest
import torch

from benchmarks.studies import host_time
from soflow_kernels import _dispatch, bias_gelu
from soflow_kernels.testing import launches_dropped


def test_launches_are_prepared_and_dropped(monkeypatch):
    x, bias = torch.randn(4, 64), torch.zeros(64)
    prepared = []
    real = _dispatch.launch

    def launch(kernel, grid, *args, **options):
        prepared.append((kernel.__name__, grid))
        return real(kernel, grid, *args, **options)

    monkeypatch.setattr("soflow_kernels.gelu.launch", launch)
    with launches_dropped():
        assert _dispatch.on_gpu(x)
        out = bias_gelu(x, bias)
    assert out.shape == x.shape and prepared == [("_forward_kernel", (1,))]
    assert not _dispatch.on_gpu(x) and _dispatch._recorded is None
    assert torch.equal(bias_gelu(x, bias), plain_gelu(x))


def plain_gelu(x):
    return torch.nn.functional.gelu(x, approximate="tanh")


def test_what_a_block_costs_the_host(monkeypatch, capsys):
    monkeypatch.setattr(host_time, "DEPTHS", (2, 3))
    ticks = itertools.count()
    two, three = (host_time.measure(depth, 2, lambda: float(next(ticks))) for depth in (2, 3))
    assert two.milliseconds == three.milliseconds == [1000.0, 1000.0]
    # Guidance 2; the student 3; increments 4; the backward 4: each norm with its residual, GELUs, attention, dqkv.
    assert three.ours - two.ours == 13
    assert three.others > two.others
    host_time.main(["--steps", "2"])
    said = capsys.readouterr().out.splitlines()
    assert said[1].split()[0] == "2" and said[2].split()[0] == "3" and "13 operations of ours" in said[3]


def test_a_wrong_number_of_steps_is_refused():
    with pytest.raises(Exception, match="steps"):
        host_time.main(["--steps", "0"])

"""The kernels' elementary functions against float64, over the ranges that they promise."""

import math

import pytest
import torch

from soflow_kernels import testing
from soflow_kernels._dispatch import jit, launch, tl
from soflow_kernels._math import exp2, expm1, sincos, sincos_of_quarters

BLOCK = 1024


def _kernel(x_ptr, first_ptr, second_ptr, NAME: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    if NAME == "sincos":
        first, second = sincos(x)
    elif NAME == "sincos_of_quarters":
        first, second = sincos_of_quarters(x)
    elif NAME == "expm1":
        first = expm1(x)
        second = first
    else:
        first = exp2(x, 0.0)
        second = exp2(x, 1e-4)
    tl.store(first_ptr + at, first)
    tl.store(second_ptr + at, second)


def call(name, x):
    with testing.poisoned():
        first, second = torch.empty_like(x), torch.empty_like(x)
    # Compiled or interpreted is decided here: while tests are collected it is not settled yet.
    launch(jit(_kernel), (1,), x, first, second, NAME=name, BLOCK=BLOCK, num_warps=4)
    return first.double(), second.double()


@pytest.mark.parametrize("largest", [1.0, 1000.0, 12_800.0])
def test_sincos(largest, device):
    x = torch.linspace(-largest, largest, BLOCK, device=device)
    x[:40] = torch.arange(-20, 20) * (math.pi / 4) if largest > 20 else x[:40]
    sin, cos = call("sincos", x)
    assert (sin - x.double().sin()).abs().max() <= 1.1e-7 and (cos - x.double().cos()).abs().max() <= 1.1e-7


def test_sine_of_small_angles_is_relative(device):
    x = torch.logspace(-30, 0, BLOCK, device=device)
    for name, scale in (("sincos", 1.0), ("sincos_of_quarters", math.pi / 2)):
        sin, _ = call(name, x)
        torch.testing.assert_close(sin, (scale * x.double()).sin(), rtol=2.5e-7, atol=0)


def test_sincos_of_quarters(device):
    x = torch.linspace(-4, 4, BLOCK, device=device)
    x[:9] = torch.arange(-4, 5)
    sin, cos = call("sincos_of_quarters", x)
    angle = x.double() * (math.pi / 2)
    assert (sin - angle.sin()).abs().max() <= 1.5e-7 and (cos - angle.cos()).abs().max() <= 1.5e-7
    assert sin[:9].abs().tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0] and cos[:9].tolist() == [1, 0, -1, 0, 1, 0, -1, 0, 1]


def test_what_is_no_angle(device):
    x = torch.zeros(BLOCK, device=device)
    x[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30])
    sin, cos = call("sincos", x)
    assert sin.isnan().nonzero().flatten().tolist() == cos.isnan().nonzero().flatten().tolist() == [0, 1, 2]
    assert sin[3].abs() <= 1 and cos[3].abs() <= 1


def test_expm1(device):
    x = torch.cat([torch.linspace(-0.5, 0.5, BLOCK // 2), torch.logspace(-30, -1, BLOCK // 2)]).to(device)
    torch.testing.assert_close(call("expm1", x)[0], x.double().expm1(), rtol=2.5e-7, atol=0)


def test_exp2(device):
    x = torch.linspace(-100, 100, BLOCK, device=device)
    x[:201] = torch.arange(-100, 101)
    for got, rest in zip(call("exp2", x), (0.0, 1e-4), strict=True):
        torch.testing.assert_close(got, (x.double() + rest).exp2(), rtol=1.25e-7, atol=0)

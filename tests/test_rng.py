"""Randomness is a function of (seed, step, rank, purpose) and of nothing else."""

import torch

from soflow_fast import generator


def numbers(*key):
    return torch.randn(4, generator=generator(*key))


def test_same_arguments_same_numbers_whatever_came_before():
    first = numbers(3, 7, 1, "noise")
    torch.manual_seed(99)
    numbers(3, 8, 1, "noise")
    assert torch.equal(first, numbers(3, 7, 1, "noise"))


def test_each_argument_matters():
    keys = [(0, 0, 0, "noise"), (1, 0, 0, "noise"), (0, 1, 0, "noise"), (0, 0, 1, "noise"), (0, 0, 0, "time")]
    keys += [(1, 10, 0, "n"), (11, 0, 0, "n")]
    drawn = [tuple(numbers(*key).tolist()) for key in keys]
    assert len(set(drawn)) == len(keys)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    numbers(0, 0, 0, "noise")
    assert torch.equal(torch.rand(3), wanted)

"""FLOPs, bytes and memory of a step, counted on operations whose figures are known."""

import torch
from torch import nn

from benchmarks.harness import account
from benchmarks.harness.recipes import OURS, build
from tests.benchmarks.tiny import CONFIG


def test_flops_and_bytes_of_a_product():
    a, b = torch.zeros(3, 4), torch.zeros(4, 5)
    assert account.flops(lambda: a @ b) == 2 * 3 * 4 * 5
    assert account.bytes_moved(lambda: a @ b) == 4 * (12 + 20 + 15)
    assert account.bytes_moved(lambda: a.add_(1)) == 4 * (12 + 12)  # read and written
    assert account.bytes_moved(lambda: a.t()[1:].reshape(-1)) == 4 * (9 + 9)  # views are free, a copy is not
    assert account.bytes_moved(lambda: torch.zeros(1, 4).expand(8, 4) + a[:1]) < 4 * 100


def test_what_autograd_keeps():
    """Linear and GELU: the input of each, weights apart; a storage that is kept twice counts once."""
    state = build(OURS, CONFIG)
    x = torch.zeros(4, 16, requires_grad=True)
    layer = nn.Linear(16, 16)
    state.flow.network.extra = layer
    kept = account.kept_for_backward(state, lambda: nn.functional.gelu(layer(x)).sum())
    assert kept == 2 * x.nbytes
    assert account.kept_for_backward(state, lambda: (x * x).sum()) == x.nbytes
    with torch.no_grad():
        assert account.kept_for_backward(state, lambda: nn.functional.gelu(layer(x)).sum()) == 0

"""Sums over tokens: partial sums added up in order, and how tokens are split among programs."""

import pytest
import torch

from soflow_kernels import _reduce, testing


@pytest.mark.parametrize(
    "shape", [(1, 2, 1, 40), (2, 3, 32, 72), (3, 1, 64, 1), (4, 2, 70, 33), (4, 1, 200, 33)], ids=str
)
def test_finish(shape, device):
    """K sums of N partial ones: one tile of rows, several, and a part of one; columns that fill no tile."""
    partials = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    dtypes = [torch.float32, torch.float16, torch.float32, torch.float32][: shape[0]]
    with testing.poisoned():
        sums = _reduce.finish(partials, dtypes)
    for got, dtype, want in zip(sums, dtypes, partials.double().sum(2), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=2e-6 if dtype == torch.float32 else 2e-3, atol=2e-5)


@pytest.mark.parametrize("shape", [(2, 0, 3, 8), (2, 3, 0, 8), (1, 0, 0, 8), (1, 2, 3, 0)], ids=str)
def test_a_sum_of_nothing_is_zero(shape, device):
    with testing.poisoned():
        sums = _reduce.finish(torch.zeros(shape, device=device), [torch.float32] * shape[0])
    for got in sums:
        assert got.shape == (shape[1], shape[3]) and not got.any()


@pytest.mark.parametrize(("groups", "rows"), [(1, 1), (1, 256), (3, 63), (256, 256), (5000, 9), (0, 7), (7, 0)])
def test_split_rows_covers_every_token_once(groups, rows):
    chunks, per_chunk = _reduce.split_rows(groups, rows, 8)
    assert (chunks - 1) * per_chunk < rows <= chunks * per_chunk or rows == chunks == 0
    assert groups * chunks <= max(_reduce.PROGRAMS, groups)

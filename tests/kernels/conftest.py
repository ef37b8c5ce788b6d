"""Kernel tests run compiled on a GPU, and elsewhere under Triton's interpreter, in a process of their own.

Triton decides between the two when it is imported, for the whole process: `pytest tests/kernels` runs them, and a run
of all tests, where the engine has imported triton before, skips them.
"""

import os

import numpy
import pytest
import torch

INTERPRET = not torch.cuda.is_available()
NOT_OURS = (
    "ignore::RuntimeWarning",  # numpy, with which the interpreter computes, on the NaN and infinity that tests feed in
    "ignore:Conversion of an array:DeprecationWarning",  # the interpreter of triton 3.6
    "ignore:.torch.jit.script:DeprecationWarning",  # torch's own forward-mode formulas
)

with pytest.MonkeyPatch.context() as patch:
    if INTERPRET:
        patch.setenv("TRITON_INTERPRET", "1")
    from soflow_kernels import _dispatch, testing


def release(module):
    """(3, 6) of version 3.6.0."""
    return tuple(int(number) for number in module.__version__.split(".")[:2])


if _dispatch.INTERPRETED and release(_dispatch.triton) < (3, 7) and release(numpy) >= (2, 4):
    raise pytest.UsageError(f"triton 3.6 interprets loops with numpy below 2.4 only, numpy {numpy.__version__} is here")

ELSEWHERE = INTERPRET and _dispatch.triton is not None and not _dispatch.INTERPRETED


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(os.path.dirname(__file__)):
            for warning in NOT_OURS:
                item.add_marker(pytest.mark.filterwarnings(warning))
            if ELSEWHERE:
                item.add_marker(pytest.mark.skip(reason="interpreted kernels: pytest tests/kernels"))


@pytest.fixture(autouse=True)
def kernels_on(monkeypatch):
    """The tests of this folder run kernels."""
    if INTERPRET:  # the interpreter imports parts of itself late, and they look at the variable
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    with testing.mode("auto"):
        yield


@pytest.fixture
def device():
    """Where kernels run."""
    if testing.device() is None:
        pytest.skip("triton is not installed")
    return testing.device()

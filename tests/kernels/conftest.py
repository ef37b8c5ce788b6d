"""Kernel tests run compiled on a GPU, and elsewhere under Triton's interpreter.

Triton decides between the two when it is imported, for the whole process. So this file imports it first, interpreted,
and then switches the kernels off again: the engine's tests in the same process take the references on the CPU, and only
the tests of this folder switch the kernels on.
"""

import os

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

if INTERPRET:
    if _dispatch.triton is not None and not _dispatch.INTERPRETED:
        raise pytest.UsageError(
            "soflow_kernels was imported before tests/kernels/conftest.py, so its kernels cannot be interpreted: "
            "name tests/kernels first on the command line"
        )
    _dispatch._mode = "reference"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(os.path.dirname(__file__)):
            for warning in NOT_OURS:
                item.add_marker(pytest.mark.filterwarnings(warning))


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

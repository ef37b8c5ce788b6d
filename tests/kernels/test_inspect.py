"""The ahead-of-time inspection, in processes of its own: this one interprets its kernels."""

import json
import os
import subprocess
import sys

import pytest

from soflow_kernels import inspect, testing

pytestmark = pytest.mark.skipif(testing.triton is None, reason="triton is not installed")
ROOT = os.path.dirname(os.path.dirname(testing.__file__))

PROBLEMS = """
import torch
from soflow_kernels import _dispatch, adaln, inspect

def problem(x, **changed):
    m, stats = torch.zeros(2, 1152, dtype=x.dtype), torch.zeros(2, 16)
    with _dispatch.recording() as launches:
        adaln._backward(x, x, x, x, m, m, None, stats, stats)
    kernel, args, options = launches[0]
    return inspect.inspect_launch("case", (kernel, args, {**options, **changed}), 90)["problem"]

x = torch.zeros(2, 16, 1152, dtype=torch.bfloat16)
print(problem(x), problem(torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)), sep="|", end="|")
print(problem(x, num_warps=1, STAGES=1), problem(x, STAGES=20), sep="|")
"""

REAL = """
import resource
from soflow_kernels import _dispatch, inspect

def resident():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

before, launches = resident(), 0
for module in inspect.MODULES:
    largest = 0
    for case, call in module.inspect_cases():
        with _dispatch.recording() as found:
            call()
        launches += len(found)
        tensors = [a for _, args, _ in found for a in args if hasattr(a, "untyped_storage")]
        largest = max([largest, *(t.untyped_storage().nbytes() for t in tensors)])
    print(module.__name__.removeprefix("soflow_kernels."), largest)
print("launches", launches)
print("touched", resident() - before)
"""

ONES = """
from soflow_kernels import _dispatch, inspect

compiled = set()
for module in inspect.MODULES:
    for _, call in module.inspect_cases():
        with _dispatch.recording() as launches:
            call()
        for kernel, args, options in launches:
            if kernel not in compiled:
                compiled.add(kernel)
                ones = [1 if type(value) is int else value for value in args]
                inspect.compile_launch(kernel, ones, options, 90)
print(len(compiled))
"""


@pytest.fixture
def run(tmp_path):
    def run(*arguments):
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"PYTHONPATH": ROOT, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "COLUMNS": "120"}
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900)

    return run


@pytest.mark.parametrize(
    ("only", "kernel", "programs"),  # the module and the label; how many fit on a multiprocessor at least
    [
        (
            "adaln gate_residual_layernorm_modulate backward and output +bias 65536 x 1152 bfloat16",
            "adaln._backward_kernel",
            {80: 4, 90: 4, 100: 3},
        ),
        ("gelu bias_gelu backward and output 4608 bfloat16", "gelu._backward_kernel", {80: 8, 90: 8, 100: 8}),
    ],
    ids=["adaln", "gelu"],
)
def test_table_and_record(only, kernel, programs, run, tmp_path):
    only = ("--only", only)
    result = run("-m", "soflow_kernels.inspect", "--arch", "80", "90", "100", *only, "--json", "record.json")
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    rows = [row for row in record["kernels"] if row["kernel"] == kernel]
    assert [row["arch"] for row in rows] == [80, 90, 100]
    for row in rows:
        assert row["spill"] == 0 and row["widest"] >= 16 and 32 <= row["registers"] <= 136, row
        assert row["programs/SM"] >= programs[row["arch"]], row
    assert set(record["versions"]) == {"soflow_kernels", "triton", "torch"}
    assert kernel in result.stdout
    assert inspect.summary(record["kernels"]) in result.stdout


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "programs"),
    [
        (90, 1, 168, 0, 12),  # 5376 registers a warp, three of which fit each quarter of 16384
        (90, 8, 228, 32768, 1),  # two warps in each quarter, eight in all
        (90, 8, 128, 0, 2),
        (90, 8, 129, 0, 1),  # given out as 136, of which three warps would fit a quarter, but not four
        (90, 4, 16, 0, 16),  # 64 warps
        (90, 1, 16, 0, 32),  # programs
        (80, 4, 32, 163 * 1024, 1),
        (80, 4, 32, 81 * 1024, 2),
        (90, 4, 32, 81 * 1024, 2),
        (90, 4, 32, 75 * 1024, 3),  # 76 KB each, of 228
        (90, 4, 32, 75 * 1024 + 1, 2),
        (86, 1, 16, 0, 16),
    ],
)
def test_programs_at_once(arch, warps, registers, shared, programs):
    assert inspect.programs_at_once(arch, warps, registers, shared) == programs


def test_cases_are_as_large_as_real_ones_and_nothing_is_touched(run):
    """A batch of 256 with 256 tokens of 1152, in float32, of which no byte is read or written."""
    result = run("-c", REAL)
    found = dict(line.split() for line in result.stdout.splitlines())
    assert result.returncode == 0 and int(found["launches"]) > 250, result.stderr
    for module, width in (("adaln", 1152), ("gated_residual", 1152), ("gelu", 4608)):
        assert int(found[module]) == 4 * 256 * 256 * width, module
    assert int(found["touched"]) < 100  # MB


def test_summary_is_the_worst_of_all_cases():
    row = {"kernel": "a._kernel", "arch": 90, "registers": 40, "programs/SM": 12}
    rows = [row, row | {"registers": 168, "programs/SM": 10}, row | {"arch": 80, "registers": 50, "programs/SM": 9}]
    table = "| kernel | sm_80 | sm_90 |\n| --- | ---: | ---: |\n| a._kernel | 50, 9 | 168, 10 |"
    assert inspect.summary(rows) == table


@pytest.mark.slow  # minutes; `test_table_and_record` looks at one kernel on all three
@pytest.mark.parametrize(
    ("arch", "only"), [("80", ["--only", "bfloat16"]), ("90", []), ("100", ["--only", "bfloat16"])]
)
def test_every_kernel_at_every_shipped_shape(run, arch, only):
    """No spill, no load narrower than its tensor allows, no kernel alone on a multiprocessor without a reason: else
    `inspect` exits with 1. And no reason that is not needed any more. Of two architectures in bfloat16 alone: the
    record has all, and is made anew when a kernel changes."""
    result = run("-m", "soflow_kernels.inspect", "--arch", arch, *only)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    if only:
        assert " adaln._" in result.stdout and " increment.attention._" in result.stdout
        return
    for module in (
        "adaln",
        "adamw",
        "gated_residual",
        "gelu",
        "increment.adaln",
        "increment.attention",
        "increment.gelu",
        "increment.qk_norm",
        "increment.silu",
        "increment.time_embedding",
        "lookahead",
        "losses",
        "qk_norm",
        "time_embedding",
    ):
        assert f" {module}._" in result.stdout
    for (kernel, kind), reason in inspect.ALONE.items():
        assert f"{kernel} is alone on a multiprocessor in {kind}: {reason}" in result.stdout


@pytest.mark.slow
def test_spills_narrow_loads_and_being_alone_are_problems(run):
    result = run("-c", PROBLEMS)
    assert result.stdout == "|narrow loads|spills|one program per multiprocessor\n", result.stderr


@pytest.mark.slow
def test_sizes_of_one_compile(run):
    """A launch turns an argument that is 1 into a constant, on which some of the language is not defined."""
    result = run("-c", ONES)
    assert result.returncode == 0 and int(result.stdout) >= 30, result.stdout + result.stderr


@pytest.mark.slow
def test_failure_is_one_line_and_exit_code_1(run):
    result = run("-m", "soflow_kernels.inspect", "--only", "no such case")
    assert result.returncode == 1
    assert result.stderr == "Failed: no case contains 'no such case'\n"

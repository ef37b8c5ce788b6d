"""Compile every kernel ahead of time, as it is launched at the shipped shapes, and read what came out. Needs no GPU.

    python -m soflow_kernels.inspect --arch 80 90 100 [--only SUBSTRING] [--json FILE]

Each module below names its calls in `inspect_cases`; their launches are recorded and compiled instead of run, and the
tensors, as large as real ones, are never touched. A table shows registers, spilled bytes, shared memory, the programs
that fit on a multiprocessor at once, and the widths of the global loads. Exit code 1 if a kernel

    spills;
    has more loads narrower than 16 bytes than its tensors force: one with fewer than 16 bytes a thread cannot fill one;
    leaves room for one program on a multiprocessor, which then idles while that one waits, unless `ALONE` says why.
"""

import argparse
import collections
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from soflow_kernels import (
    _dispatch,
    adaln,
    adamw,
    gated_residual,
    gelu,
    lookahead,
    losses,
    packed_gradient,
    qk_norm,
    rmsnorm,
    time_embedding,
)
from soflow_kernels.increment import adaln as increment_adaln
from soflow_kernels.increment import attention as increment_attention
from soflow_kernels.increment import gelu as increment_gelu
from soflow_kernels.increment import qk_norm as increment_qk_norm
from soflow_kernels.increment import silu as increment_silu
from soflow_kernels.increment import time_embedding as increment_time_embedding
from soflow_kernels.version import __version__

MODULES = (
    adaln,
    adamw,
    gated_residual,
    gelu,
    increment_adaln,
    increment_attention,
    increment_gelu,
    increment_qk_norm,
    increment_silu,
    increment_time_embedding,
    lookahead,
    losses,
    packed_gradient,
    qk_norm,
    rmsnorm,
    time_embedding,
)
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
Launch = tuple[Any, Sequence[Any], dict[str, Any]]
"""A kernel, its arguments and its options."""
COLUMNS = (
    "case", "kernel", "arch", "warps", "registers", "spill", "shared", "programs/SM", "widest", "narrowest", "problem",
)  # fmt: skip
REGISTERS = 65536
"""Of 32 bits, on a multiprocessor of any architecture below; a quarter of them belongs to each of its four parts."""
ALONE = {
    (
        "increment.attention._kernel",
        "float32",
    ): "two accumulators and the operands of six products, which no tensor core "
    "takes, fill the registers of 8 or 16 warps, which hide each other's waits",
}
"""{(kernel, what its case ends with): why one program on a multiprocessor is enough for it}."""


class Multiprocessor(NamedTuple):
    """What the programs on a multiprocessor share (CUDA C++ Programming Guide, "Compute Capabilities")."""

    warps: int
    programs: int
    shared: int
    """Bytes; each program takes 1024 for the system besides its own."""


MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164 * 1024),
    86: Multiprocessor(48, 16, 100 * 1024),
    89: Multiprocessor(48, 24, 100 * 1024),
    90: Multiprocessor(64, 32, 228 * 1024),
    100: Multiprocessor(64, 32, 228 * 1024),
    120: Multiprocessor(48, 24, 100 * 1024),
}
"""By compute capability."""


class Failed(Exception):
    """The inspection cannot run, or found a problem."""


def specialise(kernel: Any, args: Sequence[Any], options: dict[str, Any]) -> tuple[dict, dict, dict, dict]:
    """(signature, constants, attributes, settings) of a recorded launch, as a launch makes them: the compiler knows
    integers that are 1, tensors that are not given, and which integers and addresses are multiples of 16."""
    settings = {name: options[name] for name in ("num_warps", "num_stages", "maxnreg") if name in options}
    constants = {name: value for name, value in options.items() if name not in settings}
    signature, attributes = {}, {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, [*args, *constants.values()], strict=True)):
        tensor = isinstance(value, torch.Tensor)
        if name not in constants and (value is None or (isinstance(value, int) and value == 1)):
            constants[name] = value
        if value is None or name in constants:
            signature[name] = "constexpr"
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = POINTERS[value.dtype] if tensor else "i32" if abs(value) < 2**31 else "i64"
            if (value.data_ptr() if tensor else value) % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes, settings


def compile_launch(kernel: Any, args: Sequence[Any], options: dict[str, Any], arch: int) -> Any:
    """The compiled kernel of a recorded launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes, settings = specialise(kernel, args, options)
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=settings)


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, spilled bytes a thread), from the machine code's own record."""
    import triton

    cuobjdump = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(cubin)
        text = subprocess.run([cuobjdump, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise Failed(f"cuobjdump printed no resource usage: {text!r}")
    # No kernel here has an array of its own, so what lies on the stack was spilled.
    return int(found[1]), int(found[2])


def programs_at_once(arch: int, warps: int, registers: int, shared: int) -> int:
    """How many programs of a kernel a multiprocessor holds: the least of what registers, shared memory, warps and the
    number of programs allow. A warp takes registers from one of four parts, in steps of 8 a thread; shared memory is
    given out in steps of 128 bytes."""
    limit = MULTIPROCESSORS[arch]
    by_registers = 4 * (REGISTERS // 4 // (32 * _up(max(registers, 1), 8))) // warps
    return min(by_registers, limit.shared // (_up(shared, 128) + 1024), limit.warps // warps, limit.programs)


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def load_widths(ptx: str) -> collections.Counter[int]:
    """{bytes: number of load instructions}, asynchronous copies included."""
    widths = collections.Counter()
    for vector, bits in re.findall(r"\bld\.global(?:\.L\w+::\w+|\.nc|\.relaxed|\.gpu)*(?:\.v(\d))?\.[bfsu](\d+)", ptx):
        widths[int(vector or 1) * int(bits) // 8] += 1
    for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\], (0x[0-9a-f]+|\d+)", ptx):
        widths[int(size, 0)] += 1
    return widths


def forced_narrow(ttgir: str, warps: int) -> int:
    """How many loads narrower than 16 bytes the shapes of the loaded tensors make unavoidable."""
    sizes = {"bf16": 2, "f16": 2, "f32": 4, "f64": 8, "i32": 4, "i64": 8, "i8": 1, "u8": 1, "i1": 1}
    count = 0
    for line in ttgir.splitlines():
        if "tt.load" not in line and "async_copy_global_to_local" not in line:
            continue
        shape, dtype = re.findall(r"(?:tensor<([\dx]+)x)?!tt\.ptr<(\w+)>", line)[0]
        elements = math.prod(int(n) for n in shape.split("x")) if shape else 1
        if max(1, elements // (32 * warps)) * sizes[dtype] < 16:
            count += 1
    return count


def inspect_launch(case: str, launch: Launch, arch: int) -> dict[str, Any]:
    """One row of the table."""
    kernel, args, options = launch
    compiled = compile_launch(kernel, args, options, arch)
    warps = compiled.metadata.num_warps
    registers, spill = resources(compiled.asm["cubin"])
    widths = load_widths(compiled.asm["ptx"])
    narrow = sum(n for width, n in widths.items() if width < 16)
    problems = []
    if spill:
        problems.append("spills")
    if narrow > forced_narrow(compiled.asm["ttgir"], warps):
        problems.append("narrow loads")
    name = f"{kernel.fn.__module__.removeprefix('soflow_kernels.')}.{kernel.fn.__name__}"
    shared = compiled.metadata.shared
    programs = programs_at_once(arch, warps, registers, shared)
    if programs < 2 and not any(name == kernel and case.endswith(kind) for kernel, kind in ALONE):
        problems.append("one program per multiprocessor")
    row = (case, name, arch, warps, registers, spill, shared, programs, max(widths), min(widths), ", ".join(problems))
    return dict(zip(COLUMNS, row, strict=True))


def inspect_all(arches: Iterable[int], only: str = "") -> Iterator[dict[str, Any]]:
    """The rows for cases whose module or label contains `only`; launches that compile to the same code come once."""
    if _dispatch.triton is None:
        raise Failed("triton is not installed")
    if _dispatch.INTERPRETED:
        raise Failed("TRITON_INTERPRET is set: kernels are interpreted, not compiled, in this process")
    seen = set()
    for module in MODULES:
        for case, call in module.inspect_cases():
            if only not in f"{module.__name__.rpartition('.')[2]} {case}":
                continue
            with _dispatch.recording() as launches:
                call()
            for launch in launches:
                key = (launch[0].fn.__module__, launch[0].fn.__name__, str(specialise(*launch)))
                if key not in seen:
                    seen.add(key)
                    yield from (inspect_launch(case, launch, arch) for arch in arches)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table with a line for each kernel: over all its cases the most registers a thread and the fewest
    programs on a multiprocessor, on each architecture."""
    arches = sorted({row["arch"] for row in rows})
    lines = [f"| kernel | {' | '.join(f'sm_{arch}' for arch in arches)} |", f"| --- |{' ---: |' * len(arches)}"]
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        cells = []
        for arch in arches:
            mine = [row for row in rows if (row["kernel"], row["arch"]) == (kernel, arch)]
            most, fewest = max(row["registers"] for row in mine), min(row["programs/SM"] for row in mine)
            cells.append(f"{most}, {fewest}")
        lines.append(f"| {kernel} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    what = "Compile every kernel ahead of time and read what came out. Needs no GPU."
    parser = argparse.ArgumentParser(prog="python -m soflow_kernels.inspect", description=what)
    default = [80, 90, 100]
    parser.add_argument(
        "--arch", type=int, nargs="+", default=default, choices=MULTIPROCESSORS, help="compute capabilities (80 90 100)"
    )
    parser.add_argument(
        "--only", default="", metavar="SUBSTRING", help="only cases whose module or label contains this"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the table there")
    options = parser.parse_args(argv)
    # The reason alone, without the path through this file: an uncaught exception is exit code 1.
    sys.tracebacklimit = 0
    line = "{:<64} {:<24} {:>4} {:>5} {:>9} {:>5} {:>6} {:>11} {:>6} {:>9}  {}"
    print(line.format(*COLUMNS))
    rows = []
    for row in inspect_all(options.arch, options.only):
        print(line.format(*row.values()), flush=True)
        rows.append(row)
    if options.json:
        versions = {"soflow_kernels": __version__, "triton": _dispatch.triton.__version__, "torch": torch.__version__}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"versions": versions, "kernels": rows}, file, indent=1)
    if not rows:
        raise Failed(f"no case contains {options.only!r}")
    print(f"\nMost registers a thread, fewest programs on a multiprocessor:\n\n{summary(rows)}\n")
    alone = {row["kernel"] for row in rows if row["programs/SM"] < 2}
    for (kernel, kind), reason in ALONE.items():
        if kernel in alone:
            print(f"{kernel} is alone on a multiprocessor in {kind}: {reason}")
    bad = [row for row in rows if row["problem"]]
    if bad:
        print("Problems:", *(line.format(*row.values()) for row in bad), sep="\n")
        raise Failed(f"{len(bad)} of {len(rows)} kernels have a problem")
    print(f"{len(rows)} kernels, no spill, no load narrower than its tensor allows, programs enough to hide a wait")


if __name__ == "__main__":
    main()

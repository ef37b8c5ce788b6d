"""The benchmarks of operations and sweeps, and everything for a GPU in one command, all tiny."""

import sys
from dataclasses import replace

import pytest
import torch

import soflow_kernels
from benchmarks import bandwidth, gpu, kernels, norms, operations, record, report, sweeps, tables
from benchmarks.gates import RedGate
from benchmarks.operations import Sizes

CPU = torch.device("cpu")
TINY = Sizes(samples=4, tokens=4, width=16, heads=2, blocks=1)
OPERATIONS = {op.name: op for op in operations.operations(CPU)}
CASES = [(op, backward) for op in OPERATIONS.values() for backward in (False, True) if op.trains or not backward]


def test_every_operation_takes_part():
    assert {name.split(",")[0] for name in OPERATIONS} == set(soflow_kernels.OPERATIONS)


@pytest.mark.parametrize(
    ("operation", "backward"), CASES, ids=[f"{op.name}{' backward' * backward}" for op, backward in CASES]
)
def test_ways_are_timed_in_turn(operation, backward):
    race = kernels.KernelRace(operation, backward, TINY, CPU)
    for _ in range(race.rounds(0.0)):
        race.run()
    rows = {row["way"]: row for row in race.rows}
    assert len(rows[kernels.OURS]["seconds"]) == len(rows[kernels.EAGER]["seconds"]) == 7
    assert rows[kernels.OURS]["runs"].startswith("reference: ")
    assert rows[kernels.COMPILED]["why_not"] and not rows[kernels.COMPILED]["seconds"]
    assert all(row["why_not"] for row in race.rows if row["way"] in operation.others)
    gradients = [name.removeprefix("gradient of ").split("[")[0] for name in race.errors if "gradient" in name]
    assert tuple(dict.fromkeys(gradients)) == operation.trains * backward


def off(operation):
    """The operation with its first result, or what it writes to first, 1 % off in one element of every sixteen."""

    def bend(tensor):
        bent = torch.ones(tensor.numel(), dtype=tensor.dtype)
        bent[::16] = 1.01
        return tensor * bent.view(tensor.shape)

    def wrong(**inputs):
        outputs = operation.ours(**inputs)
        if operation.writes:
            first = inputs[operation.writes[0]][0]
            first.copy_(bend(first))
            return outputs
        return (bend(outputs[0]), *outputs[1:]) if isinstance(outputs, tuple) else bend(outputs)

    return replace(operation, ours=wrong)


@pytest.mark.parametrize("name", OPERATIONS)
def test_gate_is_red_for_a_tampered_kernel(name):
    with pytest.raises(RedGate, match=f"{name} against float64"):
        kernels.KernelRace(off(OPERATIONS[name]), False, TINY, CPU)


@pytest.mark.parametrize("name", [name for name, op in OPERATIONS.items() if op.trains])
def test_gate_is_red_for_a_tampered_backward(name):
    """A gradient twice as large, behind a result that is right."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    operation = OPERATIONS[name]
    first = operation.trains[0]

    def wrong(**inputs):
        twice = (Twice.apply(inputs[first][0]), *inputs[first][1:]) if isinstance(inputs[first], tuple) else None
        return operation.ours(**inputs | {first: Twice.apply(inputs[first]) if twice is None else twice})

    kernels.KernelRace(replace(operation, ours=wrong), False, TINY, CPU)
    with pytest.raises(RedGate, match=f"gradient of {first}"):
        kernels.KernelRace(replace(operation, ours=wrong), True, TINY, CPU)


def test_gate_is_red_for_a_kernel_that_leaves_nan():
    def wrong(x):
        out = soflow_kernels.silu_increment(x)
        out[1, 0, 0, 0] = torch.nan
        return out

    with pytest.raises(RedGate, match=r"increment of output 0: relative error nan.*worst row: relative error nan"):
        kernels.KernelRace(replace(OPERATIONS["silu_increment"], ours=wrong), False, TINY, CPU)


def test_another_way_that_is_wrong_or_raises_is_not_timed():
    def raises(**inputs):
        raise RuntimeError("no such\ndevice")

    operation = OPERATIONS["layernorm_modulate"]
    others = {"wrong": lambda x, shift, scale: 0 * x, "raises": raises, "absent": "it is not installed"}
    race = kernels.KernelRace(replace(operation, others=others), False, TINY, CPU)
    why = {row["way"]: row["why_not"] for row in race.rows}
    assert why["wrong"].startswith("wrong against float64: output 0: relative error 1.0e+00 above ")
    assert (why["raises"], why["absent"]) == ("RuntimeError: no such device", "it is not installed")
    assert set(race.steps) == {kernels.OURS, kernels.EAGER}


def test_norms_of_others_are_raced_with_the_same_formula(monkeypatch):
    """Stand-ins with the signatures that the packages have; on a GPU the gate sees the packages themselves."""

    def affine(x, weight, bias, eps):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)

    class Packages:
        liger_layer_norm = staticmethod(affine)
        layer_norm_fn = staticmethod(lambda x, weight, bias, residual=None, eps=1e-6: affine(x, weight, bias, eps))
        fused_layer_norm = staticmethod(lambda x, shape, eps: torch.nn.functional.layer_norm(x, shape, eps=eps))

    monkeypatch.setattr(norms.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(norms.importlib, "import_module", lambda name: Packages)
    assert set(norms.norms(CPU).values()) == {f"{n} needs a GPU" for n in ("liger-kernel", "apex", "flash-attn")}
    raced = [op for op in operations.operations(torch.device("cuda")) if op.others]
    assert len(raced) == 2
    for operation in raced:
        for dtype in (torch.float32, torch.bfloat16):
            race = kernels.KernelRace(operation, True, TINY, CPU, dtype)
            assert set(race.steps) == {kernels.OURS, kernels.EAGER, "Liger", "apex", "flash-attn"}

    def fail(name):
        raise ImportError("built for\nanother torch")

    monkeypatch.setattr(norms.importlib, "import_module", fail)
    why = norms.norms(torch.device("cuda"))["apex"]
    assert why == "apex cannot be imported: built for another torch"


def test_weights_of_a_norm_are_made_once_for_a_width_and_dtype():
    given: list[tuple[torch.Tensor, torch.Tensor]] = []
    norm = norms._affine(lambda x, weight, bias: given.append((weight, bias)) or x)
    for dtype in (torch.float32, torch.float32, torch.bfloat16):
        norm(torch.zeros(2, 3, dtype=dtype))
    assert all(a is b for a, b in zip(given[0], given[1], strict=True)) and given[2][0].dtype == torch.bfloat16
    assert given[0][0].tolist() == [1.0] * 3 and given[0][1].tolist() == [0.0] * 3


def test_bytes_are_those_of_the_docstrings():
    shipped, half, single = operations.SHIPPED, torch.bfloat16, torch.float32
    stream = 65_536 * 1152 * 2  # "S is 151 MB"
    assert round(stream / 1e6) == 151
    found = OPERATIONS["gate_residual_layernorm_modulate"]
    assert (found.traffic(shipped, half, False), found.traffic(shipped, half, True)) == (4 * stream, 10 * stream)
    assert OPERATIONS["bias_gelu"].traffic(shipped, half, False) == 2 * 4 * stream
    assert OPERATIONS["layernorm_modulate_increment"].traffic(shipped, half, False) == 2 * stream // 2
    assert OPERATIONS["consistency_loss"].traffic(shipped, single, True) == 6 * 256 * 4 * 32 * 32 * 4
    for name, bytes_of_gradient, copies in (("adamw_ema", 4, 0), ("adamw_ema, bfloat16 gradients and copies", 2, 4)):
        inputs = OPERATIONS[name].inputs(TINY, CPU, single)
        count = sum(p.numel() for p in inputs["params"])
        assert inputs["grads"][0].itemsize == bytes_of_gradient
        wanted = count * (3 * 8 + 8 + bytes_of_gradient + copies)
        assert OPERATIONS[name].traffic(TINY, single, False) == wanted
    assert OPERATIONS["linear_gelu"].traffic(shipped, half, True) is None


@pytest.fixture
def kernel_rows():
    rows = [bandwidth.copy(CPU, rounds=3, size=4096)]
    race = kernels.KernelRace(OPERATIONS["layernorm_modulate"], True, TINY, CPU)
    for _ in range(race.rounds(0.0)):
        race.run()
    return rows + race.rows


def test_kernel_table(kernel_rows, tmp_path):
    copy, *rows = kernel_rows
    assert copy["bytes"] == 8192 and len(copy["seconds"]) == 3
    text = tables.kernel_table(kernel_rows)
    assert "| layernorm_modulate, forward + backward: 4 x 4 x 16, float32 | soflow_kernels (reference: " in text
    assert "torch.compile" in text and "not installed" in text and "%" not in text

    # As if on a GPU, where 5 S in as many seconds as a copy of the same bytes took is its whole bandwidth.
    for row in rows:
        row["runs"] = "kernel" if row["way"] == kernels.OURS else None
        row["seconds"] = [5 * 4 * 4 * 16 * 4 / 8192] * 7
    copy["seconds"] = [1.0]
    assert "| 0.005120 | 100% |" in tables.kernel_table(kernel_rows)

    record.write(kernel_rows, "pytest benchmarks/test_kernels.py --record", tmp_path, "kernels")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "kernels.md"
    page.write_text("<!-- benchmark:kernels -->\n<!-- /benchmark:kernels -->\n")
    assert report.main([], tmp_path, tmp_path) == 0 and "A copy moves" in page.read_text()


@pytest.fixture(scope="module")
def sweep_rows():
    config = sweeps.network("cpu", batch=4, hidden=16, depth=1, heads=2, side=4)
    points = sweeps.Sweep(config, (4, 8), (1, 4), (1, 2)).points()
    for config in {point.config.model: point.config for point in points}.values():
        sweeps.check(config)
    return [row for point in points for row in sweeps.measure(point, 0.0)]


def test_sweeps_change_one_number_at_a_time(sweep_rows):
    ours = [row for row in sweep_rows if row["recipe"] == sweeps.OURS.name]
    assert len(sweep_rows) == 2 * len(ours) and all(len(row["seconds"]) == 3 for row in sweep_rows)
    cases = [row["case"].removeprefix("sweep: ") for row in ours]
    assert cases == [
        "hidden 16, depth 1, 4 tokens, batch 4",
        "hidden 16, depth 1, 4 tokens, batch 8",
        "hidden 16, depth 1, 1 tokens, batch 4",
        "hidden 16, depth 1, 4 tokens, batch 4",
        "hidden 16, depth 1, 4 tokens, batch 4",
        "hidden 16, depth 2, 4 tokens, batch 4",
    ]
    with pytest.raises(AssertionError, match="squares"):
        sweeps.Sweep(sweeps.sweep().config, (), (3,), ()).points()


def test_points_come_in_order_of_worth():
    config = sweeps.network("cpu", batch=4, hidden=16, depth=1, heads=2, side=4)
    points = sweeps.in_order_of_worth(sweeps.Sweep(config, (4, 8, 16), (1,), (1, 2)).points())
    assert [(point.axis, point.value) for point in points] == [
        *(("batch", 4), ("batch", 8), ("tokens", 1), ("depth", 1), ("depth", 2), ("batch", 16))
    ]


@pytest.mark.parametrize("within", [None, "0"])
def test_sweeps_end_when_time_is_up(within, tmp_path, monkeypatch, capsys):
    config = sweeps.network("cpu", batch=4, hidden=16, depth=1, heads=2, side=4)
    monkeypatch.setattr(sweeps, "sweep", lambda: sweeps.Sweep(config, (4, 8, 16), (1,), ()))
    monkeypatch.setattr(sweeps.record, "write", lambda rows, *_, **__: written.append(rows) or tmp_path)
    monkeypatch.setattr(sweeps.record, "RECORDS", tmp_path)
    written: list[list[dict]] = []
    sweeps.main(["--seconds", "0", *([f"--within={within}"] if within else [])])
    points = [(row["axis"], row["value"]) for row in written[-1]][::2]
    assert points == ([("batch", 4), ("batch", 8), ("batch", 16), ("tokens", 1)] if within is None else [("batch", 4)])
    assert ("time is up: batch 8" in capsys.readouterr().out) == (within is not None)


def test_shipped_sweeps_can_be_built():
    points = sweeps.sweep().points()
    assert {point.axis for point in points} == set(tables.AXES)
    for point in points:
        tokens = (point.config.model.input_size // point.config.model.patch_size) ** 2
        wanted = {"batch": point.config.batch_size, "tokens": tokens, "depth": point.config.model.depth}
        assert wanted[point.axis] == point.value


def test_resident_peak_sees_what_came_and_went():
    rose = sweeps.resident_peak()
    if rose is None:
        pytest.skip("the peak of resident memory cannot be read here")
    size = 2**26
    held = torch.ones(size, dtype=torch.uint8)
    del held
    # A page here and there may have been resident before, or is the interpreter's own.
    assert 0.9 * size < rose() < 1.5 * size


def test_out_of_memory_is_a_row(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("none left")

    point = sweeps.Sweep(sweeps.network("cpu", 4, 16, 1, 2, 4), (4,), (), ()).points()[0]
    monkeypatch.setattr(sweeps, "memory", fail)
    rows = sweeps.measure(point, 0.0)
    assert [(row["why_not"], row["seconds"]) for row in rows] == [("out of memory", [])] * 2
    assert tables.sweep_table(rows).count("out of memory") == 2


def test_sweep_page_and_plot(sweep_rows, tmp_path):
    record.write(sweep_rows, "python -m benchmarks.sweeps", tmp_path, "sweeps")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "performance.md"
    page.write_text("<!-- benchmark:sweeps -->\n<!-- /benchmark:sweeps -->\n")
    report.main([], tmp_path, tmp_path)
    text = page.read_text()
    assert "| 8 images in a batch | soflow-fast, fp32 |" in text and text.count("authors' recipe, fp32") == 6
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    base = "The network in the middle: hidden 16, depth 1, 4 tokens, batch 4; the parts change its"
    assert f"{base} batch, tokens and depth." in text

    pytest.importorskip("matplotlib")
    plot = (tmp_path / "docs" / "sweeps.svg").read_bytes()
    assert b"<svg" in plot[:500]
    assert report.main([], tmp_path, tmp_path) == 0 and (tmp_path / "docs" / "sweeps.svg").read_bytes() == plot


def test_the_base_of_a_sweep_is_read_off_its_rows(sweep_rows):
    batches = [row for row in sweep_rows if row["axis"] == "batch"]
    wanted = "The network in the middle: hidden 16, depth 1, 4 tokens; the parts change its batch."
    assert tables.sweep_base(batches) == wanted
    other = [row | {"case": row["case"].replace("batch 4", "batch 64")} for row in sweep_rows if row["axis"] == "depth"]
    rest = [row for row in sweep_rows if row["axis"] == "tokens"]
    wanted = "The parts: tokens at hidden 16, depth 1, batch 4; depth at hidden 16, 4 tokens, batch 64."
    assert tables.sweep_base(rest + other) == wanted


def part(name: str, code: str, share: float = 1.0) -> gpu.Part:
    return gpu.Part(name, share, [sys.executable, "-c", code])


def test_parts_that_fail_or_hang_are_named_and_stop_nothing(tmp_path, capfd, monkeypatch):
    within = "import sys; assert 10 < float(sys.argv[1]) < 60; print('within')"
    leave = "import os, pathlib; pathlib.Path(os.environ['SOFLOW_RECORDS'], '{}.json').write_text('1'); print('{}')"
    hang = (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).wait()"
    )
    todo = [
        part("good", leave.format("first", "shown"), 50),
        part("bad", "import sys; sys.exit(3)", 50),
        part("slow", hang, 2),
        gpu.Part("absent", 50, [str(tmp_path / "no such command")]),
        gpu.Part("timed", 50, [sys.executable, "-c", within, gpu.WITHIN]),
        part("last", leave.format("second", "shown too"), 50),
    ]
    (tmp_path / "old.json").write_text("0")
    monkeypatch.setattr(gpu, "TRIAL", tmp_path)
    monkeypatch.setattr(gpu, "parts", lambda minutes, cpu: todo)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--allow-cpu", "--minutes", "2"]) == 1
    out = capfd.readouterr().out
    assert "shown\n" in out and "within\n" in out and "shown too\n" in out
    end = out[out.index("== not done:") :].splitlines()
    assert end[1] == "   bad: exit code 3" and end[2].startswith("   slow: ran out of time after ")
    assert end[3] == "   absent: could not be started: No such file or directory"
    assert end[4:] == ["== records:", f"   {tmp_path}/first.json", f"   {tmp_path}/second.json"]


def test_no_time_left_is_said(tmp_path, capfd):
    assert gpu.run_all([part("late", "print('ran')")], 0.0, tmp_path) == 1
    out = capfd.readouterr().out
    assert "late: no time was left" in out and "== no records" in out and "ran\n" not in out


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    out, err = capsys.readouterr()
    assert not out and err == "benchmarks.gpu: no GPU here (--allow-cpu tries it all small)\n"
    with pytest.raises(SystemExit) as wrong:
        gpu.main(["--minutes", "0"])
    assert wrong.value.code == 2 and "--minutes must be above 0" in capsys.readouterr().err


@pytest.mark.parametrize("cpu", [False, True])
def test_parts_name_what_is_there(cpu):
    for each in gpu.parts(10, cpu):
        assert each.share > 0 and each.command[0] == sys.executable
        for word in each.command:
            if word.startswith(("benchmarks/", "tests")):
                assert (record.ROOT / word).exists()
            if word.startswith(("benchmarks.", "soflow_fast.")):
                assert (record.ROOT / f"{word.replace('.', '/')}.py").exists()

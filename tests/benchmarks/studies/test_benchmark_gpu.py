"""Everything for a GPU in one command: parts that fail, hang or are stopped early."""

import os
import signal
import subprocess
import sys

import pytest

from benchmarks.report import record
from benchmarks.studies import gpu

HANGING = """
import pathlib, sys, time
from benchmarks.studies import gpu
gpu.TRIAL = pathlib.Path(sys.argv[1])
part = (
    "import os, pathlib, time; folder = pathlib.Path(os.environ['SOFLOW_RECORDS']);"
    "(folder / 'first.json').write_text('1'); print('part', os.getpid(), flush=True); time.sleep(600)"
)
gpu.parts = lambda minutes, cpu: [gpu.Part("hangs", 1, [sys.executable, "-c", part]), gpu.Part("next", 1, ["never"])]
sys.exit(gpu.main(["--allow-cpu"]))
"""


@pytest.mark.parametrize("signum", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT])
def test_stopped_early_it_names_the_records_and_leaves_no_process(signum, environment, tmp_path):
    command = [sys.executable, "-c", HANGING, str(tmp_path)]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts what is to run in its background
    try:
        process = subprocess.Popen(command, env=environment, cwd=record.ROOT, stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stdout
    pid = next(line for line in process.stdout if line.startswith("part ")).split()[1]
    process.send_signal(signum)
    out, _ = process.communicate()
    assert process.returncode == 1
    end = out[out.index("== not done:") :].splitlines()
    assert end[:2] == ["== not done:", "   stopped before its end"]
    assert end[-2:] == ["== records:", f"   {tmp_path}/first.json"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf", "x"])
def test_wrong_minutes(minutes, capsys):
    with pytest.raises(SystemExit) as wrong:
        gpu.main(["--minutes", minutes])
    assert wrong.value.code == 2 and "--minutes" in capsys.readouterr().err


def test_an_hour_is_for_every_recipe_and_the_largest_batches():
    few, all_of_them = ([word for part in gpu.parts(minutes) for word in part.command] for minutes in (10, 60))
    assert "--every" not in few and "--every" in all_of_them and "test_largest_batch" not in few
    assert "test_largest_batch" in all_of_them


def test_ten_minutes_are_for_the_step_after_the_tests_of_what_it_runs():
    parts = gpu.parts(10)
    names = [part.name for part in parts]
    assert names[:4] == ["environment", "kernels' tests", "the step", "operations"]
    assert sum(part.share for part in parts) == 600 and max(parts, key=lambda part: part.share).name == "the step"
    kernels = parts[1].command
    assert "tests/kernels" in kernels and "--taking=device" in kernels and "gpu" not in kernels


LEFT = """
import json, os, pathlib
run = {"benchmark": "step", "date": "2026-11-21", "command": "c", "device": "d", "versions": {}, "unfinished": True}
run |= {"missing": ["DiT-B/2: soflow-fast"], "rows": [{"case": "c"}]}
pathlib.Path(os.environ["SOFLOW_RECORDS"], "step.json").write_text(json.dumps(run))
"""


def test_the_plan_is_said_first_and_what_is_left_out_last(tmp_path, capfd):
    assert gpu.run_all([part("one", LEFT, 1), part("two", "print('ran')", 3)], 60.0, tmp_path) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("== plan of 1 minutes, in seconds") and lines[1:3] == ["   one: 15", "   two: 45"]
    end = lines[lines.index("== done") :]
    assert end == [
        "== done",
        "== left out:",
        "   step: DiT-B/2: soflow-fast",
        "== records:",
        f"   {tmp_path}/step.json",
    ]


def test_tests_run_beside_each_other_where_they_can(monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name)
    assert gpu.beside_each_other(4) == [] and gpu.beside_each_other(16)[:2] == ["-n", "12"]
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu.beside_each_other(16) == []


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
    assert end[-3:] == ["== records:", f"   {tmp_path}/first.json", f"   {tmp_path}/second.json"]


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

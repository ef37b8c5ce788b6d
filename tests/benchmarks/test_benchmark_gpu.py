"""What the owner of a GPU runs, when it is stopped early."""

import os
import signal
import subprocess
import sys

import pytest

from benchmarks import gpu, record

HANGING = """
import pathlib, sys, time
from benchmarks import gpu
gpu.TRIAL = pathlib.Path(sys.argv[1])
part = (
    "import os, pathlib, time; folder = pathlib.Path(os.environ['SOFLOW_RECORDS']);"
    "(folder / 'first.json').write_text('1'); print('part', os.getpid(), flush=True); time.sleep(600)"
)
gpu.parts = lambda minutes, cpu: [gpu.Part("hangs", 1, [sys.executable, "-c", part]), gpu.Part("next", 1, ["never"])]
sys.exit(gpu.main(["--allow-cpu"]))
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
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
    assert end == ["== not done:", "   stopped before its end", "== records:", f"   {tmp_path}/first.json"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf", "x"])
def test_wrong_minutes(minutes, capsys):
    with pytest.raises(SystemExit) as wrong:
        gpu.main(["--minutes", minutes])
    assert wrong.value.code == 2 and "--minutes" in capsys.readouterr().err


def test_an_hour_is_for_every_recipe():
    few, all_of_them = ([word for part in gpu.parts(minutes) for word in part.command] for minutes in (10, 60))
    assert "--headline" in few and "--headline" not in all_of_them

"""AdamWEMA on a model that `fully_shard` has cut over two processes, each with Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import soflow_kernels


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_a_sharded_step_is_the_whole_one(tmp_path):
    path = os.path.dirname(os.path.dirname(soflow_kernels.__file__))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("sharded_step.py"))]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting")], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors

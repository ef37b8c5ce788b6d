"""The same seed three times is the same state, to the bit; no kernel adds with atomics, in no fixed order."""

import ast
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import soflow_kernels
from soflow_fast import TrainState, preset, train_step
from soflow_fast.data import open_source
from soflow_fast.runs import checkpoint

SMALL = {"model.hidden_size": 16, "model.depth": 2, "model.num_heads": 2, "batch_size": 16, "device": "cpu"}


def state_hash(seed: int) -> str:
    state = TrainState.build(preset("digits", seed=seed, teacher="ema", **SMALL))
    assert state.teacher
    source = open_source(state.config)
    for _ in range(10):
        train_step(state, *source.batch(state.step))
    moments = [value for entry in state.optimizer.state.values() for value in entry.values()]
    flows = (state.flow, state.ema, state.teacher)
    digest = hashlib.sha256()
    for value in (*(v for flow in flows for v in flow.state_dict().values()), *moments):
        digest.update(value.detach().numpy().tobytes())
    return digest.hexdigest()


def test_three_runs_have_one_hash_and_another_seed_has_another() -> None:
    assert len({state_hash(0) for _ in range(3)}) == 1
    assert state_hash(1) != state_hash(0)


def test_three_processes_write_the_same_checkpoints(
    started: Any, environment: dict[str, str], tiny: list[str], tmp_path: Path, files: Any
) -> None:
    """One of them hashes differently, and so has other orders of its sets."""
    arguments = [*tiny, "--teacher", "ema", "--steps", "6", "--checkpoint-every", "3", "--run-dir"]
    program = (
        "from soflow_fast import train; from soflow_fast.runs import trainer; import sys; "
        "trainer.evaluate = lambda *given: {}; train.main(sys.argv[1:])"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, *arguments, str(tmp_path / "2")],
        env={**environment, "PYTHONHASHSEED": "7"},
        stdout=subprocess.DEVNULL,
    )
    assert [started(*arguments, tmp_path / str(k)).wait() for k in range(2)] == [0, 0]
    assert other.wait() == 0
    hashes = set()
    for k in range(3):
        found = files(checkpoint.directory(tmp_path / str(k)))
        assert len(found) == 16
        tensors = [found[name] for name in sorted(found) if name.endswith(".safetensors")]
        hashes.add(hashlib.sha256(b"".join(tensors)).hexdigest())
    assert len(hashes) == 1


def atomics(text: str) -> list[str]:
    names = [node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)]
    return [name for name in names if name.startswith("atomic")]


def test_no_kernel_has_atomics() -> None:
    assert atomics("tl.atomic_add(p, x)") == ["atomic_add"]
    files = list(Path(soflow_kernels.__file__).parent.rglob("*.py"))
    assert len(files) > 10
    assert {file.name: atomics(file.read_text()) for file in files if atomics(file.read_text())} == {}

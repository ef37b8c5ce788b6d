"""The code in kernels/README.md runs, block after block, as a reader would type it."""

import re
from pathlib import Path

import soflow_kernels

README = Path(soflow_kernels.__file__).parent.parent / "README.md"


def test_every_block_of_code_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 9
    names = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, "kernels/README.md", "exec"), names)
    x, x2 = names["x"], names["x2"]
    assert names["h"].shape == x.shape and names["c"].shape == (2, 64)
    assert (names["inner"] - names["same"]).abs().max() < 1e-4
    assert (x2 - soflow_kernels.gate_residual_reference(x, names["y"], names["gate"])).abs().max() < 1e-5
    out = capsys.readouterr().out
    assert all(name in out for name in soflow_kernels.status())


def test_every_operation_is_in_the_table():
    text = README.read_text(encoding="utf-8")
    for name in soflow_kernels.status():
        assert f"| `{name}(" in text, name

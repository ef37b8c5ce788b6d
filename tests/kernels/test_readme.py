"""The code in kernels/README.md runs, block after block, as a reader would type it."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import soflow_kernels
from soflow_kernels import testing

README = Path(soflow_kernels.__file__).parent.parent / "README.md"


@pytest.mark.parametrize("mode", [pytest.param("auto", marks=pytest.mark.slow), "reference"])
def test_every_block_of_code_runs(mode, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 10
    names = {"__name__": "readme"}
    with testing.mode(mode):
        for block in blocks:
            exec(compile(block, "kernels/README.md", "exec"), names)
    x, x2 = names["x"], names["x2"]
    assert names["h"].shape == x.shape and names["c"].shape == (2, 64)
    assert (names["inner"] - names["same"]).abs().max() < 1e-4
    assert (x2 - soflow_kernels.gate_residual_reference(x, names["y"], names["gate"])).abs().max() < 1e-5
    (value, added), pair = (names["value"].double(), names["increment"].double()), names["pair"].double()
    moved = [names["rows"][0].double(), names["rows"].double().sum(0)]
    shift, scale = (torch.stack(ends) for ends in zip(*(F.silu(m).chunk(2, dim=-1) for m in moved), strict=True))
    ends = [soflow_kernels.layernorm_modulate(h, shift[i], scale[i]) for i, h in enumerate((pair[0], pair.sum(0)))]
    assert (value - ends[0]).norm() < 1e-5 * ends[0].norm()
    assert (added - (ends[1] - ends[0])).norm() < 1e-4 * added.norm()
    out = capsys.readouterr().out
    assert all(name in out for name in soflow_kernels.status())


def test_every_operation_is_in_the_table():
    text = README.read_text(encoding="utf-8")
    for name in soflow_kernels.status():
        assert f"| `{name}(" in text, name

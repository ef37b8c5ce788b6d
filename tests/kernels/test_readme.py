"""The code in kernels/README.md runs, block after block, as a reader would type it."""

import re
from pathlib import Path

import pytest
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
    shift, scale, *_ = names["modulation"][:, None].chunk(6, dim=2)
    normed = names["norm"](x) * (1 + scale) + shift
    assert (names["h_rms"] - normed).abs().max() < 1e-5 and (names["x2_rms"] - x2).abs().max() < 1e-5
    value, added, row, moved, increment = (
        names[name].double() for name in ("value", "added", "row", "moved", "increment")
    )
    ends = [
        soflow_kernels.layernorm_modulate(h, F.silu(m), F.silu(m))
        for h, m in ((value, row), (value + added, row + moved))
    ]
    assert (increment - (ends[1] - ends[0])).norm() < 1e-4 * increment.norm()
    out = capsys.readouterr().out
    assert all(name in out for name in soflow_kernels.status())


def test_every_operation_is_in_the_table():
    text = README.read_text(encoding="utf-8")
    for name in soflow_kernels.status():
        assert f"| `{name}(" in text, name

"""The choice of the fastest right attention backend, and the place where it is kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from soflow_fast.errors import ConfigError
from soflow_fast.models import attention_autotune
from soflow_fast.models.attention import BACKENDS, attention, why_not
from soflow_fast.models.attention_autotune import Case, Shape, cache_path, choose, compare, remembered, try_out

CPU = torch.device("cpu")
HERE = [name for name in BACKENDS if why_not(name, CPU, torch.float32, 64) is None]


class Bench:
    """A clock that backends move by their cost."""

    def __init__(self) -> None:
        self.now = 0.0
        self.tried: list[str] = []
        self.costs = {"sdpa-flash": 3.0, "sdpa-math": 2.0, "sdpa": 5.0}
        self.behaviour: dict[str, Callable[..., Tensor]] = {}

    def clock(self) -> float:
        return self.now

    def attention(self, q: Tensor, k: Tensor, v: Tensor, backend: str = "sdpa") -> Tensor:
        self.tried.append(backend)
        self.now += self.costs[backend]
        return self.behaviour.get(backend, attention)(q, k, v)

    def choose(self, cache: Path, head_dim: int = 8) -> str:
        return remembered(CPU, torch.bfloat16, Shape(3, 2, 5, head_dim), self.clock, cache, compiled=False)


@pytest.fixture
def bench(monkeypatch: Any) -> Bench:
    """The three backends of the CPU, timed by a clock of ours."""
    made = Bench()
    monkeypatch.setattr(attention_autotune, "BACKENDS", tuple(made.costs))
    monkeypatch.setattr(attention_autotune, "attention", made.attention)
    return made


def test_the_faster_one_is_chosen(bench: Bench, tmp_path: Path) -> None:
    assert bench.choose(tmp_path / "a.json") == "sdpa-math"
    bench.costs["sdpa-flash"] = 1.0
    assert bench.choose(tmp_path / "b.json") == "sdpa-flash"


def test_forward_and_backward_are_timed(bench: Bench) -> None:
    def costly_backward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(q, k, v)
        if out.requires_grad:
            out.register_hook(lambda gradient: setattr(bench, "now", bench.now + 10))
        return out

    bench.behaviour["sdpa-math"] = costly_backward
    found = compare(CPU, torch.bfloat16, Shape(3, 2, 5, 8), bench.clock)
    assert found.seconds == {"sdpa-flash": (3, 3), "sdpa-math": (2, 12), "sdpa": (5, 5)}
    assert found.fastest() == "sdpa-flash" and found.passed_over == {}


def test_one_that_is_wrong_or_raises_is_passed_over_with_its_reason(bench: Bench, tmp_path: Path) -> None:
    def raises(*anything: Tensor) -> Tensor:
        raise RuntimeError("no kernel image\nfor this GPU")

    bench.behaviour = {"sdpa-math": lambda q, k, v: attention(q, k, v) * 1.05, "sdpa-flash": raises}
    assert bench.choose(tmp_path / "a.json") == "sdpa"
    (entry,) = json.loads((tmp_path / "a.json").read_text()).values()
    assert entry["backend"] == "sdpa" and list(entry["seconds"]) == ["sdpa"]
    assert entry["passed_over"]["sdpa-flash"] == "no kernel image"
    assert entry["passed_over"]["sdpa-math"].startswith("its result is wrong: relative error 5.")


def test_one_that_cannot_be_compiled_is_passed_over_in_compiled_blocks(monkeypatch: Any) -> None:
    torch.compiler.reset()

    def breaks(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        if backend == "sdpa-flash":
            torch._dynamo.graph_break()
        return attention(q, k, v, backend)

    monkeypatch.setattr(attention_autotune, "attention", breaks)
    for compiled in (False, True):
        case = Case(CPU, torch.bfloat16, Shape(3, 2, 5, 8), compiled)
        faults = {name: case.fault(name) for name in HERE}
        assert faults["sdpa"] is faults["sdpa-math"] is None
        assert (faults["sdpa-flash"] is not None) == compiled
    with pytest.raises(ConfigError, match=r"^--attention sdpa-flash: .*graph_break"):
        try_out("sdpa-flash", CPU, torch.bfloat16, 64, 2, 16, 8, compiled=True)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_wrong_gradient_is_seen(which: int, bench: Bench) -> None:
    def wrong(*qkv: Tensor) -> Tensor:
        out = attention(*qkv)
        return out + (qkv[which] - qkv[which].detach()).to(out) * 0.1

    case = Case(CPU, torch.bfloat16, Shape(1, 2, 5, 8))
    bench.behaviour["sdpa-math"] = wrong
    assert (case.fault("sdpa-math") or "").startswith("its gradient is wrong")
    bench.behaviour["sdpa-math"] = lambda *qkv: attention(*qkv) * float("nan")
    assert case.fault("sdpa-math") == "its result is wrong: relative error nan"


def test_one_that_fails_while_it_is_timed_is_passed_over(bench: Bench) -> None:
    def once(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if bench.tried.count("sdpa-math") > 3:
            raise torch.OutOfMemoryError("out of memory")
        return attention(q, k, v)

    bench.behaviour["sdpa-math"] = once
    found = compare(CPU, torch.bfloat16, Shape(3, 2, 5, 8), bench.clock)
    assert found.passed_over == {"sdpa-math": "out of memory"} and found.fastest() == "sdpa-flash"


def test_nothing_left_is_torchs_choice(bench: Bench) -> None:
    def raises(*anything: Tensor) -> Tensor:
        raise RuntimeError

    bench.behaviour = dict.fromkeys(bench.costs, raises)
    found = compare(CPU, torch.bfloat16, Shape(3, 2, 5, 8), bench.clock)
    assert found.fastest() == "sdpa" and set(found.passed_over.values()) == {"RuntimeError"}


def test_the_choice_is_kept_by_shape(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "new" / "attention.json"
    assert bench.choose(path) == "sdpa-math"
    tried = len(bench.tried)
    bench.costs["sdpa-flash"] = 1.0
    assert bench.choose(path) == "sdpa-math" and len(bench.tried) == tried
    assert bench.choose(path, head_dim=16) == "sdpa-flash" and len(bench.tried) > tried
    entries = json.loads(path.read_text())
    assert len(entries) == 2
    key = next(iter(entries))
    assert all(part in key for part in (torch.__version__, "bfloat16", "B=3 heads=2 T=5 head_dim=8", "xformers"))
    assert [file.name for file in path.parent.iterdir()] == ["attention.json"]


def test_packages_are_asked_for_what_a_network_asks_of_them(bench: Bench, tmp_path: Path, monkeypatch: Any) -> None:
    """Where q and k are normalised they are tensors of their own, and the choice is another one."""
    monkeypatch.setattr(attention_autotune, "takes_packed", lambda backend, dtype, kind: backend == "sdpa-flash")
    packed: list[str] = []

    def in_one(qkv: Tensor, backend: str) -> Tensor:
        packed.append(backend)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        return attention(q, k, v, backend).transpose(1, 2)

    monkeypatch.setattr(attention_autotune, "packed_attention", in_one)
    path, shape = tmp_path / "a.json", Shape(3, 2, 5, 8)
    assert remembered(CPU, torch.bfloat16, shape, bench.clock, path, False) == "sdpa-flash"  # at no cost here
    assert set(packed) == {"sdpa-flash"}
    packed.clear()
    assert remembered(CPU, torch.bfloat16, shape, bench.clock, path, False, apart=True) == "sdpa-math"
    assert packed == [] and len(json.loads(path.read_text())) == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, "entry: 3", "entry: {}", 'entry: {"backend": "flash9"}',
     'entry: {"backend": ["sdpa"]}', 'entry: {"backend": "sdpa-cudnn"}'],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_a_damaged_or_outdated_file_is_measured_anew(content: bytes | str, bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "attention.json"
    if isinstance(content, str):
        bench.choose(path)
        (key,) = json.loads(path.read_text())
        content = f'{{{json.dumps(key)}: {content.removeprefix("entry: ")}, "other": 1}}'.encode()
    path.write_bytes(content)
    bench.tried.clear()
    assert bench.choose(path) == "sdpa-math" and bench.tried
    bench.tried.clear()
    assert bench.choose(path) == "sdpa-math" and not bench.tried
    assert ("other" in json.loads(path.read_text())) == (b"other" in content)


def test_a_file_that_cannot_be_read_or_written_is_no_error(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert bench.choose(tmp_path / "file" / "attention.json") == "sdpa-math"
    assert bench.choose(tmp_path) == "sdpa-math"  # a folder
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_where_the_choice_is_kept(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_path() == tmp_path / "soflow-fast" / "attention.json"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_path() == tmp_path / "home" / ".cache" / "soflow-fast" / "attention.json"


def test_on_the_cpu_torch_picks_and_nothing_is_timed(monkeypatch: Any, tmp_path: Path) -> None:
    def never() -> float:
        raise AssertionError

    assert choose(CPU, torch.float32, 2, 2, 4, 8, never, tmp_path / "a.json") == "sdpa"
    assert list(tmp_path.iterdir()) == []

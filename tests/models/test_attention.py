"""Attention backends against float64, and why one cannot be used."""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from soflow_fast.config.presets import preset
from soflow_fast.config.schema import AttentionBackend, override
from soflow_fast.errors import ConfigError
from soflow_fast.models import attention as backends
from soflow_fast.models import attention_autotune
from soflow_fast.models.attention import BACKENDS, IMPLEMENTATIONS, PACKAGES, attention, require, status, why_not
from soflow_fast.models.attention_autotune import choose, try_out
from soflow_fast.models.dit import DiT, DiTConfig, TapedOutputs
from soflow_fast.models.measured_choice import rounding_unit
from soflow_fast.runs import trainer
from soflow_fast.training.state import TrainState

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HERE = [name for name in BACKENDS if why_not(name, CPU, torch.float32, 64) is None]
HALF_ONLY = ["flash4", "flash3", "flash2"]
MODULES = {"flash4": "flash_attn.cute", "flash3": "flash_attn_interface", "flash2": "flash_attn"}


def operands(B: int, T: int, heads: int, d: int, dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
    """One product that q, k and v are views of, as in a block."""
    source = torch.Generator().manual_seed(1)
    return torch.randn(B, T, 3, heads, d, generator=source).to(device, dtype).requires_grad_()


def results(qkv: Tensor, function: Callable[..., Tensor], *backend: str) -> tuple[Tensor, Tensor]:
    """[B, T, heads, d] and the gradient of qkv, for a gradient of the result that depends on the position."""
    out = function(*qkv.permute(2, 0, 3, 1, 4), *backend).transpose(1, 2)
    dout = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    return out.detach(), torch.autograd.grad(out, qkv, dout)[0]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula, in the dtype that is given."""
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def agrees(qkv: Tensor, found: tuple[Tensor, Tensor]) -> None:
    """Checks a result and its gradient against float64. The tolerance is the one of `choose`, explained there."""
    right = results(qkv.detach().double().requires_grad_(), plain)
    for what, a, b in zip(("result", "gradient"), found, right, strict=True):
        assert a.dtype == qkv.dtype and a.shape == b.shape
        error = float((a - b).norm() / b.norm())
        assert error <= 2 * rounding_unit(qkv.device, qkv.dtype), (what, error)


# What there is on the CPU


# Each length, head dimension and dtype once or more, the default network's (64 tokens of 32) among them.
@pytest.mark.parametrize(
    ("T", "d", "dtype"),
    [(1, 24, torch.float32), (63, 64, torch.bfloat16), (256, 72, torch.bfloat16), (64, 32, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("backend", HERE)
def test_backends_agree_with_float64(backend: str, T: int, d: int, dtype: torch.dtype) -> None:
    qkv = operands(2, T, 3, d, dtype)
    agrees(qkv, results(qkv, attention, backend))


def test_the_cpu_has_these_of_those_that_a_configuration_may_name() -> None:
    assert HERE == ["sdpa-flash", "sdpa-math", "sdpa"]
    assert ("auto", *BACKENDS) == get_args(AttentionBackend)


class Seen(TorchDispatchMode):
    """The operations that are run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("backend", "flash"), [("sdpa-flash", True), ("sdpa-math", False)])
def test_a_kernel_of_torch_is_the_one_that_was_asked_for(backend: str, flash: bool) -> None:
    q, k, v = operands(2, 5, 3, 8, torch.float32).permute(2, 0, 3, 1, 4)
    with Seen() as seen:
        attention(q, k, v, backend)
    assert ("_scaled_dot_product_flash_attention_for_cpu" in seen.names) == flash
    assert ("bmm" in seen.names) != flash


@pytest.mark.parametrize("backend", ["sdpa-flash", "flash2"])
def test_backends_compile_without_a_break(backend: str, monkeypatch: Any) -> None:
    torch.compiler.reset()
    if backend == "flash2":
        stand_in(monkeypatch, backend)
    qkv = operands(2, 6, 3, 8, torch.bfloat16)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def of_product(qkv: Tensor) -> Tensor:
        return attention(*qkv.permute(2, 0, 3, 1, 4), backend).transpose(1, 2)

    out = of_product(qkv)
    dout = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    agrees(qkv, (out.detach(), torch.autograd.grad(out, qkv, dout)[0]))


def test_a_function_is_a_backend() -> None:
    """In any dtype it is called in every block, and nothing else is."""
    shapes = []

    def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shapes.append(q.shape)
        return plain(q, k, v)

    net = DiT(DiTConfig(input_size=4, hidden_size=16, depth=3, num_heads=2, num_classes=3))
    net.set_attention(own)
    x, t = torch.randn(2, 4, 4, 4), torch.ones(2)
    with Seen() as seen:
        net(x, t, t)
    assert shapes == [(2, 2, 4, 8)] * 3
    assert not any("attention" in name for name in seen.names)
    qkv = operands(2, 7, 3, 8, torch.float32)
    agrees(qkv, results(qkv, attention, own))


# Packages, by stand-ins of their interfaces


class Call(NamedTuple):
    """The arguments of a stand-in."""

    operands: tuple[Tensor, Tensor, Tensor]
    options: dict[str, Any]


def stand_in(monkeypatch: Any, backend: str, *, wrong: bool = False, error: Exception | None = None) -> list[Call]:
    """Put a package in place that takes and gives [B, T, heads, d], as its documentation says. Returns its calls."""
    calls: list[Call] = []

    def compute(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append(Call((q, k, v), options))
        if error is not None:
            raise error
        assert q.dtype in (torch.bfloat16, torch.float16) or backend == "xformers"
        assert q.shape == k.shape == v.shape and q.stride(-1) == 1
        work = (part.transpose(1, 2).double() for part in (q, k, v))
        return (plain(*work) * (1.1 if wrong else 1)).to(q.dtype).transpose(1, 2).contiguous()

    def flash2(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, *, deterministic=False):
        assert (dropout_p, softmax_scale, causal) == (0.0, None, False)
        return compute(q, k, v, deterministic=deterministic)

    def flash3(q, k, v, softmax_scale=None, causal=False, *, deterministic=False):
        assert (softmax_scale, causal) == (None, False)
        return compute(q, k, v, deterministic=deterministic)

    def flash4(q, k, v, softmax_scale=None, causal=False, *, deterministic=False):
        return flash3(q, k, v, softmax_scale, causal, deterministic=deterministic), None

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
        assert (attn_bias, p, scale) == (None, 0.0, None)
        return compute(query, key, value)

    if backend == "xformers":
        module = ModuleType("xformers.ops")
        module.memory_efficient_attention = memory_efficient_attention
        monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
        monkeypatch.setitem(sys.modules, "xformers.ops", module)
        return calls
    module = ModuleType(MODULES[backend])
    module.flash_attn_func = {"flash2": flash2, "flash3": flash3, "flash4": flash4}[backend]
    if backend in ("flash2", "flash3"):
        whole = module.flash_attn_func
        # Its own backward would write one tensor; what it is given is one tensor, which is what counts here.
        module.flash_attn_qkvpacked_func = lambda qkv, **options: whole(*qkv.unbind(2), **options)
    if backend == "flash4":
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, MODULES[backend], module)
    return calls


@pytest.mark.parametrize("backend", PACKAGES)
def test_packages_are_called_as_they_document(backend: str, monkeypatch: Any) -> None:
    """Their operands are views, their result is not copied, and deterministic algorithms are asked of those that have
    them."""
    (B, T, heads, d), calls = (2, 7, 3, 72), stand_in(monkeypatch, backend)
    qkv = operands(B, T, heads, d, torch.bfloat16)
    agrees(qkv, results(qkv, attention, backend))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    out = attention(*qkv.permute(2, 0, 3, 1, 4), backend)
    assert out.shape == (B, heads, T, d)
    assert out.transpose(1, 2).is_contiguous()  # so the block's reshape to [B, T, D] is a view
    for call, deterministic in zip(calls, (False, True), strict=True):
        assert call.options == ({} if backend == "xformers" else {"deterministic": deterministic})
        for k, part in enumerate(call.operands):
            assert part.shape == (B, T, heads, d) and part.dtype == torch.bfloat16
            assert part.stride() == (T * 3 * heads * d, 3 * heads * d, d, 1)
            assert part.data_ptr() == qkv[:, :, k].data_ptr()


def test_float32_is_left_to_torch(monkeypatch: Any) -> None:
    """Samples and checks of a bf16 run are in float32, which these do not take."""
    qkv = operands(2, 7, 3, 8, torch.float32)
    for backend in (*HALF_ONLY, "sdpa-cudnn"):
        calls = stand_in(monkeypatch, backend) if backend in PACKAGES else []
        agrees(qkv, results(qkv, attention, backend))
        assert calls == []


def test_a_network_takes_the_backend_in_every_block(monkeypatch: Any) -> None:
    calls = stand_in(monkeypatch, "flash2")
    net = DiT(DiTConfig(input_size=4, hidden_size=16, depth=3, num_heads=2, num_classes=3))
    assert {block.attn.backend for block in net.blocks} == {"sdpa"}
    net.set_attention("flash2")
    x, t = torch.randn(2, 4, 4, 4), torch.ones(2)
    with torch.autocast("cpu", torch.bfloat16):
        net(x, t, t).sum().backward()
    assert [call.operands[0].shape for call in calls] == [(2, 4, 2, 8)] * 3
    assert torch.isfinite(net.blocks[0].attn.qkv.weight.grad).all()


@pytest.mark.parametrize("backend", ["flash2", "flash3"])
def test_packages_get_q_k_and_v_in_one_tensor_where_they_take_it(backend: str, monkeypatch: Any) -> None:
    """Then the gradient comes back in one tensor, and nothing of the kind of cat or stack is left in the backward."""
    stand_in(monkeypatch, backend)
    module, seen = sys.modules[MODULES[backend]], []

    class Packed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, qkv: Tensor) -> Tensor:
            seen.append(qkv)
            ctx.save_for_backward(qkv)
            q, k, v = (part.transpose(1, 2).double() for part in qkv.unbind(2))
            return plain(q, k, v).to(qkv.dtype).transpose(1, 2).contiguous()

        @staticmethod
        def backward(ctx: Any, dout: Tensor) -> Tensor:
            with torch.enable_grad():
                (qkv,) = (value.detach().double().requires_grad_() for value in ctx.saved_tensors)
                q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
                (gradient,) = torch.autograd.grad(plain(q, k, v).transpose(1, 2), qkv, dout.double())
            return gradient.to(dout.dtype)

    module.flash_attn_qkvpacked_func = lambda qkv, *, deterministic: Packed.apply(qkv)
    config = DiTConfig(input_size=4, hidden_size=16, depth=2, num_heads=2, num_classes=3)
    torch.manual_seed(0)
    net, other = DiT(config), DiT(config)
    with torch.no_grad():
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            q.copy_(p.add_(0.2 * torch.randn_like(p)))
    net.set_attention(backend)
    x, t, gradients = torch.randn(2, 4, 4, 4), torch.rand(2), []
    for network in (net, other):
        tape = TapedOutputs(slice(None))
        with torch.autocast("cpu", torch.bfloat16):
            out = network(x, t, t / 2, tape=tape).float()
        pieces: list[tuple[int, torch.dtype]] = []

        class Stacks(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None, pieces=pieces):
                if func in (torch.ops.aten.cat.default, torch.ops.aten.stack.default):
                    pieces.append((args[0][0].dim(), args[0][0].dtype))
                return func(*args, **(kwargs or {}))

        with Stacks():
            out.square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
        assert ((3, torch.bfloat16) in pieces) == (network is other)
        assert tape.blocks[0].q.shape == (2, 4, 16)
    assert [qkv.shape for qkv in seen] == [(2, 4, 3, 2, 8)] * 2
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 0.05 * b.norm() + 1e-6


# Why not


def gpu(monkeypatch: Any, capability: tuple[int, int], hip: str | None = None) -> None:
    """Let torch speak of a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", hip)


def test_a_package_that_is_not_installed_is_named(monkeypatch: Any) -> None:
    for module in ("flash_attn", "flash_attn.cute", "flash_attn_interface", "xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, module, None)  # an import then fails as if it was not there
    monkeypatch.setattr(backends, "version", lambda package: None)
    installs = {
        "flash4": ("flash-attn-4", "pip install flash-attn-4"),
        "flash3": ("flash_attn_3", "pip install flash_attn_3 --index-url https://download.pytorch.org/whl/cu130"),
        "flash2": ("flash-attn", "pip install flash-attn"),
        "xformers": ("xformers", "pip install xformers"),
    }
    assert list(installs) == list(PACKAGES)
    for backend, (name, install) in installs.items():
        with pytest.raises(ConfigError) as error:
            require(backend, CPU, torch.bfloat16, 64)
        assert str(error.value) == f"--attention {backend}: {name} is not installed ({install})"


def test_a_package_that_cannot_be_imported_says_why(monkeypatch: Any) -> None:
    def fails() -> None:
        raise ImportError("undefined symbol: _ZN3c10\nand more")

    monkeypatch.setattr(backends, "version", lambda package: "1.0")
    for backend, row in PACKAGES.items():
        monkeypatch.setitem(IMPLEMENTATIONS, backend, row._replace(load=fails))
        reason = why_not(backend, CPU, torch.bfloat16, 64)
        assert reason == f"{row.package} cannot be imported: undefined symbol: _ZN3c10"


@pytest.mark.parametrize(
    ("backend", "dtype", "d", "capability", "reason"),
    [
        ("flash4", torch.bfloat16, 72, (9, 0), None),
        ("flash4", torch.bfloat16, 72, (10, 0), None),
        ("flash4", torch.bfloat16, 72, (8, 0), "needs compute capability 9.0 or more, the GPU has 8.0"),
        ("flash4", torch.bfloat16, 160, (9, 0), None),
        ("flash4", torch.bfloat16, 160, (10, 0), "head dimension 160: it takes multiples of 8 up to 128"),
        ("flash3", torch.float16, 72, (9, 0), None),
        ("flash3", torch.bfloat16, 72, (10, 0), "needs compute capability 9.0, the GPU has 10.0"),
        ("flash3", torch.float32, 72, (9, 0), "needs bf16 or fp16"),
        ("flash2", torch.bfloat16, 72, (8, 0), None),
        ("flash2", torch.bfloat16, 36, (8, 0), "head dimension 36: it takes multiples of 8 up to 256"),
        ("flash2", torch.bfloat16, 264, (9, 0), "head dimension 264: it takes multiples of 8 up to 256"),
        ("flash2", torch.float16, 72, (7, 5), "needs compute capability 8.0 or more, the GPU has 7.5"),
        ("xformers", torch.float32, 36, (7, 5), None),
        ("xformers", torch.bfloat16, 64, (7, 5), "needs compute capability 8.0 or more, the GPU has 7.5"),
        ("xformers", torch.float64, 64, (9, 0), "needs bf16 or fp16 or fp32"),
        ("sdpa-cudnn", torch.float32, 64, (9, 0), "needs bf16 or fp16"),
        ("sdpa-flash", torch.float32, 64, (9, 0), "needs bf16 or fp16"),
        ("sdpa-efficient", torch.float64, 64, (9, 0), "needs bf16 or fp16 or fp32"),
        ("sdpa-math", torch.float64, 7, (5, 0), None),
        ("sdpa", torch.float64, 7, (5, 0), None),
    ],
)
def test_what_a_gpu_lacks_is_said(
    backend: str, dtype: torch.dtype, d: int, capability: tuple[int, int], reason: str | None, monkeypatch: Any
) -> None:
    gpu(monkeypatch, capability)
    if backend in PACKAGES:
        stand_in(monkeypatch, backend)
    assert why_not(backend, GPU, dtype, d) == reason


def test_gpu_backends_need_a_gpu(monkeypatch: Any) -> None:
    for backend in PACKAGES:
        stand_in(monkeypatch, backend)
        assert why_not(backend, CPU, torch.bfloat16, 64) == "needs an NVIDIA GPU"
        gpu(monkeypatch, (9, 0), hip="6.2")
        assert why_not(backend, GPU, torch.bfloat16, 64) == "needs an NVIDIA GPU"
    for backend in ("sdpa-cudnn", "sdpa-efficient"):
        assert why_not(backend, CPU, torch.bfloat16, 64) == "needs a GPU"
    assert why_not("sdpa-flash", torch.device("mps"), torch.bfloat16, 64) == "needs a GPU"


def test_torchs_own_reason_is_passed_on(monkeypatch: Any) -> None:
    def refuses(*anything: Any) -> Tensor:
        warnings.warn("cuDNN attention kernel not used because: (Triggered internally at a.cpp:1.)", stacklevel=1)
        warnings.warn("Head_dim must be\n a multiple of 8. (Triggered internally at a.cpp:2.)", stacklevel=1)
        warnings.warn("Flash attention has been runtime disabled.", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(backends, "attention", refuses)
    assert why_not("sdpa-flash", CPU, torch.bfloat16, 7) == "Head_dim must be a multiple of 8."
    monkeypatch.setattr(warnings, "warn", lambda *anything, **more: None)
    assert why_not("sdpa-flash", CPU, torch.bfloat16, 7) == "No available kernel. Aborting execution."


def test_status_lists_every_backend() -> None:
    rows = status(CPU, torch.float32, 64)
    assert [name for name, _, _ in rows] == list(BACKENDS)
    assert [name for name, usable, _ in rows if usable] == HERE
    assert all(why and "\n" not in why for _, _, why in rows)


# What was asked for


def test_what_was_asked_for_is_tried_out(monkeypatch: Any) -> None:
    try_out("sdpa-math", CPU, torch.float32, 64, 2, 16, 8)
    for options, said in (({"wrong": True}, "its result is wrong"), ({"error": OSError("no ptxas")}, "no ptxas")):
        stand_in(monkeypatch, "flash2", **options)
        monkeypatch.setattr(attention_autotune, "require", lambda *anything: None)
        with pytest.raises(ConfigError, match=f"^--attention flash2: {said}"):
            try_out("flash2", CPU, torch.bfloat16, 64, 2, 16, 8)


# The run

TINY = {"model.hidden_size": 16, "model.depth": 2, "model.num_heads": 2, "device": "cpu", "steps": 2}


def test_every_network_of_a_run_gets_it() -> None:
    config = trainer.resolved(override(preset("digits"), TINY | {"teacher": "ema", "attention": "sdpa-math"}))
    state = TrainState.build(config)
    state.set_attention(trainer.resolve_attention(state))
    assert state.teacher is not None
    for flow in (state.flow, state.ema, state.teacher):
        assert [block.attn.backend for block in flow.network.blocks] == ["sdpa-math"] * 2


@pytest.mark.parametrize(
    ("precision", "micro", "dtype", "B"),
    [("bf16", 0, torch.bfloat16, 24), ("fp32", 8, torch.float32, 8), ("fp32", 99, torch.float32, 24)],
)
def test_the_choice_is_for_the_shape_of_the_run(
    precision: str, micro: int, dtype: torch.dtype, B: int, monkeypatch: Any
) -> None:
    asked = []
    monkeypatch.setattr(trainer, "choose", lambda *given, **more: asked.append((*given, more)) or "sdpa-flash")
    changes = {"precision": precision, "micro_batch": micro, "batch_size": 24}
    state = TrainState.build(trainer.resolved(override(preset("digits"), TINY | changes)))
    assert trainer.resolve_attention(state) == "sdpa-flash"
    tokens = (state.config.model.input_size // state.config.model.patch_size) ** 2
    assert asked == [(CPU, dtype, B, 2, tokens, 8, trainer.time.perf_counter, {"compiled": False, "apart": False})]


def test_a_backend_that_is_not_there_is_refused(refused: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr(backends, "version", lambda package: None)
    expected = "soflow: error: --attention flash2: flash-attn is not installed (pip install flash-attn)\n"
    assert refused("train", "--attention", "flash2", "--device", "cpu") == expected
    assert refused("train", "--attention", "flash2", "--device", "cpu", "--dry-run") == expected
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_backend_is_refused(refused: Any) -> None:
    assert "must be one of auto, flash4, " in refused("train", "--attention", "flash5")


def test_the_flag_is_in_the_help(call: Any) -> None:
    text = "".join(call("train", "--help").out.split())  # lines are broken after hyphens, too
    assert "--attentionNAME" in text and all(name in text for name in ("auto", *BACKENDS))


def test_a_run_says_which_it_takes_and_may_go_on_with_another(
    call: Any, tiny: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("soflow_fast.runs.samples.EVALUATION_SAMPLES", 64)
    flags = [*tiny, "--run-dir", tmp_path / "run", "--steps", 4, "--checkpoint-every", 2]
    first = call("train", *flags, "--attention", "sdpa-math")
    assert first.code == 0, first
    assert "fp32 on cpu, attention sdpa-math\n" in first.out
    again = call("train", *flags, "--attention", "sdpa-flash")
    assert again.code == 0 and "resuming" in again.out, again


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("d", [64, 72])
@pytest.mark.parametrize("backend", BACKENDS)
def test_usable_backends_agree_with_float64_on_a_gpu(backend: str, d: int) -> None:
    reason = why_not(backend, GPU, torch.bfloat16, d)
    if reason:
        pytest.skip(reason)
    qkv = operands(2, 256, 16, d, torch.bfloat16, GPU)
    agrees(qkv, results(qkv, attention, backend))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_choice_is_made_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "attention.json"
    name = choose(GPU, torch.bfloat16, 8, 16, 256, 72, trainer.time.perf_counter, path)
    (entry,) = json.loads(path.read_text()).values()
    assert name == entry["backend"] and set(entry["seconds"]) | set(entry["passed_over"]) == set(BACKENDS)
    assert {"sdpa", "sdpa-math"} <= set(entry["seconds"])

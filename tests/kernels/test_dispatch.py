"""Which calls reach a kernel, what the others get, and how wrong arguments are refused."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch._library.custom_ops import CustomOpDef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import soflow_kernels
from soflow_kernels import _dispatch, adaln, gelu, testing

x, m = torch.randn(2, 3, 8), torch.randn(2, 8)
GOOD = {
    "layernorm_modulate": {"x": x, "shift": m, "scale": m},
    "gate_residual_layernorm_modulate": {"x": x, "y": x, "gate": m, "shift": m, "scale": m, "bias": m[0]},
    "gate_residual": {"x": x, "y": x, "gate": m, "bias": m[0]},
    "rmsnorm_modulate": {"x": x, "shift": m, "scale": m, "weight": m[0]},
    "gate_residual_rmsnorm_modulate": {"x": x, "y": x, "gate": m, "shift": m, "scale": m, "weight": m[0]},
    "bias_gelu": {"x": x, "bias": m[0]},
    "linear_gelu": {"x": x, "weight": m, "bias": m[0, :2]},
}
OPTIONAL = {("rmsnorm_modulate", "weight"), ("gate_residual_rmsnorm_modulate", "weight")}
ARGUMENTS = [(op, name) for op, arguments in GOOD.items() for name in arguments]


def call(op, **changed):
    return getattr(soflow_kernels, op)(**{**GOOD[op], **changed})


@pytest.fixture
def launches(device):
    """Counts the launches of kernels."""

    class Counter:
        count = 0

    original = _dispatch.launch

    def counted(*args, **options):
        Counter.count += 1
        return original(*args, **options)

    patch = pytest.MonkeyPatch()
    for module in ("adaln", "gated_residual", "gelu", "_reduce"):
        patch.setattr(f"soflow_kernels.{module}.launch", counted)
    yield Counter
    patch.undo()


def on(device, op):
    return {name: tensor.to(device) for name, tensor in GOOD[op].items()}


def test_every_operation_of_the_package_is_tested_here():
    elsewhere = {op for op in soflow_kernels.status() if op not in GOOD}
    here = Path(__file__)
    tests = "".join(path.read_text() for path in here.parent.rglob("test_*.py") if path.name != here.name)
    assert not {op for op in elsewhere if f"{op}(" not in tests}
    for op in soflow_kernels.status():
        assert callable(getattr(soflow_kernels, op)) and callable(getattr(soflow_kernels, f"{op}_reference"))


@pytest.mark.parametrize("op", GOOD)
def test_mode_switches_between_kernel_and_reference(op, device, launches):
    arguments = on(device, op)
    want = getattr(soflow_kernels, f"{op}_reference")(**arguments)
    got = getattr(soflow_kernels, op)(**arguments)
    torch.testing.assert_close(got, want)
    kernel_launches = launches.count
    assert kernel_launches > 0 or (op == "linear_gelu" and device == "cuda")
    with testing.mode("reference"):
        got = getattr(soflow_kernels, op)(**arguments)
        assert soflow_kernels.status()[op] == (False, "SOFLOW_KERNELS=reference")
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert launches.count == kernel_launches
    assert soflow_kernels.status()[op].kernel


@pytest.mark.parametrize("op", GOOD)
def test_float64_stays_float64(op, device, launches):
    arguments = {name: tensor.double() for name, tensor in on(device, op).items()}
    got = getattr(soflow_kernels, op)(**arguments)
    for out in got if isinstance(got, tuple) else (got,):
        assert out.dtype == torch.float64
    assert launches.count == 0


@pytest.mark.parametrize(
    ("op", "how"),
    [(op, how) for op in GOOD for how in ("dual tensor", "torch.func.jvp")]
    # How the question is asked in a compiled function is the same for every operation.
    + [(op, "compiled torch.func.jvp") for op in ("gate_residual_layernorm_modulate", "linear_gelu")],
)
def test_forward_mode_never_gives_a_silent_zero(op, how, device):
    arguments = on(device, op)
    tangents = {name: torch.randn_like(tensor) for name, tensor in arguments.items()}

    def tangent_of(function):
        def ordered(*values):
            return function(**dict(zip(arguments, values, strict=True)))

        primal, tangent = tuple(arguments.values()), tuple(tangents.values())
        if how == "dual tensor":
            with forward_ad.dual_level():
                out = ordered(*(forward_ad.make_dual(p, t) for p, t in zip(primal, tangent, strict=True)))
                out = out[-1] if isinstance(out, tuple) else out
                return forward_ad.unpack_dual(out).tangent
        run = lambda *both: torch.func.jvp(ordered, both[: len(primal)], both[len(primal) :])[1]  # noqa: E731
        if how.startswith("compiled"):
            torch.compiler.reset()
            run = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=False)
        out = run(*primal, *tangent)
        return out[-1] if isinstance(out, tuple) else out

    got = tangent_of(getattr(soflow_kernels, op))
    want = tangent_of(getattr(soflow_kernels, f"{op}_reference"))
    assert got is not None and want.abs().max() > 0
    torch.testing.assert_close(got, want)


def _call_losses(name, at, others):
    """An operation on images or times, as a function of `at`."""
    x, v, t, l, s, weights, table = others
    calls = {
        "flow_matching_loss": lambda: soflow_kernels.flow_matching_loss(at, v, t)[0],
        "consistency_loss": lambda: soflow_kernels.consistency_loss(at, v, x, v, t, l, s)[0],
        "path_point": lambda: soflow_kernels.path_point(at, x, t)[0],
        "euler_lookahead": lambda: soflow_kernels.euler_lookahead(at, v, t, l)[2],
        "dual_time_embedding": lambda: soflow_kernels.dual_time_embedding(t, at[:, 0], None, weights, weights, table),
    }
    return calls[name]()


@pytest.mark.parametrize(
    "op", ["flow_matching_loss", "consistency_loss", "path_point", "euler_lookahead", "dual_time_embedding"]
)
def test_dual_tensors_keep_their_tangents(op, device, launches):
    source = torch.Generator().manual_seed(0)
    x, v, at, tangent = (torch.rand(3, 8, generator=source).to(device) for _ in range(4))
    weights = tuple(torch.randn(shape, generator=source).to(device) for shape in ((8, 16), (8,), (8, 8), (8,)))
    t, l, s = (torch.full((3,), value, device=device) for value in (0.9, 0.5, 0.1))
    others = (x, v, t, l, s, weights, torch.randn(4, 8, generator=source).to(device))
    with forward_ad.dual_level():
        out = _call_losses(op, forward_ad.make_dual(at, tangent), others)
        got = forward_ad.unpack_dual(out).tangent
    assert launches.count == 0
    wide = [value.double() if isinstance(value, torch.Tensor) else tuple(w.double() for w in value) for value in others]
    low, high = (_call_losses(op, at.double() + sign * 1e-6 * tangent.double(), wide) for sign in (-1, 1))
    if op in ("flow_matching_loss", "consistency_loss"):  # weights and targets count as constants: no plain difference
        assert got is not None and got.abs() > 0
    else:
        torch.testing.assert_close(got.double(), (high - low) / 2e-6, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("op", GOOD)
def test_torch_func_transforms(op, device):
    arguments = on(device, op)
    function, reference = getattr(soflow_kernels, op), getattr(soflow_kernels, f"{op}_reference")

    def total(f, given):
        out = f(**{**arguments, "x": given})
        return (out[-1] if isinstance(out, tuple) else out).square().sum()

    got = torch.func.grad(lambda given: total(function, given))(arguments["x"])
    torch.testing.assert_close(got, torch.func.grad(lambda given: total(reference, given))(arguments["x"]))
    several = torch.randn(4, *arguments["x"].shape, device=device)
    got = torch.func.vmap(lambda given: total(function, given))(several)
    torch.testing.assert_close(got, torch.func.vmap(lambda given: total(reference, given))(several))


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_wrong_arguments_are_named(op, name):
    value = GOOD[op][name]
    wrong = {
        "must be a tensor": [value.tolist(), None, 3.0][: 1 if name == "bias" or (op, name) in OPTIONAL else 3],
        "must be bfloat16": [value.long(), value > 0],
        "must have shape": [value[..., None].expand(*value.shape, 2), torch.randn(())],
    }
    if name != "x":
        wrong["must have shape"].append(torch.randn(*value.shape[:-1], value.shape[-1] + 1))
        wrong["must be on cpu"] = [value.to("meta")]
    elif op.endswith("gelu"):
        wrong["must have shape"] = [torch.randn(())]  # any other shape is a shape of its own
    for expected, values in wrong.items():
        for bad in values:
            with pytest.raises(ValueError, match=rf"^{op}: {name} {expected}"):
                call(op, **{name: bad})


@pytest.fixture(scope="module")
def distribute():
    """Makes a DTensor of a tensor, over a group of this process alone."""
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    if testing.device() is None:
        pytest.skip("triton is not installed")
    kind = testing.device()
    torch.distributed.init_process_group(
        "gloo" if kind == "cpu" else "nccl", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    mesh = init_device_mesh(kind, (1,))
    yield lambda tensor: distribute_tensor(tensor, mesh)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("op", GOOD)
def test_dtensors_take_the_reference(op, device, launches, distribute):
    """Forward and gradients; beside plain tensors they are refused by name."""
    arguments = on(device, op)
    function, reference = getattr(soflow_kernels, op), getattr(soflow_kernels, f"{op}_reference")
    outputs = reference(**arguments)
    weights = [torch.ones_like(out) for out in (outputs if isinstance(outputs, tuple) else (outputs,))]
    want = testing.grads(reference, arguments, weights)
    spread = {name: distribute(tensor) for name, tensor in arguments.items()}
    got = testing.grads(function, spread, [distribute(weight) for weight in weights])
    assert launches.count == 0
    for name, value in want.items():
        torch.testing.assert_close(got[name].full_tensor(), value)
    for name in list(arguments)[1:]:
        with pytest.raises(ValueError, match=f"{op}: {name} must be a DTensor, as the first argument is, got a plain"):
            function(**{**spread, name: arguments[name]})
        with pytest.raises(ValueError, match=f"{op}: {name} must be a plain tensor, got DTensor"):
            function(**{**arguments, name: spread[name]})


def test_dtensors_in_the_halves(device, launches, distribute):
    x, m = (GOOD["layernorm_modulate"][name].to(device) for name in ("x", "scale"))

    def halves(x, m):
        made = adaln.adaln_fwd(x, x, m, m, m)
        d = adaln.adaln_bwd(made.out, x, made.sum, x, m, m, None, made.mean, made.rstd)
        return made.sum, made.out, *d[:5], *gelu.bias_gelu_backward(x, x, m[0])

    with testing.mode("reference"):
        wanted = halves(x, m)
    found = halves(distribute(x), distribute(m))
    assert launches.count == 0
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.full_tensor(), want)


class Plain(torch.Tensor):
    """A subclass with memory of its own and nothing else."""


@pytest.mark.parametrize("op", GOOD)
def test_parameters_and_plain_subclasses_go_to_the_kernel(op, device, launches):
    arguments = on(device, op)
    want = getattr(soflow_kernels, op)(**arguments)
    before, launches.count = launches.count, 0
    kinds = {name: tensor.as_subclass(Plain) if name == "x" else tensor for name, tensor in arguments.items()}
    kinds["bias" if "bias" in kinds else "scale"] = torch.nn.Parameter(kinds["bias" if "bias" in kinds else "scale"])
    got = getattr(soflow_kernels, op)(**kinds)
    assert launches.count == before or device == "cuda"  # there a gradient rules out the product's epilogue
    torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_nested_and_sparse_tensors_are_named(op, name):
    value = GOOD[op][name]
    for bad, what in (
        (torch.nested.nested_tensor([value, value], layout=torch.jagged), "a nested one"),
        (torch.nested.nested_tensor([value, value]), "a nested one"),
        (value.to_sparse(), "layout torch.sparse_coo"),
    ):
        with pytest.raises(ValueError, match=f"^{op}: {name} must be a dense tensor, got {what}"):
            call(op, **{name: bad})


def test_one_row_of_modulation_is_not_broadcast_in_silence():
    with pytest.raises(ValueError, match=r"shift must have shape \[2, 8\], got \[1, 8\]"):
        call("layernorm_modulate", shift=m[:1])


def test_mode_refuses_unknown_names():
    with pytest.raises(ValueError, match="mode must be one of auto, reference, got 'fast'"), testing.mode("fast"):
        pass


def run(code, **environment):
    base = {name: value for name, value in os.environ.items() if name not in ("SOFLOW_KERNELS", "TRITON_INTERPRET")}
    root = os.path.dirname(os.path.dirname(soflow_kernels.__file__))
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env={**base, "PYTHONPATH": root, **environment}, capture_output=True, text=True, timeout=120
    )


def test_environment_variable_switches_kernels_off():
    code = "import soflow_kernels as k; print(*{s.why for s in k.status().values()})"
    assert run(code, SOFLOW_KERNELS="reference").stdout == "SOFLOW_KERNELS=reference\n"


def test_environment_variable_is_checked():
    result = run("import soflow_kernels", SOFLOW_KERNELS="of")
    assert result.returncode == 1
    assert result.stderr.endswith("ValueError: SOFLOW_KERNELS must be one of auto, reference, got 'of'\n")


def test_without_triton_the_references_run():
    code = """
import sys
sys.modules["triton"] = None  # makes the import fail
import torch, soflow_kernels as k
x, m = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 8)
k.gate_residual_layernorm_modulate(x, x, m, m, m)[1].sum().backward()
k.bias_gelu(x, m[0]).sum().backward()
print(x.grad.shape, *{s for s in k.status().values()})
"""
    result = run(code)
    assert result.stderr == ""
    assert result.stdout == ("torch.Size([2, 3, 8]) Status(kernel=False, why='triton is not installed')\n")


class Looking(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class LookingAtFunctions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


LISTENERS = {
    "autograd": torch.enable_grad,
    "a dispatch mode": Looking,
    "a function mode": LookingAtFunctions,
    "a profiler": torch.autograd.profiler.profile,
}


@pytest.mark.parametrize("op", [op for op in GOOD if op != "linear_gelu"])
def test_the_dispatcher_is_left_out_where_nobody_listens(op, device, launches, monkeypatch):
    """The kernel runs all the same, with the same result."""
    calls, plain = [], CustomOpDef.__call__
    monkeypatch.setattr(CustomOpDef, "__call__", lambda self, *given: calls.append(self) or plain(self, *given))
    arguments = on(device, op)
    with torch.no_grad():
        want = call(op, **arguments)
        made = launches.count
        assert made and not calls
        for name, listener in LISTENERS.items():
            with listener():
                got = call(op, **arguments)
            assert len(calls) == 1, name
            torch.testing.assert_close(got, want, rtol=0, atol=0)
            calls.clear()
        got = call(op, **{name: value.as_subclass(Plain) for name, value in arguments.items()})
        assert len(calls) == 1
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert launches.count == (2 + len(LISTENERS)) * made


def unusual(tensor):
    """Tensors of the type Tensor whose memory is not what they stand for, with the values that they have."""
    negated = torch._neg_view(tensor)
    yield "negated", negated, -tensor
    yield (
        "zero without memory",
        torch._efficientzerotensor(tensor.shape, device=tensor.device),
        torch.zeros_like(tensor),
    )


@pytest.mark.parametrize("op", [op for op in GOOD if op != "linear_gelu"])
def test_tensors_that_are_not_their_memory_are_understood(op, device):
    for name in GOOD[op]:
        for what, value, true in unusual(on(device, op)[name]):
            with torch.no_grad():
                want = getattr(soflow_kernels, f"{op}_reference")(**{**on(device, op), name: true})
                got = call(op, **{**on(device, op), name: value})
            torch.testing.assert_close(got, want, msg=lambda text, name=name, what=what: f"{name} {what}: {text}")


def test_numbers_of_other_types_are_converted(device):
    arguments = on(device, "layernorm_modulate")
    want = soflow_kernels.layernorm_modulate(**arguments, eps=1e-6)
    for eps in (np.float32(1e-6), torch.tensor(1e-6)):
        with torch.no_grad():
            got = soflow_kernels.layernorm_modulate(**arguments, eps=eps)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("op", [op for op in GOOD if op != "linear_gelu"])
def test_batches_of_gradients(op, device):
    """As in a vectorised Jacobian: grad mode is off in the backward, and the gradients are batches of vmap."""
    arguments = {name: value.double().requires_grad_() for name, value in on(device, op).items()}
    single = {name: value.float().detach().requires_grad_() for name, value in arguments.items()}

    def first(out):
        return out[1] if isinstance(out, tuple) else out

    want = first(getattr(soflow_kernels, f"{op}_reference")(**arguments))
    got = first(call(op, **single))
    batch = torch.randn(3, *got.shape, generator=torch.Generator().manual_seed(0)).to(device)
    exact = torch.autograd.grad(want, list(arguments.values()), batch.double(), is_grads_batched=True)
    found = torch.autograd.grad(got, list(single.values()), batch, is_grads_batched=True)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5)


def test_a_limit_on_registers_is_nvidias(monkeypatch):
    """The compiler for other GPUs knows no such option, and refuses it."""
    for hip, kept in ((None, {"num_warps": 4, "maxnreg": 96}), ("6.4", {"num_warps": 4})):
        monkeypatch.setattr(torch.version, "hip", hip)
        with _dispatch.recording() as launches:
            _dispatch.launch(None, (1,), torch.zeros(1), num_warps=4, maxnreg=96)
        assert launches[0][2] == kept

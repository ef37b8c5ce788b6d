"""What a test of a kernel needs, ours or yours: shapes, awkward memory layouts, poisoned memory, and the tolerance."""

import contextlib

import torch
from torch._library.custom_ops import OPDEFS

from soflow_kernels._dispatch import INTERPRETED, as_on_gpu, launches_dropped, mode, recording, triton

__all__ = [
    "INTERPRETED",
    "LAYOUTS",
    "SHAPES",
    "as_on_gpu",
    "assert_matches",
    "device",
    "grads",
    "launches_dropped",
    "launches_of",
    "lay_out",
    "mode",
    "poisoned",
    "triton",
]

# (B, T, D): every width, token count and batch size that is special to a kernel (one segment or two, padded or not, odd
# widths that no vector load fits, the shipped 768, 1024 and 1152), in few programs: the interpreter runs about 400 a
# second.
SHAPES = (
    (3, 2, 1),
    (1, 256, 64),
    (3, 63, 72),
    (3, 3, 100),
    (2, 3, 384),
    (1, 3, 768),
    (2, 2, 1000),
    (3, 1, 1024),
    (2, 3, 1152),
    (1, 2, 4608),
    (0, 3, 72),
)
LAYOUTS = ("contiguous", "chunk", "expanded", "misaligned", "transposed")


def device():
    """Where kernels run in this process: the GPU, or the CPU under Triton's interpreter; None: they do not run."""
    if triton is None:
        return None
    return "cuda" if torch.cuda.is_available() else "cpu" if INTERPRETED else None


def lay_out(tensor, layout):
    """The same values ("expanded": of the first sample in all) in another memory layout."""
    if layout == "chunk":  # a view into a wider tensor, as the six parts of one modulation tensor are
        return torch.cat([torch.full_like(tensor, torch.nan), tensor], dim=-1).chunk(2, dim=-1)[1]
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape) if tensor.shape[0] else tensor
    if layout == "misaligned":  # no vector load fits
        flat = tensor.new_empty(tensor.numel() + 1)
        flat[1:] = tensor.flatten()
        return flat[1:].view(tensor.shape)
    if layout == "transposed":  # a strided last dimension
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if tensor.dim() > 1 else tensor
    return tensor.contiguous()


@contextlib.contextmanager
def poisoned():
    """Within the context, fresh memory holds NaN: an element that a kernel does not write shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor):
        return tensor.fill_(torch.nan) if tensor.dtype.is_floating_point else tensor

    torch.empty = lambda *args, **kwargs: poison(empty(*args, **kwargs))
    torch.empty_like = lambda *args, **kwargs: poison(empty_like(*args, **kwargs))
    try:
        yield
    finally:
        torch.empty, torch.empty_like = empty, empty_like


def grads(function, tensors, weights):
    """The outputs of `function(**tensors)` and the gradients of the sum of outputs times `weights`, by name.

    tensors: {name: tensor}, every one differentiated; weights: one tensor an output, None to leave that output unused.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    used = [(out, weight.to(out.dtype)) for out, weight in zip(outputs, weights, strict=True) if weight is not None]
    found = torch.autograd.grad([out for out, _ in used], list(leaves.values()), [weight for _, weight in used])
    named = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    return named | {f"gradient of {name}": grad for name, grad in zip(leaves, found, strict=True)}


def assert_matches(actual, eager, exact, beside=None):
    """Hold a kernel's results against PyTorch's in the same dtype and against the float64 truth, all {name: tensor}.

    An element may be off by 1.5 times the largest error of eager PyTorch, plus one unit in its own last place (2^-7
    relative for bfloat16: the interpreter truncates where a GPU rounds), plus one float32 unit of the largest element,
    since sums may be taken in another order. beside: {name: what its elements may be off by besides}.
    """
    for name, want in exact.items():
        got, eager_error = actual[name], (eager[name].double() - want.double()).abs()
        assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        assert got.dtype == eager[name].dtype, f"{name}: {got.dtype}, expected {eager[name].dtype}"
        if want.numel() == 0:
            continue
        error = (got.double() - want.double()).abs()
        size = want.double().abs()
        unit = torch.finfo(torch.float32).eps * size.max() + torch.finfo(got.dtype).eps * size
        bound = 1.5 * eager_error.max() + unit + (beside or {}).get(name, 0.0)
        worst = (error - bound).argmax()
        assert (error <= bound).all(), (
            f"{name}: {int((~(error <= bound)).sum())} of {error.numel()} elements off; "
            f"the worst by {error.flatten()[worst]:.3g}, allowed {bound.flatten()[worst]:.3g} "
            f"(eager PyTorch: at most {eager_error.max():.3g})"
        )


def launches_of(operation, *args, **kwargs):
    """What a library operation launches on tensors without data: [(name of the kernel, the tensors that it is given)].

    operation: as "soflow::bias_gelu". Its own code runs, with every launch noted instead of made. An operation that
    reads addresses (`soflow::adamw_ema`) cannot be asked.
    """
    run = OPDEFS[operation]._init_fn
    with recording() as found:
        run(*args, **kwargs)
    return [(kernel.__name__, [a for a in given if isinstance(a, torch.Tensor)]) for kernel, given, _ in found]

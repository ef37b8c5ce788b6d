"""A batch of no samples, and samples of no tokens, go through every operation, forward and backward: the kernels give
what the references give, and sums over nothing are 0."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import soflow_kernels as k
from soflow_kernels import testing
from soflow_kernels.adaln import adaln_bwd, adaln_fwd
from soflow_kernels.gelu import bias_gelu_backward

D = 24
Case = tuple[Callable[..., Tensor | tuple[Tensor, ...]], list[Tensor]]


def trained(B: int, T: int, device: str) -> dict[str, Case]:
    """{operation: (function, the tensors to differentiate in)} for B samples of T tokens or image rows."""

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, device=device)

    x, m, b, t, image = ones(B, T, D), ones(B, D), ones(D), ones(B), ones(B, T, 4)
    heads = ones(B, T, 2, D)
    none = t[:0]  # times have no tokens: always a batch of no samples
    weights = [ones(D, 16), ones(D), ones(D, D), ones(D)]
    return {
        "layernorm_modulate": (k.layernorm_modulate, [x, m, m]),
        "gate_residual_layernorm_modulate": (
            lambda x, y, gate, shift, scale, bias: k.gate_residual_layernorm_modulate(
                x, y, gate, shift, scale, bias=bias
            ),
            [x, x, m, m, m, b],
        ),
        "gate_residual": (k.gate_residual, [x, x, m, b]),
        "rmsnorm_modulate": (k.rmsnorm_modulate, [x, m, m, b]),
        "gate_residual_rmsnorm_modulate": (k.gate_residual_rmsnorm_modulate, [x, x, m, m, m, b]),
        "bias_gelu": (k.bias_gelu, [x, b]),
        "linear_gelu": (k.linear_gelu, [x, ones(16, D), ones(16)]),
        "path_point": (lambda x0, x1: k.path_point(x0, x1, t), [image, image]),
        "euler_lookahead": (lambda x_t, v_t: k.euler_lookahead(x_t, v_t, t, t, image, image), [image, image]),
        "flow_matching_loss": (lambda output: k.flow_matching_loss(output, image, t)[0], [image]),
        "consistency_loss": (lambda output: k.consistency_loss(output, image, image, image, t, t, t)[0], [image]),
        "dual_time_embedding": (
            lambda *w: k.dual_time_embedding(none, none, none.long(), w[:4], w[4:8], w[8]),
            [*weights, *weights, ones(4, D)],
        ),
        "qk_rms_norm": (k.qk_rms_norm, [heads, heads, b, b]),
        "adaln_fwd, adaln_bwd": (AdaLN.apply, [x, x, m, m, m, b]),
        "bias_gelu_backward": (BiasGELU.apply, [x, b]),
    }


class AdaLN(torch.autograd.Function):
    """The node that `adaln_fwd` and `adaln_bwd` are made for."""

    @staticmethod
    def forward(ctx, x, y, gate, shift, scale, bias):
        made = adaln_fwd(x, y, gate, shift, scale, bias=bias)
        ctx.save_for_backward(made.sum, y, gate, scale, bias, made.mean, made.rstd)
        return made.sum, made.out

    @staticmethod
    def backward(ctx, dsum, dout):
        return tuple(adaln_bwd(dout, dsum, *ctx.saved_tensors))


class BiasGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias):
        ctx.save_for_backward(x, bias)
        return k.bias_gelu(x, bias)

    @staticmethod
    def backward(ctx, dout):
        dx, dbias, out = bias_gelu_backward(dout, *ctx.saved_tensors)
        assert out.shape == dx.shape
        return dx, dbias


def untrained(B: int, T: int, device: str) -> dict[str, Callable[[], Tensor | tuple[Tensor, ...]]]:
    """{operation: call} for the operations on pairs, which have no gradient."""

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, device=device)

    x, m, none, heads = ones(2, B, T, D), ones(2, B, D), ones(0), ones(2, B, 2, T, 8)
    return {
        "layernorm_modulate_increment": lambda: k.layernorm_modulate_increment(x, m, m),
        "gate_residual_layernorm_modulate_increment": lambda: k.gate_residual_layernorm_modulate_increment(
            x[0], x[1], x, m, m, m
        ),
        "bias_gelu_increment": lambda: k.bias_gelu_increment(x, ones(D)),
        "silu_increment": lambda: k.silu_increment(x),
        "time_embedding_increment": lambda: k.time_embedding_increment(none, none, none),
        "attention_increment": lambda: k.attention_increment(heads, heads, heads),
        "qk_rms_norm_increment": lambda: k.qk_rms_norm_increment(heads, heads, ones(8), ones(8)),
    }


def test_every_operation_is_here() -> None:
    here = trained(0, 0, "cpu").keys() | untrained(0, 0, "cpu").keys()
    updates = {"adamw_ema"}  # below: it returns nothing
    assert set(k.status()) - updates <= here


def both(call: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    with testing.poisoned():
        got = call()
    with testing.mode("reference"):
        return got, call()


sizes = pytest.mark.parametrize(("B", "T"), [(0, 3), (2, 0)], ids=["no samples", "no tokens"])


@sizes
@pytest.mark.parametrize("op", trained(0, 0, "cpu"))
def test_forward_and_backward(op: str, B: int, T: int, device: str) -> None:
    function, leaves = trained(B, T, device)[op]
    names = {str(i): leaf for i, leaf in enumerate(leaves)}
    outputs = function(*leaves)
    weights = [torch.ones_like(out) for out in (outputs if isinstance(outputs, tuple) else (outputs,))]
    got, wanted = both(lambda: testing.grads(lambda **given: function(*given.values()), names, weights))
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0, equal_nan=True)
        if name.startswith("gradient"):
            assert not value.any(), name


@sizes
@pytest.mark.parametrize("op", untrained(0, 0, "cpu"))
def test_pairs(op: str, B: int, T: int, device: str) -> None:
    def call() -> dict[str, Tensor]:
        out = untrained(B, T, device)[op]()
        return {str(i): value for i, value in enumerate(out if isinstance(out, tuple) else (out,))}

    got, wanted = both(call)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0)
        assert value.numel() == 0


@pytest.mark.parametrize("how", ["auto", "reference"])
def test_an_update_of_nothing(how: str, device: str) -> None:
    """No tensors, or one tensor of no elements among others."""
    lr = torch.tensor(0.1, device=device)
    with testing.mode(how):
        k.adamw_ema([], [], [], [], [], lr)
        lists = [[torch.ones(n, device=device) for n in (0, 5)] for _ in range(4)]
        k.adamw_ema(*lists, [torch.tensor(1.0, device=device) for _ in range(2)], lr)
    assert lists[0][0].numel() == 0 and (lists[0][1] < 1).all()

"""Tensors that wrap others: every operation follows them by its reference, or refuses them by name; none is read as if
it were plain."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

import soflow_kernels as k

B, D = 3, 8


def images(n: int) -> list[torch.Tensor]:
    return list(torch.randn(n, B, D, generator=torch.Generator().manual_seed(0)))


t = torch.tensor([0.9, 0.5, 0.7])
l, s = 0.9 * t, 0.1 * t
pairs = torch.randn(2, 2, 3, 4, D, generator=torch.Generator().manual_seed(1))
rows = torch.randn(3, 2, 3, D, generator=torch.Generator().manual_seed(2))
weights = [torch.randn(shape, generator=torch.Generator().manual_seed(3)) for shape in ((D, 16), (D,), (D, D), (D,))]
FOLLOWED = {
    "path_point": (*images(2), t),
    "euler_lookahead": (*images(2), t, l, images(3)[2]),
    "consistency_loss": (*images(4), t, l, s),
    "flow_matching_loss": (*images(2), t, images(3)[2]),
    "silu_increment": (rows[0],),
    "bias_gelu_increment": (pairs[0], rows[0, 0, 0]),
    "layernorm_modulate_increment": (pairs[0], *rows[:2]),
    "gate_residual_layernorm_modulate_increment": (*pairs[0], pairs[1], *rows),
    "attention_increment": (pairs[:, :1],) * 3,
    "rmsnorm_modulate": (pairs[0, 0], rows[0, 0], rows[1, 0], rows[2, 0, 0]),
    "gate_residual_rmsnorm_modulate": (*pairs[:, 0], *rows[:, 0], rows[0, 1, 0]),
    "qk_rms_norm": (*pairs, *rows[0, 0, :2]),
    "qk_rms_norm_increment": (pairs[:, :1], pairs[:, 1:], *rows[0, 0, :2]),
}
REFUSED = {
    "dual_time_embedding": (t, s, None, weights, weights, torch.randn(4, D)),
    "time_embedding_increment": (t, l, s),
}


@pytest.fixture(scope="module")
def wrap() -> Iterator[Callable[[torch.Tensor], DTensor]]:
    """`wrap(tensor)`: a DTensor of a mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield lambda tensor: distribute_tensor(tensor, mesh, [Replicate()])
    dist.destroy_process_group()


@pytest.mark.parametrize("op", FOLLOWED)
def test_distributed_tensors_are_followed(op: str, wrap: Callable[[torch.Tensor], DTensor]) -> None:
    wanted = getattr(k, f"{op}_reference")(*FOLLOWED[op])
    got = getattr(k, op)(*map(wrap, FOLLOWED[op]))
    outs, references = ((v if isinstance(v, tuple) else (v,)) for v in (got, wanted))
    for out, reference in zip(outs, references, strict=True):
        assert isinstance(out, DTensor)
        assert torch.equal(out.full_tensor(), reference)


@pytest.mark.parametrize("op", REFUSED)
def test_distributed_times_are_refused_by_name(op: str, wrap: Callable[[torch.Tensor], DTensor]) -> None:
    names = {"dual_time_embedding": ("t", "s"), "time_embedding_increment": ("t", "dt", "s")}
    for i, name in enumerate(names[op]):
        given = list(REFUSED[op])
        given[i] = wrap(given[i])
        with pytest.raises(ValueError, match=f"^{op}: {name} must be a plain tensor, got DTensor"):
            getattr(k, op)(*given)


def test_a_mixture_is_refused(wrap: Callable[[torch.Tensor], DTensor]) -> None:
    x0, x1 = images(2)
    with pytest.raises(ValueError, match="path_point: x1 must be a DTensor, as the first argument is, got a plain one"):
        k.path_point(wrap(x0), x1, t)


def test_gradients_of_distributed_tensors(wrap: Callable[[torch.Tensor], DTensor]) -> None:
    """The losses too, whose plain backward is a stored direction."""
    for op in ("consistency_loss", "flow_matching_loss"):
        output, *others = FOLLOWED[op]
        plain = output.clone().requires_grad_()
        wrapped = wrap(output).requires_grad_()
        (wanted,) = torch.autograd.grad(getattr(k, op)(plain, *others)[0], plain)
        (got,) = torch.autograd.grad(getattr(k, op)(wrapped, *map(wrap, others))[0], wrapped)
        torch.testing.assert_close(got.full_tensor(), wanted)

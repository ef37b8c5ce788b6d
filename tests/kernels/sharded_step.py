"""A step of AdamWEMA on a sharded model against the same on a whole one: run by `test_adamw_sharded`, in two processes.

TRITON_INTERPRET=1 python sharded_step.py RANK FILE
"""

import copy
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from soflow_kernels import AdamWEMA, adamw, clip_scale

HYPER = {"lr": 3e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def refused(message, **settings):
    try:
        AdamWEMA(**settings)
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"not refused: {message}")


def compare(mesh, dtype):
    torch.manual_seed(0)
    # The last layer has one row: the second process holds nothing of it.
    plain = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)
    sharded = copy.deepcopy(plain)
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh)
    launches, plain_launch = [], adamw.launch
    adamw.launch = lambda *a, **k: launches.append(a[0]) or plain_launch(*a, **k)
    optimizers, emas = [], []
    for model in (plain, sharded):
        params = list(model.parameters())
        emas.append([p.detach().float().clone() for p in params])
        optimizers.append(AdamWEMA(params, **HYPER, emas=[emas[-1]], ema_decays=[0.5]))
    assert all(isinstance(m, DTensor) for m in optimizers[1].masters)
    for k in range(2):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(k)).to(dtype)
        for model, optimizer in zip((plain, sharded), optimizers, strict=True):
            model(x).float().square().mean().backward()
            # The norm of a norm is rounded in another way, in bfloat16 too much for a comparison.
            grads = [p.grad.float() for p in model.parameters()]
            scale, finite = clip_scale(torch.nn.utils.get_total_norm(grads), 0.1)
            if dtype == torch.bfloat16:
                scale = torch.full_like(scale, 0.5)
            before = len(launches)
            optimizer.step(grad_scale=scale, finite=finite)
            assert len(launches) > before
            optimizer.zero_grad()
    masters = [o.masters for o in optimizers]
    moments = [[o.state[p]["exp_avg"] for p in o.param_groups[0]["params"]] for o in optimizers]
    for got, wanted in ((sharded.parameters(), plain.parameters()), masters[::-1], emas[::-1], moments[::-1]):
        for a, b in zip(got, wanted, strict=True):
            assert isinstance(a, DTensor) and a.dtype == b.dtype
            tolerance = 0 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(whole(a), b, rtol=tolerance, atol=tolerance)
    state = optimizers[1].state_dict()
    optimizers[1].load_state_dict(state)
    assert all(isinstance(entry["exp_avg"], DTensor) for entry in state["state"].values())
    p = next(sharded.parameters())
    master = p.detach().float()
    refused("emas[0][0] must be placed", params=[p], emas=[[whole(master)]], ema_decays=[0.5])
    other = distribute_tensor(whole(master), mesh, [Replicate()])
    refused("emas[0][0] must be placed", params=[p], emas=[[other]], ema_decays=[0.5])


def main(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for dtype in (torch.float32, torch.bfloat16):
        compare(mesh, dtype)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

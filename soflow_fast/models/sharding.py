"""The network cut over ranks by FSDP2, block by block."""

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


def shard(network, mesh, *, blocks, reduce):
    for b in network.blocks:
        fully_shard(
            b,
            mesh=mesh,
            mp_policy=MixedPrecisionPolicy(param_dtype=blocks, reduce_dtype=reduce, cast_forward_inputs=False),
            reshard_after_forward=True,
        )
    fully_shard(
        network.final_layer.adaLN_modulation,
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(param_dtype=blocks, reduce_dtype=reduce, cast_forward_inputs=False),
        reshard_after_forward=True,
    )
    fully_shard(
        network,
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
        reshard_after_forward=True,
    )

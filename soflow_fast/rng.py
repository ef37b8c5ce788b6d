"""Every random draw is a pure function of (seed, step, rank, purpose).

Exact resume then needs the integer step and nothing else, and a run may be restarted anywhere.
"""

import hashlib

import torch


def generator(seed: int, step: int, rank: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on `device` for one purpose ("noise", "time", ...) of one step on one rank.

    Distinct arguments give statistically independent streams: the four are hashed (BLAKE2b) into the 63-bit seed.
    A CPU and a CUDA generator of the same arguments give different numbers.
    """
    key = f"{int(seed)}/{int(step)}/{int(rank)}/{purpose}".encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    source = torch.Generator(device=device)
    source.manual_seed(int.from_bytes(digest, "little") >> 1)
    return source

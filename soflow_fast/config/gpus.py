"""GPUs for predictions: memory, and rates at which they are assumed to work.

Products in bf16, attention and copies of the H200 are what kernels reached in whole steps at a batch of 256 (record
2026-11-26-timeline-nvidia-h200): products 77 % of one alone, which the card's power holds back in a step, and the rest
78 % of a large copy. The H100, the same chip with slower memory, is assumed to do as well, and the A100 in proportion.
All else is assumption: what libraries are known to reach in large shapes, below the peaks of NVIDIA's data sheets,
which stand beside them. Products of the sizes of a DiT-XL/2 at a batch of 256 fill a GPU; smaller ones do not, and then
a prediction is too short. Links are those of servers with NVSwitch and an InfiniBand adapter for each GPU; latencies
are near those by which NCCL chooses among its algorithms (src/graph/tuning.cc, LL128).
"""

from dataclasses import dataclass

GIB = 2**30
GIGA = 1e9
TERA = 1e12


@dataclass(frozen=True)
class Gpu:
    """What is assumed of one GPU."""

    title: str
    memory: int
    """Bytes."""
    copy: float
    """Bytes a second, read and written, of kernels beside products and attention."""
    products: dict[str, float]
    """FLOP/s of products, by the precision of their operands; what is not there runs at the rate of bf16."""
    attention: float
    attention_backward: float
    """FLOP/s."""
    nvlink: float
    """Bytes a second that a GPU sends to others of its node, while it receives as many."""
    network: float
    """The same to other nodes, by its own adapter."""
    launch: float = 2e-6
    """Seconds that a kernel takes at least, one after another."""
    collective: float = 14e-6
    """Seconds that a collective takes beside its bytes and hops."""
    nvlink_hop: float = 2e-6
    """Seconds from one GPU of a ring to the next of the same node."""
    network_hop: float = 5e-6
    """Seconds from a GPU to one of another node."""


@dataclass(frozen=True)
class Host:
    """Seconds that the host is assumed to take for what it dispatches. They differ between machines by a factor."""

    dispatch: float = 8e-6
    """An operation of torch, views included, with what Python and autograd do for it."""
    launch: float = 2.5e-6
    """A kernel of torch."""
    operation: float = 13e-6
    """An operation of ours, its checks included."""
    kernel: float = 8e-6
    """A Triton kernel."""
    exchange: float = 300e-6
    """What FSDP2 does around the gathering or the reduction of one block: hooks, streams, copies, their launches."""


GPUS = {
    # Peaks: 989 TFLOP/s in bf16, 1979 in float8, 494 in TF32, 67 in float32, 3.35 TB/s; NVLink 450 GB/s each way,
    # 400 Gbit/s InfiniBand.
    "h100": Gpu(
        title="H100 SXM, 80 GB",
        memory=80 * GIB,
        copy=2.3 * TERA,
        products={"bf16": 640 * TERA, "fp8": 1300 * TERA, "tf32": 380 * TERA, "fp32": 50 * TERA},
        attention=250 * TERA,
        attention_backward=160 * TERA,
        nvlink=360 * GIGA,
        network=45 * GIGA,
    ),
    # The same peaks of products and links, and 4.8 TB/s; less held back by its power.
    "h200": Gpu(
        title="H200 SXM, 141 GB",
        memory=141 * GIB,
        copy=3.3 * TERA,
        products={"bf16": 660 * TERA, "fp8": 1450 * TERA, "tf32": 380 * TERA, "fp32": 50 * TERA},
        attention=250 * TERA,
        attention_backward=160 * TERA,
        nvlink=360 * GIGA,
        network=45 * GIGA,
    ),
    # Peaks: 312 TFLOP/s in bf16, 156 in TF32, 19.5 in float32, 2.04 TB/s; no float8; NVLink 300 GB/s each way, 200
    # Gbit/s InfiniBand.
    "a100": Gpu(
        title="A100 SXM, 80 GB",
        memory=80 * GIB,
        copy=1.25 * TERA,
        products={"bf16": 250 * TERA, "tf32": 125 * TERA, "fp32": 17 * TERA},
        attention=170 * TERA,
        attention_backward=130 * TERA,
        nvlink=230 * GIGA,
        network=22 * GIGA,
    ),
}
"""By the name that `--gpu` takes."""

"""`--dry-run --gpus N`: what a run would need on many GPUs, and how fast it would be. Makes no step, writes nothing."""

from ..config.gpus import GIGA, GPUS, TERA, Gpu, Host
from ..config.schema import NOTHING_LEFT, Config, DataChoices
from ..runs.progress import duration
from ..training.memory_estimate import USABLE
from ..training.plan import Cluster, PhasePlan, Plan, plan
from .dry_run import with_data

FIRST_LINE = "Predicted by arithmetic from stated rates; nothing of this was measured."


def predict(config: Config, gpu: str, gpus: int, nodes: int = 1, choices: DataChoices = NOTHING_LEFT) -> str:
    """The text that `--dry-run --gpus` prints for `nodes` nodes of `gpus` GPUs each. gpu: one of `GPUS`.

    Raises UserError as a run would, and ConfigError for what cannot be laid out so.
    """
    return said_of(plan(with_data(config, choices)[0], Cluster(gpu, gpus, nodes)))


def said_of(found: Plan) -> str:
    """A prediction as lines of text."""
    gpu = GPUS[found.cluster.gpu]
    text = "\n".join(f"{name:<13} {value}" for name, value in _rows(found))
    return f"{FIRST_LINE}\n{text}\n\n{_table(found)}\n{_assumed(gpu, Host())}"


def _rows(found: Plan) -> list[tuple[str, str]]:
    cluster, config, memory, step = found.cluster, found.config, found.memory, found.step
    gpu, model, whole = GPUS[cluster.gpu], config.model, step.whole
    where = f"{cluster.nodes} nodes of {cluster.gpus}" if cluster.nodes > 1 else "one node"
    cut = f", the state cut over {found.where.shards.size}" if config.run.parallel != "ddp" else ""
    if cut and found.where.replicas.size > 1:
        cut += f", {found.where.replicas.size} times"
    micro = f" in {found.micro_batches} micro-batches" if found.micro_batches > 1 else ""
    parts = ", ".join(f"{name} {size / GIGA:.2f}" for name, size in memory.parts().items() if size)
    usable = f"{'fits' if found.fits else 'does not fit'} the {USABLE * gpu.memory / GIGA:.1f} GB that are usable"
    host = "none, as a CUDA graph" if step.graph else f"{1e3 * step.host:.4g}"
    seconds = (whole.compute, whole.seconds - whole.compute, step.seconds)
    compute, links, all_in_all = (f"{1e3 * value:.4g}" for value in seconds)
    sent = _size(whole.traffic.nvlink), _size(whole.traffic.network)
    return [
        ("on", f"{cluster.ranks} x {gpu.title}: {where}; {config.run.parallel}{cut}"),
        (
            "preset",
            f"{config.preset}: {model.words}; {found.precision}"
            + ("; fp8 is counted as bf16" if "fp8" in (config.precision, config.guidance_precision) else ""),
        ),
        ("parameters", f"{found.parameters / 1e6:.2f} M"),
        ("each GPU", f"{found.share} of {config.batch_size} images a step{micro}; recompute {config.run.recompute}"),
        ("memory", f"{memory.peak / GIGA:.2f} GB at its peak, {usable}: {parts}"),
        ("links", f"each GPU sends {sent[0]} by NVLink and {sent[1]} by the network in a step"),
        ("step", f"{all_in_all} ms: the longer of GPU {compute} and links beyond that {links}, and host {host}"),
        (
            "speed",
            f"{found.images_per_second:.4g} images/s, {found.efficiency:.1%} of {cluster.ranks} GPUs that each compute "
            f"their {found.share} alone",
        ),
        ("time needed", f"{duration(step.seconds * config.steps)} for {config.steps} steps"),
    ]


def _size(size: float) -> str:
    """Bytes in GB, small numbers in MB."""
    return f"{size / GIGA:.2f} GB" if size >= 0.1 * GIGA else f"{size / 1e6:.2f} MB"


def _table(found: Plan) -> str:
    """The parts of the step."""
    head = f"{'':<10}{'gathers':>9}{'NVLink GB':>11}{'network GB':>12}{'GPU ms':>9}{'with links ms':>15}"
    return "\n".join([head, *(_line(*row) for row in (*found.step.phases.items(), ("step", found.step.whole)))])


def _line(name: str, part: PhasePlan) -> str:
    sent = part.traffic
    return (
        f"{name:<10}{part.gathers:>9}{sent.nvlink / GIGA:>11.3f}{sent.network / GIGA:>12.3f}{1e3 * part.compute:>9.2f}"
        f"{1e3 * part.seconds:>15.2f}"
    )


def _assumed(gpu: Gpu, host: Host) -> str:
    """The rates behind it, but for those of one GPU and its host, which `--gpu` alone shows."""
    return (
        f"Assumed of a GPU: {gpu.nvlink / GIGA:g} GB/s to others of its node and {gpu.network / GIGA:g} GB/s to other "
        f"nodes, each way; {1e6 * gpu.collective:g} us a collective,\n{1e6 * gpu.nvlink_hop:g} us a hop by NVLink and "
        f"{1e6 * gpu.network_hop:g} by the network; products in bf16 {gpu.products['bf16'] / TERA:g} TFLOP/s, copies "
        f"{gpu.copy / TERA:g} TB/s;\nof the host: {1e6 * host.exchange:g} us for what FSDP2 does around gathering or "
        "reducing a block. The rest is what --gpu without --gpus says."
    )

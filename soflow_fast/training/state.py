"""What training changes: network, its averages, optimiser, step."""

import copy
from dataclasses import dataclass

import torch

from ..config.schema import Config
from ..config.validation import validate
from ..errors import ConfigError
from ..flow import SolutionFlow
from ..models import float8
from ..models.dit import DiT
from ..objective import Objective
from ..rng import generator
from .consistency_target import Quotient, resolve_quotient
from .cuda_graph import Captured
from .nonfinite import Guard
from .optimizer import Optimizer, build_optimizer


@dataclass
class TrainState:
    """One training run in memory. `step` updates have been made; the next one is number `step`."""

    config: Config
    flow: SolutionFlow
    ema: SolutionFlow
    optimizer: Optimizer
    """Updates the averages as well: `ema`, then `teacher` if there is one."""
    objective: Objective
    device: torch.device
    precision: str
    """"fp32", "tf32", "bf16" or "fp8": what `config.precision` resolved to on this device."""
    quotient: Quotient
    guard: Guard
    """Lets an update happen or not."""
    teacher: SolutionFlow | None = None
    """The average of the weights behind the consistency target, if it is not the student's own."""
    captured: Captured | None = None
    """What a step does on the device, as a CUDA graph."""
    step: int = 0
    rank: int = 0
    world: int = 1

    @classmethod
    def build(cls, config: Config, *, rank: int = 0, world: int = 1) -> "TrainState":
        """Network, EMA and optimiser at step 0, initialised from `config.seed`.

        Raises ConfigError naming a wrong field.
        """
        try:
            validate(config)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if config.batch_size % world:
            raise ConfigError(f"batch_size must be a multiple of the {world} ranks, got {config.batch_size}")
        device = resolve_device(config.run.device)
        if config.run.cuda_graph and device.type != "cuda":
            raise ConfigError(f"--cuda-graph: needs a GPU, the device is {device.type}")
        precision = resolve_precision(config.precision, device)
        quotient = resolve_quotient(config, precision, device)
        flow = build_flow(config)
        values = flow.state_dict()  # `to_empty` would do, but it imports sympy for its work on the meta device
        flow.load_state_dict({k: torch.empty(v.shape, dtype=v.dtype) for k, v in values.items()}, assign=True)
        flow.network.initialize(generator(config.seed, 0, 0, "initialisation"))  # on the CPU: the same on every device
        flow = flow.to(device)
        ema = copy.deepcopy(flow).requires_grad_(False).eval()
        flow.network.keep_copies(torch.bfloat16 if precision in ("bf16", "fp8") else torch.float32)
        if precision == "fp8":
            float8.require(config.model, device)
            float8.use_float8([layer for block in flow.network.blocks for layer in block.products()])
        flow.network.recompute = config.run.recompute
        teacher = None if quotient.teacher == "student" else copy.deepcopy(ema)
        if config.run.compile:
            for network in (flow.network, *([teacher.network] if teacher else [])):
                network.compile_blocks()
        averages = [average.network for average in (ema, teacher) if average is not None]
        optimizer = build_optimizer(config.run.optimizer, config.optim, flow.network, averages)
        objective = Objective(config.objective)
        guard = Guard(device)  # in a loop of one's own, a step that is refused is left out, and that is all
        return cls(
            config, flow, ema, optimizer, objective, device, precision, quotient, guard, teacher, rank=rank, world=world
        )

    def rides_along(self) -> bool:
        """Whether the values behind the quotient are those of the student's own forward. A forward that keeps little
        for its backward would have to keep them for this."""
        return self.quotient.rides_along(self.precision) and self.flow.network.recompute == "none"

    def sum_gradients_in(self, dtype: torch.dtype | None) -> None:
        """The dtype of the weights' gradients: None, as products with the weights' copies give them, or a wider one in
        which those of several micro-batches are added up."""
        for layer in self.flow.network.copied_layers():
            layer.weight.grad_dtype = layer.bias.grad_dtype = dtype

    def parameter_count(self) -> int:
        """Trained numbers in the network."""
        return sum(p.numel() for p in self.flow.parameters())


def build_flow(config: Config) -> SolutionFlow:
    """The flow of a configuration on the meta device: its weights are still to be loaded or initialised."""
    with torch.device("meta"):
        return SolutionFlow(DiT(config.model), config.flow.path, config.flow.coefficients)


def resolve_device(name: str) -> torch.device:
    """ "auto" -> the GPU if there is one, else the CPU. Raises ConfigError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0].split(". ")[0]
        raise ConfigError(f"--device {name}: {reason}") from None
    if device.type == "meta":
        raise ConfigError(f"--device {name}: holds no data")
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """ "auto" -> bf16 on a GPU that computes in it, else fp32. Raises ConfigError where the device lacks it."""
    if name == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if name == "tf32" and device.type != "cuda":
        raise ConfigError(f"--precision tf32: only NVIDIA GPUs have it, the device is {device.type}")
    return name

"""The state that training changes: network, its averages, optimiser, step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config.schema import Config, ModelConfig
from ..config.validation import validate
from ..errors import ConfigError
from ..flow import SolutionFlow
from ..models import float8, network_of
from ..models.attention import Backend
from ..models.dit import DiT
from ..models.paired_forward import missed_part
from ..objective import Objective
from ..ranks import micro_batches
from ..rng import generator
from .consistency_target import ConsistencyTarget, resolve_target
from .cuda_graph import GraphedFunction, why_not_graphed
from .nonfinite import NonfiniteGuard
from .optimizer import Optimizer, build_optimizer, updated_parameters
from .precision import OPERAND, resolve_device, resolve_precision, round_parameters

if TYPE_CHECKING:
    from .parallel import Engine, Parallel


@dataclass
class TrainState:
    """One training run in memory. `step` updates have been made; the next one is number `step`.

    In a step of bf16 or fp8 the parameters of the blocks are bfloat16 themselves, and the optimiser holds their float32
    masters.
    """

    config: Config
    flow: SolutionFlow
    ema: SolutionFlow
    optimizer: Optimizer
    """Updates the averages as well: `ema`, then `teacher` if there is one."""
    objective: Objective
    device: torch.device
    precision: str
    """"fp32", "tf32", "bf16" or "fp8": `config.precision` on this device."""
    target: ConsistencyTarget
    guard: NonfiniteGuard
    """Lets an update happen or not."""
    teacher: SolutionFlow | None = None
    """The average of the weights behind the consistency target, if it is not the student's own."""
    guide: SolutionFlow | None = None
    """The student with the same parameters and float8 products, for the forward behind guidance."""
    graphed: bool = False
    """Whether steps are made a CUDA graph, after the first of them."""
    graph: GraphedFunction | None = None
    """The part of a step that runs on the device, as a CUDA graph."""
    data: str = ""
    """The identity of the data set, as text that checkpoints keep; empty: not known."""
    step: int = 0
    rank: int = 0
    world: int = 1
    parallel: "Parallel | None" = None
    """The ranks that train together; None: this process alone."""
    engine: "Engine | None" = None
    """What averages gradients over the ranks: `engine.module` is what the forward with gradient calls."""

    @classmethod
    def build(
        cls,
        config: Config,
        *,
        rank: int = 0,
        world: int = 1,
        parallel: "Parallel | None" = None,
        weights: Mapping[str, Tensor] | None = None,
        averages: Mapping[str, Tensor] | None = None,
        resolve_for: torch.device | None = None,
    ) -> "TrainState":
        """Network, EMA and optimiser at step 0, initialised from `config.seed`.

        parallel: the ranks of the run, of which this is one; each builds its state at the same time. rank, world:
        without it, of which samples of the whole batch this state learns.
        weights: the initial weights instead, by the names of `SolutionFlow.state_dict`. averages: those of the EMA,
        None: the same.
        resolve_for: the device that decides about precision and consistency target; None: the one of the run.
        Raises ConfigError naming a wrong field.
        """
        try:
            validate(config)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if parallel is not None:
            rank, world = parallel.rank, parallel.world
        if config.batch_size % world:
            raise ConfigError(f"batch_size must be a multiple of the {world} ranks, got {config.batch_size}")
        device = resolve_device(config.run.device) if parallel is None else parallel.device
        sharded = parallel is not None and parallel.sharded
        if config.run.cuda_graph and device.type != "cuda":
            raise ConfigError(f"--cuda-graph: needs a GPU, the device is {device.type}")
        precision = resolve_precision(config.precision, resolve_for or device)
        graphed = config.run.cuda_graph
        if graphed is None:
            graphed = why_not_graphed(config, precision, device, world) is None
        elif graphed and sharded:
            raise ConfigError(f"--cuda-graph: a step of --parallel {config.run.parallel} cannot be recorded")
        target = resolve_target(config, precision, resolve_for or device)
        if precision == "fp8":
            float8.require(config.dit, device)
        elif config.guidance_precision == "fp8":
            if precision != "bf16":
                raise ConfigError(f"--guidance-precision fp8: the step must be in bf16, it is in {precision}")
            float8.require(config.dit, device, "--guidance-precision")
        low = torch.bfloat16 if precision in ("bf16", "fp8") else None
        reduce_dtype = OPERAND[config.run.reduce_dtype]
        if parallel is not None and sharded:
            check_sharded(config, precision, parallel.world)

        def flow_in(blocks: torch.dtype | None, own: Mapping[str, Tensor] | None = None) -> SolutionFlow:
            nonlocal weights
            if parallel is not None and sharded:
                from .parallel import fill, sharded_flow, whole

                made = sharded_flow(parallel, build_flow(config), blocks, reduce_dtype)
                if weights is None:  # drawn part by part: no rank holds them whole
                    made.network.initialize(initialisation(config), whole)
                    weights = made.state_dict()
                fill(made, weights if own is None else own)
                return made
            if weights is None:
                weights = initial_weights(config)
            values = weights if own is None else own
            return filled_flow(config, {name: value.to(device) for name, value in values.items()})

        # What is drawn is read for the others before anything is rounded or trained.
        flow, ema = flow_in(low), flow_in(None, averages).requires_grad_(False).eval()
        blocks = low if target.rounds_weights else None  # then half as much is gathered
        teacher = None if target.teacher == "student" else flow_in(blocks).requires_grad_(False).eval()
        masters: list[Tensor | None] = [None] * sum(1 for _ in flow.parameters())
        if low is not None and not sharded:  # parts are float32, the masters of what is gathered
            masters = round_parameters(flow.network, flow.network.low_precision_layers(), torch.bfloat16)
        if precision == "fp8":
            float8.use_float8(flow.network)
        guide = None
        if precision == "bf16" and config.guidance_precision == "fp8":
            guide = flow_of(config, float8.float8_twin(flow.network))
        recompute = config.run.recompute
        flow.network.recompute = "none" if recompute in ("auto", "nothing") else recompute
        flow.network.keep_norms = None if recompute == "auto" else recompute == "nothing"
        if config.run.compile:
            for network in (flow.network, *([teacher.network] if teacher else [])):
                network.compile_blocks()
        averaged = [average.network for average in (ema, teacher) if average is not None]
        optimizer = build_optimizer(config.run.optimizer, config.optim, flow.network, masters, averaged)
        engine = None
        if parallel is not None:
            from .parallel import Replicated, Sharded

            B = config.batch_size // world
            parts, network = micro_batches(B, config.micro_batch), flow.network
            engine = (
                Sharded(parallel, network) if sharded else Replicated(parallel, network, reduce_dtype, parts, graphed)
            )
        objective = Objective(config.objective, config.model.guidance_range)
        guard = NonfiniteGuard(device)  # in a loop of one's own, a refused step is left out, and that is all
        return cls(
            config,
            flow,
            ema,
            optimizer,
            objective,
            device,
            precision,
            target,
            guard,
            teacher,
            guide,
            graphed,
            rank=rank,
            world=world,
            parallel=parallel,
            engine=engine,
        )

    def rides_along(self) -> bool:
        """Whether the values behind the consistency target are those of the student's own forward. One that keeps
        little for its backward would have to keep them for this, and one whose layers are called does not note them."""
        network = self.flow.network
        return (
            self.target.rides_along(self.precision)
            and network.recompute == "none"
            and missed_part(network, float8=False) is None
        )

    def set_attention(self, backend: Backend) -> None:
        """Let the network, its averages and its guide take an attention, as `DiT.set_attention` does."""
        for flow in (self.flow, self.ema, self.teacher, self.guide):
            if flow is not None:
                flow.network.set_attention(backend)

    def watched(self) -> bool:
        """Whether a module of the network was hooked, replaced or wrapped, so that Python must run in every step."""
        networks = [flow.network for flow in (self.flow, self.teacher, self.guide) if flow is not None]
        return any(isinstance(network, DiT) and missed_part(network) is not None for network in networks)

    def check_parameters(self) -> None:
        """Raise ValueError naming a parameter with gradient that the optimiser does not update."""
        updated = {id(p) for p in updated_parameters(self.optimizer)}
        for name, parameter in self.flow.named_parameters():
            if parameter.requires_grad and id(parameter) not in updated:
                raise ValueError(
                    f"{name} is not a parameter of the optimiser: it was replaced (as by "
                    "load_state_dict(assign=True)) or added; write in place, or set state.optimizer to one with it"
                )

    def sum_gradients_in(self, dtype: torch.dtype | None) -> None:
        """Set the dtype of the gradients of parameters in low precision: None, their own, or a wider one in which those
        of several micro-batches are added up."""
        for parameter in self.flow.parameters():
            if parameter.dtype.itemsize < 4:
                parameter.grad_dtype = dtype or parameter.dtype

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """The network's state dict in float32: masters in place of parameters in low precision."""
        return self.flow.state_dict() | {name: master.detach() for name, master in self._named_masters()}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set masters, parameters and buffers to the float32 `weights`, by the names of `SolutionFlow.state_dict`."""
        self.flow.load_state_dict(weights)
        for name, master in self._named_masters():
            master.copy_(weights[name])

    def _named_masters(self) -> list[tuple[str, Tensor]]:
        """The float32 weight behind each parameter by its name; by the parameter itself, as names may be reordered."""
        behind = dict(zip(map(id, updated_parameters(self.optimizer)), self.optimizer.masters, strict=True))
        return [(name, behind[id(parameter)]) for name, parameter in self.flow.named_parameters()]

    def parameter_count(self) -> int:
        """Trained numbers in the network."""
        return sum(p.numel() for p in self.flow.parameters())


def check_sharded(config: Config, precision: str, world: int) -> None:
    """Raise ConfigError for what does not go with parameters of which each of `world` ranks holds a part."""
    from .parallel import check_shares

    given = f"--parallel {config.run.parallel}"
    if precision == "fp8" or config.guidance_precision == "fp8":
        raise ConfigError(f"{given}: float8 layers are not cut over ranks; give --parallel ddp")
    if config.run.optimizer == "apex":
        raise ConfigError(f"{given}: apex's optimiser does not know parts of parameters; give another --optimizer")
    check_shares(config, world)


def no_conditions(model: ModelConfig, n: int, device: torch.device) -> Tensor:
    """Labels int64 [n], or vectors float32 [n, E] of a model that takes these, all zeros."""
    if model.condition_size:
        return torch.zeros(n, model.condition_size, device=device)
    return torch.zeros(n, dtype=torch.int64, device=device)


def flow_of(config: Config, network: Any) -> SolutionFlow:
    """The flow of a configuration around a network."""
    return SolutionFlow(network, config.flow.path, config.flow.coefficients, config.objective.kind)


def build_flow(config: Config) -> SolutionFlow:
    """The flow of a configuration on the meta device: its weights are still to be loaded or initialised."""
    with torch.device("meta"):
        return flow_of(config, network_of(config.model))


def filled_flow(config: Config, weights: Mapping[str, Tensor]) -> SolutionFlow:
    """The flow of a configuration with a copy of these weights, on their device."""
    flow = build_flow(config)
    flow.load_state_dict({name: value.detach().clone() for name, value in weights.items()}, assign=True)
    return flow


def initial_weights(config: Config) -> dict[str, Tensor]:
    """The weights from which a run begins: a function of its seed, drawn on the CPU, so the same on every device."""
    flow = build_flow(config)
    empty = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in flow.state_dict().items()}
    flow.load_state_dict(empty, assign=True)
    flow.network.initialize(initialisation(config))
    return flow.state_dict()


def initialisation(config: Config) -> torch.Generator:
    """Draws the weights from which a run begins, on the CPU."""
    return generator(config.seed, 0, 0, "initialisation")

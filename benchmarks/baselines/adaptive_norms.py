"""Other people's adaptive layer norms, norm(x) (1 + scale) + shift in one operation, where they are installed.

cuDNN's is a node of its graphs (`pygraph.adalayernorm`, cudnn-frontend 1.12 and cuDNN 9.9 or newer), forward and
backward. Its scale is the whole factor, one for a sample in float32, so 1 + scale and the casts are eager, [B, D] each.
TransformerEngine's is `ops.AdaptiveLayerNorm` of its newest versions; older ones have a layer norm alone, which takes
part among the `norms`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.norms import EPS, Found, found

Adaptive = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x [B, T, D], shift and scale [B, D] -> [B, T, D]."""


def adaptive_norms(device: torch.device) -> Found[Adaptive]:
    """Other people's adaptive layer norms, or why they are not here."""
    engine = "transformer_engine.pytorch.ops"
    return found(
        device,
        {
            "cuDNN adaptive": ("cudnn", "cudnn", "nvidia-cudnn-frontend", _cudnn),
            "TransformerEngine adaptive": ("transformer_engine", engine, "transformer-engine", _transformer_engine),
        },
    )


def gated_residual_norm(norm: Adaptive, x, y, gate, shift, scale, bias) -> tuple[Tensor, Tensor]:
    """`gate_residual_layernorm_modulate` with an adaptive norm; the residual is eager."""
    x = torch.addcmul(x, gate.unsqueeze(1), y + bias)
    return x, norm(x, shift, scale)


def _transformer_engine(module: Any) -> Adaptive:
    made: dict[int, Any] = {}
    make = module.AdaptiveLayerNorm  # an AttributeError says that this version has none

    def adaptive(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        D = x.shape[-1]
        if D not in made:
            made[D] = make(D, eps=EPS)
        return made[D](x, scale, shift)

    return adaptive


def _cudnn(module: Any) -> Adaptive:
    made: dict[tuple, CudnnGraphs] = {}
    assert callable(module.pygraph.adalayernorm)  # an AttributeError says that this version has none

    def adaptive(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        key = x.shape, x.dtype, x.device
        if key not in made:
            made[key] = CudnnGraphs(module, x)
        return _AdaptiveNorm.apply(x, shift, scale, made[key])  # pyright: ignore[reportReturnType]

    return adaptive


class CudnnGraphs:
    """cuDNN's graphs for inputs like x [B, T, D]: forward without and with statistics, and backward."""

    def __init__(self, cudnn: Any, x: Tensor) -> None:
        B, T, D = x.shape
        self.cudnn, self.device, self.handle = cudnn, x.device, cudnn.create_handle()
        self.tokens, self.vectors, self.statistics = (B, T, D), (B, 1, D), (B, T, 1)
        self.epsilon = torch.full((1, 1, 1), EPS)  # by value, from the host
        kinds = {torch.bfloat16: "BFLOAT16", torch.float16: "HALF", torch.float32: "FLOAT"}
        self.kind, self.single = getattr(cudnn.data_type, kinds[x.dtype]), cudnn.data_type.FLOAT
        self.inference = self._forward(cudnn.norm_forward_phase.INFERENCE)
        self.training = self._forward(cudnn.norm_forward_phase.TRAINING)
        self.backward = self._backward()

    def _graph(self) -> Any:
        single = self.single
        return self.cudnn.pygraph(handle=self.handle, intermediate_data_type=single, compute_data_type=single)

    def _tensor(self, graph: Any, name: str, shape: tuple[int, ...], kind: Any, by_value: bool = False) -> Any:
        stride = (shape[1] * shape[2], shape[2], 1)
        return graph.tensor(name=name, dim=shape, stride=stride, data_type=kind, is_pass_by_value=by_value)

    def _forward(self, phase: Any) -> tuple[Any, list[Any], Tensor]:
        graph = self._graph()
        inputs = [
            self._tensor(graph, "x", self.tokens, self.kind),
            self._tensor(graph, "scale", self.vectors, self.single),
            self._tensor(graph, "bias", self.vectors, self.single),
            self._tensor(graph, "epsilon", (1, 1, 1), self.single, by_value=True),
        ]
        names = dict(zip(("input", "scale", "bias", "epsilon"), inputs, strict=True))
        outputs = graph.adalayernorm(name="norm", norm_forward_phase=phase, **names)
        kinds = (self.kind, self.single, self.single)
        wanted = 3 if phase == self.cudnn.norm_forward_phase.TRAINING else 1
        return self._built(graph, inputs, list(zip(outputs, kinds, strict=True))[:wanted])

    def _backward(self) -> tuple[Any, list[Any], Tensor]:
        graph = self._graph()
        inputs = [
            self._tensor(graph, "grad", self.tokens, self.kind),
            self._tensor(graph, "x", self.tokens, self.kind),
            self._tensor(graph, "scale", self.vectors, self.single),
            self._tensor(graph, "mean", self.statistics, self.single),
            self._tensor(graph, "inv_variance", self.statistics, self.single),
        ]
        names = dict(zip(("grad", "input", "scale", "mean", "inv_variance"), inputs, strict=True))
        outputs = graph.adalayernorm_backward(name="backward", **names)
        return self._built(graph, inputs, list(zip(outputs, (self.kind, self.single, self.single), strict=True)))

    def _built(self, graph: Any, inputs: list[Any], outputs: list[tuple[Any, Any]]) -> tuple[Any, list[Any], Tensor]:
        for tensor, kind in outputs:
            tensor.set_output(True).set_data_type(kind)
        graph.build([self.cudnn.heur_mode.A, self.cudnn.heur_mode.FALLBACK])
        workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=self.device)
        return graph, [*inputs, *(tensor for tensor, _ in outputs)], workspace

    def run(self, built: tuple[Any, list[Any], Tensor], *values: Tensor) -> None:
        """Execute a graph on values in the order of its inputs and outputs, on the current stream."""
        graph, tensors, workspace = built
        stream = torch.cuda.current_stream(self.device).cuda_stream
        self.cudnn.set_stream(handle=self.handle, stream=stream)
        graph.execute(dict(zip(tensors, values, strict=True)), workspace, handle=self.handle)


class _AdaptiveNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, graphs: CudnnGraphs) -> Tensor:
        x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        factor, bias = (1 + scale.float()).unsqueeze(1), shift.float().contiguous().unsqueeze(1)
        if not any(ctx.needs_input_grad):
            graphs.run(graphs.inference, x, factor, bias, graphs.epsilon, out)
            return out
        mean, inverse = (x.new_empty(graphs.statistics, dtype=torch.float32) for _ in range(2))
        graphs.run(graphs.training, x, factor, bias, graphs.epsilon, out, mean, inverse)
        ctx.save_for_backward(x, factor, mean, inverse)
        ctx.graphs, ctx.dtypes = graphs, (shift.dtype, scale.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, factor, mean, inverse = ctx.saved_tensors
        dx, dfactor, dbias = torch.empty_like(x), torch.empty_like(factor), torch.empty_like(factor)
        grad = gradients[0].contiguous()
        ctx.graphs.run(ctx.graphs.backward, grad, x, factor, mean, inverse, dx, dfactor, dbias)
        dshift, dscale = (d.squeeze(1).to(t) for d, t in zip((dbias, dfactor), ctx.dtypes, strict=True))
        return dx, dshift, dscale, None

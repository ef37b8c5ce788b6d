"""x_0 = f(x_1, 1, 0; y) in a single network call, for the least latency."""

import torch
from torch import Tensor

from soflow_kernels import on_gpu

from ..errors import ConfigError
from ..flow import SolutionFlow
from ..training.cuda_graph import GraphedFunction
from ..training.precision import matmul_precision, resolve_precision, round_parameters
from .drawing import checked_conditions
from .guidance import chosen_guidance, scales


class OneStep:
    """x_0 = f(x_1, 1, 0; y) in one network call (arXiv 2512.15657): `images = OneStep(flow)(noise, labels)`.

    The flow is taken over: the parameters of its blocks are rounded to bf16, or its blocks compiled, where these are
    asked for, and it is not to be trained meanwhile.

    Args:
        flow: a trained flow on its device, in float32.
        precision: "auto" (bf16 on a GPU that has it, else fp32), "bf16", "tf32" or "fp32".
        compile: the blocks by torch.compile; the first call of each size of batch takes its time.
        cuda_graph: record the call and replay it; calls of another size than the first run as they are.
        guidance: of a network with a `guidance_range`: the scale w; None: as `sample` has it.

    Raises ConfigError for what the device lacks, and ValueError for a flow that takes many steps and for a guidance
    that the network was not trained for.
    """

    def __init__(
        self,
        flow: SolutionFlow,
        *,
        precision: str = "auto",
        compile: bool = False,
        cuda_graph: bool = False,
        guidance: float | None = None,
    ) -> None:
        if not flow.solves:
            raise ValueError(f"flow: was trained by {flow.objective}, whose samples take many calls; see `sample`")
        self.guidance = chosen_guidance(flow, guidance)
        self.flow = flow.requires_grad_(False).eval()
        self.device = next(flow.parameters()).device
        self.precision = resolve_precision(precision, self.device)
        if self.precision == "fp8":
            raise ConfigError("precision fp8: OneStep has bf16, tf32 and fp32")
        if cuda_graph and self.device.type != "cuda":
            raise ConfigError(f"cuda_graph: needs a GPU, the device is {self.device.type}")
        if self.precision == "bf16":
            round_parameters(flow.network, flow.network.low_precision_layers(), torch.bfloat16)
        if compile:
            flow.network.compile_blocks()
        self.call = GraphedFunction(self._call) if cuda_graph else self._call

    @torch.no_grad()
    def __call__(self, noise: Tensor, y: Tensor | None = None) -> Tensor:
        """Images [B, C, H, W] in the scale of the training data, from standard normal noise [B, C, H, W] and labels
        [B] or vectors [B, E] (None: the null one) on the flow's device.

        Raises ValueError for labels or vectors that are none; those on a GPU are not looked at, as that would wait for
        it."""
        if y is not None and not isinstance(y, Tensor):
            y = torch.as_tensor(y, device=self.device)
        return self.call(noise, y if y is None or on_gpu(y) else checked_conditions(self.flow, y))

    def _call(self, noise: Tensor, y: Tensor | None) -> Tensor:
        t = torch.ones(len(noise), device=noise.device, dtype=noise.dtype)
        w = scales(self.flow, self.guidance, y, noise)
        with matmul_precision(self.precision, self.device):
            return self.flow.solution(noise, t, torch.zeros_like(t), y, w)

"""`SoFlowPipeline`: images of classes or vectors, by the conventions of diffusers' `DiTPipeline`."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

from ..config.schema import DiTConfig, nearest, shown
from ..flow import SolutionFlow
from ..hub import add_card, upload
from ..hub.card import model_card
from ..runs.images import to_uint8
from ..runs.latents.vae import factors, quiet
from ..sampling.drawing import checked_conditions
from ..sampling.guidance import chosen_guidance, scales
from ..sampling.solving import usual_calls
from .flow_model import FlowModel

with quiet():
    from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
    from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
    from diffusers.utils.torch_utils import randn_tensor

NULL = "null"
"""The label of no class, for which a network is trained beside its classes."""
OUTPUTS = ("pil", "np", "pt", "latent")
Label = int | str
Generators = torch.Generator | Sequence[torch.Generator] | None


class SoFlowPipeline(DiffusionPipeline):
    """Images from a flow in one network call or more, decoded by a VAE where the flow makes latents.

    Args:
        flow: any SolutionFlow with a DiT; it becomes a `FlowModel` with the same network.
        vae: diffusers' AutoencoderKL, of a flow that makes latents; None: the flow makes images, or nothing but its
            latents is wanted.
        id2label: names of classes by number, several of one class with commas between, in place of those of the data
            that the flow was trained on.

    Saved and loaded by `save_pretrained` and `from_pretrained`, cast by `dtype` (`torch_dtype`) or `.to(dtype)`.
    """

    model_cpu_offload_seq = "flow->vae"
    _optional_components = ["vae"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        flow: SolutionFlow,
        vae: Optional[AutoencoderKL] = None,  # noqa: UP045  # diffusers reads these types, and older ones know no "|"
        id2label: Optional[dict[int, str]] = None,  # noqa: UP045
    ) -> None:
        """Raises ValueError naming the argument that is wrong."""
        super().__init__()
        if not isinstance(flow, SolutionFlow):
            raise ValueError(f"flow must be a SolutionFlow, got a {type(flow).__name__}")
        flow = FlowModel.of(flow)
        channels = flow.network.config.in_channels
        if vae is not None and flow.origin is not None and not flow.origin.config.data.latent:
            raise ValueError("vae: the flow makes images, not latents; give none")
        known: Any = None if vae is None else vae.config
        if known is not None and known.latent_channels != channels:
            raise ValueError(f"vae: is of latents of {known.latent_channels} channels, the flow's have {channels}")
        self.register_modules(flow=flow, vae=vae)
        self.register_to_config(id2label=id2label)
        self.labels = _labels(id2label, flow)
        """Numbers of classes by name."""
        self._interrupt = False

    def get_label_ids(self, label: Label | Sequence[Label]) -> list[int]:
        """Numbers of classes from their names or numbers; "null" is the label of no class. Raises ValueError."""
        labels = [label] if isinstance(label, str) or not isinstance(label, Sequence) else label
        return [self._number(each) for each in labels]

    def _number(self, label: Any) -> int:
        classes = self.flow.network.num_classes
        if isinstance(label, str):
            if label in self.labels:
                return self.labels[label]
            if label.strip() in (NULL, *self.labels):
                return classes if label.strip() == NULL else self.labels[label.strip()]
            if not label.strip().isdecimal():
                hint = nearest(label, self.labels) if self.labels else "; it knows no names, give numbers"
                raise ValueError(f"class_labels: {shown(label)} is no class of this model{hint}")
            label = int(label)
        if isinstance(label, bool) or not isinstance(label, int | np.integer):
            raise ValueError(f"class_labels must be numbers or names of classes, got {shown(label)}")
        if not 0 <= label <= classes:
            known = (
                f"from 0 to {classes - 1}, or {classes} for none" if classes else "0 or left out: there are no classes"
            )
            raise ValueError(f"class_labels must be {known}, got {shown(int(label))}")
        return int(label)

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `_interrupt`, to end the call with what there is."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Network calls of each image in the present call, or the last."""
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label] | Tensor | None = None,
        num_inference_steps: int | None = None,
        num_images_per_label: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance_scale: float | None = None,
        prompt_embeds: Tensor | None = None,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Draw images: solve from noise to the data and, in each further step, re-noise the result and solve again. A
        flow that was trained by flow matching goes along its velocity instead, by Euler's method.

        Args:
            class_labels: classes by number or name, one for each image; "null" is none. None: an image of no class.
            num_inference_steps: network calls per image, at least 1; None: 1, of flow matching 10.
            num_images_per_label: images of each label, which follow each other.
            generator: of the noise, one or a list with one for each image; None: torch's own. The noise is drawn in
                float32, so that it is the same in each dtype.
            latents: noise of the first step, [n, C, H, W]; None: it is drawn.
            output_type: "pil", a list of images; "np", [n, H, W, C], or "pt", [n, C, H, W], in [0, 1]; "latent", what
                the flow makes, [n, C, H, W].
            return_dict: an ImagePipelineOutput, with `images`; else a tuple of these.
            callback_on_step_end: called with (pipeline, step, time, {"latents": x}) after each step. x is what is
                solved for, an image or latent without noise (of flow matching with the noise that is left); "latents"
                of the dict that it returns take its place.
            guidance_scale: w, of a flow that was trained for a range of them, at no further calls; None: the geometric
                mean of the range.
            prompt_embeds: of a flow that takes vectors, such as embeddings of texts, in the place of `class_labels`:
                [n, E], one for each image. None: an image of no condition.

        Raises:
            ValueError: for arguments that are wrong or do not fit, naming the argument.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        y = self._condition(class_labels, prompt_embeds)
        num_inference_steps = usual_calls(self.flow) if num_inference_steps is None else num_inference_steps
        for name, count in (
            ("num_inference_steps", num_inference_steps),
            ("num_images_per_label", num_images_per_label),
        ):
            if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {shown(count)}")
        each, model, device = int(num_images_per_label), self.flow.network.config, self._execution_device
        n = each * (1 if y is None else len(y))
        shape = (n, model.in_channels, model.input_size, model.input_size)
        self._check(shape, generator, latents, output_type, callback_on_step_end_tensor_inputs)

        try:
            guidance = chosen_guidance(self.flow, guidance_scale)
        except ValueError as error:
            raise ValueError(str(error).replace("guidance", "guidance_scale", 1)) from None

        dtype = self.flow.dtype
        generators = generator if generator is None or isinstance(generator, torch.Generator) else list(generator)

        def noise() -> Tensor:
            return randn_tensor(shape, generators, device, torch.float32).to(dtype)

        y = y.repeat_interleave(each, 0).to(device) if y is not None and model.conditional else None
        x = noise() if latents is None else latents.to(device, dtype)
        w = scales(self.flow, guidance, y, x)
        self._interrupt, self._num_timesteps = False, int(num_inference_steps)
        progress_bar: Any = self.progress_bar
        with progress_bar(total=num_inference_steps) as bar:
            for step in range(num_inference_steps):
                t, after = (torch.full((n,), 1 - k / num_inference_steps, device=device) for k in (step, step + 1))
                if step and self.flow.solves:
                    x = self.flow.point(x, noise(), t)[0]
                s = torch.zeros_like(t) if self.flow.solves else after
                x = self.flow(x, t, s, y, w)  # a call, for the hooks that move it to a GPU in time
                if callback_on_step_end is not None:
                    given = {name: x for name in callback_on_step_end_tensor_inputs}
                    x = (callback_on_step_end(self, step, t[0], given) or {}).get("latents", x)
                bar.update()
                if self.interrupt:
                    break
        images = self._output(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _condition(self, labels: Any, vectors: Any) -> Tensor | None:
        """Labels int64 [n], all null of a network without classes, or vectors [n, E] of one that takes some, None: one
        image of no condition. Raises ValueError."""
        model = self.flow.network.config
        if not model.condition_size:
            if vectors is not None:
                raise ValueError("prompt_embeds must be left out: the network takes no vectors; give class_labels")
            return self._label_tensor(labels)
        if labels is not None:
            raise ValueError("class_labels must be left out: the network takes vectors; give prompt_embeds")
        if vectors is None:
            if not model.null_label:
                raise ValueError("prompt_embeds must be given: the network was trained with a vector each")
            return None
        if not isinstance(vectors, Tensor | np.ndarray) or not len(vectors):
            raise ValueError(f"prompt_embeds must be vectors [n, {model.condition_size}], got {shown(vectors)}")
        try:
            return checked_conditions(self.flow, torch.as_tensor(vectors)).to(self.flow.dtype)
        except ValueError as error:
            raise ValueError(str(error).replace("y ", "prompt_embeds ", 1)) from None

    def _label_tensor(self, labels: Any) -> Tensor:
        """Labels as int64 [n], on the CPU. Raises ValueError."""
        model = self.flow.network.config
        if labels is None:
            labels = [model.num_classes]
        if isinstance(labels, Tensor | np.ndarray):
            labels = torch.as_tensor(labels)
            if labels.dim() != 1 or labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
                raise ValueError(f"class_labels must be [n] whole numbers, got {labels.dtype} {list(labels.shape)}")
            labels = labels.tolist()
        numbers = self.get_label_ids(labels)
        if not numbers:
            raise ValueError("class_labels: is empty")
        if model.num_classes in numbers and not model.null_label:
            raise ValueError("class_labels must be classes: the network has no null label, it was trained without one")
        return torch.tensor(numbers)

    def _check(
        self, shape: tuple[int, ...], generator: Any, latents: Any, output_type: Any, tensor_inputs: Sequence[str]
    ) -> None:
        """Raise ValueError for the first argument of a call that is wrong."""
        if generator is not None and not isinstance(generator, torch.Generator):
            if not isinstance(generator, list | tuple) or not all(isinstance(g, torch.Generator) for g in generator):
                raise ValueError(f"generator must be a torch.Generator or a list of them, got {shown(generator)}")
            if len(generator) != shape[0]:
                raise ValueError(f"generator must be one for each of {shape[0]} images, got {len(generator)}")
        is_tensor = isinstance(latents, Tensor)
        if latents is not None and not (is_tensor and latents.is_floating_point() and latents.shape == shape):
            got = f"{latents.dtype} {list(latents.shape)}" if is_tensor else shown(latents)
            raise ValueError(f"latents must be noise {list(shape)}, got {got}")
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUTS)}, got {shown(output_type)}")
        if output_type != "latent" and self.vae is None:
            origin = self.flow.origin
            if shape[1] not in (1, 3) or (origin is not None and origin.config.data.latent):
                raise ValueError(f"output_type {output_type}: it makes latents, and there is no vae; take 'latent'")
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            known = ", ".join(self._callback_tensor_inputs)
            raise ValueError(f"callback_on_step_end_tensor_inputs: {unknown[0]} is not there, only {known}")

    def _output(self, x: Tensor, output_type: str) -> Any:
        """What is asked for, of what the flow has made."""
        if output_type == "latent":
            return x
        if self.vae is not None:
            x = self.vae.decode(self._vae_latents(x), return_dict=False)[0]
        if output_type == "pil":
            return _pictures(to_uint8(x).cpu().numpy())
        images = (x / 2 + 0.5).clamp(0, 1)
        return images if output_type == "pt" else images.float().permute(0, 2, 3, 1).cpu().numpy()

    def _vae_latents(self, x: Tensor) -> Tensor:
        """z = x / scale + shift, the latents of the VAE: by what the flow's data say, or else by what the VAE does."""
        origin = self.flow.origin
        known = None if origin is None or origin.data is None else origin.data.space
        values = factors("vae", self.vae.config) if known is None else (known.scale, known.shift)
        scale, shift = (torch.tensor(value, device=x.device).view(-1, 1, 1) for value in values)
        return (x.float() / scale + shift).to(self.vae.dtype)

    def save_pretrained(self, save_directory: str | os.PathLike, *arguments: Any, **settings: Any) -> None:
        """As diffusers' pipelines do, with a model card where there is none."""
        super().save_pretrained(save_directory, *arguments, **settings)
        self._add_card(Path(save_directory), Path(save_directory).absolute().name)

    def _add_card(self, folder: Path, name: str) -> None:
        add_card(folder, model_card(self.flow, self.flow.origin, name, _use(self.flow.network.config, name)))

    def push_to_hub(self, repo_id: str, **settings: Any) -> Any:
        """Upload what `save_pretrained` writes, as `hub.push_to_hub` does it of a flow. Returns the same."""

        def save(folder: Path) -> None:
            folder.mkdir()
            self._add_card(folder, repo_id)  # of this name, and not that of the folder
            self.save_pretrained(folder)

        return upload(save, repo_id, **{"commit_message": "Upload SoFlow pipeline", **settings})


def _labels(id2label: Mapping[Any, str] | None, flow: SolutionFlow) -> dict[str, int]:
    """Numbers of classes by name. Raises ValueError."""
    if id2label is not None:
        for key in id2label:
            if not str(key).isdecimal() or int(key) >= flow.network.num_classes:
                raise ValueError(f"id2label: {shown(key)} is no class, they are {flow.network.num_classes}")
        return {name.strip(): int(key) for key, names in id2label.items() for name in names.split(",")}
    data = None if flow.origin is None else flow.origin.data
    names = () if data is None or len(data.classes) != flow.network.num_classes else data.classes
    return {name: number for number, name in enumerate(names)}


def _pictures(images: np.ndarray) -> list[Any]:
    """uint8 [n, H, W, C] as PIL images, the same as `sample` writes."""
    from PIL import Image

    return [Image.fromarray(image[..., 0] if image.shape[2] == 1 else image) for image in images]


def _use(model: DiTConfig, name: str) -> str:
    labels = "class_labels=[0]" if model.num_classes else ""
    needed = given = ""
    if model.condition_size:
        labels, needed = "prompt_embeds=vectors", "import torch\n\n"
        given = f"vectors = torch.zeros(1, {model.condition_size})  # the embedding of a text, say\n"
    return (
        f"{needed}from soflow_fast.pipeline import SoFlowPipeline\n\n"
        f'pipe = SoFlowPipeline.from_pretrained("{name}")\n{given}image = pipe({labels}).images[0]'
    )

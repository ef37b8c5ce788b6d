"""A flow as a model of diffusers: the part `flow` of a pipeline."""

from typing import Any

import torch

from ..config.schema import from_dict
from ..errors import CheckpointError
from ..flow import SolutionFlow
from ..models import network_of
from ..runs.checkpoint import published
from ..runs.checkpoint.origin import from_values, without_folders
from ..runs.latents.vae import quiet

with quiet():
    # diffusers looks for the base class of a part in the module of its class: ModelMixin has to have a name here.
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config


class FlowModel(SolutionFlow, ModelMixin, ConfigMixin):
    """A SolutionFlow that diffusers can save, load, move and cast. Its weights have the names of any flow's.

    Its configuration is the config.json of `runs.checkpoint.published`, so `load` and `SolutionFlow.from_pretrained`
    read its folder as well. `save_pretrained` and `push_to_hub` are those of diffusers' models.
    """

    @register_to_config
    def __init__(
        self,
        model: dict[str, Any],
        flow: dict[str, Any],
        data: dict[str, Any] | None = None,
        run: dict[str, Any] | None = None,
    ) -> None:
        """Raises ValueError for a wrong configuration."""
        super().__init__(network_of(from_dict({"model": model}).model), **flow)
        self.origin = from_values({"data": data, "run": run})

    @classmethod
    def of(cls, flow: SolutionFlow) -> "FlowModel":
        """The same flow, with the same network. Raises ValueError if its network is none of ours."""
        if isinstance(flow, cls):
            return flow
        values = published.describe(flow, without_folders(flow.origin))
        with torch.device("meta"):
            model = cls(**values)
        model.network = flow.network
        return model.train(flow.training)

    save_pretrained: Any = ModelMixin.save_pretrained
    push_to_hub: Any = ModelMixin.push_to_hub

    @classmethod
    def from_pretrained(cls, *arguments: Any, output_loading_info: bool = False, **settings: Any) -> Any:
        """As diffusers' models do. Raises CheckpointError where they would leave weights that are missing at random."""
        plain: Any = ModelMixin.from_pretrained
        model, found = plain.__func__(cls, *arguments, output_loading_info=True, **settings)
        for what, key in (("lacks", "missing_keys"), ("has no place for", "unexpected_keys")):
            if names := sorted(found[key]):
                raise CheckpointError(f"{arguments[0] if arguments else 'flow'}: {what} {names[0]}")
        return (model, found) if output_loading_info else model

"""SoFlow as a pipeline of diffusers: `SoFlowPipeline(flow=load(RUN), vae=None)(class_labels=[207])`."""

try:
    import diffusers  # noqa: F401
except ImportError:
    raise ImportError(
        "soflow_fast.pipeline needs diffusers: pip install 'soflow-fast[hub]'", name="diffusers"
    ) from None

from .class_conditional import SoFlowPipeline
from .flow_model import FlowModel

__all__ = ["FlowModel", "SoFlowPipeline"]

"""Drawing images: `sample` draws any number, `Devices` several batches at once, `OneStep` is the quickest call."""

from .devices import Devices
from .drawing import BATCH, Drawing, draw_on, image_noise, sample, sample_batches
from .guidance import chosen_guidance
from .one_step import OneStep
from .solving import checked_method, checked_times

__all__ = [
    "BATCH",
    "Devices",
    "Drawing",
    "OneStep",
    "checked_method",
    "checked_times",
    "chosen_guidance",
    "draw_on",
    "image_noise",
    "sample",
    "sample_batches",
]

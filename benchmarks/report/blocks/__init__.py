"""Blocks of pages, each made of a record: functions of the record that give Markdown."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from benchmarks.report import mixture_tables
from benchmarks.report.blocks import exact, numerics, predictions, quality, runs, steps
from benchmarks.report.book_tables import look_ahead_table, samples_table, weights_table
from benchmarks.report.equal_work_tables import calls_table, costs_table, rates_table


class Block(NamedTuple):
    """A part of a page that is made from the newest record of a benchmark."""

    page: str
    benchmark: str
    render: Callable[[dict], str]
    gpu: bool | None = None
    """Whether it shows a record of a GPU alone, or of a CPU alone."""


BLOCKS = {
    "step": Block("docs/performance.md", "step", steps.table, gpu=False),
    "step-gpu": Block("docs/performance.md", "step", steps.table, gpu=True),
    "timeline": Block("docs/performance.md", "timeline", steps.timeline),
    "choices": Block("docs/performance.md", "choices", steps.choices),
    "quality-for-time": Block("docs/performance.md", "quality-for-time", quality.quality_for_time),
    "equal-work-digits": Block("docs/equal-work.md", "equal-work", quality.equal_work_digits),
    "equal-work-photographs": Block("docs/equal-work.md", "equal-work", quality.equal_work_photographs),
    "equal-work-calls": Block("docs/equal-work.md", "equal-work", calls_table),
    "equal-work-costs": Block("docs/equal-work.md", "equal-work", costs_table),
    "equal-work-rates": Block("docs/equal-work.md", "equal-work", rates_table),
    "policies": Block("docs/policies.md", "policies", quality.policies),
    "scaling": Block("docs/performance.md", "scaling", steps.scaling),
    "prediction": Block("docs/performance.md", "prediction", predictions.prediction),
    "plan": Block("docs/many-gpus-plan.md", "plan", predictions.plan),
    "sampling": Block("docs/performance.md", "sampling", quality.sampling),
    "reading": Block("docs/data.md", "reading", runs.reading),
    "digits": Block("docs/performance.md", "digits", quality.digits),
    "guidance": Block("docs/sampling.md", "guidance", quality.guidance),
    "precision-errors": Block("docs/precision.md", "precision", numerics.precision_errors),
    "step-batch": Block("docs/performance.md", "step-batch", steps.table),
    "distance": Block("docs/precision.md", "distance", numerics.distance),
    "soak": Block("docs/reliability.md", "soak", runs.soak),
    "cpu": Block("docs/performance.md", "cpu", steps.cpu),
    "memory": Block("docs/performance.md", "memory", steps.peaks),
    "increments": Block("docs/precision.md", "increments", numerics.increments),
    "derivative": Block("docs/precision.md", "derivative", numerics.derivative),
    "precision-quality": Block("docs/precision.md", "precision", numerics.precision_quality),
    "kernels": Block("docs/kernels.md", "kernels", steps.kernels),
    "tokens": Block("docs/open-questions.md", "tokens", exact.tokens, gpu=False),
    "discrete": Block("docs/open-questions.md", "discrete", exact.discrete, gpu=False),
    "discrete-pixel": Block("docs/open-questions.md", "discrete", exact.discrete_pixel, gpu=False),
    "book-samples": Block("docs/why-it-works.md", "book", partial(exact.of_book, samples_table)),
    "book-look-ahead": Block("docs/why-it-works.md", "book", partial(exact.of_book, look_ahead_table)),
    "book-weights": Block("docs/why-it-works.md", "book", partial(exact.of_book, weights_table)),
    "sweeps": Block("docs/performance.md", "sweeps", steps.sweeps),
    "mixtures-central": Block("docs/open-questions.md", "mixtures-central", partial(exact.mixtures, "long")),
    **{
        f"mixtures-{name}": Block("docs/open-questions.md", "mixtures", partial(exact.mixtures, name))
        for name in mixture_tables.TABLES
    },
}

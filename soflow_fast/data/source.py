"""The order in which a run sees a data set, and its batches."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..config.schema import Config, DataChoices, DiTConfig, PolicyConfig
from ..errors import DataError
from ..ranks import share
from ..rng import generator
from ._beside import conditions_of
from .conditions import BY_NAME, IN_ORDER, read_vectors
from .dataset import Dataset, Wanted
from .formats import open_dataset


class Source:
    """The batches of a run.

    Each epoch is a fresh permutation of the whole set, and step k takes its positions k * batch_size and on; rank r of
    W takes the r-th slice of them, or where `dealt_first` is set, of so many first places and of the others. What a
    sample is, mirrored or not, with its noise, belongs to its place in the whole batch. So nothing depends on W, on who
    reads a batch, or on what was read before.
    """

    dealt_first: int = 0
    """How many places of a batch are dealt to the ranks before the others are, see `ranks.share`."""

    def __init__(self, dataset: Dataset, *, seed: int, batch_size: int, flip: bool = False, place: str = "") -> None:
        """place: where the data set is, for messages."""
        self.dataset, self.seed, self.batch_size, self.flip, self.place = dataset, seed, batch_size, flip, place
        self._order = functools.lru_cache(maxsize=2)(self._order_of)

    def __len__(self) -> int:
        return len(self.dataset)

    def _order_of(self, epoch: int) -> Tensor:
        return torch.randperm(len(self), generator=generator(self.seed, epoch, 0, "data order"))

    def _places(self, rank: int, world: int) -> Tensor:
        return share(self.batch_size, self.dealt_first, rank, world)

    def indices(self, step: int, rank: int = 0, world: int = 1) -> Tensor:
        """Which samples rank `rank` of `world` takes at `step`, int64 [batch_size / world]."""
        position = self._places(rank, world) + step * self.batch_size
        epoch, found = position // len(self), torch.empty_like(position)
        for e in epoch.unique().tolist():
            found[epoch == e] = self._order(e)[position[epoch == e] % len(self)]
        return found

    def mirrored(self, step: int, rank: int = 0, world: int = 1) -> Tensor | None:
        """Which of them are mirrored, bool [batch_size / world]; None: no sample ever is."""
        if not self.flip:
            return None
        drawn = torch.rand(self.batch_size, generator=generator(self.seed, step, 0, "flip"))
        return drawn[self._places(rank, world)] < 0.5

    def raw(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        """The samples of one step as they are read, and what `Dataset.given` returns of them: labels, int64
        [batch_size / world], or vectors, [batch_size / world, E]. Raises DataError."""
        index = self.indices(step, rank, world)
        return self.dataset.read(index, self.mirrored(step, rank, world)), self.dataset.given(index)

    def decoded(self, raw: Tensor, step: int, rank: int = 0, world: int = 1) -> Tensor:
        """What a model takes, float32 [batch_size / world, C, H, W], of what `raw` returned, on its device."""

        def noise(shape: tuple[int, ...]) -> Tensor:
            source = generator(self.seed, step, 0, "latent noise", raw.device)
            whole = torch.randn(self.batch_size, *shape[1:], generator=source, device=raw.device)
            return whole if world == 1 else whole[self._places(rank, world).to(raw.device)]

        return self.dataset.decoded(raw, noise)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        """Samples, float32 in [-1, 1] or scaled latents, and labels or vectors of one step, on the host. Raises
        DataError."""
        raw, labels = self.raw(step, rank, world)
        return self.decoded(raw, step, rank, world), labels


def open_source(config: Config, say: Callable[[str], None] = lambda text: None) -> Source:
    """The data set of a configuration. Raises DataError if it is missing or does not fit the model.

    say: is told how a check that takes long goes on. Its classes may be others than the model's: see `fitted`.
    """
    data, model = config.data, config.model
    if data.kind == "demonstrations":
        from .demonstrations import TASKS, open_demonstrations

        if not data.path:
            raise DataError(f"--data is missing: a policy needs a task ({', '.join(TASKS)}) or a LeRobot data set")
        chunks = open_demonstrations(data.path, model.sample_shape[1], config.seed)
        return Source(chunks, seed=config.seed, batch_size=config.batch_size, place=data.path)
    if data.kind == "digits":
        if data.path:
            raise DataError(f"--data {data.path}: the digits come with scikit-learn and take no path")
        from .digits import digits

        dataset: Dataset = digits()
        path = ""
    else:
        if not data.path:
            what = (
                "a folder or zip of images, CLASS/NAME" if data.kind == "images" else "latents, as encode writes them"
            )
            raise DataError(f"--data is missing: preset {config.preset} needs {what}")
        size, channels = config.image_model.input_size, config.image_model.in_channels
        wanted = Wanted(size, channels, data.resize, data.flip, data.skip_bad, say, data.vae)
        path = str(Path(data.path, "latents")) if data.kind == "digits-latent" else data.path
        dataset = open_dataset(path, "latents" if data.latent else "images", wanted)
    shape = model.sample_shape
    if dataset.shape != shape:
        raise DataError(
            f"the samples are {dataset.shape}, the model takes {shape}: set model.in_channels and model.input_size"
        )
    if not len(dataset):
        raise DataError(f"--data {data.path}: holds no samples")
    if data.flip and not dataset.mirrors:
        raise DataError(
            f"--data {data.path}: has no mirrored samples; give --set data.flip=false, or encode with --flip"
        )
    _take_conditions(config, dataset, path)
    return Source(dataset, seed=config.seed, batch_size=config.batch_size, flip=data.flip, place=data.path)


def _take_conditions(config: Config, dataset: Dataset, path: str) -> None:
    """Give a data set its vectors, where the model takes some. Raises DataError."""
    size, given = config.model.condition_size, config.data.conditions
    if not size:
        if given:
            if config.model.kind != "dit":
                raise DataError(f"--conditions {given}: a network of the kind {config.model.kind} takes no vectors")
            width = read_vectors(Path(given)).size
            raise DataError(f"--conditions {given}: the model takes labels; give --condition-size {width} too")
        return
    found = conditions_of(dataset, path, given)
    if found is None:
        where = f"--data {path}: has" if path else "the digits have"
        beside = f"put {BY_NAME} or {IN_ORDER} into the folder, or give " if Path(path).is_dir() and path else "give "
        raise DataError(f"{where} no conditions, the model takes vectors of {size}: {beside}--conditions FILE")
    if found.size != size:
        raise DataError(f"--conditions {found.path}: has vectors of {found.size} numbers, --condition-size is {size}")
    dataset.conditions = found


def fitted(config: Config, source: Source, choices: DataChoices) -> Config:
    """The configuration with what it leaves to the data: the number of classes, and the steps of so many epochs.

    Raises DataError if the data has another number of classes than is asked for; a model may have none in any case.
    """
    if isinstance(config.model, PolicyConfig):
        config = _fitted_policy(config, config.model, source)
        choices = choices._replace(classes_fixed=True)
    found, wanted = len(source.dataset.contents.classes), config.model.num_classes
    if source.dataset.conditions is not None:
        found = wanted = 0
    if choices.classes_fixed and wanted not in (0, found):
        has = f"{found} classes" if found else "no classes"
        raise DataError(f"the data has {has}, the model {wanted}: set model.num_classes, or leave it out")
    if not choices.classes_fixed and isinstance(config.model, DiTConfig):
        config = replace(config, model=replace(config.model, num_classes=found))
    if choices.epochs is not None:
        config = replace(config, steps=max(1, -(-choices.epochs * len(source) // config.batch_size)))
    return config


def _fitted_policy(config: Config, model: PolicyConfig, source: Source) -> Config:
    """The configuration with the sizes of observations and actions that it leaves to the demonstrations."""
    sizes = {"obs_size": source.dataset.given(torch.tensor([0])).shape[1], "action_dim": source.dataset.shape[2]}
    for name, found in sizes.items():
        wanted = getattr(model, name)
        if wanted not in (0, found):
            raise DataError(f"--data {source.place}: has model.{name} {found}, not {wanted}; leave it out")
    return replace(config, model=replace(model, **sizes))

"""Flows in folders as the Hugging Face hub has them, and on the hub itself: config.json, safetensors and a model card.

`flow.save_pretrained(DIR)`, `SolutionFlow.from_pretrained(DIR or NAME)` and `flow.push_to_hub(NAME)` are functions of
this module. Only what goes to the hub or comes from it needs huggingface_hub, whose errors, of names, rights and
networks, stay as they are.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..files import write_file
from ..flow import SolutionFlow
from ..runs.checkpoint import load, published
from ..runs.checkpoint.origin import Origin, without_folders
from .card import model_card

CARD = "README.md"
FLOATS = (None, torch.float32, torch.bfloat16, torch.float16, torch.float64)


def save_pretrained(flow: SolutionFlow, folder: str | os.PathLike) -> None:
    """Write config.json, model.safetensors, manifest.json and, where there is none, README.md to a folder.

    `load` and `from_pretrained` read it; weights keep their dtype. Where the flow was loaded from a run, its
    configuration, data, step, figures, command and commit are kept. An older such folder is overwritten. Raises
    ValueError naming what is wrong with the flow or the folder, and OSError if the disk refuses.
    """
    _save(flow, Path(folder), flow.origin, Path(folder).absolute().name)


def _save(flow: SolutionFlow, folder: Path, origin: Origin | None, name: str) -> None:
    published.write(flow, folder, origin)
    add_card(folder, model_card(flow, origin, name))


def add_card(folder: Path, text: str) -> None:
    """Write README.md, unless somebody has written one."""
    if not os.path.lexists(folder / CARD):
        write_file(folder / CARD, text.encode())


def from_pretrained(
    source: str | os.PathLike,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> SolutionFlow:
    """A flow in eval mode, without gradients, from whatever `load` reads or from a repository of the hub.

    Args:
        source: a folder, of `save_pretrained`, `export`, a run, or a pipeline; or else a repository, OWNER/NAME, with
            what `save_pretrained` or `SoFlowPipeline.save_pretrained` writes.
        dtype: of the weights; None: as they were saved.
        revision, token, cache_dir, local_files_only: of the repository, as in huggingface_hub.

    Raises:
        CheckpointError: if there is nothing to load or it is damaged.
        ValueError: for a dtype that no network computes in.
        ImportError: if a repository is asked for and huggingface_hub is not installed.
    """
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be a floating-point dtype of torch, got {dtype!r}")
    place = Path(source)
    if not place.exists() and _names_a_repository(os.fspath(source)):
        where = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        files = [*published.FILES, published.PIPELINE, *(f"{published.PART}/{name}" for name in published.FILES)]
        place = Path(_huggingface_hub().snapshot_download(os.fspath(source), allow_patterns=files, **where))
    flow = load(place, device)
    return flow if dtype is None else flow.to(dtype)


def _names_a_repository(text: str) -> bool:
    """Whether a text that is no path here can be OWNER/NAME."""
    parts = text.split("/")
    return len(parts) == 2 and all(parts) and not text.startswith(".")


def push_to_hub(flow: SolutionFlow, repo_id: str, **settings: Any) -> Any:
    """Upload what `save_pretrained` writes to a repository of the hub, which is made if need be.

    repo_id: OWNER/NAME. settings: see `upload`. A VAE that is named by a folder of this machine is not named there.
    Returns huggingface_hub's CommitInfo. Raises ImportError if that package is not installed.
    """
    origin = without_folders(flow.origin)
    return upload(lambda folder: _save(flow, folder, origin, repo_id), repo_id, **settings)


def upload(
    save: Callable[[Path], object],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload SoFlow weights",
    create_pr: bool = False,
) -> Any:
    """Upload the folder that `save` fills. A model card that the repository has already stays as it is."""
    api = _huggingface_hub().HfApi(token=token)
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "upload"
        save(folder)
        if api.file_exists(name, CARD):
            (folder / CARD).unlink(missing_ok=True)
        return api.upload_folder(
            repo_id=name, folder_path=str(folder), commit_message=commit_message, create_pr=create_pr
        )


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        message = "the Hugging Face hub needs huggingface_hub: pip install 'soflow-fast[hub]'"
        raise ImportError(message, name="huggingface_hub") from None
    return huggingface_hub

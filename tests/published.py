"""A flow off its initial zeros, and a run that knows much of itself, for the tests of what is given away."""

import json
import types
from pathlib import Path
from typing import Any

import torch

from soflow_fast import DiT, DiTConfig, SolutionFlow
from soflow_fast.data import identity
from soflow_fast.data.dataset import LatentSpace
from soflow_fast.data.identity import Identity
from soflow_fast.runs import checkpoint
from tests.states import advance, build

NAMES = ("cat", "dog, hound", "3", "newt", "eel", "owl", "yak", "ant", "bee", "cow")
FIGURES = {"accuracy": 0.975, "frechet": 21.25, "near_copies": 0.5}


def small_flow(
    channels: int = 1,
    classes: int = 10,
    guidance_range: tuple[float, float] | None = None,
    condition_size: int = 0,
    null_label: bool = True,
    **settings: Any,
) -> SolutionFlow:
    """A flow of 8 x 8, in eval mode without gradients. condition_size: of vectors in the place of classes."""
    condition: Any = {"num_classes": 0 if condition_size else classes, "condition_size": condition_size}
    net = DiT(DiTConfig(8, 2, channels, 32, 2, 2, null_label=null_label, guidance_range=guidance_range, **condition))
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=source))
    return SolutionFlow(net, **settings).eval().requires_grad_(False)


def known_run(folder: Path, space: LatentSpace | None = None, **changes: Any) -> Path:
    """A run directory with a checkpoint of step 2, on data with names, with figures and a commit."""
    state = build(**{"run_dir": "/secret/run", "data.path": "/secret/data", **changes})
    shape = (state.config.model.in_channels, 8, 8)
    data = Identity("folder of images", 40, shape, NAMES, (4,) * 10, "abcdef", space)
    state.data = identity.to_json(data)
    checkpoint.save(folder, advance(state, 2) if shape[0] == 1 else state)
    (folder / "code.json").write_text(json.dumps({"soflow-fast": "0.1.0", "commit": "0123abc", "torch": "2.13.0"}))
    evaluation = {"step": state.step, "samples": 4000, "nfe": {"1": FIGURES, "2": {**FIGURES, "accuracy": 0.99}}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def assert_same(a: SolutionFlow, b: SolutionFlow) -> None:
    """The same weights to the bit, in the same dtype, of the same flow."""
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    assert (a.path, a.coefficients, a.objective) == (b.path, b.coefficients, b.objective)
    assert all(value.dtype == right[name].dtype and torch.equal(value, right[name]) for name, value in left.items())


class FakeHub(types.ModuleType):
    """In the place of huggingface_hub: a repository in a folder, and what was asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__("huggingface_hub")
        self.folder, self.asked = folder, []

    def HfApi(self, token: Any = None) -> "FakeHub":
        self.asked.append(("HfApi", token))
        return self

    def create_repo(self, repo_id: str, **settings: Any) -> Any:
        self.asked.append(("create_repo", repo_id, settings))
        return types.SimpleNamespace(repo_id=f"me/{repo_id.split('/')[-1]}")

    def file_exists(self, repo_id: str, name: str) -> bool:
        return (self.folder / name).exists()

    def upload_folder(self, *, folder_path: str, **settings: Any) -> str:
        self.asked.append(("upload_folder", settings))
        self.folder.mkdir(exist_ok=True)
        for path in Path(folder_path).rglob("*"):
            if path.is_file():
                place = self.folder / path.relative_to(folder_path)
                place.parent.mkdir(exist_ok=True)
                place.write_bytes(path.read_bytes())
        return "commit"

    def snapshot_download(self, repo_id: str, **settings: Any) -> str:
        """As the cache has it: a folder of links."""
        self.asked.append(("snapshot_download", repo_id, settings))
        snapshot = self.folder.parent / "snapshot"
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder)
            if path.is_file() and str(name) in settings["allow_patterns"]:
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                (snapshot / name).symlink_to(path)
        return str(snapshot)

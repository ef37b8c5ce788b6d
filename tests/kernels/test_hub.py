"""The repository for Hugging Face's kernel hub: its builds load beside the installed package, and their rules hold."""

import base64
import hashlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import soflow_kernels
from soflow_kernels import testing

ROOT = Path(soflow_kernels.__file__).parent.parent


def from_file(name, path):
    """The module at `path`, imported under `name`, as the hub's packages are."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hub = from_file("hub_of_kernels", ROOT / "hub.py")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "soflow-kernels"
    hub.main([str(out), "--repo-id", "someone/soflow-kernels"])
    return out


@pytest.fixture
def load():
    """Imports a folder under the id of its metadata.json, and forgets it after the test."""
    before = set(sys.modules)

    def load(folder, file="__init__.py"):
        metadata = json.loads((folder / "metadata.json").read_text())
        return from_file(metadata["id"], folder / file)

    yield load
    for name in set(sys.modules) - before:
        if name.startswith("_soflow_kernels_"):
            del sys.modules[name]


def gradients(kernels, device):
    """The output and gradients of an operation with two outputs, by the package `kernels`."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 3, 72), "y": (2, 3, 72), "gate": (2, 72), "shift": (2, 72), "scale": (2, 72)}
    tensors = {name: torch.randn(shape, generator=draw).to(device) for name, shape in shapes.items()}
    weights = [torch.ones(2, 3, 72, device=device)] * 2
    return testing.grads(kernels.gate_residual_layernorm_modulate, tensors, weights)


def test_a_build_loads_beside_the_installed_package(repository, load, device):
    build = load(repository / "build" / "torch-cpu")
    assert build.gate_residual_layernorm_modulate is not soflow_kernels.gate_residual_layernorm_modulate
    assert all(status.kernel for status in build.status().values())  # compiled or interpreted: these are kernels
    found, wanted = gradients(build, device), gradients(soflow_kernels, device)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    registered = {name.split("::")[0] for name in torch._C._dispatch_get_all_op_names()}
    assert {"soflow", build.__name__} <= registered


def test_builds_of_different_content_live_in_one_process(repository, load, tmp_path, device):
    files = hub.sources()
    changed = {**files, "version.py": files["version.py"] + "# another commit\n"}
    assert hub.identifier(files, "cpu") != hub.identifier(changed, "cpu") != hub.identifier(changed, "cuda")
    for path, text in hub.variant(changed, "cpu").items():
        place = tmp_path / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
    first, second = load(repository / "build" / "torch-cpu"), load(tmp_path)
    assert first.__name__ != second.__name__
    assert torch.equal(gradients(first, device)["output 1"], gradients(second, device)["output 1"])


def test_the_folder_within_exports_the_same(repository, load):
    folder = repository / "build" / "torch-cuda"
    outer = load(folder)
    inner = from_file("_soflow_kernels_older", folder / "soflow_kernels" / "__init__.py")
    assert inner.layernorm_modulate is outer.layernorm_modulate and set(outer.__all__) <= set(vars(inner))


@pytest.mark.parametrize("backend", ["cpu", "cuda", "rocm"])
def test_metadata_names_every_file(backend, repository):
    folder = repository / "build" / f"torch-{backend}"
    metadata = json.loads((folder / "metadata.json").read_text())
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.py")}
    digests = {path: base64.b64encode(hashlib.sha256(data).digest()).decode() for path, data in found.items()}
    assert metadata["digest"] == {"algorithm": "sha256", "files": digests}
    assert metadata["id"].isidentifier() and metadata["backend"] == {"type": backend}
    assert (metadata["name"], metadata["license"], metadata["python-depends"]) == ("soflow-kernels", "MIT", [])


def test_a_build_is_the_source_of_the_builder_with_a_library_of_its_own(repository):
    source, build = repository / "torch-ext" / "soflow_kernels", repository / "build" / "torch-cuda"
    for path in source.rglob("*.py"):
        assert path.read_text() == (build / path.relative_to(source)).read_text()
    assert not (source / "_ops.py").exists()  # their builder makes it
    assert not list(repository.rglob("testing.py")) and "soflow::" not in (build / "_ops.py").read_text()


@pytest.mark.parametrize(
    ("line", "depth", "wanted"),
    [
        ("from soflow_kernels import layernorm_modulate", 0, "from . import layernorm_modulate"),
        ("from soflow_kernels._rows import load", 0, "from ._rows import load"),
        ("    from soflow_kernels.patch.forwards import a", 1, "    from ..patch.forwards import a"),
        ("from soflow_kernels_of_others import a", 0, None),
        ("import soflow_kernels", 0, None),
        ("from numpy import array", 0, None),
        ("import math, scipy.linalg", 1, None),
        ("from torch.nn import functional\nimport triton.language as tl, os", 2, ""),
    ],
)
def test_imports(line, depth, wanted):
    text = f"def f():\n{line}\n" if line[0] == " " else line + "\n"
    if wanted is None:
        with pytest.raises(ValueError, match=r"line 1 imports (soflow_kernels|numpy|scipy)"):
            hub.relative(text, depth)
    else:
        assert hub.relative(text, depth) == text.replace(line, wanted or line)


def test_the_card_is_true_of_what_get_kernel_returns(repository, load, monkeypatch):
    """Its code runs with the names of a build, in a process where nothing of it can be imported by its name."""
    card, build = (repository / "CARD.md").read_text(), load(repository / "build" / "torch-cpu")
    asked = []

    def get_kernel(name, version, trust_remote_code):
        asked.append((name, version))
        return build

    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    readme = (ROOT / "README.md").read_text()
    assert len(blocks) == readme.count("```python") + 1  # none is lost, and `get_kernel` comes before them
    names = {"__name__": "card"}
    monkeypatch.setattr(build._dispatch, "_mode", "reference")  # interpreted, the kernels would take minutes
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=get_kernel))
        patch.setitem(sys.modules, "soflow_kernels", None)  # an import raises
        for block in blocks:
            exec(compile(block, "CARD.md", "exec"), names)
    assert asked == [("someone/soflow-kernels", hub.VERSION)] and names["h"].shape == names["x"].shape
    assert names["layernorm_modulate"] is build.layernorm_modulate
    assert not re.search(r"\]\((?!https?://)", card), "a link to a file that is not there"
    for name in ("pip install", "python -m", "soflow_kernels.testing", "soflow_kernels.inspect", "kernels/hub.py"):
        assert name not in card, name
    assert "`layers` of a package" in card and "## Where a call runs" in card and card.startswith("---\nlibrary_name")
    for name in re.findall(r"`soflow_kernels\.(\w+)`", card):
        assert hasattr(build, name), name


@pytest.mark.parametrize(("old", "text"), [("pip install ./k", "INSTALLATION"), ("## Without a GPU", "no section")])
def test_a_readme_that_the_card_can_no_longer_be_made_of_is_refused(old, text):
    readme = (ROOT / "README.md").read_text().replace(old, "another")
    with pytest.raises(ValueError, match=text):
        hub.card(readme, "a/b")


def test_wrong_arguments(repository, capsys, tmp_path):
    for arguments, message in (
        ([str(repository), "--repo-id", "a/b"], "not an empty folder"),
        ([str(tmp_path), "--repo-id", "b"], "--repo-id must be OWNER/NAME, got 'b'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            hub.main(arguments)
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# By the package `kernels`, which reads such repositories.


class Block(nn.Module):
    def __init__(self, dim=16):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False) for _ in range(2))
        self.attn = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.adaLN_modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x, c):
        shift, scale, gate, shift2, scale2, gate2 = (m[:, None] for m in self.adaLN_modulation(c).chunk(6, dim=1))
        x = x + gate * self.attn(self.norm1(x) * (1 + scale) + shift)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    def __init__(self, dim=16):
        super().__init__()
        self.norm_final, self.linear = nn.LayerNorm(dim, elementwise_affine=False), nn.Linear(dim, 4)
        self.adaLN_modulation = nn.Linear(dim, 2 * dim)

    def forward(self, x, c):
        shift, scale = (m[:, None] for m in self.adaLN_modulation(c).chunk(2, dim=1))
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class Positions(nn.Linear):
    """An attention that takes positions, and adds them."""

    def forward(self, x, rope=None):
        return super().forward(x if rope is None else x + rope)


class TurnedBlock(Block):
    def __init__(self):
        super().__init__()
        self.attn = Positions(16, 16)

    def forward(self, x, c, feat_rope=None):
        return super().forward(x, c)


LAYERS = {"DiTBlock": Block, "LightningDiTBlock": TurnedBlock, "DiTFinalLayer": FinalLayer}


def test_layers_compute_what_their_classes_do(device):
    """As `kernelize` does it: the layer's forward in place of the module's."""
    for name, cls in LAYERS.items():
        module, layer = cls().to(device), getattr(soflow_kernels.layers, name)
        x, c = torch.randn(2, 3, 16, device=device), torch.randn(2, 16, device=device)
        if name == "LightningDiTBlock":
            assert not torch.allclose(layer.forward(module, x, c), layer.forward(module, x, c, feat_rope=x))
        torch.testing.assert_close(layer.forward(module, x, c), module(x, c), rtol=1e-4, atol=1e-5)
        assert layer.__init__ is nn.Module.__init__ and layer.has_backward and layer.can_torch_compile


def test_kernels_loads_the_repository(repository):
    kernels = pytest.importorskip("kernels.layer", reason="kernels is not installed")  # a folder here is `kernels`, too
    from kernels._rust import Build, Digest, DigestAlgorithm, Metadata  # pyright: ignore[reportMissingImports]

    from kernels import get_local_kernel

    loaded = get_local_kernel(repository)
    assert loaded.__version__ == soflow_kernels.__version__ and loaded.__name__.startswith("_soflow_kernels_")
    assert len(Build.open(repository).general.backends) == 3
    for folder in (repository / "build").iterdir():
        metadata = Metadata.read_from_file(folder / "metadata.json")
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))
    for name, cls in LAYERS.items():
        adopting = kernels.use_kernel_forward_from_hub(name)(type(cls.__name__, (cls,), {"forward": cls.forward}))
        model = nn.ModuleList([adopting()])
        given = torch.randn(2, 3, 16), torch.randn(2, 16)
        wanted = model[0](*given)
        mapping = {name: {"cpu": kernels.LocalLayerRepository(repository, layer_name=name)}}
        with kernels.use_kernel_mapping(mapping):
            mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
            kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)
        assert model[0].forward.__func__ is getattr(loaded.layers, name).forward
        torch.testing.assert_close(model[0](*given), wanted, rtol=1e-4, atol=1e-5)

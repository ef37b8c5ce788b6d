"""The networks that features are taken of: DINOv2 beside transformers' own, and one line for what is missing."""

import hashlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from soflow_fast.errors import ConfigError
from soflow_fast.evaluation import RandomFeatures, open_networks
from soflow_fast.evaluation.networks import inception_v3, vit
from tests.evaluation.small import pictures

CPU = torch.device("cpu")


def test_random_features_are_the_same_everywhere_and_tell_sets_apart() -> None:
    x = pictures(6, 0)
    first, second = (RandomFeatures().on(CPU)(x).features for _ in range(2))
    assert torch.equal(first, second) and first.shape == (6, 32 + 64 + 128) and first.dtype == torch.float32
    # Pinned, as figures of other machines and versions are compared: float32 sums, in another order at most.
    assert float(first.double().mean()) == pytest.approx(0.1920923, rel=1e-5)
    assert torch.allclose(RandomFeatures().on(CPU)(x[:1]).features, first[:1], rtol=1e-5, atol=1e-6)
    assert RandomFeatures().on(CPU)(torch.zeros(2, 3, 1, 1, dtype=torch.uint8)).features.shape == (2, 224)


# DINOv2


def their_weights(positions: int, swiglu: bool = False) -> dict[str, Tensor]:
    """A DINOv2 of two layers and 128 numbers in the layout of the authors' files."""
    source, D, hidden = torch.Generator().manual_seed(0), 128, 344 if swiglu else 512
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, D),
        "pos_embed": (1, 1 + positions**2, D),
        "mask_token": (1, D),
        "patch_embed.proj.weight": (D, 3, 14, 14),
        "patch_embed.proj.bias": (D,),
        "norm.weight": (D,),
        "norm.bias": (D,),
    }
    for k in range(2):
        layers = {"attn.qkv": (3 * D, D), "attn.proj": (D, D)}
        mlp = {"mlp.w12": (2 * hidden, D), "mlp.w3": (D, hidden)}
        layers |= mlp if swiglu else {"mlp.fc1": (hidden, D), "mlp.fc2": (D, hidden)}
        for name, shape in layers.items():
            shapes |= {f"blocks.{k}.{name}.weight": shape, f"blocks.{k}.{name}.bias": shape[:1]}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            shapes[f"blocks.{k}.{name}"] = (D,)
    return {name: torch.randn(shape, generator=source) * 0.1 for name, shape in shapes.items()}


def save_as_transformers(theirs: dict[str, Tensor], folder: Path) -> Path:
    """The same weights in the layout of its folders, as `facebook/dinov2-large` has it."""
    named: dict[str, Tensor] = {}
    for name, value in theirs.items():
        name = re.sub(r"^blocks\.", "encoder.layer.", name)
        name = re.sub(r"^norm\.", "layernorm.", name)
        name = re.sub(r"^(cls_token|mask_token)$", r"embeddings.\1", name).replace("ls1.gamma", "layer_scale1.lambda1")
        name = re.sub(r"^pos_embed$", "embeddings.position_embeddings", name)
        name = name.replace("patch_embed.proj.", "embeddings.patch_embeddings.projection.")
        name = name.replace("ls2.gamma", "layer_scale2.lambda1").replace("attn.proj", "attention.output.dense")
        name = name.replace("mlp.w12", "mlp.weights_in").replace("mlp.w3", "mlp.weights_out")
        if "attn.qkv" in name:
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                named[name.replace("attn.qkv", f"attention.attention.{part}")] = piece.clone()
        else:
            named[name] = value
    folder.mkdir()
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def features_of(place: Path) -> Tensor:
    return open_networks(["dinov2"], dinov2=str(place))["dinov2"].on(CPU)(pictures(2, 0, 32)).features


@pytest.mark.parametrize("swiglu", [False, True])
def test_dinov2_from_the_files_of_its_authors_and_of_transformers(swiglu: bool, tmp_path: Path) -> None:
    theirs = their_weights(16, swiglu)
    torch.save(theirs, tmp_path / "dinov2.pth")
    folder = save_as_transformers(theirs, tmp_path / "hf")
    found = features_of(tmp_path / "dinov2.pth")
    assert found.shape == (2, 128) and (found[0] - found[1]).abs().max() > 0.01
    assert torch.equal(features_of(folder), found) and torch.equal(features_of(folder / "model.safetensors"), found)


@pytest.mark.slow  # importing transformers takes seconds
@pytest.mark.parametrize("swiglu", [False, True])
def test_dinov2_is_transformers_model(swiglu: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = save_as_transformers(their_weights(16, swiglu), tmp_path / "hf")
    size = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 224}
    config = transformers.Dinov2Config(**size, use_swiglu_ffn=swiglu)
    model = transformers.Dinov2Model.from_pretrained(folder, config=config).eval()
    with torch.no_grad():
        expected = model(pixel_values=vit.prepared(pictures(2, 0, 32))).pooler_output
    # float32 through two layers, by other kernels.
    torch.testing.assert_close(features_of(folder), expected, rtol=1e-4, atol=1e-5)


def test_dinov2_scales_its_positions_as_the_authors_do(tmp_path: Path) -> None:
    """From 37 x 37 to 16 x 16 by a factor of 16.1 / 37, as `interpolate_offset=0.1` of their code has it."""
    theirs = their_weights(37)
    table = theirs["pos_embed"]
    found = vit._positions(table)
    assert found.shape == (1, 257, 128) and torch.equal(found[:, 0], table[:, 0])
    # Bicubic interpolation has the values of a ramp, here of the column, at (i + 1/2) / factor - 1/2, within 0.05: its
    # filter, as torch has it, is exact on constants alone. By 16 / 37 the last would be 0.2 off.
    ramp = torch.arange(37.0).expand(37, 37).reshape(1, -1, 1)
    scaled = vit._positions(torch.cat([torch.zeros(1, 1, 1), ramp], 1))[0, 1:, 0].view(16, 16)
    expected = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    torch.testing.assert_close(scaled[7, 1:-1], expected[1:-1], rtol=0, atol=0.06)


def test_images_are_prepared_by_pillow() -> None:
    image = pictures(1, 0, 32)
    scaled = Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
    x = vit.prepared(image)
    back = (x[0].permute(1, 2, 0) * torch.tensor(vit.DEVIATION) + torch.tensor(vit.MEAN)) * 255
    np.testing.assert_allclose(back.numpy(), np.asarray(scaled), atol=1e-3)


def test_files_that_are_no_dinov2(tmp_path: Path) -> None:
    def refused(name: str) -> str:
        with pytest.raises(ConfigError) as error:
            open_networks(["dinov2"], dinov2=str(tmp_path / name) if name else "")
        text = str(error.value)
        assert text.startswith("--dinov2 ") and "\n" not in text and len(text) < 400
        return text

    assert "is needed" in refused("")
    assert "cannot be read (No such file" in refused("nowhere.pth")
    (tmp_path / "text.pth").write_text("mine")
    assert "holds no weights" in refused("text.pth")
    (tmp_path / "text.safetensors").write_text("mine")
    assert "holds no weights" in refused("text.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert "is no DINOv2" in refused("other.safetensors")
    torch.save({**their_weights(16), "register_tokens": torch.zeros(1, 4, 128)}, tmp_path / "registers.pth")
    assert "without registers" in refused("registers.pth")
    lacking = their_weights(16)
    del lacking["blocks.1.mlp.fc2.weight"]
    torch.save(lacking, tmp_path / "lacking.pth")
    assert "is no DINOv2 ('blocks.1.mlp.fc2.weight')" in refused("lacking.pth")
    torch.save({"x": print}, tmp_path / "code.pth")
    assert "holds no weights" in refused("code.pth")


# Inception: torch-fidelity is in the place of which a module stands with the same names.


class FakeInception(nn.Module):
    def __init__(self, name: str, features_list: list[str], path: str) -> None:
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        self.Mixed_6d = nn.Module()
        self.Mixed_6d.branch1x1 = nn.Conv2d(3, 192, 1)
        self.load_state_dict(torch.load(path, weights_only=True))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        spatial = self.Mixed_6d.branch1x1(x.float()[:, :, :17, :17])
        return spatial.mean((2, 3)), spatial.flatten(1)[:, :1008]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`installed(name=module)`: what importing a name gives, or raises."""

    def install(**modules: Any) -> None:
        def import_module(name: str) -> Any:
            found = modules.get(name)
            if found is None:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(inception_v3.importlib, "import_module", import_module)

    return install


def fidelity() -> ModuleType:
    module = ModuleType("torch_fidelity")
    module.FeatureExtractorInceptionV3 = FakeInception
    return module


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "inception.pth"
    torch.save({f"Mixed_6d.branch1x1.{k}": v for k, v in nn.Conv2d(3, 192, 1).state_dict().items()}, path)
    return path


def test_inception_gives_seven_channels_in_the_order_of_adm(installed: Any, weights: Path) -> None:
    installed(torchvision=sys, torch_fidelity=fidelity())
    network = open_networks(["inception"], inception=str(weights))["inception"]
    images = pictures(3, 0, 20)
    for _ in range(2):  # what is kept of a call goes with it
        found = network.on(CPU)(images)
    whole = network._network.Mixed_6d.branch1x1(images.float()[:, :, :17, :17])
    assert found.spatial is not None and found.spatial.shape == (3, 17 * 17 * 7)
    assert torch.equal(found.spatial.view(3, 17, 17, 7)[1, 2, 5], whole[1, :7, 2, 5])
    assert found.features.shape == (3, 192) and found.logits is not None and found.logits.shape == (3, 1008)
    assert not network._network.Mixed_6d.branch1x1._forward_hooks


def refused(**given: str) -> str:
    with pytest.raises(ConfigError) as error:
        open_networks(["inception"], **given)
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


@pytest.mark.parametrize(
    ("version", "command"),
    [
        ("2.13.0+cpu", "pip install 'torchvision==0.28.*' --index-url https://download.pytorch.org/whl/cpu"),
        ("2.10.1", "pip install 'torchvision==0.25.*'"),
        ("2.14.1+cu130", "pip install 'torchvision==0.29.*' --index-url https://download.pytorch.org/whl/cu130"),
        ("3.0.0a0+git1234", "pip install torchvision"),
    ],
)
def test_a_torchvision_that_is_missing_or_does_not_fit(
    version: str, command: str, installed: Any, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    installed(torch_fidelity=fidelity())
    missing = refused(inception=str(weights))
    assert missing == f"torchvision is missing, which torch-fidelity needs: {command}"
    for error in (RuntimeError("operator torchvision::nms does not exist"), ImportError("undefined symbol: _ZN3c10"),
                  AttributeError("partially initialized module"), OSError("libcudart.so.13")):  # fmt: skip
        installed(torch_fidelity=fidelity(), torchvision=error)
        assert refused(inception=str(weights)) == f"torchvision does not fit torch {version}: {command}"


def test_without_torch_fidelity_its_weights_or_a_network(
    installed: Any, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(torchvision=sys)
    assert refused(inception=str(weights)).endswith("pip install 'torch-fidelity>=0.4'")
    installed(torchvision=sys, torch_fidelity=fidelity())
    assert "--inception nowhere: cannot be read (No such file" in refused(inception="nowhere")
    torch.save({"x": print}, tmp_path / "code.pth")
    assert f"--inception {tmp_path / 'code.pth'}: holds no weights" in refused(inception=str(tmp_path / "code.pth"))
    torch.save({"other": torch.zeros(2)}, tmp_path / "other.pth")
    assert "is not of this network (Error(s) in loading state_dict" in refused(inception=str(tmp_path / "other.pth"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def offline(url: str, *_: Any, **__: Any) -> None:
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    line = refused()
    assert line.startswith("--inception FILE is needed: https://github.com/toshas/torch-fidelity/")
    cached = tmp_path / "hub" / "checkpoints" / inception_v3.URL.rpartition("/")[2]
    cached.write_bytes(b"half of it")
    assert "is damaged" in refused()


def test_downloaded_weights_are_compared_with_their_sha_256(
    installed: Any, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(torchvision=sys, torch_fidelity=fidelity())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(inception_v3, "SHA256", hashlib.sha256(weights.read_bytes()).hexdigest()[:8])
    monkeypatch.setattr(inception_v3, "URL", weights.as_uri())
    for _ in range(2):  # fetched, and found
        assert "inception" in open_networks(["inception"])
    assert (tmp_path / "hub" / "checkpoints" / weights.name).exists()
    (tmp_path / "hub" / "checkpoints" / weights.name).unlink()
    monkeypatch.setattr(inception_v3, "SHA256", "0" * 8)
    assert "cannot be fetched (invalid hash value" in refused()

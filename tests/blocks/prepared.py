"""The files that the pages' examples are about, small, in a folder: images, latents, runs, weights, episodes.

Names are those on the pages. A VAE and CLIP lie where their names on the hub lead to as paths, so that diffusers and
transformers take them for folders.
"""

import contextlib
import io
import json
import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from PIL import Image

from soflow_fast import DiT, DiTConfig, TrainState, preset, train_step
from soflow_fast.config.authors import to_authors
from soflow_fast.config.schema import Config
from soflow_fast.data import identity
from soflow_fast.data.dataset import LatentSpace
from soflow_fast.data.identity import Identity
from soflow_fast.runs import checkpoint
from soflow_fast.runs.checkpoint.authors import as_authors
from soflow_fast.train import main as train
from soflow_fast.training.state import build_flow
from tests.blocks.changes import added
from tests.data.demonstrations.test_lerobot import write as write_episodes

VAES = ("stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-ema")
CLIP = "openai/clip-vit-base-patch32"
TINY: dict[str, Any] = {"model.hidden_size": 16, "model.depth": 1, "model.num_heads": 2, "batch_size": 4, "steps": 2}
CLASSES = 1000


def image(seed: int, size: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    return Image.fromarray(pixels)


def images(home: Path) -> None:
    """Folders and a zip with classes, one of them with captions, and an .npz as ADM has it."""
    with zipfile.ZipFile(home / "cifar10-train.zip", "w") as archive:
        for i in range(20):
            content = io.BytesIO()
            image(i, 32).save(content, "PNG")
            archive.writestr(f"{'ab'[i % 2]}/{i}.png", content.getvalue())
    for folder, suffix in (("photos", ".jpg"), ("imagenet/val", ".png"), ("out", ".png"), ("reference", ".png")):
        for i in range(8):
            place = home / folder / "ab"[i % 2] / f"{i}{suffix}" if folder != "out" else home / folder / f"{i}{suffix}"
            place.parent.mkdir(parents=True, exist_ok=True)
            image(i, 32).save(place)
            if folder == "photos":
                place.with_suffix(".txt").write_text(f"a dog, number {i}")
    for name in ("samples.npz", "REFERENCE.npz", "VIRTUAL_imagenet256_labeled.npz"):
        np.savez(home / name, arr_0=np.stack([np.asarray(image(i, 32)) for i in range(12)]))


def latents(home: Path) -> None:
    """Latents as the authors' trainer keeps them, a file and folders of it, with vectors for the samples."""
    source = np.random.default_rng(0)
    rows = np.concatenate([source.normal(size=(8, 4, 32, 32)), np.full((8, 4, 32, 32), 0.1)], 1)
    for folder in (home, home / "latents", home / "LATENTS"):
        folder.mkdir(exist_ok=True)
        with h5py.File(folder / "imagenet_latent.hdf5", "w") as file:
            file.create_dataset("latents", data=np.float32(rows))
            file.create_dataset("labels", data=np.linspace(0, CLASSES - 1, 8).astype(np.int64))
    np.save(home / "latents" / "conditions.npy", np.float32(source.normal(size=(8, 512))))
    np.save(home / "texts.npy", np.float32(source.normal(size=(8, 512))))


def vaes(home: Path) -> None:
    """VAEs that make an eighth of height and width, as those of Stable Diffusion."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
    )
    for name in VAES:
        vae.save_pretrained(home / name)


def clip(home: Path) -> None:
    """A text encoder of CLIP's kind that knows single letters."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    place = home / CLIP
    place.mkdir(parents=True)
    letters = [chr(code) for code in range(33, 127)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (place / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (place / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(place / "vocab.json"), str(place / "merges.txt"), model_max_length=77).save_pretrained(place)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPTextConfig(vocab_size=len(tokens), projection_dim=512, **sizes, **ends)
    CLIPTextModelWithProjection(config).save_pretrained(place)


def run_of(config: Config, folder: Path) -> None:
    """A run on latents with one step, whose classes have names."""
    state = TrainState.build(config)
    shape = (config.dit.in_channels, config.dit.input_size, config.dit.input_size)
    names = ("cat", *(f"class {i}" for i in range(1, CLASSES)))
    space = LatentSpace(VAES[0], 0.18215, 0.0)
    state.data = identity.to_json(Identity("latents", CLASSES, shape, names, (1,) * CLASSES, "abc", space))
    source = torch.Generator().manual_seed(0)
    train_step(state, torch.randn(4, *shape, generator=source), torch.arange(4))
    checkpoint.save(folder, state)


def digits(home: Path) -> None:
    """Two runs on the digits, as the tests make them of the plain command."""
    for folder in ("digits", "digits-b"):
        with contextlib.redirect_stdout(io.StringIO()):
            train([*added("python -m soflow_fast.train", 0), "--run-dir", str(home / "runs" / folder)])


def imagenet(home: Path) -> None:
    """Runs on latents."""
    run_of(preset("imagenet256-b2", device="cpu", **TINY, **{"model.input_size": 4}), home / "runs" / "imagenet")


def zeros_of(config: Config) -> dict[str, torch.Tensor]:
    shapes = {name: value.shape for name, value in build_flow(config).state_dict().items()}
    return {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}


def authors(home: Path) -> None:
    """Directories of the authors' trainer, its file of a tiny network, and a SiT's weights.

    The smallest network of theirs has 130 million weights: zeros in half precision, one file under three names."""
    run_of(preset("imagenet256-b4", device="cpu", **TINY), home / "RUN")
    torch.save(as_authors(checkpoint.load_whole(home / "RUN")), home / "FILE.pt")
    public = preset("imagenet256-b4")
    torch.save(zeros_of(public), home / "weights.pt")
    (home / "alone").mkdir()
    torch.save(zeros_of(replace(public, model=DiTConfig.named("S/2", num_classes=7))), home / "alone" / "weights.pt")
    for place in ("THEIR_DIR/ckpts/400000.pt", "XL-2-cond/ckpts/1200000.pt"):
        (home / place).parent.mkdir(parents=True, exist_ok=True)
        os.link(home / "weights.pt", home / place)
    for folder in ("THEIR_DIR", "XL-2-cond", "."):
        (home / folder / "config.yaml").write_text(to_authors(public, "work"))
    small = DiT(DiTConfig(patch_size=2, hidden_size=16, depth=1, num_heads=2)).state_dict()
    torch.save({name: v for name, v in small.items() if "s_embedder" not in name}, home / "SiT-XL-2-256x256.pt")


def episodes(home: Path) -> None:
    """A LeRobot data set."""
    write_episodes(home / "my-lerobot-data", "v3.0")


PARTS: dict[Callable[[Path], None], str] = {
    images: r"cifar10-train\.zip|photos|samples\.npz|imagenet/val|reference|REFERENCE",
    latents: r"latents|LATENTS|texts\.npy",
    vaes: r"photos|runs/imagenet\b|sd-vae",
    clip: r"openai/clip",
    digits: r"runs/digits",
    imagenet: r"runs/imagenet\b",
    authors: r"THEIR_DIR|FILE\.pt|load_official\(",
    episodes: r"my-lerobot-data",
}
"""What is made, each where the blocks of a page match its expression."""


def prepare(home: Path, text: str) -> None:
    """Write what the blocks of a page, `text`, are about."""
    for part, names in PARTS.items():
        if re.search(names, text):
            part(home)

"""Packaging: `pip install -e .` gives both `soflow_fast` and `soflow_kernels`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """The version as text: importing the package here would need torch at build time."""
    found = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "soflow_fast" / "version.py").read_text(), re.MULTILINE)
    assert found, "soflow_fast/version.py holds no __version__"
    return found[1]


def long_description() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


# The book, built from docs/ and the docstrings.
DOCS = ["mkdocs-material>=9.6", "mkdocstrings[python]>=1.0", "latex2mathml>=3.77"]
EXTRAS = {
    "test": [
        *DOCS,
        "pytest>=8",
        "pytest-benchmark>=5",
        "hypothesis>=6.100",
        "diffusers>=0.35",  # whose DiT takes the kernels
        "matplotlib>=3.9",  # the plots of the records
        "pyyaml>=6",  # judges the YAML that is written
        "nbclient>=0.10",  # runs the notebooks, in a kernel of ipykernel
        "ipykernel>=6.29",
        "h5py>=3.12",  # real files of latents in others' formats
        "lmdb>=1.5",
        "gymnasium>=1.0",  # the tasks of policies
        "pyarrow>=17",  # real files of LeRobot
        "transformers>=5",  # whose CLIP an example on a page takes
        "triton>=3.6; sys_platform == 'linux'",
        "torchao>=0.14; sys_platform == 'linux'",  # whose float8 products --precision fp8 takes
        "peft>=0.17; python_version >= '3.11'",  # whose LoRA layers must take effect
        "kernels>=0.17; python_version >= '3.11'",  # which loads what kernels/hub.py writes
        "ruff>=0.12",
        "pyright[nodejs]>=1.1.400",
    ],
    # Apex is left out on purpose: it is built from NVIDIA's source, and the package called "apex" on the index is an
    # unrelated project.
    "fp8": ["torchao>=0.14; sys_platform == 'linux'"],
    "quack": ["quack-kernels>=0.6.5; sys_platform == 'linux'"],  # whose products --set run.mlp=quack takes
    "gpu": ["xformers", "flash-attn>=2.7; sys_platform == 'linux'"],
    "eval": ["torch-fidelity>=0.4"],
    # Tasks, and LeRobot's parquet files; the GIFs are pillow's. Policies themselves need none of these.
    "policy": ["gymnasium>=1.0", "pyarrow>=17"],
    "hub": ["huggingface_hub>=0.34", "diffusers>=0.35", "accelerate>=1.0"],  # accelerate: enable_model_cpu_offload
    "latents": ["h5py>=3.12", "lmdb>=1.5"],  # whose files --from and --data take
    "hf": ["datasets>=3.6,<6"],  # data sets that it saved, and parquet files of images
    # What --track takes. Neither is pinned in constraints.txt: trackio wants an older pillow than the pinned one.
    "wandb": ["wandb>=0.19"],
    "trackio": ["trackio>=0.20"],
    "docs": DOCS,
    "notebooks": ["matplotlib>=3.9", "ipykernel>=6.29"],
}
# What installs anywhere from wheels; flash-attn compiles, so "gpu" stays out.
EXTRAS["all"] = [requirement for name in ("test", "eval", "hub", "latents") for requirement in EXTRAS[name]]

setup(
    name="soflow-fast",
    version=version(),
    description="A fast training engine for SoFlow one-step image generators",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["soflow_fast", "soflow_fast.*"]),
        *find_packages("kernels", include=["soflow_kernels", "soflow_kernels.*"]),
    ],
    package_dir={"soflow_kernels": "kernels/soflow_kernels"},
    package_data={"soflow_fast.runs.gallery": ["page.html", "page.css", "page.js", "charts.js"]},
    install_requires=[
        "torch>=2.10",
        "numpy>=1.26",
        "scipy>=1.13",
        "scikit-learn>=1.5",  # ships the digits of the default preset, and the classifier that judges its samples
        "safetensors>=0.5",
        "pillow>=10.3",
        "tensorboard>=2.18",
        "rich>=13",
    ],
    extras_require=EXTRAS,
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

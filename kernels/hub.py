"""Writes these kernels as a repository of Hugging Face's kernel hub: `python kernels/hub.py OUT --repo-id OWNER/NAME`.

OUT then holds what their `kernel-builder` starts from (build.toml, flake.nix, CARD.md, torch-ext/) and, as the kernels
are Triton's and nothing is compiled, what it would make of it: build/torch-BACKEND, each a package of its own with its
metadata, which `kernels.get_local_kernel(OUT)` loads and an upload publishes. A package has relative imports only, and
registers its operations in a library named after its content. https://huggingface.co/docs/kernels/kernel-requirements
"""

import argparse
import ast
import base64
import hashlib
import json
import re
import sys
from pathlib import Path

SOURCE = Path(__file__).parent / "soflow_kernels"
NAME = "soflow-kernels"
MODULE = "soflow_kernels"
VERSION = 0
"""The hub's major version, 0 while the interface may change; it is one more with every change that breaks a call."""
BACKENDS = ("cpu", "cuda", "rocm")
LEFT_OUT = {"inspect.py", "testing.py", "_ops.py"}
"""The command that compiles ahead of time, what tests are made of, and what every build has of its own."""
HERE_ALONE = ("On Hugging Face's kernel hub", "Without a GPU")
"""Sections of the README about what a build does not have."""
INSTALLATION = """```sh
pip install ./kernels        # from a clone of the repository
```
"""

OPS = '''"""The library of this build."""

import torch

_NAMESPACE = "{id}"

ops = getattr(torch.ops, _NAMESPACE)


def add_op_namespace_prefix(name: str) -> str:
    """The full name of an operation, NAMESPACE::name."""
    return f"{{_NAMESPACE}}::{{name}}"
'''
COMPATIBLE = '''"""For releases of `kernels` that look for the package one folder further down."""

import importlib.util
import sys
from pathlib import Path

_name = "{id}"
if _name not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_name, Path(__file__).parent.parent / "__init__.py")
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])
globals().update(vars(sys.modules[_name]))
'''
BUILD = """[general]
name = "{name}"
version = {version}
edition = 5
license = "MIT"
backends = [{backends}]

[general.hub]
repo-id = "{repo}"

[torch-noarch]
"""
FLAKE = """{
  description = "soflow-kernels";

  inputs = {
    kernel-builder.url = "github:huggingface/kernels";
  };

  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""
HEAD = """---
library_name: kernels
license: mit
tags:
- kernels
---

"""
GET = """The package `kernels` loads them, and every name below is one of `soflow_kernels`:

```python
from kernels import get_kernel

soflow_kernels = get_kernel("{repo}", version={version}, trust_remote_code=True)
```
"""


def relative(source: str, depth: int) -> str:
    """The text of a module `depth` folders below the package, its imports from the package made relative.

    Raises ValueError if the module imports something else than torch, triton and the standard library.
    """
    dots = "." * (depth + 1)
    imports = re.compile(rf"^(\s*from ){MODULE}(?:\.([\w.]+))? import ", re.MULTILINE)
    text = imports.sub(lambda found: f"{found[1]}{dots}{found[2] or ''} import ", source)
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.Import, ast.ImportFrom)) or getattr(node, "level", 0):
            continue
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        for name in names:
            if name.split(".")[0] not in {"torch", "triton", *sys.stdlib_module_names}:
                raise ValueError(f"line {node.lineno} imports {name}, which no kernel of the hub may")
    return text


def sources() -> dict[str, str]:
    """{path in the package: text} of every module that a build has, but for its `_ops`."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        place = path.relative_to(SOURCE)
        if place.as_posix() not in LEFT_OUT:
            try:
                found[place.as_posix()] = relative(path.read_text(encoding="utf-8"), len(place.parts) - 1)
            except ValueError as error:
                raise ValueError(f"{MODULE}/{place.as_posix()}, {error}") from None
    return found


def card(readme: str, repo_id: str) -> str:
    """The text of CARD.md: the README as it holds for who has the kernels by `get_kernel`.

    Names are taken from what that returns, as a build cannot be imported by its name. Sections of HERE_ALONE and
    paragraphs that link files which are not in the repository are left out. Raises ValueError for a README that has
    no INSTALLATION or lacks such a section.
    """
    if INSTALLATION not in readme:
        raise ValueError("README.md no longer says how to install as INSTALLATION does")
    begin, *sections = re.split(r"^(?=## )", readme, flags=re.MULTILINE)
    titles = {text.partition("\n")[0].removeprefix("## "): text for text in sections}
    if lacking := set(HERE_ALONE) - titles.keys():
        raise ValueError(f"README.md has no section {', '.join(sorted(lacking))}")
    text = begin + "".join(text for title, text in titles.items() if title not in HERE_ALONE)
    linking = re.compile(r"\]\((?!https?://|#)")
    text = "\n\n".join(part for part in text.split("\n\n") if not linking.search(part))
    text = text.replace(INSTALLATION, GET.format(repo=repo_id, version=VERSION))
    text = re.sub(rf"^import {MODULE}\n\n?", "", text, flags=re.MULTILINE)

    def assignment(found: re.Match[str]) -> str:
        names = found[1].split(", ")
        return f"{', '.join(names)} = {', '.join(f'{MODULE}.{name}' for name in names)}"

    return HEAD + re.sub(rf"^from {MODULE} import (.+)$", assignment, text, flags=re.MULTILINE).rstrip() + "\n"


def identifier(files: dict[str, str], backend: str) -> str:
    """The name of a build, also of its library of operations: another for every other content."""
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return f"_{MODULE}_{backend}_{digest[:12]}"


def variant(files: dict[str, str], backend: str) -> dict[str, str]:
    """{path: text} of build/torch-BACKEND."""
    name = identifier(files, backend)
    files = {
        **files,
        "_ops.py": OPS.format(id=name),
        f"{MODULE}/__init__.py": COMPATIBLE.format(id=name),
    }
    digests = {
        path: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for path, text in sorted(files.items())
    }
    metadata = {
        "name": NAME,
        "id": name,
        "version": VERSION,
        "license": "MIT",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    return {**files, "metadata.json": json.dumps(metadata, indent=2) + "\n"}


def repository(repo_id: str) -> dict[str, str]:
    """{path: text} of the whole repository."""
    files = sources()
    readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    fields = {"name": NAME, "version": VERSION, "repo": repo_id}
    listed = ", ".join(f'"{backend}"' for backend in BACKENDS)
    return {
        "build.toml": BUILD.format(**fields, backends=listed),
        "flake.nix": FLAKE,
        "CARD.md": card(readme, repo_id),
        **{f"torch-ext/{MODULE}/{path}": text for path, text in files.items()},
        **{
            f"build/torch-{backend}/{path}": text
            for backend in BACKENDS
            for path, text in variant(files, backend).items()
        },
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python kernels/hub.py", description="Write a repository of the kernel hub.")
    parser.add_argument("out", type=Path, help="a folder that is empty or not there yet")
    parser.add_argument("--repo-id", required=True, metavar="OWNER/NAME", help="the repository that it is for")
    options = parser.parse_args(argv)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", options.repo_id):
        parser.error(f"--repo-id must be OWNER/NAME, got {options.repo_id!r}")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        parser.error(f"{options.out} is there already and not an empty folder")
    files = repository(options.repo_id)
    for path, text in files.items():
        place = options.out / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8", newline="\n")
    print(f"{options.out}: {len(files)} files, build/torch-{{{','.join(BACKENDS)}}}")


if __name__ == "__main__":
    main()

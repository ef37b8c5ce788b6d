"""Who may import whom, and which module alone may do what: read off the syntax trees of both packages.

A rule is a function from a source file to the problems it has. Each is held against every file here and, so that it is
known to be able to fail, against a piece of bad source.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"soflow_fast": ROOT / "soflow_fast", "soflow_kernels": ROOT / "kernels" / "soflow_kernels"}
MAX_LINES = 450

LEAVES = {"soflow_fast.errors", "soflow_fast.rng", "soflow_fast.config.schema"}
MODELS = {"soflow_fast.models", "soflow_fast.policy"}
COMMAND_LINES = {f"soflow_fast.{name}" for name in ("train", "sample", "evaluate", "encode")}
SERIALISERS = {"pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve"}
CLOCKS = {
    "time": {"soflow_fast.runs.trainer"},
    "timeit": {"soflow_fast.runs.trainer"},
    "datetime": {"soflow_fast.runs.trainer"},
    "signal": {"soflow_fast.runs.signals"},
}
GENERATORS = {
    "torch.Generator",
    "torch.seed",
    "numpy.random.default_rng",
    "numpy.random.seed",
    "numpy.random.RandomState",
    "random.Random",
    "random.seed",
}
EXITS = {"sys.exit", "os._exit", "os.abort", "exit", "quit"}
WRITERS = {
    "torch.save",
    "torch.distributed.checkpoint.save",
    "torch.distributed.checkpoint.async_save",
    "safetensors.torch.save",
    "safetensors.torch.save_file",
    "safetensors.torch.save_model",
    "safetensors.numpy.save_file",
}


class Import(NamedTuple):
    line: int
    names: tuple[str, ...]  # what one imported name may stand for: `from a import b` is `a` and `a.b`


class Source:
    """One file: its dotted name, text and syntax tree."""

    def __init__(self, module: str, text: str, is_package: bool = False) -> None:
        self.module = module
        self.text = text
        self.tree = ast.parse(text)
        self.package = module if is_package else module.rpartition(".")[0]

    @cached_property
    def imports(self) -> list[Import]:
        """Every import of the file, at any depth, as absolute names."""
        return list(self._imports())

    def _imports(self) -> Iterator[Import]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(node.lineno, (alias.name,))
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute("." * node.level + (node.module or ""))
                for alias in node.names:
                    yield Import(node.lineno, (base, f"{base}.{alias.name}"))
        for node, name in self.calls:
            if name in ("importlib.import_module", "__import__", "builtins.__import__") and node.args:
                target = node.args[0]
                if isinstance(target, ast.Constant) and isinstance(target.value, str):
                    yield Import(node.lineno, (self._absolute(target.value),))

    def _absolute(self, name: str) -> str:
        level = len(name) - len(name.lstrip("."))
        if level == 0:
            return name
        parents = self.package.split(".")
        return ".".join([*parents[: len(parents) - level + 1], *filter(None, [name[level:]])])

    @cached_property
    def calls(self) -> list[tuple[ast.Call, str]]:
        """Every call, with the dotted name of what is called as far as imports and their aliases tell it."""
        found = ((node, self.dotted(node.func)) for node in ast.walk(self.tree) if isinstance(node, ast.Call))
        return [(node, name) for node, name in found if name]

    def dotted(self, node: ast.expr) -> str:
        """`a.b.c` of an expression, its first name replaced by what it was imported as; "?.c" of any other value."""
        if isinstance(node, ast.Name):
            return self._aliases.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            return f"{self.dotted(node.value) or '?'}.{node.attr}"
        return ""

    @cached_property
    def _aliases(self) -> dict[str, str]:
        aliases = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute("." * node.level + (node.module or ""))
                aliases |= {alias.asname or alias.name: f"{base}.{alias.name}" for alias in node.names}
        return aliases


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imports_of(source: Source, *packages: str) -> list[str]:
    return [
        f"line {line}: imports {names[-1]}"
        for line, names in source.imports
        if any(within(name, package) for name in names for package in packages)
    ]


def calls_of(source: Source, names: set[str]) -> list[str]:
    return [f"line {node.lineno}: calls {name}" for node, name in source.calls if name in names]


def keyword(node: ast.Call, name: str) -> object:
    """The literal given as keyword `name`, or None."""
    return next((k.value.value for k in node.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


def leaves_import_nothing_of_ours(source: Source) -> list[str]:
    return imports_of(source, *PACKAGES) if source.module in LEAVES else []


def objective_imports_no_model(source: Source) -> list[str]:
    return imports_of(source, *MODELS) if source.module == "soflow_fast.objective" else []


def kernels_import_torch_and_triton_only(source: Source) -> list[str]:
    if not within(source.module, "soflow_kernels"):
        return []
    allowed = {"torch", "triton", "soflow_kernels", *sys.stdlib_module_names}
    imported = [(line, names[-1]) for line, names in source.imports]
    return [f"line {line}: imports {name}" for line, name in imported if name.split(".")[0] not in allowed]


def nobody_imports_a_command_line(source: Source) -> list[str]:
    return imports_of(source, *COMMAND_LINES)


def one_module_each_reads_clocks_and_signals(source: Source) -> list[str]:
    forbidden = [module for module, owners in CLOCKS.items() if source.module not in owners]
    return imports_of(source, *forbidden)


def rng_alone_makes_generators(source: Source) -> list[str]:
    if source.module == "soflow_fast.rng":
        return []
    seeded = [f"line {n.lineno}: calls {name}" for n, name in source.calls if re.search(r"\.manual_seed(_all)?$", name)]
    return calls_of(source, GENERATORS) + seeded


def checkpoint_alone_writes_checkpoints(source: Source) -> list[str]:
    return [] if source.module == "soflow_fast.runs.checkpoint" else calls_of(source, WRITERS)


def process_alone_exits(source: Source) -> list[str]:
    if source.module == "soflow_fast.commands.process":
        return []
    raised = [node for node in ast.walk(source.tree) if isinstance(node, ast.Raise) and node.exc]
    names = [(n.lineno, source.dotted(n.exc.func if isinstance(n.exc, ast.Call) else n.exc)) for n in raised if n.exc]
    return calls_of(source, EXITS) + [f"line {line}: raises {name}" for line, name in names if name == "SystemExit"]


def no_code_from_data(source: Source) -> list[str]:
    unpickled = [f"line {n.lineno}: allow_pickle" for n, _ in source.calls if keyword(n, "allow_pickle") is True]
    run = calls_of(source, {"eval", "exec", "builtins.eval", "builtins.exec"})
    return imports_of(source, *SERIALISERS) + run + unpickled


def torch_load_takes_weights_only(source: Source) -> list[str]:
    loads = [node for node, name in source.calls if name in ("torch.load", "torch.serialization.load")]
    return [f"line {n.lineno}: torch.load" for n in loads if keyword(n, "weights_only") is not True]


def no_utils(source: Source) -> list[str]:
    return ["is called utils"] if source.module.rpartition(".")[2] in ("utils", "util") else []


def files_stay_short(source: Source) -> list[str]:
    lines = len(source.text.splitlines())
    return [f"has {lines} lines, more than {MAX_LINES}"] if lines > MAX_LINES else []


def read_sources() -> list[Source]:
    sources = []
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            is_package = parts[-1] == "__init__"
            module = ".".join(parts[:-1] if is_package else parts)
            sources.append(Source(module, path.read_text(encoding="utf-8"), is_package))
    return sources


Rule = Callable[[Source], list[str]]
SOURCES = read_sources()

# For each rule: source that breaks it, and source close to that which does not; each with the module it stands in.
CASES: dict[Rule, tuple[list[tuple[str, str]], list[tuple[str, str]]]] = {
    leaves_import_nothing_of_ours: (
        [
            ("soflow_fast.errors", "from .config import Config"),
            ("soflow_fast.rng", "from soflow_fast import config"),
            ("soflow_fast.config.schema", "def f():\n    import soflow_kernels.gelu"),
            ("soflow_fast.config.schema", "import importlib\nimportlib.import_module('.errors', __package__)"),
        ],
        [("soflow_fast.config.schema", "import json"), ("soflow_fast.flow", "from .config import FlowConfig")],
    ),
    objective_imports_no_model: (
        [
            ("soflow_fast.objective", "from .models.dit import DiT"),
            ("soflow_fast.objective", "from . import models"),
            ("soflow_fast.objective", "def f():\n    from soflow_fast.models.unet import UNet"),
            ("soflow_fast.objective", "import soflow_fast.models.paired_forward as i"),
        ],
        [
            ("soflow_fast.objective", "from .flow import SolutionFlow"),
            ("soflow_fast.training.state", "from .models.dit import DiT"),
        ],
    ),
    kernels_import_torch_and_triton_only: (
        [
            ("soflow_kernels.gelu", "from soflow_fast.errors import UserError"),
            ("soflow_kernels.patch", "def f():\n    import diffusers"),
            ("soflow_kernels.testing", "try:\n    import numpy as np\nexcept ImportError:\n    np = None"),
        ],
        [
            ("soflow_kernels.gelu", "import os\nimport torch.nn.functional as F\nimport triton.language as tl"),
            ("soflow_kernels.gelu", "from ._dispatch import jit"),
            ("soflow_fast.data.digits", "import sklearn.datasets"),
        ],
    ),
    nobody_imports_a_command_line: (
        [
            ("soflow_fast.runs.trainer", "from ..train import main"),
            ("soflow_fast.pipeline", "from . import sample"),
            ("soflow_fast.pipeline", "from soflow_fast import sample"),
            ("soflow_fast.data.encoder", "from ..encode import main"),
            ("soflow_fast.train", "def f():\n    import soflow_fast.evaluate"),
            ("soflow_fast.train", "__import__('soflow_fast.sample')"),
        ],
        [("soflow_fast.pipeline", "from .sampling import sample"), ("soflow_fast.train", "from .trainer import train")],
    ),
    one_module_each_reads_clocks_and_signals: (
        [
            ("soflow_fast.runs.metrics", "import time"),
            ("soflow_fast.runs.checkpoint", "from datetime import datetime"),
            ("soflow_fast.sampling", "def f():\n    from time import monotonic as now"),
            ("soflow_fast.train", "import signal"),
            ("soflow_fast.errors", "import time"),
            ("soflow_fast.runs.trainer", "import signal"),
        ],
        [("soflow_fast.runs.trainer", "import time"), ("soflow_fast.runs.signals", "import signal")],
    ),
    rng_alone_makes_generators: (
        [
            ("soflow_fast.training.step", "import torch\ng = torch.Generator('cpu')"),
            ("soflow_fast.training.step", "from torch import Generator as G\ng = G()"),
            ("soflow_fast.training.state", "import torch as t\nt.manual_seed(0)"),
            ("soflow_fast.training.state", "import torch\ntorch.cuda.manual_seed_all(0)"),
            ("soflow_fast.training.state", "def f(source):\n    source.manual_seed(0)"),
            ("soflow_fast.data.images", "import numpy as np\nr = np.random.default_rng(0)"),
        ],
        [
            ("soflow_fast.rng", "import torch\ng = torch.Generator().manual_seed(0)"),
            ("soflow_fast.training.step", "import torch\ndef f(g: torch.Generator): ..."),
        ],
    ),
    checkpoint_alone_writes_checkpoints: (
        [
            ("soflow_fast.runs.trainer", "import torch\ntorch.save({}, 'x')"),
            ("soflow_fast.models.official", "from safetensors.torch import save_file as write\nwrite({}, 'x')"),
            ("soflow_fast.training.state", "import safetensors.torch as st\nst.save_model(None, 'x')"),
            ("soflow_fast.training.state", "import torch.distributed.checkpoint as dcp\ndcp.save({})"),
        ],
        [
            ("soflow_fast.runs.checkpoint", "from safetensors.torch import save_file\nsave_file({}, 'x')"),
            ("soflow_fast.runs.images", "image.save('grid.png')"),
        ],
    ),
    process_alone_exits: (
        [
            ("soflow_fast.train", "import sys\nsys.exit(2)"),
            ("soflow_fast.train", "from sys import exit as leave\nleave(2)"),
            ("soflow_fast.train", "exit(2)"),
            ("soflow_fast.train", "import os\nos._exit(2)"),
            ("soflow_fast.commands.parser", "def f():\n    raise SystemExit(2)"),
            ("soflow_fast.commands.parser", "raise SystemExit"),
        ],
        [
            ("soflow_fast.commands.process", "import sys\nsys.exit(2)"),
            ("soflow_fast.train", "from .commands.process import run\nif __name__ == '__main__':\n    run(main)"),
        ],
    ),
    no_code_from_data: (
        [
            ("soflow_fast.config.schema", "eval('1')"),
            ("soflow_fast.config.schema", "exec('x = 1')"),
            ("soflow_fast.models.official", "import pickle"),
            ("soflow_fast.models.official", "def f():\n    from pickle import loads"),
            ("soflow_fast.data.latents", "import numpy as np\nnp.load('x', allow_pickle=True)"),
        ],
        [
            ("soflow_fast.runs.checkpoint", "network.eval()"),
            ("soflow_fast.data.latents", "np.load('x', allow_pickle=False)"),
        ],
    ),
    torch_load_takes_weights_only: (
        [
            ("soflow_fast.models.official", "import torch\ntorch.load('x')"),
            ("soflow_fast.models.official", "from torch import load\nload('x', weights_only=False)"),
            ("soflow_fast.models.official", "import torch\ntorch.load('x', weights_only=flag)"),
        ],
        [("soflow_fast.models.official", "import torch\ntorch.load('x', weights_only=True)")],
    ),
    no_utils: ([("soflow_fast.utils", ""), ("soflow_fast.data.utils", "")], [("soflow_fast.flow", "")]),
    files_stay_short: (
        [("soflow_fast.flow", "x = 1\n" * (MAX_LINES + 1))],
        [("soflow_fast.flow", "x = 1\n" * MAX_LINES)],
    ),
}


def by_name(value: object) -> str | None:
    return getattr(value, "__name__", None)


def test_the_sources_are_seen():
    modules = {source.module for source in SOURCES}
    assert modules >= {"soflow_fast", "soflow_kernels", "soflow_fast.objective", *LEAVES}
    files = [path for folder in PACKAGES.values() for path in folder.glob("**/*.py")]
    assert len(SOURCES) == len(modules) == len(files)


@pytest.mark.parametrize("rule", CASES, ids=by_name)
def test_sources_keep_the_rule(rule: Rule):
    assert [f"{source.module}, {problem}" for source in SOURCES for problem in rule(source)] == []


@pytest.mark.parametrize(
    ("rule", "module", "text"),
    [(rule, *case) for rule, (bad, _) in CASES.items() for case in bad],
    ids=lambda value: by_name(value) or "",
)
def test_rule_reports_bad_source(rule: Rule, module: str, text: str):
    assert rule(Source(module, text))


@pytest.mark.parametrize(
    ("rule", "module", "text"),
    [(rule, *case) for rule, (_, good) in CASES.items() for case in good],
    ids=lambda value: by_name(value) or "",
)
def test_rule_accepts_good_source(rule: Rule, module: str, text: str):
    assert rule(Source(module, text)) == []


def test_relative_imports_of_a_package_start_at_itself():
    text = "from .source import Source\nfrom ..config.schema import Config"
    seen = [names for _, names in Source("soflow_fast.data", text, is_package=True).imports]
    assert seen == [
        ("soflow_fast.data.source", "soflow_fast.data.source.Source"),
        ("soflow_fast.config.schema", "soflow_fast.config.schema.Config"),
    ]


def test_kernels_is_no_package():
    """`kernels/__init__.py` would shadow the package `kernels` of Hugging Face."""
    assert (ROOT / "kernels" / "soflow_kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_both_packages_have_the_same_version():
    versions = {(folder / "version.py").read_text(encoding="utf-8") for folder in PACKAGES.values()}
    assert len(versions) == 1
    assert re.fullmatch(r'__version__ = "\d+\.\d+\.\d+"\n', versions.pop())

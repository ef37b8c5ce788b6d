"""The house: who may import whom, and which module alone may do what, read off the syntax trees of both packages.

A rule is a function from sources to the problems that they have. One table holds each rule with source that breaks it
and source close to that which does not, so that each is known to be able to fail.
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
BENCHMARKS = {"benchmarks": ROOT / "benchmarks"}

FLOORS = (
    {"errors", "ranks", "rng", "version"},
    {"config", "files", "launch"},
    {"data", "flow"},
    {"average_velocity", "augmentation"},
    {"objective"},
    {"policy"},
    {"models"},
    {"training"},
    {"sampling"},
    {"evaluation"},
    {"runs"},
    {"commands", "hub"},
    {"pipeline"},
    {"train", "sample", "evaluate", "encode", "export", "gallery"},
)
"""The rooms of the engine from the ground up: each imports from lower floors only. The last are the command lines."""
MOST_MODULES = {"soflow_fast": 12, "soflow_kernels": 12}
"""The most modules that a folder may hold, besides `version`, command lines and names that begin with an underscore."""

SERIALISERS = {"pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve"}
PROCESS = {"soflow_fast.commands.process"}
CLOCKS = {
    **{name: {"soflow_fast.runs", "soflow_fast.commands"} for name in ("time", "timeit", "datetime")},
    "signal": {"soflow_fast.runs.signals", *PROCESS},
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
SETTINGS = r"torch\.(_dynamo|_inductor)\.config\.|torch\.backends\.|sys\.tracebacklimit$|threading\.excepthook$"
"""Attributes that are made to be set from outside."""
NAMERS = {"soflow_fast", "soflow_fast.data.formats"}
"""Modules that import by names in a table of their own: the public names, the formats of data."""
PATCHING = {"soflow_kernels.testing"}
"""Modules that replace functions of others: tests find memory that no kernel writes by a filling `torch.empty`."""
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
        return list(self._imports(ast.walk(self.tree)))

    @cached_property
    def first_imports(self) -> list[Import]:
        """The imports that are made when the module is."""
        return [found for found in self._imports(iter(self.tree.body)) if isinstance(found, Import)]

    def _imports(self, nodes: Iterator[ast.AST]) -> Iterator[Import]:
        for node in nodes:
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
    def imported(self) -> set[str]:
        """The first names of everything that is imported."""
        return {name.split(".")[0] for _, names in self.imports for name in names}

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


Tree = dict[str, Source]
Rule = Callable[[Tree], list[str]]


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def room(name: str) -> str:
    """The first name below soflow_fast of an import; nothing of another one and of the package itself."""
    package, _, rest = name.partition(".")
    return rest.partition(".")[0] if package == "soflow_fast" else ""


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


def each(rule: Callable[[Source], list[str]]) -> Rule:
    """A rule about one file after the other."""

    def of_all(tree: Tree) -> list[str]:
        return [f"{name}, {problem}" for name, source in tree.items() for problem in rule(source)]

    of_all.__name__ = rule.__name__
    return of_all


@each
def imports_run_one_way_down(source: Source) -> list[str]:
    here = room(source.module)
    if not here:  # __init__ offers the public names, each on its first use; soflow_kernels has no rooms
        return []
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    if here not in floor:
        return [f"{here} is no room of the house"]
    wanted = [(line, room(names[-1])) for line, names in source.imports]
    return [
        f"line {line}: {here} imports {there}"
        for line, there in wanted
        if there not in ("", here) and floor.get(there, len(FLOORS)) >= floor[here]
    ]


def modules_import_in_no_circle(tree: Tree) -> list[str]:
    done: set[str] = set()

    def circles(name: str, path: tuple[str, ...]) -> Iterator[str]:
        if name in path:
            yield " -> ".join([*path[path.index(name) :], name])
        elif name not in done:
            for other in sorted(imported_modules(tree, tree[name].imports) - {"soflow_fast", "soflow_kernels", name}):
                yield from circles(other, (*path, name))
            done.add(name)

    return [circle for name in tree for circle in circles(name, ())]


def imported_modules(tree: Tree, imports: list[Import]) -> set[str]:
    """The modules of the tree behind some imports."""
    most_specific = (next((name for name in reversed(names) if name in tree), "") for _, names in imports)
    return {name for name in most_specific if name}


def a_wrong_command_line_is_answered_without_torch(tree: Tree) -> list[str]:
    queue = [f"soflow_fast.{name}" for name in ("train", "sample", "evaluate", "encode", "export", "gallery")]
    queue = [name for name in queue if name in tree]
    for name in queue:
        found = imported_modules(tree, tree[name].first_imports)
        parents = {other.rpartition(".")[0] for other in found} & tree.keys()
        queue += sorted((found | parents) - set(queue))
    heavy = {"torch", "numpy", "scipy", "sklearn", "PIL", "triton", "safetensors"}
    return [
        f"{name}, line {line}: imports {names[-1]}"
        for name in queue
        for line, names in tree[name].first_imports
        if names[0].split(".")[0] in heavy
    ]


def a_folder_holds_a_dozen_modules(tree: Tree) -> list[str]:
    folders: dict[str, list[str]] = {}
    for name in tree:
        folder, _, last = name.rpartition(".")
        is_folder = any(within(other, name) for other in tree if other != name)
        command = folder == "soflow_fast" and last in FLOORS[-1]
        if folder and not is_folder and not command and last != "version" and not last.startswith("_"):
            folders.setdefault(folder, []).append(last)
    most = {folder: MOST_MODULES.get(folder, 12) for folder in folders}
    return [f"{folder} holds {len(names)} modules" for folder, names in folders.items() if len(names) > most[folder]]


@each
def kernels_import_torch_and_triton_only(source: Source) -> list[str]:
    if not within(source.module, "soflow_kernels"):
        return []
    allowed = {"torch", "triton", "soflow_kernels", *sys.stdlib_module_names}
    imported = [(line, names[-1]) for line, names in source.imports]
    return [f"line {line}: imports {name}" for line, name in imported if name.split(".")[0] not in allowed]


@each
def runs_and_commands_alone_read_clocks_and_signals(source: Source) -> list[str]:
    forbidden = [name for name, owners in CLOCKS.items() if not any(within(source.module, owner) for owner in owners)]
    return imports_of(source, *forbidden)


@each
def rng_alone_makes_generators(source: Source) -> list[str]:
    if source.module == "soflow_fast.rng":
        return []
    seeded = [f"line {n.lineno}: calls {name}" for n, name in source.calls if re.search(r"\.manual_seed(_all)?$", name)]
    return calls_of(source, GENERATORS) + seeded


@each
def checkpoint_alone_writes_checkpoints(source: Source) -> list[str]:
    return [] if within(source.module, "soflow_fast.runs.checkpoint") else calls_of(source, WRITERS)


@each
def process_alone_exits(source: Source) -> list[str]:
    if source.module in PROCESS:
        return []
    raised = [node for node in ast.walk(source.tree) if isinstance(node, ast.Raise) and node.exc]
    names = [(n.lineno, source.dotted(n.exc.func if isinstance(n.exc, ast.Call) else n.exc)) for n in raised if n.exc]
    return calls_of(source, EXITS) + [f"line {line}: raises {name}" for line, name in names if name == "SystemExit"]


@each
def flow_alone_asks_the_package(source: Source) -> list[str]:
    """The package hands out its public names from every floor: whoever took one from it would be on none. The methods
    of a flow that are public functions of floors above take theirs, once they are called."""
    asked = [line for line, names in source.imports if names == ("soflow_fast",)]
    if source.module == "soflow_fast.flow":
        first = {line for line, _ in source.first_imports}
        asked = [line for line in asked if line in first]
    found = [f"line {line}: imports the package itself" for line in asked]
    if source.module not in NAMERS:
        named = [node for node, name in source.calls if name in ("importlib.import_module", "__import__") and node.args]
        unseen = [node for node in named if not isinstance(node.args[0], ast.Constant)]
        found += [f"line {node.lineno}: imports what is not written there" for node in unseen]
    return found


@each
def no_code_from_data(source: Source) -> list[str]:
    unpickled = [f"line {n.lineno}: allow_pickle" for n, _ in source.calls if keyword(n, "allow_pickle") is True]
    run = calls_of(source, {"eval", "exec", "builtins.eval", "builtins.exec"})
    return imports_of(source, *SERIALISERS) + run + unpickled


@each
def torch_load_takes_weights_only(source: Source) -> list[str]:
    loads = [node for node, name in source.calls if name in ("torch.load", "torch.serialization.load")]
    return [f"line {n.lineno}: torch.load" for n in loads if keyword(n, "weights_only") is not True]


@each
def nothing_is_patched(source: Source) -> list[str]:
    """No attribute of what was imported is set, beyond settings; nor is any set by a name that is not written there."""
    if source.module in PATCHING:
        return []
    stored = [
        (node.lineno, source.dotted(node))
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del))
    ]
    patched = [
        f"line {line}: sets {name}"
        for line, name in stored
        if name.split(".")[0] in source.imported and not re.match(SETTINGS, name)
    ]
    named = [(node, name, node.args and source.dotted(node.args[0])) for node, name in source.calls]
    by_name = [f"line {n.lineno}: calls {f}({x})" for n, f, x in named if f in ("setattr", "delattr") and x != "sys"]
    return patched + by_name + imports_of(source, "unittest.mock")


@each
def no_utils(source: Source) -> list[str]:
    return ["is called utils"] if source.module.rpartition(".")[2] in ("utils", "util") else []


def read_sources(packages: dict[str, Path]) -> Tree:
    sources = []
    for package, folder in packages.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            is_package = parts[-1] == "__init__"
            module = ".".join(parts[:-1] if is_package else parts)
            sources.append(Source(module, path.read_text(encoding="utf-8"), is_package))
    return {source.module: source for source in sources}


SOURCES = read_sources(PACKAGES)
Example = tuple[str, str] | dict[str, str]

# For each rule: sources that break it, and sources close to those which do not; each a text with the module that it
# stands in, or several by module.
HOUSE: dict[Rule, tuple[list[Example], list[Example]]] = {
    imports_run_one_way_down: (
        [
            ("soflow_fast.errors", "from .config import Config"),
            ("soflow_fast.rng", "from soflow_fast import config"),
            ("soflow_fast.config.schema", "import importlib\nimportlib.import_module('..flow', __package__)"),
            ("soflow_fast.data.source", "def f():\n    from ..models.dit import DiT"),
            ("soflow_fast.objective", "from .models.dit import DiT"),
            ("soflow_fast.objective", "from . import models"),
            ("soflow_fast.objective", "def f():\n    from soflow_fast.models.unet import UNet"),
            ("soflow_fast.objective", "import soflow_fast.models.paired_forward as i"),
            ("soflow_fast.models.dit", "from ..training.state import TrainState"),
            ("soflow_fast.policy.adapter", "from ..runs.checkpoint import load"),
            ("soflow_fast.models.dit", "from ..runs.trainer import train"),
            ("soflow_fast.training.step", "from ..runs import checkpoint"),
            ("soflow_fast.runs.trainer", "from ..commands.parser import Parser"),
            ("soflow_fast.runs.trainer", "from ..train import main"),
            ("soflow_fast.pipeline", "from . import sample"),
            ("soflow_fast.pipeline", "from soflow_fast import sample"),
            ("soflow_fast.data.encoder", "from ..encode import main"),
            ("soflow_fast.train", "def f():\n    import soflow_fast.evaluate"),
            ("soflow_fast.train", "__import__('soflow_fast.sample')"),
            ("soflow_fast.flow", "from .data import Source"),
            ("soflow_fast.flow", "from .attic import Chest"),
            ("soflow_fast.attic.chest", ""),
        ],
        [
            ("soflow_fast.config.schema", "import json"),
            ("soflow_fast.flow", "from .config.schema import FlowConfig"),
            ("soflow_fast.objective", "from .flow import SolutionFlow"),
            ("soflow_fast.training.state", "from ..models.dit import DiT\nfrom .step import train_step"),
            ("soflow_fast.pipeline", "from .sampling import sample"),
            ("soflow_fast.train", "from .runs.trainer import train"),
        ],
    ),
    flow_alone_asks_the_package: (
        [
            ("soflow_fast.models.dit", "def f():\n    import soflow_fast\n    return soflow_fast.train_step"),
            ("soflow_fast.objective", "import importlib\np = importlib.import_module('soflow_fast')"),
            ("soflow_fast.objective", "import importlib\np = importlib.import_module(__package__)"),
            ("soflow_fast.objective", "from importlib import import_module\np = import_module(f'{__package__}.hub')"),
            ("soflow_fast.flow", "import soflow_fast"),
        ],
        [
            ("soflow_fast.flow", "def f():\n    import soflow_fast\n    return soflow_fast.save_pretrained"),
            ("soflow_fast.train", "import soflow_fast.runs.trainer"),
            ("soflow_fast.data.formats", "import importlib\nm = importlib.import_module(f'.{x}', __package__)"),
            ("soflow_fast.data.huggingface", "import importlib\nd = importlib.import_module('datasets')"),
        ],
    ),
    modules_import_in_no_circle: (
        [
            {
                "soflow_fast.flow": "from . import rng",
                "soflow_fast.rng": "def f():\n    from .flow import SolutionFlow",
            },
            {
                "soflow_kernels.a": "from .b import f",
                "soflow_kernels.b": "from . import c",
                "soflow_kernels.c": "import soflow_kernels.a",
            },
        ],
        [
            {
                "soflow_kernels.a": "from . import b, c",
                "soflow_kernels.b": "from .c import f",
                "soflow_kernels.c": "import torch",
            },
        ],
    ),
    a_wrong_command_line_is_answered_without_torch: (
        [
            ("soflow_fast.train", "import torch"),
            ("soflow_fast.encode", "import torch"),
            {"soflow_fast.train": "from .flow import f", "soflow_fast.flow": "from torch import nn"},
            {
                "soflow_fast.sample": "from .runs.signals import f",
                "soflow_fast.runs.signals": "import signal",
                "soflow_fast.runs": "import torch.nn as nn",
            },
        ],
        [
            {"soflow_fast.train": "def f():\n    import torch", "soflow_fast.flow": "import torch"},
            {"soflow_fast.train": "from .errors import UserError", "soflow_fast.errors": "import os"},
        ],
    ),
    a_folder_holds_a_dozen_modules: (
        [
            {f"soflow_fast.models.m{i}": "" for i in range(13)},
            {f"soflow_fast.m{i}": "" for i in range(13)},
            {f"soflow_fast.models.m{i}": "" for i in range(12)} | {"soflow_fast.models.train": ""},
        ],
        [
            {f"soflow_fast.models.m{i}": "" for i in range(12)} | {"soflow_fast.models._shared": ""},
            {f"soflow_fast.models.m{i}": "" for i in range(12)} | {f"soflow_fast.data.m{i}": "" for i in range(12)},
            {f"soflow_fast.m{i}": "" for i in range(12)} | {"soflow_fast.train": "", "soflow_fast.export": ""},
        ],
    ),
    runs_and_commands_alone_read_clocks_and_signals: (
        [
            ("soflow_fast.models.attention_autotune", "import time"),
            ("soflow_fast.training.step", "from datetime import datetime"),
            ("soflow_fast.sampling", "def f():\n    from time import monotonic as now"),
            ("soflow_fast.train", "import signal"),
            ("soflow_fast.runs.checkpoint", "import signal"),
            ("soflow_fast.errors", "import time"),
        ],
        [
            ("soflow_fast.runs.trainer", "import time"),
            ("soflow_fast.runs.signals", "import signal"),
            ("soflow_fast.commands.dry_run", "import time"),
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
            ("soflow_fast.train", "from .commands import process\nif __name__ == '__main__':\n    process.run(main)"),
        ],
    ),
    nothing_is_patched: (
        [
            ("soflow_fast.training.step", "from . import state\nstate.resolve_device = None"),
            ("soflow_fast.training.step", "import torch.nn.functional as F\nF.scaled_dot_product_attention = None"),
            ("soflow_fast.training.step", "import torch\ntorch.nn.Module._apply = None"),
            ("soflow_fast.training.step", "import torch.nn\ndef f():\n    torch.nn.Module._apply = None"),
            ("soflow_fast.training.step", "from ..models.dit import DiT\nDiT.initialize = lambda self: None"),
            ("soflow_fast.training.step", "from ..models.dit import DiT\n(DiT.a, x), DiT.b = (1, 2), 3"),
            ("soflow_fast.training.step", "from ..models.dit import DiT\ndel DiT.initialize"),
            ("soflow_fast.training.step", "from ..models import dit\ndit.COUNT += 1"),
            ("soflow_fast.training.step", "def f(owner, name):\n    setattr(owner, name, None)"),
            ("soflow_fast.training.step", "import torch\nsetattr(torch, 'empty', None)"),
            ("soflow_fast.training.step", "from unittest.mock import patch"),
            ("soflow_kernels.patch", "import torch\ntorch.empty = None"),
        ],
        [
            ("soflow_fast.training.step", "def f(state):\n    state.step += 1"),
            ("soflow_fast.training.step", "from ..models.dit import DiT\nnet = DiT()\nnet.recompute = 'none'"),
            ("soflow_fast.models.dit", "import torch\ntorch._dynamo.config.recompile_limit = 64"),
            ("soflow_fast.training.step", "class A:\n    def f(self):\n        self.x = 1"),
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
            ("soflow_fast.runs.checkpoint.sharded", "import torch.distributed.checkpoint as dcp\ndcp.save({})"),
            ("soflow_fast.runs.images", "image.save('grid.png')"),
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
}


def tree_of(example: Example) -> Tree:
    texts = example if isinstance(example, dict) else dict([example])
    return {module: Source(module, text) for module, text in texts.items()}


@pytest.mark.parametrize("rule", HOUSE, ids=lambda rule: rule.__name__)
def test_the_house(rule: Rule):
    bad, good = HOUSE[rule]
    assert rule(SOURCES) == []
    assert [example for example in bad if not rule(tree_of(example))] == [], "the rule does not see these"
    assert [(example, rule(tree_of(example))) for example in good if rule(tree_of(example))] == []


def test_benchmarks_patch_nothing():
    """What is measured is the engine as it is."""
    sources = read_sources(BENCHMARKS)
    assert len(sources) > 30 and "benchmarks.harness.race" in sources
    assert nothing_is_patched(sources) == []


def test_the_sources_are_seen():
    assert SOURCES.keys() >= {"soflow_fast", "soflow_kernels", "soflow_fast.objective", "soflow_fast.config.schema"}
    files = [path for folder in PACKAGES.values() for path in folder.glob("**/*.py")]
    assert len(SOURCES) == len(files) > 40


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


def test_tests_is_a_package():
    """torch-fidelity installs one of this name, which would hide a folder that is none."""
    assert (ROOT / "tests" / "__init__.py").exists()


def test_both_packages_have_the_same_version():
    versions = {(folder / "version.py").read_text(encoding="utf-8") for folder in PACKAGES.values()}
    assert len(versions) == 1
    assert re.fullmatch(r'__version__ = "\d+\.\d+\.\d+"\n', versions.pop())

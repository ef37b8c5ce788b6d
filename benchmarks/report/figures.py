"""The figures of the pages: scripts in docs/figures/, each drawn for a light and a dark page, as SVG.

A script NAME.py has a docstring and

    RECORDS = ("digits",)   names of benchmarks whose newest records of a CPU it shows; may be empty
    SOURCES = ()            paths, from the root, of other files that it computes with
    def draw(theme: Theme, *runs: dict) -> matplotlib.figure.Figure

and makes NAME-light.svg and NAME-dark.svg beside itself. A figure bears a digest of its script, sources and records,
and one of itself, so that a stale one is known without matplotlib; `redrawn` says whether drawing it anew gives the
same.
"""

import ast
import hashlib
import importlib.util
import io
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

from benchmarks.report import record
from soflow_fast.errors import UserError

FOLDER = "docs/figures"
DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"
SEAL = re.compile(r"<!-- sha256 of the above: ([0-9a-f]{64}) -->\n$")


@dataclass(frozen=True)
class Theme:
    """Colours of a page. The backgrounds of figures are transparent."""

    name: str
    ink: str
    """Text and axes."""
    muted: str
    """What is there for comparison: a floor, a bound, an arrow."""
    grid: str
    colours: tuple[str, ...]
    """Of lines and points, to be told apart with any sight (Okabe and Ito, Color Universal Design, 2008)."""


LIGHT = Theme(
    "light", "#1f2328", "#6e7781", "#d8dee4", ("#0072b2", "#d55e00", "#009e73", "#b3579a", "#a57a00", "#2a8fc4")
)
DARK = Theme(
    "dark", "#e6edf3", "#8b949e", "#30363d", ("#56b4e9", "#f0883e", "#2fc79a", "#e39bc6", "#e6c34a", "#9db8ff")
)
THEMES = (LIGHT, DARK)


def scripts(home: Path) -> list[Path]:
    """The scripts in a folder of figures, in alphabetical order."""
    return sorted(path for path in home.glob("*.py") if not path.name.startswith("_"))


def drawings(script: Path) -> dict[Theme, Path]:
    """The files of a script."""
    return {theme: script.with_name(f"{script.stem}-{theme.name}.svg") for theme in THEMES}


def picture(name: str, alt: str) -> str:
    """The figure of a script in a page of docs/, in the colours that the reader asks for."""
    return (
        "<picture>\n"
        f'  <source media="(prefers-color-scheme: dark)" srcset="figures/{name}-dark.svg">\n'
        f'  <img src="figures/{name}-light.svg" alt="{alt}">\n'
        "</picture>"
    )


def fault(script: Path, theme: Theme, folder: Path, root: Path = record.ROOT) -> str | None:
    """The reason, in words, why a file is not the figure of its script and records; None if it is."""
    try:
        text = drawings(script)[theme].read_text(encoding="utf-8")
        tree = ElementTree.fromstring(text)
    except OSError as error:
        return error.strerror or str(error)
    except (ElementTree.ParseError, ValueError):
        return "is no SVG"
    described = next((found.text for found in tree.iter(DUBLIN_CORE + "description")), None)
    if described is None:
        return "does not say what it was drawn from"
    if described != _origin(script, _runs(script, folder), root):
        return "its script, sources or records have changed since"
    seal = SEAL.search(text)
    if seal is None or seal[1] != _sha256(text[: seal.start()].encode()):
        return "was changed after it was drawn"
    return None


def drawn(script: Path, theme: Theme, folder: Path, root: Path = record.ROOT) -> str:
    """The figure as SVG. The same script, sources and records give the same text. Raises UserError without matplotlib,
    or where a record is missing or holds something else."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(f"{script.stem}: cannot be drawn: {error} (pip install matplotlib)") from None
    module, runs = _load(script), _runs(script, folder)
    settings: Any = _style(theme) | {"svg.hashsalt": script.stem}
    with matplotlib.rc_context(settings):
        try:
            figure = module.draw(theme, *runs)
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, StopIteration) as error:
            named = ", ".join(run["file"] for run in runs) or "no record"
            what = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"{script.stem}: cannot be drawn from {named} ({what})") from error
        buffer = io.StringIO()
        origin = {"Date": None, "Description": _origin(script, runs, root), "Creator": f"matplotlib {_version()}"}
        figure.savefig(buffer, format="svg", metadata=origin)
    text = buffer.getvalue()
    return f"{text}<!-- sha256 of the above: {_sha256(text.encode())} -->\n"


def redrawn(script: Path, theme: Theme, folder: Path, root: Path = record.ROOT) -> str | None:
    """The reason, in words, why drawing a figure anew gives another one; None if it gives the same.

    Numbers may differ in their last digits, as processors round differently. Another release of matplotlib draws other
    text, so there it is enough that the figure can be drawn.
    """
    text, anew = drawings(script)[theme].read_text(encoding="utf-8"), drawn(script, theme, folder, root)
    if f"<dc:title>matplotlib {_version()}</dc:title>" not in text:
        return None
    (words, numbers), (other_words, other_numbers) = _taken_apart(text), _taken_apart(anew)
    if words != other_words or len(numbers) != len(other_numbers):
        return "other elements"
    apart = max((abs(a - b) for a, b in zip(numbers, other_numbers, strict=True)), default=0.0)
    return f"numbers {apart:.3g} apart" if apart > 0.05 else None


def draw_the_stale(root: Path, folder: Path, check: bool = False) -> list[str]:
    """Draw the figures of docs/figures that are stale, or (check) leave them; a line for each of them. Those of which
    there is no record are passed over; a check names them where they have been drawn. Raises UserError for one that
    cannot be drawn."""
    stale = []
    for script in scripts(root / FOLDER):
        lost = [name for name in _declared(script, "RECORDS") if record.newest(folder, name, gpu=False) is None]
        for theme, path in drawings(script).items():
            if lost:
                if check and path.exists():
                    stale.append(f"{record.shown(path)}: no record of {', '.join(lost)} is in {record.shown(folder)}")
            elif found := fault(script, theme, folder, root):
                stale.append(f"{record.shown(path)}: {found}")
                if not check:
                    record.replace(path, drawn(script, theme, folder, root).encode())
    return stale


def _declared(script: Path, name: str) -> tuple[str, ...]:
    """RECORDS or SOURCES of a script, read off its text: to import it would need matplotlib."""
    for node in ast.parse(script.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in node.targets):
            return ast.literal_eval(node.value)
    raise UserError(f"{record.shown(script)}: says no {name}")


def _load(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"figure_{script.stem}", script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _runs(script: Path, folder: Path) -> list[dict]:
    found = {name: record.newest(folder, name, gpu=False) for name in _declared(script, "RECORDS")}
    for name, run in found.items():
        if run is None:
            raise UserError(
                f"{script.stem}: no record of benchmarks.{name.replace('-', '_')} in {record.shown(folder)}"
            )
    return [run for run in found.values() if run is not None]


def _origin(script: Path, runs: list[dict], root: Path) -> str:
    """What a figure says that it was drawn from."""
    parts = [script.read_bytes(), *((root / source).read_bytes() for source in _declared(script, "SOURCES"))]
    digest = _sha256("\n".join([*map(_sha256, parts), *map(record.digest, runs)]).encode())
    return f"sha256 of script, sources and records ({', '.join(run['file'] for run in runs) or 'none'}): {digest}"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _version() -> str:
    import matplotlib

    return matplotlib.__version__


def _style(theme: Theme) -> dict[str, Any]:
    """What matplotlib draws with."""
    ink = {
        f"{name}color": theme.ink
        for name in ("text.", "axes.edge", "axes.label", "axes.title", "xtick.", "ytick.", "legend.label")
    }
    return ink | {
        "font.size": 10,
        "font.family": "DejaVu Sans",
        "axes.prop_cycle": f"cycler('color', {list(theme.colours)})",
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": theme.grid,
        "grid.linewidth": 0.6,
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "path.simplify": True,
    }


def _taken_apart(text: str) -> tuple[list[str], list[float]]:
    """What an SVG says beside its numbers, and the numbers. Names that matplotlib makes of numbers, and pictures, are
    left out."""
    text = SEAL.sub("", text)
    text = re.sub(r"[a-zA-Z]{1,2}[0-9a-f]{10}\b|base64,[^\"]*|[0-9a-f]{64}", "", text)
    number = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
    return re.split(number, text), [float(found) for found in re.findall(number, text)]

"""Figures: each is that of its script and of the newest records, on a light page and on a dark one."""

import ast
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks.report import figures, pages, record
from soflow_fast.errors import UserError

HOME = record.ROOT / figures.FOLDER
SCRIPTS = figures.scripts(HOME)
FIGURES = [
    pytest.param(script, theme, id=f"{script.stem}-{theme.name}") for script in SCRIPTS for theme in figures.THEMES
]


def test_every_drawing_has_a_script():
    assert sorted(HOME.glob("*.svg")) == sorted(
        path for script in SCRIPTS for path in figures.drawings(script).values()
    )


@pytest.mark.parametrize(("script", "theme"), FIGURES)
def test_no_figure_is_stale(script, theme):
    """`python docs/figures` draws them anew."""
    assert figures.fault(script, theme, record.RECORDS) is None


@pytest.mark.parametrize(("script", "theme"), FIGURES)
def test_a_figure_can_be_drawn_anew(script, theme):
    assert figures.redrawn(script, theme, record.RECORDS) is None


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_figure_is_shown_and_small(script):
    pages_of = [path.read_text(encoding="utf-8") for path in [record.ROOT / "README.md", *HOME.parent.rglob("*.md")]]
    for path in figures.drawings(script).values():
        assert any(f"figures/{path.name}" in text for text in pages_of), f"{path.name} is on no page"
        assert path.stat().st_size < 250_000


def computed_with(code: str) -> set[str]:
    """The files of the repository that a script imports, as paths from the root, but for the drawing of figures."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= {name for name in below if _file(name)} or {str(node.module)}
    return {file for name in modules if name != "benchmarks.report.figures" and (file := _file(name))}


def _file(module: str) -> str | None:
    """The file of a module of this repository; None: of others, or no module."""
    if module.partition(".")[0] not in ("benchmarks", "soflow_fast", "soflow_kernels"):
        return None
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # a name of a module, not a package
        return None
    return Path(spec.origin).relative_to(record.ROOT).as_posix() if spec and spec.origin else None


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_what_a_figure_is_computed_with_is_among_its_sources(script):
    """A change there makes it stale. Of the files that these import in turn a script names what it chooses to."""
    assert computed_with(script.read_text(encoding="utf-8")) - set(figures._declared(script, "SOURCES")) == set()


def test_what_a_script_imports_is_found():
    code = """
import math, benchmarks.exact.levels
from benchmarks.exact import mixture
from benchmarks.report import figures
from benchmarks.report.figures import Theme
from matplotlib.figure import Figure
from soflow_fast.config.schema import ObjectiveConfig
def draw():
    from soflow_kernels.lookahead import guidance_decay
"""
    assert computed_with(code) == {
        "benchmarks/exact/levels.py",
        "benchmarks/exact/mixture.py",
        "soflow_fast/config/schema.py",
        "kernels/soflow_kernels/lookahead.py",
    }


POINTS = [{"step": 1, "seconds": 1.0, "frechet": 99.0}, {"step": 2, "seconds": 2.0, "frechet": 30.0}]


@pytest.fixture
def site(tmp_path):
    """A repository with one figure, of one record."""
    home = tmp_path / figures.FOLDER
    home.mkdir(parents=True)
    shutil.copy(HOME / "quality.py", home)
    record.write([{"method": "ours", "seed": 0, "points": POINTS}], "a command", tmp_path, "quality-for-time")
    figures.draw_the_stale(tmp_path, tmp_path)
    return tmp_path


def test_a_stale_figure_is_known_by_its_reason(site):
    script = site / figures.FOLDER / "quality.py"
    path = figures.drawings(script)[figures.DARK]

    def found() -> str | None:
        return figures.fault(script, figures.DARK, site, site)

    assert found() is None and figures.redrawn(script, figures.DARK, site, site) is None
    text = path.read_text()
    path.unlink()
    assert found() == "No such file or directory"
    for junk, reason in {
        "junk": "is no SVG",
        "<svg/>": "does not say what it was drawn from",
        text.replace("stroke-width", "stroke-Width"): "was changed after it was drawn",
        text.partition("<!-- sha256")[0]: "was changed after it was drawn",
    }.items():
        path.write_text(junk)
        assert found() == reason
    path.write_text(text)

    code = script.read_text()
    script.write_text(code.replace("seconds of training", "time"))
    assert found() == "its script, sources or records have changed since"
    script.write_text(code)
    kept = next(site.glob("*.json"))
    run = json.loads(kept.read_text())
    run["rows"][0]["points"][0]["seconds"] = 1.5
    kept.write_text(json.dumps(run))
    assert found() == "its script, sources or records have changed since"
    assert [line.split(": ")[0].split("/")[-1] for line in figures.draw_the_stale(site, site, check=True)] == [
        "quality-light.svg",
        "quality-dark.svg",
    ]
    assert found() is not None
    figures.draw_the_stale(site, site)
    assert found() is None and path.read_text() != text


def test_another_drawing_of_the_same_script_is_known(site, monkeypatch):
    """As when the shared style has changed: the digests agree, the drawings do not."""
    script = site / figures.FOLDER / "quality.py"
    path = figures.drawings(script)[figures.LIGHT]
    text = path.read_text()
    moved = text.replace('d="M ', 'd="M 1', 1)
    path.write_text(moved)
    assert str(figures.redrawn(script, figures.LIGHT, site, site)).startswith("numbers ")
    path.write_text(text.replace(figures.LIGHT.colours[0], figures.LIGHT.colours[1]))
    assert figures.redrawn(script, figures.LIGHT, site, site) == "other elements"
    path.write_text(moved.replace("<dc:title>matplotlib ", "<dc:title>matplotlib 0."))
    assert figures.redrawn(script, figures.LIGHT, site, site) is None  # another release is not compared


def test_the_sources_of_a_figure_count(site):
    script = site / figures.FOLDER / "quality.py"
    (site / "other.py").write_text("a = 1\n")
    script.write_text(script.read_text().replace("SOURCES = ()", 'SOURCES = ("other.py",)'))
    figures.draw_the_stale(site, site)
    assert figures.fault(script, figures.LIGHT, site, site) is None
    (site / "other.py").write_text("a = 2\n")
    assert figures.fault(script, figures.LIGHT, site, site) == "its script, sources or records have changed since"


def test_check_needs_no_matplotlib(site, monkeypatch, capsys):
    page = site / "docs" / "performance.md"
    page.write_text("<!-- benchmark:quality-for-time -->\n<!-- /benchmark:quality-for-time -->\n")
    shutil.copy(next(site.glob("*.json")), site / "kept")
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    assert figures.draw_the_stale(site, site, check=True) == []
    (site / figures.FOLDER / "quality-dark.svg").unlink()
    run = json.loads(next(site.glob("*.json")).read_text())
    for point in run["rows"][0]["points"]:
        point["accuracy"] = 0.5
    next(site.glob("*.json")).write_text(json.dumps(run))
    assert pages.main([], site, site) == 2
    err = capsys.readouterr().err
    assert "quality: cannot be drawn: " in err and "pip install matplotlib" in err and err.count("\n") == 1


def test_without_its_record_a_figure_cannot_be_drawn(site, capsys):
    next(site.glob("*.json")).unlink()
    script = site / figures.FOLDER / "quality.py"
    with pytest.raises(figures.UserError, match=r"quality: no record of benchmarks\.quality_for_time"):
        figures.drawn(script, figures.LIGHT, site, site)
    assert figures.draw_the_stale(site, site) == []
    lost = figures.draw_the_stale(site, site, check=True)
    assert [line.rpartition("/docs/")[2].partition(" is in ")[0] for line in lost] == [
        f"figures/quality-{theme}.svg: no record of quality-for-time" for theme in ("light", "dark")
    ]
    for path in figures.drawings(script).values():
        path.unlink()
    assert figures.draw_the_stale(site, site, check=True) == []  # of a benchmark that was not run yet


def test_a_record_of_something_else_is_named(site):
    record.write([{"method": "ours"}], "a command", site, "quality-for-time")
    script = site / figures.FOLDER / "quality.py"
    with pytest.raises(figures.UserError, match=r"quality: cannot be drawn from .*quality-for-time.*KeyError"):
        figures.drawn(script, figures.LIGHT, site, site)


@pytest.mark.parametrize("names", ["nosuch", "quality nosuch", "quality.py"])
def test_a_figure_that_is_not_there_is_named_before_any_is_drawn(names, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # whose first entry the command sets
    specification = importlib.util.spec_from_file_location("drawing", HOME / "__main__.py")
    assert specification and specification.loader
    drawing = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(drawing)
    monkeypatch.setattr(sys, "argv", ["docs/figures", *names.split()])
    monkeypatch.setattr(figures, "drawn", None)  # whoever calls it fails
    with pytest.raises(UserError) as error:
        drawing.main()
    assert f"there is no figure {names.split()[-1]}; there are calls, " in str(error.value)
    assert "\n" not in str(error.value)

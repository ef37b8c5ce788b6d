"""The book: mkdocs builds it from docs/ without a warning, with every public name, and its hooks do what they say."""

import dataclasses
import html
import importlib.util
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

import soflow_fast
import soflow_kernels
from soflow_fast.config.schema import TYPES, Config
from tests.elements import Elements

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (soflow_fast, soflow_kernels)
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "srcset", "link": "href"}
"""Elements for which a browser loads something, and the attribute that says from where."""
FONTS = r"@import|url\(\s*[\"']?(?:https?:)?//"


def public_names() -> set[str]:
    return {f"{package.__name__}.{name}" for package in PACKAGES for name in package.__all__}


def loaded(text: str) -> list[str]:
    """What a browser loads for a page. A link's `rel` says whether it is loaded or led to."""
    return [
        attributes[LOADED[tag]]
        for tag, attributes in Elements(text).found
        if LOADED.get(tag) in attributes and attributes.get("rel") not in ("canonical", "prev", "next", "alternate")
    ]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The book, built as `make docs` builds it, but elsewhere: in about five seconds of an idle core."""
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(place)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | QUIET, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return place


QUIET = {"NO_MKDOCS_2_WARNING": "1"}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """`small(markdown)`: a site of one page by the book's own settings, without the reference. Returns its folder."""
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")

    def small(markdown: str) -> Path:
        pages = tmp_path / "pages"
        pages.mkdir(exist_ok=True)
        (pages / "index.md").write_text(markdown)
        (pages / "kernels.md").write_text("# Kernels\n\n## Ahead of time\n")  # which kernels/README.md links to
        for name in ("one-light.svg", "one-dark.svg"):
            (pages / name).write_text("<svg/>")
        places = {"docs_dir": str(pages), "site_dir": str(tmp_path / "site")}
        nav = ["index.md", "kernels.md", "repository/kernels/README.md"]
        build(load_config(str(ROOT / "mkdocs.yml"), plugins=[], nav=nav, **places))
        return tmp_path / "site"

    return small


def test_every_public_name_is_on_a_page_of_the_reference() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    assert public_names() - set(re.findall(r"^::: (\S+)$", text, re.MULTILINE)) == set()


@pytest.mark.slow
def test_every_public_name_has_an_entry(site: Path) -> None:
    """In the inventory of the built site, at an element that is there."""
    _, _, packed = (site / "objects.inv").read_bytes().partition(b"zlib.\n")
    entries = [line.split(" ") for line in zlib.decompress(packed).decode().splitlines()]
    places = {name: where.replace("$", name) for name, _, _, where, *_ in entries}
    assert public_names() - places.keys() == set() and "soflow_fast.no_such_name" not in places
    for name in public_names():
        page, _, anchor = places[name].partition("#")
        assert any(given.get("id") == anchor for _, given in Elements((site / page).read_text()).found), name


def classes_of_fields() -> dict[str, list[str]]:
    """The fields of the configuration by full name, each as the classes that have it write it: CLASS.FIELD."""
    found: dict[str, list[str]] = {}
    for name, hint in get_type_hints(Config).items():
        sections = [each for each in (hint, *get_args(hint)) if dataclasses.is_dataclass(each)]
        for section in sections:
            for field in dataclasses.fields(section):
                found.setdefault(f"{name}.{field.name}", []).append(f"{section.__name__}.{field.name}")
        if not sections:
            found[name] = [f"Config.{name}"]
    return found


def undescribed(page: str) -> list[str]:
    """The fields without an element of their own in the reference, as CLASS.FIELD. page: its HTML."""
    ids = {given.get("id", "") for _, given in Elements(page).found}
    there = {name for package in ("soflow_fast.config.schema.", "soflow_fast.") for name in _after(package, ids)}
    return [name for names in classes_of_fields().values() for name in names if name not in there]


def _after(begin: str, names: set[str]) -> set[str]:
    return {name.removeprefix(begin) for name in names if name.startswith(begin)}


@pytest.mark.slow
def test_every_field_of_the_configuration_is_described(site: Path) -> None:
    assert undescribed((site / "api" / "configuration.html").read_text(encoding="utf-8")) == []


def test_a_field_of_another_section_describes_nothing() -> None:
    """`in_channels` is a field of two networks, `p` of the objective: nothing stands in for another's."""
    assert classes_of_fields().keys() == TYPES.keys()
    named = [name for names in classes_of_fields().values() for name in names]
    assert {"Config.steps", "DiTConfig.in_channels", "UNetConfig.in_channels", "ObjectiveConfig.p"} <= set(named)

    def page(wanted: list[str]) -> str:
        return "".join(
            f'<h2 id="soflow_fast.{"config.schema." * (k % 2)}{name}"></h2>' for k, name in enumerate(wanted)
        )

    assert undescribed(page(named)) == []
    for name in ("DiTConfig.in_channels", "ObjectiveConfig.p"):
        stand_in = f"OptimConfig.{name.partition('.')[2]}"
        assert undescribed(page([stand_in if each == name else each for each in named])) == [name]


@pytest.mark.slow
def test_a_page_asks_no_other_host_for_anything(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        found = loaded(page.read_text(encoding="utf-8"))
        assert found, page
        assert [place for place in found if re.match(r"(https?:)?//", place)] == [], page
    for style in site.rglob("*.css"):
        assert not re.search(FONTS, style.read_text(encoding="utf-8")), style


def test_what_another_host_is_asked_for_is_seen() -> None:
    text = '<script src="https://a/b.js"></script><link rel="canonical" href="https://c"><link href="//d/e.css">'
    assert loaded(text) == ["https://a/b.js", "//d/e.css"] and re.search(FONTS, "src: url('https://a/b.woff')")


@pytest.mark.slow
def test_every_formula_became_mathml(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert 'class="arithmatex"' not in page.read_text(encoding="utf-8"), page
    for source in (ROOT / "docs").glob("*.md"):
        if "$$" in source.read_text(encoding="utf-8"):
            name = "index.html" if source.stem == "README" else f"{source.stem}.html"
            assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in (site / name).read_text(), (
                name
            )


@pytest.mark.slow
def test_links_out_of_docs_lead_into_the_site(site: Path) -> None:
    """Every relative link and image of every page does."""
    outside = set()
    for page in site.rglob("*.html"):
        for tag, given in Elements(page.read_text(encoding="utf-8")).found:
            link = given.get({"a": "href", "img": "src"}.get(tag, ""), "").partition("#")[0]
            if not link or re.match(r"\w+:|/", link):
                continue
            place = Path(os.path.normpath(page.parent / link))
            assert place.exists(), f"{page}: {link}"
            outside |= {place.relative_to(site / "repository").as_posix()} if "repository" in place.parts else set()
    assert {"CONTRIBUTING.html", "kernels/index.html", "kernels/examples/train.py"} <= outside


PICTURE = """<picture>
  <source media="(prefers-color-scheme: dark)" srcset="one-dark.svg">
  <img src="one-light.svg" alt="What it shows.">
</picture>"""
PAGE = f"""# One

For $a < b$ and $x_t$:

$$
\\begin{{aligned}} q &= \\frac{{N_t - N_l}}{{t - l}} \\\\ w &= \\left(\\varepsilon\\right)^{{-p}} \\end{{aligned}}
$$

{PICTURE}

[the kernels](../kernels/README.md#one-line), [a file](../pyproject.toml), `$5 $6`, `a[0](../no/such)`

<a href="kernels.md#ahead-of-time">a page</a> <a href="#one"><img alt="" src='one-light.svg'></a>
<a href="../Makefile">outside</a> <a href="https://arxiv.org">elsewhere</a> `<img src="no-such.png">`
<a href="/place">of this host</a>

```text
[not a link](../nothing.md) $x$ <a href="nothing.md">
```
"""


def test_formulas_figures_and_links(small: Callable[[str], Path]) -> None:
    made = small(PAGE)
    text = (made / "index.html").read_text()
    assert text.count('display="block"') == 1, "the formula on lines of its own"
    assert text.count("<math ") == 3 and text.count("<mtr>") == 2 and "&#x0003C;" in text and "arithmatex" not in text
    images = {given["src"]: given["alt"] for tag, given in Elements(text).found if tag == "img"}
    shown = {f"one-{theme}.svg#only-{theme}": "What it shows." for theme in ("light", "dark")}
    assert images == shown | {"one-light.svg": ""}
    links = [given["href"] for tag, given in Elements(text).found if tag == "a"]
    assert {"repository/kernels/index.html#one-line", "repository/pyproject.toml"} <= set(links)
    of_html = {"kernels.html#ahead-of-time", "#one", "repository/Makefile", "https://arxiv.org", "/place"}
    assert of_html <= set(links)
    assert (made / "repository" / "pyproject.toml").read_bytes() == (ROOT / "pyproject.toml").read_bytes()
    kernels = (made / "repository" / "kernels" / "index.html").read_text()
    assert 'href="examples/train.py"' in kernels  # of a page that was taken in, files are taken in as well
    assert '[not a link](../nothing.md) $x$ <a href="nothing.md">' in html.unescape(text)
    assert "<code>$5 $6</code>" in text


WRONG = {
    "$\\nosuchcommand x$": r"index\.md: the formula .* is not known, \\nosuchcommand",
    "$\\frac{a}{b$": r"index\.md: the formula .* a brace without its other",
    "$a_b_c$": r"index\.md: the formula .* is none: DoubleSubscripts",
    "$$\n\\begin{gathered} a & b \\end{gathered}\n$$": r"index\.md: the formula .* is not known, &",
    '<picture><img src="one-light.svg" alt=""></picture>': r"index\.md: a <picture> is not",
    "What $r is, and nothing more.": r"index\.md: a formula is left open: .*What \$r is",
    "$\\frac{a}$": r"index\.md: the formula .* has a fraction or an index without its part",
    "[gone](../no/such/file.json)": r"docs/index\.md: the link \.\./no/such/file\.json leads to no file",
    "[a folder](../kernels)": r"docs/index\.md: the link \.\./kernels leads to no file",
    "[beyond](../../secret)": r"docs/index\.md: the link \.\./\.\./secret leads to no file",
    f"[a file of the machine]({'../' * 20}bin/sh)": r"docs/index\.md: the link [./]*/bin/sh leads to no file",
    '<a href="../no/such/file.json">gone</a>': r"docs/index\.md: the link \.\./no/such/file\.json leads to no file",
    "text\n<A title='x > y'\nHREF='no-such.md#one'>gone</a>": r"index\.md: the link no-such\.md#one leads to no file",
    '<img src="no-such.png" alt="">': r"index\.md: the link no-such\.png leads to no file",
    '<source srcset="one-light.svg 1x, no-such.svg 2x">': r"index\.md: the link no-such\.svg leads to no file",
}


@pytest.mark.parametrize("markdown", WRONG)
def test_what_is_wrong_fails_the_build(
    markdown: str, small: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Abort):
        small(f"# One\n\n{markdown}\n")
    assert re.search(WRONG[markdown], caplog.text), caplog.text


def test_where_links_lead() -> None:
    specification = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert specification and specification.loader
    hooks: Any = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(hooks)
    for page, link, wanted in (
        ("data.md", "training.md", "training.md"),
        ("api/data.md", "../data.md", "data.md"),
        ("api/data.md", "../../kernels/README.md", "repository/kernels/README.md"),
        ("repository/kernels/README.md", "../docs/kernels.md", "kernels.md"),
        ("repository/kernels/README.md", "examples/train.py", "repository/kernels/examples/train.py"),
        ("data.md", "https://arxiv.org/abs/2512.15657", "https://arxiv.org/abs/2512.15657"),
    ):
        assert hooks.in_site(page, link) == wanted

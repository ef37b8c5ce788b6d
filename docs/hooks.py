"""What the book needs beside mkdocs: links out of docs/, figures that follow the palette, formulas as MathML.

A page here links to other files of the repository by where they lie, as GitHub shows them. In the site such a file lies
under repository/, a page if it is Markdown, as it is otherwise; a link to a file that is not there fails the build.
"""

import html
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = "repository/"
"""Where files from outside docs/ lie in the site."""

CODE = re.compile(r"(?P<fence>^(?:`{3,}|~{3,})).*?^(?P=fence)\s*?$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
"""Fenced blocks, and code within a line."""
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")
ELEMENT = re.compile(r"<(?:a|img|source)\b(?:[^>\"']|\"[^\"]*\"|'[^']*')*>", re.IGNORECASE)
ATTRIBUTE = re.compile(r"(?<=\s)(href|src|srcset)(\s*=\s*)(?:\"([^\"]*)\"|'([^']*)'|([^\s\"'>]+))", re.IGNORECASE)
"""Links of elements of HTML, which mkdocs takes as they are, and one of their attributes that says where to."""
PICTURE = re.compile(
    r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="([^"]+)">\s*'
    r'<img src="([^"]+)" alt="([^"]*)">\s*</picture>'
)
PARTS = {"mfrac": 2, "msub": 2, "msup": 2, "msubsup": 3, "munder": 2, "mover": 2, "munderover": 3}
"""How many parts an element of MathML has."""
FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take in what navigation and pages name outside docs/, and what those pages name in turn."""
    wanted = _named(config.nav)
    wanted += [link for file in files.documentation_pages() for link in _outside(file.src_uri, file.content_string)]
    while wanted:
        uri = wanted.pop()
        if files.get_file_from_path(uri):
            continue
        place = ROOT / uri.removeprefix(OUTSIDE)
        if not place.is_file():
            raise PluginError(f"mkdocs.yml: {uri} is no file of the repository")
        file = File.generated(config, uri, abs_src_path=str(place))
        files.append(file)
        if place.suffix == ".md":
            wanted += _outside(uri, file.content_string)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are in the site, and pictures with a dark twin as two images of which the palette shows one."""
    uri = page.file.src_uri

    def image(found: re.Match[str]) -> str:
        dark, light, text = found.groups()
        return f"![{text}]({light}#only-light)\n![{text}]({dark}#only-dark)"

    def link(found: re.Match[str]) -> str:
        place = in_site(uri, found[1])
        return place if place == found[1] else posixpath.relpath(place, posixpath.dirname(uri) or ".")

    def moved(target: str) -> str:
        path, mark, anchor = target.partition("#")
        if not path or _elsewhere(path):
            return target
        there = files.get_file_from_path(in_site(uri, path))
        if there is None:
            raise PluginError(f"{uri}: the link {target} leads to no file of the book")
        return there.url_relative_to(page.file) + mark + anchor

    def attribute(found: re.Match[str]) -> str:
        name, sign, *values = found.groups()
        return f'{name}{sign}"{_each_target(name, next(filter(None, values), ""), moved)}"'

    def change(text: str) -> str:
        text = PICTURE.sub(image, text)
        if "<picture" in text:
            raise PluginError(
                f"{uri}: a <picture> is not a dark source and a light image, in that order, on a line each"
            )
        text = LINK.sub(link, text)
        return ELEMENT.sub(lambda found: ATTRIBUTE.sub(attribute, found[0]), text)

    return _prose(change, markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML. Raises PluginError for a dollar that is left, of a formula without its other end."""
    made = FORMULA.sub(lambda found: mathml(page.file.src_uri, found[2] or found[3], bool(found[3])), content)
    prose = re.sub(r"<(pre|code|math)\b.*?</\1>|<[^>]*>", "", made, flags=re.DOTALL)
    if "$" in prose:
        line = prose[max(0, prose.index("$") - 40) : prose.index("$") + 40]
        raise PluginError(f"{page.file.src_uri}: a formula is left open: {line!r}")
    return made


def in_site(uri: str, link: str) -> str:
    """The page or file in the site, as a path in it, that a link of a page leads to; other hosts' as they are.

    uri: the page's path in docs/, or under repository/. Raises PluginError for a file outside docs/ that is not there.
    """
    if _elsewhere(link):
        return link
    page = uri.removeprefix(OUTSIDE) if uri.startswith(OUTSIDE) else f"docs/{uri}"
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    if target.startswith("..") or not (ROOT / target).is_file():
        raise PluginError(f"{page}: the link {link} leads to no file of the repository")
    return OUTSIDE + target


def mathml(uri: str, escaped: str, block: bool) -> str:
    """A formula of a page as MathML. escaped: its LaTeX as it stands in HTML. Raises PluginError naming the page."""
    latex = html.unescape(escaped).strip()
    known = re.sub(r"\\(begin|end){aligned}", r"\\\1{align*}", latex)  # the converter's name of the same
    if len(re.findall(r"(?<!\\){", latex)) != len(re.findall(r"(?<!\\)}", latex)):
        raise PluginError(f"{uri}: the formula {latex!r} has a brace without its other")
    try:
        made = convert(known, display="block" if block else "inline")
    except Exception as error:  # the converter has no base class of its errors
        raise PluginError(f"{uri}: the formula {latex!r} is none: {type(error).__name__} {error}") from error
    # What it does not know goes through as text: commands, and the "&" of environments.
    if unknown := re.search(r"\\[A-Za-z]+|&(?!#?\w+;)", made):
        raise PluginError(f"{uri}: the formula {latex!r} has a part that is not known, {unknown[0]}")
    for node in ElementTree.fromstring(made).iter():
        if len(node) != PARTS.get(node.tag.rpartition("}")[2], len(node)):
            raise PluginError(f"{uri}: the formula {latex!r} has a fraction or an index without its part")
    return made


def _named(nav: Any) -> list[str]:
    """The places outside docs/ that the navigation names."""
    if isinstance(nav, str):
        return [nav] if nav.startswith(OUTSIDE) else []
    return [place for part in (nav.values() if isinstance(nav, dict) else nav or ()) for place in _named(part)]


def _outside(uri: str, markdown: str) -> list[str]:
    """The places in the site of all files outside docs/ that a page links to."""
    found: list[str] = []

    def collect(text: str) -> str:
        found.extend(LINK.findall(text))
        for element in ELEMENT.findall(text):
            for name, _, *values in ATTRIBUTE.findall(element):
                _each_target(name, "".join(values), lambda target: found.append(target.partition("#")[0]) or target)
        return text

    _prose(collect, markdown)
    return [place for link in found if link and (place := in_site(uri, link)).startswith(OUTSIDE)]


def _each_target(name: str, value: str, change: Callable[[str], str]) -> str:
    """The value of an attribute with each of its targets changed: of `srcset` several, each before its size."""
    if name.lower() != "srcset":
        return change(value)
    parts = [part.split() for part in value.split(",") if part.strip()]
    return ", ".join(" ".join([change(target), *size]) for target, *size in parts)


def _elsewhere(link: str) -> bool:
    """Whether a link leads to another host, or to a place on this one that is no file of the repository."""
    return ":" in link or link.startswith("/")


def _prose(change: Callable[[str], str], markdown: str) -> str:
    """Markdown with everything but its code changed."""
    parts, end = [], 0
    for found in CODE.finditer(markdown):
        parts += [change(markdown[end : found.start()]), found[0]]
        end = found.end()
    return "".join([*parts, change(markdown[end:])])

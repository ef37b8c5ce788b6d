"""README.md, CONTRIBUTING.md and docs/ against the repository: links, figures, names and flags are what is there."""

import ast
import importlib
import json
import re
import statistics
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

import soflow_fast
from soflow_kernels.inspect import summary
from tests.blocks.pages import FENCE
from tests.elements import links

ROOT = Path(__file__).parents[1]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = [ROOT / "README.md", CONTRIBUTING, *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    importlib.import_module(f"soflow_fast.{name}")
    for name in ("train", "sample", "evaluate", "encode", "export", "gallery")
]
FLAGS = {flag.removeprefix("--") for command in COMMANDS for flag in command.parser().flags()}

FLAGGED = (
    "data",
    "conditions",
    "training",
    "sampling",
    "authors",
    "precision",
    "many-gpus-plan",
    "policies",
    "watching",
)
"""Pages of docs/ on which every flag is one of these commands."""


@cache
def records() -> list[dict]:
    """All records of benchmarks, oldest first, each with its file's name under "file"."""
    found = [
        json.loads(path.read_text()) | {"file": path.name} for path in (ROOT / "benchmarks/records").glob("*.json")
    ]
    return sorted((record for record in found if "benchmark" in record), key=lambda record: record["date"])


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def without_blocks(page: Path) -> str:
    """A page without what is made from records."""
    return re.sub(r"<!-- benchmark:.*?<!-- /benchmark:", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def leading_nowhere(page: Path, text: str) -> list[str]:
    """The links of `text`, the page's own or in its place, whose file or anchor is not there: those of Markdown, and
    those of HTML outside code."""
    prose = re.sub(r"`[^`\n]+`", "", FENCE.sub("", text))
    wrong = []
    for target in [*re.findall(r"\]\(([^)\s]+)\)", text), *links(prose)]:
        path, _, anchor = target.partition("#")
        if path.startswith("https://"):
            continue
        found = page.parent / path if path else page
        if not found.exists() or (anchor and anchor not in anchors(found)):
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    assert leading_nowhere(page, page.read_text(encoding="utf-8")) == []


LINKS = {
    "[a](README.md) [b](docs/data.md#no-such-heading)": ["docs/data.md#no-such-heading"],
    '<a href="docs/no-such.md">': ["docs/no-such.md"],
    "<A title=x\n HREF='docs/data.md#no-such-heading'>": ["docs/data.md#no-such-heading"],
    '<img alt="x > y" src="docs/no-such.png"/>': ["docs/no-such.png"],
    '<source srcset="docs/digits.png 1x, docs/no-such.png 2x">': ["docs/no-such.png"],
    '<a href="https://arxiv.org"><img src="docs/digits.png"></a><a href="#the-book">a</a> if a < b': [],
    '`<img src="gone.png">`\n\n```html\n<a href="gone.md">\n```\n': [],
}


@pytest.mark.parametrize("text", LINKS)
def test_a_link_that_leads_nowhere_is_seen(text: str):
    assert leading_nowhere(ROOT / "README.md", text) == LINKS[text]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_records_that_are_named_are_there(page: Path):
    named = set(re.findall(r"benchmarks/records/([\w.-]+\.json)", page.read_text(encoding="utf-8")))
    assert [name for name in sorted(named) if not (ROOT / "benchmarks/records" / name).exists()] == []


def uncaptioned(text: str) -> list[str]:
    """The figures of a page that no caption follows: after the picture, or after the generated block that it is in."""
    found = []
    for picture in re.finditer(r'<img src="([^"]+)"[^>]*>\s*</picture>', text):
        rest = text[picture.end() :]
        mark = re.search(r"<!-- (/?)benchmark:\S+ -->", rest)
        if mark and mark[1]:
            rest = rest[mark.end() :]
        if not re.match(r"\s*\*Figure( above)?: \S", rest):
            found.append(picture[1])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_figure_has_a_caption(page: Path):
    assert uncaptioned(page.read_text(encoding="utf-8")) == []


def test_a_figure_without_a_caption_is_seen():
    picture = '<picture>\n<img src="a.svg" alt="">\n</picture>\n\n'
    block = f"<!-- benchmark:x -->\n{picture}<!-- /benchmark:x -->\n\n"
    for text in (
        f"{picture}*Figure: x.*",
        f"{block}*Figure above: x.*",
        f"{picture}*Figure: x.*\n{block}*Figure above: y.*",
    ):
        assert uncaptioned(text) == []
    for text in (
        picture,
        f"{picture}Text. *Figure: x.*",
        f"{block}Text.",
        f"{picture}<!-- benchmark:x -->*Figure: x.*",
    ):
        assert uncaptioned(text) == ["a.svg"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_imports_what_there_is(page: Path):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "soflow_fast":
                assert [alias.name for alias in node.names if not hasattr(soflow_fast, alias.name)] == []


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{name}.md" for name in FLAGGED)])
def test_flags_are_there(name: str):
    text = re.sub(r"torchrun .*?(?=-m soflow_fast)", "", without_blocks(ROOT / name), flags=re.DOTALL)  # its own flags
    flags = {found.strip("-") for found in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)}
    assert flags - FLAGS == set()


def step_figures(run: dict) -> list[str]:
    medians = {(row["case"], row["recipe"]): statistics.median(row["seconds"]) for row in run["rows"] if row["seconds"]}
    cases = dict.fromkeys(row["case"] for row in run["rows"])

    def times_ours(recipe: str) -> str:
        return " and ".join(f"{medians[case, recipe] / medians[case, 'soflow-fast']:.2f}" for case in cases)

    return [
        f"the authors' recipe takes {times_ours(AUTHORS)} times",
        f"MeanFlow as published {times_ours('MeanFlow as published')},",
        f"derivative on a quarter of the batch {times_ours('MeanFlow, JVP on a quarter')} ",
    ]


def timeline_figures(run: dict) -> list[str]:
    found = {row["recipe"]: 1e3 * statistics.median(row["seconds"]) for row in run["rows"] if "XL/2" in row["case"]}
    ours, compiled = found["soflow-fast"], found["authors' recipe, compiled"]
    return [
        f"{ours:.1f} ms, {found['soflow-fast, as train runs it']:.1f} ms as `train` runs it",
        f"compiled {compiled:.1f} ms, {compiled / ours:.2f} times as long",
    ]


def digits_figures(run: dict) -> list[str]:
    scores = [row["nfe"]["1"] for row in run["rows"]]

    def spread(values: list[float], digits: int) -> str:
        return f"{min(values):.{digits}f} to {max(values):.{digits}f}"

    return [
        f"{spread([score['accuracy'] for score in scores], 4)} classified",
        f"Frechet distance {spread([score['frechet'] for score in scores], 1)} over {len(scores)} seeds",
        f"{spread([row['seconds'] for row in run['rows']], 0)} s",
    ]


def quality_figures(run: dict) -> list[str]:
    def reached(method: str) -> str:
        last = [row["points"][-1] for row in run["rows"] if row["method"] == method]
        distance, seconds = (statistics.mean(point[name] for point in last) for name in ("frechet", "seconds"))
        return f"{distance:.1f} after {seconds:.0f} s"

    return [
        f"SoFlow {reached('SoFlow')}",
        f"MeanFlow {reached('MeanFlow, published times')}",
        f"MeanFlow with SoFlow's times {reached(SAME_TIMES)}",
        f"the engine's MeanFlow {reached('MeanFlow of the engine')}",
        f"flow matching in 10 calls {reached('flow matching, 10 Euler steps')}",
    ]


def precision_figures(run: dict) -> list[str]:
    cosines = {row["way"]: row["cosine"] for row in run["rows"] if row["kind"] == "error" and row["r"] == 0.002}
    return [
        f"{cosines['bf16 pair']:.5f} by a pair of bf16 forwards",
        f"{cosines['bf16 increments']:.5f} by increments",
    ]


def soak_figures(run: dict) -> list[str]:
    found = {name: value for row in run["rows"] for name, value in row["measured"].items()}
    assert not sum(row["failed"] for row in run["rows"])
    return [
        f"{sum(row['passed'] for row in run['rows'])} tests",
        f"over {found['steps']:.0f} steps memory rose by {found['MB per 1000 steps']:.2f} MB per 1000",
    ]


AUTHORS, SAME_TIMES = "authors' recipe", "MeanFlow, SoFlow's times"
FIGURES = {
    "timeline": timeline_figures,
    "digits": digits_figures,
    "step": step_figures,
    "quality-for-time": quality_figures,
    "precision": precision_figures,
    "soak": soak_figures,
}


@pytest.mark.parametrize("kind", FIGURES)
def test_the_readmes_figures_are_those_of_the_newest_records(kind: str):
    run = [r for r in records() if r["benchmark"] == kind and (kind == "timeline" or "gpu" not in r)][-1]
    lines = [line for line in (ROOT / "README.md").read_text("utf-8").splitlines() if f"records/{run['file']})" in line]
    assert len(lines) == 1, run["file"]
    assert [figure for figure in FIGURES[kind](run) if figure not in lines[0]] == []


def test_kernels_ahead_of_time_are_the_newest_records():
    newest = max((ROOT / "benchmarks/records").glob("*-kernels-ahead-of-time.json"), key=lambda path: path.name)
    record, text = json.loads(newest.read_text()), (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    assert summary(record["kernels"]) in text
    assert f"By triton {record['versions']['triton']};" in text and f"`benchmarks/records/{newest.name}`" in text


def tree_of_the_house(page: str) -> list[str]:
    """The files and folders (with a slash) in the tree of CONTRIBUTING.md, `page`, as paths from the root, in order."""
    text = page.partition("## The house\n\n```\n")[2]
    found: list[str] = []
    folders: list[str] = []
    for line in text.partition("```")[0].splitlines():
        names = re.match(r" *((?:\w+(?:\.py|/)(?: |$))+)", line)
        assert names, line
        level = (len(line) - len(line.lstrip())) // 4
        for name in names[1].split():
            found.append("".join(folders[:level]) + name)
        folders[level:] = [names[1].split()[-1]]
    return found


def doubled(paths: list[str]) -> list[str]:
    """What is listed more than once, in order."""
    return [path for path, times in Counter(paths).items() if times > 1]


def test_the_house_lists_nothing_twice():
    assert doubled(tree_of_the_house(CONTRIBUTING.read_text("utf-8"))) == []
    tree = "a/    one\n    b.py c.py\n    d.py   and\n    c.py    again\ne/\n    b.py   of another folder\n"
    assert doubled(tree_of_the_house(f"## The house\n\n```\n{tree}```\n")) == ["a/c.py"]


@pytest.mark.parametrize("package", ["soflow_fast/", "kernels/soflow_kernels/"])
def test_contributing_shows_every_module(package: str):
    """Not those whose names begin with an underscore, nor the version."""
    modules = [path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("[!_]*.py")]
    folders = {f"{module.rpartition('/')[0]}/" for module in modules}
    there = folders | {module for module in modules if not module.endswith("/version.py")}
    shown = {name for name in tree_of_the_house(CONTRIBUTING.read_text("utf-8")) if name.startswith(package)}
    # A folder may have a line alone, which then tells what is in it.
    told = {f for f in shown if f.endswith("/") and not any(name.startswith(f) for name in shown - {f})}
    assert shown - there == set()
    assert {name for name in there - shown if not name.startswith(tuple(told))} == set()

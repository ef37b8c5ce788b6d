"""The elements of HTML: of the book's pages, and within Markdown."""

from html.parser import HTMLParser


class Elements(HTMLParser):
    """The elements of a page, each with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))


def links(text: str) -> list[str]:
    """Where elements that a page of Markdown may hold lead to: `<a href>`, `<img src>`, `<source srcset>`."""
    found = []
    for _, given in Elements(text).found:
        found += [given[name] for name in ("href", "src") if name in given]
        found += [part.split()[0] for part in given.get("srcset", "").split(",") if part.strip()]
    return found

"""A report as a browser reads it."""

from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """The tables of cells, the command, the captions, the words, what is loaded, and the names of all elements."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.command, self.words, self.captions, self.loaded, self.tags = "", "", [], [], []
        self.inside: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in ("meta", "img"):
            self.inside.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        elif tag == "figcaption":
            self.captions.append("")

    def handle_endtag(self, tag):
        assert self.inside.pop() == tag

    def handle_data(self, data):
        if "style" in self.inside:
            assert "url(" not in data
            assert "@import" not in data
        elif "script" not in self.inside:
            self.words += data
        if {"th", "td"} & set(self.inside):
            self.tables[-1][-1][-1] += data
        elif "pre" in self.inside:
            self.command += data
        elif "figcaption" in self.inside:
            self.captions[-1] += data


def whole_page(file: Path) -> Page:
    """A page that is closed properly, runs its own script alone, and loads nothing."""
    page = Page(file)
    assert page.inside == []
    assert page.tags.count("script") == 1
    assert all(link.startswith("data:image/png;base64,") for link in page.loaded)
    return page

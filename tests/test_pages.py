"""How the pages look that `make docs` builds: links, alternative texts, formulas, and tables that fit."""

import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urldefrag

import pytest

pytestmark = pytest.mark.pages
PAGES = Path(__file__).resolve().parent.parent / "build" / "docs"
# Made by Sphinx and the theme.
UNREAD = {"genindex.html", "py-modindex.html", "search.html"}
NAMES = PAGES / "reference" / "names"
HOLDERS = ("sparseopt", *(f"sparseopt.{name}" for name in ("core", "trend", "models", "pruning", "scalar")))
# What people look for, and a page that they should find.
QUERIES = {
    "install": "install.html", "2:4": "glossary.html", "seasonal": "how-to/choose.html", "GPU": "install.html",
    "confidence interval": "troubleshooting.html", "sklearn": "reference/trend.html", "citation": "citation.html",
    "trend_filter": "reference/names/sparseopt.trend_filter.html", "L1": "reference/names/sparseopt.L1.html",
}  # fmt: skip
# The height of a page, and which tables are wider than what holds them, as the browser laid them out.
MEASURE = """<script>
// The diagram of an estimator scrolls by itself.
const wide = [...document.querySelectorAll("article table")].filter(table => !table.closest(".sk-top-container"))
  .filter(table => table.scrollWidth > table.parentElement.clientWidth + 1)
  .map(table => [table.querySelector("tr").innerText, table.scrollWidth, table.parentElement.clientWidth]);
const found = {wide, height: document.documentElement.scrollHeight};
document.documentElement.innerHTML = "<pre id=found>" + JSON.stringify(found).replace(/</g, "&lt;") + "</pre>";
</script>"""


class Page(HTMLParser):
    """What a page links to, what can be linked to, its pictures, and its formulas."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.ids: set[str] = set()
        self.unnamed: list[str] = []
        self.formula: str | None = None
        self.formulas: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids |= {found[name] for name in ("id", "name") if name in found}
        if tag in ("a", "link") and "href" in found:
            self.links.add(found["href"])
        if tag == "img" and not found.get("alt", "").strip():
            self.unnamed.append(found.get("src", ""))
        if tag == "math":
            self.formula = ""

    def handle_data(self, data: str) -> None:
        if self.formula is not None:
            self.formula += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "math":
            self.formulas.append(self.formula or "")
            self.formula = None


@cache
def page(file: Path) -> Page:
    return Page(file)


def pages() -> list[Path]:
    found = [file for file in sorted(PAGES.rglob("*.html")) if file.name not in UNREAD]
    assert found, f"no pages in {PAGES}: run `make docs`"
    return found


def test_every_link_inside_leads_somewhere():
    dead = []
    for file in pages():
        for link in page(file).links:
            place, fragment = urldefrag(unquote(link.partition("?")[0] if "#" not in link else link))
            if ":" in place or place.startswith("//"):
                continue
            target = (file.parent / place).resolve() if place else file
            if not target.is_file():
                dead.append(f"{file.relative_to(PAGES)}: {link}")
            elif fragment and target.suffix == ".html" and fragment not in page(target).ids:
                dead.append(f"{file.relative_to(PAGES)}: {link}, no such place on the page")
    assert dead == []


def test_every_picture_has_an_alternative_text():
    assert {str(file.relative_to(PAGES)): page(file).unnamed for file in pages() if page(file).unnamed} == {}


def test_formulas_have_no_source_left_in_them():
    formulas = [(file.name, formula) for file in pages() for formula in page(file).formulas]
    assert len(formulas) > 100
    assert [found for found in formulas if "\\" in found[1] or "&" in found[1]] == []


def public() -> dict[str, Any]:
    """What the public modules hand out, by path."""
    so = importlib.import_module("sparseopt")
    holders = {path: getattr(so, path.partition(".")[2], so) for path in HOLDERS}
    names = {f"{path}.{name}": getattr(holder, name) for path, holder in holders.items() for name in holder.__all__}
    return {path: thing for path, thing in names.items() if not inspect.ismodule(thing)}


def test_each_public_name_has_one_page_and_is_in_a_table_of_the_reference():
    paths, made = public(), {file.stem for file in NAMES.glob("*.html")}
    assert made <= paths.keys()
    assert sorted(id(paths[path]) for path in made) == sorted({id(thing) for thing in paths.values()})
    subjects = [file.read_text(encoding="utf-8").partition("<article")[2] for file in NAMES.parent.glob("*.html")]
    assert sorted(re.findall(r'<tr[^>]*><td><p><a [^>]*href="names/([\w.]+)\.html', "".join(subjects))) == sorted(made)


def test_what_is_not_public_has_no_place_in_the_reference():
    made = {file.stem for file in NAMES.glob("*.html")}
    ids = {place for file in pages() if "_modules" not in file.parts for place in page(file).ids}
    assert {place for place in ids if place.startswith("module-")} == {f"module-{path}" for path in HOLDERS[1:]}
    private = [place for place in ids if place.startswith("sparseopt.") and not _under(place, made)]
    assert [place for place in private if place not in HOLDERS] == []


def _under(place: str, made: set[str]) -> bool:
    return any(place == path or place.startswith(f"{path}.") for path in made)


@pytest.fixture
def browser(tmp_path):
    """A function that shows an address and returns its document."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine, which lays pages out")

    def show(address: str, *options: str) -> str:
        given = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,900", "--dump-dom", *options]
        return subprocess.run(
            [program, *given, f"--user-data-dir={tmp_path}", address],
            capture_output=True, text=True, timeout=120, check=True,
        ).stdout  # fmt: skip

    return show


def measured(file: Path, browser: Callable[[str], str]) -> dict[str, Any]:
    # Beside the page, so that its style sheets are found.
    copy = file.with_name(f"measured-{os.getpid()}-{file.name}")
    copy.write_text(file.read_text(encoding="utf-8").replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
    try:
        shown = browser(copy.as_uri())
    finally:
        copy.unlink()
    listed = shown.partition("<pre id=")[2].partition(">")[2].partition("</pre>")[0]
    assert listed.startswith("{"), f"{file.name} was not measured: {shown[:200]}"
    return json.loads(listed.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def test_no_table_is_wider_than_the_page(browser):
    wide = {}
    for file in pages():
        if "<table" in file.read_text(encoding="utf-8") and (found := measured(file, browser)["wide"]):
            wide[str(file.relative_to(PAGES))] = found
    assert wide == {}


def test_no_page_of_a_public_name_is_long(browser):
    largest = sorted(NAMES.glob("*.html"), key=lambda file: file.stat().st_size)[-8:]
    assert {file.name: high for file in largest if (high := measured(file, browser)["height"]) > 12_000} == {}


@pytest.mark.parametrize("query", QUERIES)
def test_the_search_answers(browser, query):
    shown = browser(f"{(PAGES / 'search.html').as_uri()}?q={quote(query)}", "--virtual-time-budget=10000")
    results = shown.partition('id="search-results"')[2].partition("</article>")[0]
    assert f'href="{QUERIES[query]}' in results

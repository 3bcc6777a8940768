"""How the pages look that `make docs` builds: links, alternative texts, formulas, and tables that fit."""

import json
import os
import shutil
import subprocess
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

pytestmark = pytest.mark.pages
PAGES = Path(__file__).resolve().parent.parent / "build" / "docs"
# Made by Sphinx and the theme.
UNREAD = {"genindex.html", "py-modindex.html", "search.html"}
# Which tables are wider than what holds them, as the browser laid them out.
WIDE = """<script>
const wide = [...document.querySelectorAll("article table")]
  .filter(table => table.scrollWidth > table.parentElement.clientWidth + 1)
  .map(table => [table.querySelector("tr").innerText, table.scrollWidth, table.parentElement.clientWidth]);
document.documentElement.innerHTML = "<pre id=wide>" + JSON.stringify(wide).replace(/</g, "&lt;") + "</pre>";
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
    found = [file for file in sorted(PAGES.rglob("*.html")) if file.name not in UNREAD and "_modules" not in file.parts]
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


def test_no_table_is_wider_than_the_page(tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine, which measures tables")
    wide = {}
    for file in pages():
        text = file.read_text(encoding="utf-8")
        if "<table" not in text:
            continue
        # Beside the page, so that its style sheets are found.
        copy = file.with_name(f"measured-{os.getpid()}-{file.name}")
        copy.write_text(text.replace("</body>", f"{WIDE}</body>"), encoding="utf-8")
        try:
            options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,900", "--dump-dom"]
            shown = subprocess.run(
                [browser, *options, f"--user-data-dir={tmp_path}", copy.as_uri()],
                capture_output=True, text=True, timeout=120, check=True,
            ).stdout  # fmt: skip
        finally:
            copy.unlink()
        listed = shown.partition("<pre id=")[2].partition(">")[2].partition("</pre>")[0]
        assert listed.startswith("["), f"{file.name} was not measured: {shown[:200]}"
        if found := json.loads(listed.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")):
            wide[str(file.relative_to(PAGES))] = found
    assert wide == {}

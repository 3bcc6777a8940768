"""How the pages look that `make docs` builds: links, alternative texts, formulas, the reference, tables that fit."""

import html
import importlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
from itertools import accumulate
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

pytestmark = pytest.mark.pages
ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "build" / "docs"
NAMES = BUILT / "reference" / "names"
# Without those that Sphinx and the theme make.
MADE = ("genindex.html", "py-modindex.html", "search.html")
PAGES = {file: file.read_text(encoding="utf-8") for file in sorted(BUILT.rglob("*.html")) if file.name not in MADE}
IDS = {file: set(re.findall(r'\s(?:id|name)="([^"]+)"', text)) for file, text in PAGES.items()}
HOLDERS = ("sparseopt", *(f"sparseopt.{name}" for name in ("core", "trend", "models", "pruning", "scalar")))
# Which tables are wider than what holds them, as the browser laid them out; the diagram of an estimator scrolls.
MEASURE = """<script>
const wide = [...document.querySelectorAll("article table")].filter(table => !table.closest(".sk-top-container"))
  .filter(table => table.scrollWidth > table.parentElement.clientWidth + 1)
  .map(table => table.querySelector("tr").innerText.replace(/</g, "&lt;"));
document.documentElement.innerHTML = "<pre id=found>" + JSON.stringify(wide) + "</pre>";
</script>"""


def short(file):
    return str(file.relative_to(BUILT))


def test_every_link_inside_leads_somewhere():
    assert PAGES, f"no pages in {BUILT}: run `make docs`"
    dead, files = [], {file for file in BUILT.rglob("*") if file.is_file()}
    for file, text in PAGES.items():
        for link in set(re.findall(r'<(?:a|link)\s[^>]*?href="([^"]*)"', text)):
            place, fragment = urldefrag(unquote(html.unescape(link)))
            place = place.partition("?")[0]
            if ":" in place or place.startswith("//"):
                continue
            target = Path(os.path.normpath(file.parent / place)) if place else file
            if target not in files or (fragment and target in IDS and fragment not in IDS[target]):
                dead.append(f"{short(file)}: {link}")
    assert dead == []


def test_every_picture_has_an_alternative_text_and_no_formula_its_source():
    pictures = [(short(file), image) for file, text in PAGES.items() for image in re.findall(r"<img\s[^>]*>", text)]
    assert [one for one in pictures if not re.search(r'\salt="\s*[^"\s]', one[1])] == []
    formulas = [found for text in PAGES.values() for found in re.findall(r"<math.*?</math>", text, re.DOTALL)]
    shown = [html.unescape(re.sub(r"<[^>]*>", "", formula)) for formula in formulas]
    assert shown
    assert [text for text in shown if "\\" in text or "&" in text] == []


def test_a_formula_that_is_not_known_is_an_error_and_a_known_one_has_its_rows():
    spec = importlib.util.spec_from_file_location("mathml", ROOT / "docs" / "mathml.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ValueError, match="unheard"):
        module.mathml(r"\unheard x", True)
    made = module.mathml(r"\begin{aligned} a &= \bigl\| b \bigr\|_1 \\ c &= \bigl\{ d \bigr\} \end{aligned}", True)
    assert made.count("</mtr>") == 2
    assert "".join(re.sub(r"<[^>]*>", "", made).split()) == "a=‖b‖1c={d}"


def test_each_public_name_has_one_page_in_a_table_of_the_reference_and_nothing_else_has():
    so = importlib.import_module("sparseopt")
    holders = {path: getattr(so, path.partition(".")[2], so) for path in HOLDERS}
    public = {f"{path}.{name}": getattr(holder, name) for path, holder in holders.items() for name in holder.__all__}
    public = {path: thing for path, thing in public.items() if not inspect.ismodule(thing)}
    made = {file.stem for file in NAMES.glob("*.html")}
    assert made <= public.keys()
    assert sorted(id(public[path]) for path in made) == sorted({id(thing) for thing in public.values()})
    subjects = "".join(
        file.read_text(encoding="utf-8").partition("<article")[2] for file in NAMES.parent.glob("*.html")
    )
    assert sorted(re.findall(r'<tr[^>]*><td><p><a [^>]*href="names/([\w.]+)\.html', subjects)) == sorted(made)
    places = set().union(*(ids for file, ids in IDS.items() if "_modules" not in file.parts))
    assert {place for place in places if place.startswith("module-")} == {f"module-{path}" for path in HOLDERS[1:]}
    ours = [place for place in places if place.startswith("sparseopt.") and place not in HOLDERS]
    assert [place for place in ours if not made & {*accumulate(place.split("."), "{}.{}".format)}] == []


def test_no_table_is_wider_than_the_page(tmp_path):
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("SKIPPED: no Chromium on this machine, which lays pages out")
    browser = [program, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,900", "--dump-dom"]
    wide = {}
    for file, text in PAGES.items():
        if "<table" in text:
            # Beside the page, so that its style sheets are found.
            copy = file.with_name(f"measured-{os.getpid()}-{file.name}")
            copy.write_text(text.replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
            try:
                command = [*browser, f"--user-data-dir={tmp_path}", copy.as_uri()]
                shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
            finally:
                copy.unlink()
            wide[short(file)] = json.loads(html.unescape(re.search(r"<pre id=[^>]*>(.*?)</pre>", shown, re.DOTALL)[1]))
    assert {name: found for name, found in wide.items() if found} == {}

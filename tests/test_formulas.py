"""`docs/mathml.py` turns the formulas of the pages and notebooks into MathML, or says what it does not know."""

import importlib.util
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent
FORMULA = re.compile(r"\$\$.+?\$\$|(?<![\\$])\$[^$\n]+(?:\n[^$\n]+)?\$", re.DOTALL)
CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)


@pytest.fixture(scope="module")
def mathml():
    spec = importlib.util.spec_from_file_location("mathml", ROOT / "docs" / "mathml.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.mathml


def texts(formula):
    return [element.text for element in ElementTree.fromstring(formula).iter() if element.text]


def test_every_formula_of_the_pages_and_notebooks_has_its_mathml(mathml):
    count = 0
    for file in sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("notebooks/*.py")]):
        page = CODE.sub("", re.sub(r"^# ", "", file.read_text(), flags=re.MULTILINE))
        for formula in FORMULA.findall(page):
            mathml(formula.strip("$").strip(), formula.startswith("$$"))
            count += 1
    assert count > 500


def test_lines_are_rows_and_bars_are_bars(mathml):
    made = mathml(
        r"\begin{aligned} a &= \bigl\| b \bigr\|_1 && \text{one} \\ c &= \bigl\{ d \bigr\} \end{aligned}", True
    )
    assert made.count("mtr>") == 2 * 2
    shown = ["a", "=", "‖", "b", "‖", "1", "one", "c", "=", "{", "d", "}"]
    assert [text for text in texts(made) if text.strip()] == shown


@pytest.mark.parametrize("formula", [r"\begin{gathered} a \\ b \end{gathered}", r"\unheard x"])
def test_what_is_not_known_is_an_error_that_names_the_formula(mathml, formula):
    with pytest.raises(ValueError, match=re.escape(repr(formula))):
        mathml(formula, True)

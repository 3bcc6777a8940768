"""Formulas as MathML, which browsers render themselves: pages need no script and no network."""

import html
import re
from xml.etree import ElementTree

from docutils import nodes
from latex2mathml.converter import convert_to_element
from sphinx.application import Sphinx
from sphinx.errors import SphinxError
from sphinx.writers.html import HTMLTranslator

# Operators whose index is below them in a displayed formula.
LIMITS = {"min", "max", "inf", "sup", "lim", "argmin", "argmax"}
# No space around norms and absolute values.
BARS = {"|", "‖"}
UNDER = {"msub": "munder", "msup": "mover", "msubsup": "munderover"}


def mathml(tex: str, display: bool) -> str:
    """A formula as a `<math>` element.

    Raises:
        SphinxError: naming the formula, if a command is unknown.
    """
    tex = tex.replace(r"\arg\min", r"\operatorname{argmin}")  # \arg is unknown to latex2mathml
    try:
        # A line break or an alignment outside an environment needs one.
        if (r"\\" in tex or "&" in tex) and r"\begin" not in tex:
            tex = rf"\begin{{aligned}}{tex}\end{{aligned}}"
        math = convert_to_element(tex, display="block" if display else "inline")
    except Exception as error:
        raise SphinxError(f"cannot convert the formula {tex!r} to MathML: {error!r}") from error
    for element in math.iter():
        element.text = html.unescape(element.text or "")
        if element.text in BARS and element.tag == "mo":
            element.attrib |= {"lspace": "0", "rspace": "0"}
        if display and element.tag in UNDER and "".join(element[0].itertext()) in LIMITS:
            element.tag = UNDER[element.tag]
        if unknown := re.search(r"\\[A-Za-z]+", element.text):
            raise SphinxError(f"the formula {tex!r} has the unknown command {unknown[0]}")
    return ElementTree.tostring(math, encoding="unicode")


def _inline(self: HTMLTranslator, node: nodes.math) -> None:
    self.body.append(mathml(node.astext(), display=False))
    raise nodes.SkipNode


def _displayed(self: HTMLTranslator, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math">{mathml(node.astext(), display=True)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Use this renderer for formulas."""
    app.add_html_math_renderer("mathml", (_inline, None), (_displayed, None))

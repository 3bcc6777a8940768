"""Formulas as MathML, which browsers render themselves: pages need no script and no network."""

import html
import re
from typing import Any
from xml.etree import ElementTree

from latex2mathml.converter import convert_to_element

# Operators whose index is below them in a displayed formula.
LIMITS = {"min", "max", "inf", "sup", "lim", "argmin", "argmax"}
# What latex2mathml leaves as it stands behind `\bigl` and its like.
DELIMITERS = {r"\|": "‖", r"\{": "{", r"\}": "}"}
# Norms and absolute values: no space around them, and as tall as the line unless the formula says otherwise.
BARS = {"|", "‖"}
UNDER = {"msub": "munder", "msup": "mover", "msubsup": "munderover"}


def mathml(tex: str, display: bool) -> str:
    """A formula as a `<math>` element.

    Raises:
        ValueError: naming the formula, if a command or an environment is unknown.
    """
    # Both are unknown to latex2mathml.
    tex = tex.replace(r"\arg\min", r"\operatorname{argmin}").replace("{aligned}", "{split}")
    try:
        # A line break or an alignment outside an environment needs one.
        if (r"\\" in tex or "&" in tex) and r"\begin" not in tex:
            tex = rf"\begin{{split}}{tex}\end{{split}}"
        math = convert_to_element(tex, display="block" if display else "inline")
    except Exception as error:
        raise ValueError(f"cannot convert the formula {tex!r} to MathML: {error!r}") from error
    for element in math.iter():
        text = html.unescape(element.text or "")
        element.text = DELIMITERS.get(text, text)
        if element.text in BARS and element.tag == "mo":
            element.attrib = {"stretchy": "false", **element.attrib, "lspace": "0", "rspace": "0"}
        if display and element.tag in UNDER and "".join(element[0].itertext()) in LIMITS:
            element.tag = UNDER[element.tag]
        # A line break is no row, and browsers show none.
        if unknown := re.search(r"^&$|\\.*", r"\\" if "linebreak" in element.attrib else element.text):
            raise ValueError(f"the formula {tex!r} has {unknown[0]!r}, which latex2mathml does not know there")
    return ElementTree.tostring(math, encoding="unicode")


def setup(app: Any) -> None:
    """Use this renderer for formulas."""
    from docutils.nodes import SkipNode

    def inline(self: Any, node: Any) -> None:
        self.body.append(mathml(node.astext(), display=False))
        raise SkipNode

    def displayed(self: Any, node: Any) -> None:
        self.body.append(f'<div class="math">{mathml(node.astext(), display=True)}</div>\n')
        raise SkipNode

    app.add_html_math_renderer("mathml", (inline, None), (displayed, None))

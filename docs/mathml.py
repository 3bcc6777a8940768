"""Formulas as MathML by docutils, which browsers render themselves: pages need no script and no network."""

from functools import partial
from typing import Any

from docutils.nodes import SkipNode
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml


def mathml(tex: str, display: bool) -> str:
    """A formula as a `<math>` element.

    Raises:
        ValueError: naming the formula, if a command or an environment is unknown.
    """
    try:
        return str(tex2mathml(tex, as_block=display))
    except MathError as error:
        raise ValueError(f"cannot convert the formula {tex!r} to MathML: {error}") from error


def visit(writer: Any, node: Any, *, display: bool) -> None:
    """Put a formula into a page."""
    made = mathml(node.astext(), display)
    writer.body.append(f'<div class="math">{made}</div>\n' if display else made)
    raise SkipNode


def setup(app: Any) -> None:
    """Use this renderer for formulas."""
    inline, displayed = (partial(visit, display=display) for display in (False, True))
    app.add_html_math_renderer("mathml", (inline, None), (displayed, None))

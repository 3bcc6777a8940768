"""Sphinx configuration of the sparseopt documentation.

sphinx-build -W --keep-going -b html docs build/docs
sphinx-build -W --keep-going -b doctest docs build/doctest
"""

import importlib
import os
import re
import shutil
import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.domains.python import PyObject

os.environ.setdefault("JAX_PLATFORMS", "cpu")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from tests import programs  # noqa: E402

programs.set_up()  # examples are compiled as the tests are

import benchmark_pictures  # noqa: E402
import docstrings  # noqa: E402
import records  # noqa: E402
import tables  # noqa: E402

from sparseopt.models import FAMILIES  # noqa: E402

project = "sparseopt"
author = "The sparseopt developers"
project_copyright = "the sparseopt developers; Apache-2.0"
version = release = installed_version("sparseopt")
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.doctest",
    "mathml",
    "records",
]
exclude_patterns = ["_generated/*.md", "_static", "_templates", "**/.ipynb_checkpoints"]

# MyST and notebooks. `make notebooks` executes them; a build never does.
myst_enable_extensions = ["dollarmath", "amsmath", "deflist", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"
# Progress bars go to stderr; a reader does not need them.
nb_output_stderr = "remove"
nb_merge_streams = True

# The API from docstrings.
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "inherited-members": True}
# A page for each public name, by the tables of docs/reference.
templates_path = ["_templates"]
autosummary_generate = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = False
viewcode_line_numbers = True

doctest_global_setup = """
import jax
import jax.numpy as jnp
import numpy as np
import sparseopt as so
"""

nitpicky = True
nitpick_ignore_regex = [
    # What is internal here has no page, and what others document is linked only with their inventories.
    ("py:.*", r"sparseopt(\.[a-z_]+){2,}\.\w+"),
    ("py:.*", r"(?!sparseopt\b)\w+\..*"),
    ("py:exc", "DiskError|ConfigError|RecipeError"),
]
# Types of other packages become links with SPHINX_INTERSPHINX=1, which needs the network.
if os.environ.get("SPHINX_INTERSPHINX", "0") != "0":
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "scipy": ("https://docs.scipy.org/doc/scipy", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
    }

html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"sparseopt {version}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_js_files = ["copy.js"]
html_favicon = "_static/favicon.svg"
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False


def collect_notebooks() -> None:
    """Copy the executed notebooks next to the tutorial page."""
    target = HERE / "tutorials" / "notebooks"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in (HERE.parent / "notebooks").glob("*.ipynb"):
        shutil.copy2(file, target)


def examples_page() -> str:
    """Every module with examples, without the names that have pages of their own."""
    shown, made = docstrings.public_names().values(), [":orphan:\n"]
    for file in sorted((HERE.parent / "sparseopt").rglob("*.py")):
        name = ".".join(file.relative_to(HERE.parent).with_suffix("").parts).removesuffix(".__init__")
        if ">>>" in file.read_text(encoding="utf-8"):
            without = ", ".join(thing.__name__ for thing in shown if getattr(thing, "__module__", "") == name)
            options = f"   :ignore-module-all:\n   :no-index:\n   :exclude-members: {without}\n"
            made.append(f".. automodule:: {name}\n{options}")
    return "\n".join(made)


def summary(family: str) -> str:
    """The first sentence of a family's file."""
    module = importlib.import_module(FAMILIES[family].read_config.__module__)
    return (module.__doc__ or "").partition("\n")[0].removesuffix(".")


records.EXPRESSIONS.globals |= {"summary": summary, "place": list(FAMILIES).index}


def generate(app: Sphinx) -> None:
    """Write the generated files before Sphinx looks for pages."""
    folder = HERE / "_generated"
    folder.mkdir(exist_ok=True)
    benchmark_pictures.write_all(folder)
    for name in ("tasks", "methods", "command-line", "solvers"):
        (folder / f"{name}.md").write_text(getattr(tables, name.replace("-", "_"))(), encoding="utf-8")
    (folder / "examples.rst").unlink(missing_ok=True)
    if app.builder.name == "doctest":
        (folder / "examples.rst").write_text(examples_page(), encoding="utf-8")
    # Those of names that are no longer public.
    for file in (HERE / "reference" / "names").glob("*.rst"):
        if file.stem not in docstrings.public_names():
            file.unlink()


# A link from the source to a page; viewcode gives the names of a file one module, though several may hand them out.
BACK = re.compile(r'(/names/([\w.]*?)(\w+)\.html)#[\w.]+?\.(\3(?:\.\w+)*)"')


def lead_back(app: Sphinx, name: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Have the links from the source end at the names as their pages show them."""
    if name.startswith("_modules/"):
        context["body"] = BACK.sub(r'\1#\2\4"', context["body"])


def setup(app: Sphinx) -> None:
    """Collect the notebooks and connect the hooks."""
    collect_notebooks()
    app.connect("builder-inited", generate)
    app.connect("autodoc-process-docstring", docstrings.process, priority=1)
    app.connect("autodoc-process-signature", docstrings.signature)
    app.connect("autodoc-skip-member", docstrings.skip)
    app.connect("html-page-context", lead_back)
    # Sphinx calls attributes variables.
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"

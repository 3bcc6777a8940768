"""Sphinx configuration of the sparseopt documentation.

sphinx-build -W --keep-going -b html docs build/docs
sphinx-build -W --keep-going -b doctest docs build/doctest
"""

import importlib
import os
import pkgutil
import shutil
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.domains.python import PyObject

os.environ.setdefault("JAX_PLATFORMS", "cpu")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from tests import programs  # noqa: E402

programs.set_up()  # examples are compiled as the tests are

import benchmark_pictures  # noqa: E402
import command_line  # noqa: E402
import docstrings  # noqa: E402
import records  # noqa: E402
import solver_tables  # noqa: E402

from sparseopt.layers.methods import find_method, method_cost  # noqa: E402
from sparseopt.models import FAMILIES  # noqa: E402
from sparseopt.pruning import METHODS  # noqa: E402

project = "sparseopt"
author = "The sparseopt developers"
project_copyright = "the sparseopt developers; Apache-2.0"
version = release = installed_version("sparseopt")
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.doctest",
    "mathml",
    "records",
]
exclude_patterns = ["_generated", "_static", "**/.ipynb_checkpoints"]

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
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False
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
    # Types of other packages, type variables and aliases have no page here.
    ("py:.*", r"(jax|jaxlib|jaxtyping|numpy|np|scipy|flax|nnx|optax|matplotlib|pydantic|typing|pathlib|enum)(\..*)?"),
    ("py:.*", r"(pydantic_core|collections|sparse|ml_dtypes|tokenizers|annotated_types)\..*"),
    ("py:.*", r"(abc|re|os|io|contextlib|types|zipfile)\..*"),
    ("py:.*", r"Array|ndarray|_PydanticGeneralMetadata|sparseopt\.[a-z_.]*\.T"),
    # A base without a page, and a type that autodoc cuts at its comma.
    ("py:.*", r"sparseopt\.pruning\.modules\.flax_module\.FlaxModule|dict\[str"),
]

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


def experiments_page() -> str:
    """An `automodule` for every module of `sparseopt.experiments`, tasks first."""
    package = importlib.import_module("sparseopt.experiments")
    found = [module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    found.sort(key=lambda name: (not name.split(".")[2].startswith("task"), name))
    return "\n".join(f"## `{name}`\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n" for name in found)


def methods_table() -> str:
    """The pruning methods by name, from their registry."""
    rows = [
        f"| `{name}` | {method.summary} | {', '.join(f'`{preset}`' for preset in method.presets)} |"
        for name, method in METHODS.items()
    ]
    return "| method | what it does | presets |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def workspace(label: str, outputs: int, inputs: int) -> float:
    """The bytes that `sparseopt inspect` expects of a layer solve by "METHOD PRESET"."""
    name, _, preset = label.partition(" ")
    return method_cost(find_method(name, preset or None)).workspace.nbytes(outputs, inputs)


def summary(family: str) -> str:
    """The first sentence of a family's file."""
    module = importlib.import_module(FAMILIES[family].read_config.__module__)
    return (module.__doc__ or "").partition("\n")[0].removesuffix(".")


records.EXPRESSIONS.globals |= {"workspace": workspace, "summary": summary, "place": list(FAMILIES).index}


def generate(app: Sphinx) -> None:
    """Write the generated files before Sphinx looks for pages."""
    folder = HERE / "_generated"
    folder.mkdir(exist_ok=True)
    benchmark_pictures.write_all(folder)
    (folder / "experiments.md").write_text(experiments_page(), encoding="utf-8")
    (folder / "methods.md").write_text(methods_table(), encoding="utf-8")
    (folder / "command-line.md").write_text(command_line.page(), encoding="utf-8")
    (folder / "solvers.md").write_text(solver_tables.page(), encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Collect the notebooks and connect the hooks."""
    collect_notebooks()
    app.connect("builder-inited", generate)
    app.connect("autodoc-process-docstring", docstrings.process, priority=1)
    app.connect("autodoc-process-signature", docstrings.signature)
    app.connect("autodoc-skip-member", docstrings.skip)
    # Sphinx calls attributes variables.
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"

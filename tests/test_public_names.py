"""The public names: which there are, what they do not import, and what is said of those that moved or have ended."""

import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sparseopt as so
from sparseopt import models, pruning, trend
from sparseopt.experiments import task
from sparseopt.experiments.config import expand
from sparseopt.pruning.recipe import options
from sparseopt.shell import app

ROOT = Path(__file__).parents[1]
ENDED = [(module, name, instead) for module in (models, pruning, trend) for name, instead in module._ENDED.items()]
HEAVY = {"flax", "transformers", "torch", "matplotlib", "tokenizers", "networkx", "sklearn", "optax", "pandas"}
HEAVY |= {"jinja2", "PIL", "accelerate"}
HEAVY |= {f"scipy.{name}" for name in ("optimize", "ndimage", "linalg", "special", "sparse.csgraph")}


@pytest.mark.parametrize("room", ["", ".core", ".trend", ".models", ".pruning"])
def test_dir_shows_the_public_names_and_each_is_there(room):
    module = importlib.import_module(f"sparseopt{room}")
    assert dir(module) == sorted(module.__all__)
    assert [name for name in dir(module) if not hasattr(module, name)] == []


@pytest.mark.parametrize("name", so.MOVED)
def test_a_name_that_moved_says_where_it_is(name):
    with pytest.raises(AttributeError, match=rf"sparseopt\.{name} is (\S+?)(,| since 0.3)") as caught:
        getattr(so, name)
    place = str(caught.value).split()[2].rstrip(",")
    assert pkgutil.resolve_name(f"sparseopt.{place.partition('.')[2]}")


def test_an_unknown_name_shows_those_there_are():
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'; it has .*trend_filter"):
        _ = so.nothing


def test_importing_the_package_imports_nothing_heavy_and_pruning_a_layer_no_framework():
    code = (
        f"import sys, sparseopt; print({HEAVY} & sys.modules.keys())\n"
        "sparseopt.pruning.prune_layer; print({'transformers', 'matplotlib', 'torch'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()", "set()"]


@pytest.mark.parametrize(("module", "name", "instead"), ENDED)
def test_an_ended_name_says_what_to_use_and_that_exists(module, name, instead):
    assert name not in dir(module)
    with pytest.raises(AttributeError, match=f"{module.__name__}.{name} has ended:.* {re.escape(instead)}"):
        getattr(module, name)
    for path in re.findall(r"\b(?:so|sparseopt)(?:\.\w+)+", instead):
        assert pkgutil.resolve_name(f"sparseopt.{path.partition('.')[2]}")


@pytest.mark.parametrize(("name", "instead"), app._ENDED.items())
def test_an_ended_command_says_what_to_use(command, name, instead):
    assert command(name, "model") == (2, "", f"error: `sparseopt {name}` has ended: {instead} ")


@pytest.mark.parametrize(("name", "instead"), options._ENDED.items())
def test_an_ended_option_of_a_recipe_says_what_to_use(command, name, instead):
    field, _, value = name.partition(" ")
    with pytest.raises(ValueError, match=f"(?s)cannot be used.*{re.escape(f'{name} {instead}')}"):
        pruning.Recipe(**{field: value or 1})
    call = ["prune", "model", "--output", "out", f"--{field.replace('_', '-')}", value or 1]
    assert command(*call) == (2, "", f"error: --{name.replace('_', '-')} {instead} ")
    known = {*pruning.Recipe.model_fields, *pruning.METHODS["maiht"].presets}
    assert known.issuperset(re.findall(r"(?:called|is|in) `(\w+)`", instead))


@pytest.mark.parametrize(("name", "instead"), task._ENDED.items())
def test_an_ended_task_says_what_to_use(name, instead):
    with pytest.raises(ValueError, match=re.escape(f"the task {name!r} {instead}")):
        expand({"name": "x", "task": name})
    for module, kind in re.findall(r"it is (\w+)\.(\w+),", instead):
        assert f"class {kind}(" in (ROOT / "configs" / "papers" / f"{module}.py").read_text()

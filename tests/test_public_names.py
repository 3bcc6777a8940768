"""The public names: which there are, what is said of those that moved, and what they do not import."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import sparseopt as so

HEAVY = {
    "flax",
    "transformers",
    "torch",
    "matplotlib",
    "tokenizers",
    "networkx",
    "sklearn",
    "optax",
    "pandas",
    "jinja2",
    "PIL",
    "accelerate",
}
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

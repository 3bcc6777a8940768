"""The architecture, checked on the imports: a file imports only from lower floors."""

import ast
import fnmatch
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sparseopt"

# The rooms from the lowest, each with its files from the lowest; * stands for all others. A file imports from rooms
# before its own, and in its own from entries of earlier lines; files that one entry names may import each other.
HOUSE = {
    "system": ["*"],
    "core/base": ["types", "mesh compile", "arguments thresholds dense sums"],
    "core/operators": [
        "maps differences component_means",
        "divided_differences matrices row_tables",
        "edge_lists parts normal_solves",
    ],
    "core/penalties": ["protocols", "entries groups sets", "patterns", "sums names"],
    "core/losses": ["quadratic residuals", "scalar", "data"],
    "core/problem": ["problem units", "certify padding", "differentiate", "iterate"],
    "core/solvers": ["*"],
    "core": ["solve", "proximal"],
    "trend/base": ["graph_tables method", "graph", "layout signal", "ground", "pieces", "job"],
    "trend/methods": [
        "plan",
        "admm_plan interior_plan",
        "doge_plan",
        "choice polynomials",
        "losses piece_means",
    ],
    "trend": [
        "solver samples",
        "filter total_variation",
        "estimator paths/largest_weight reweighting",
        "paths/warm_starts",
        "paths/path",
        "paths/selection",
        "images",
        "__init__",
    ],
    "layers": [
        "bits compiled patterns",
        "problem",
        "methods/*",
        "methods/__init__",
        "split",
        "prune_layer side_by_side",
    ],
    "models/base": ["errors", "fields", "rope"],
    "models/files": [
        "folder",
        "safetensors",
        "compressed gguf/*",
        "hub",
        "source",
        "gguf/vocabulary in_memory",
        "gguf/writer",
        "forms",
    ],
    "models/decoder": ["layers", "settings", "attention experts", "decoder", "cached_decoding tokenizer"],
    # Families, relatives in one file, below the table of all.
    "models/families": ["family", "*", "__init__"],
    "models/streaming": ["prunable", "streamed"],
    "models/reshape": ["*"],
    "models": ["export loaded", "__init__"],
    "pruning/base": ["activations records", "grams reports"],
    "pruning/text": ["chats", "documents", "windows"],
    "pruning/evaluate": ["perplexity audit", "scoring", "zero_shot"],
    "pruning/train": ["training", "distillation reconstruction"],
    "pruning/recipe": ["allocation effort options targets", "pass_recipe", "prune_recipe shrink_recipe"],
    "pruning/run": [
        "output_form",
        "facts measured permutation plan",
        "calibration card part",
        "resumption variants",
        "block drawn",
        "folder_pass",
    ],
    "pruning/measure": ["block_removal survey", "mixing"],
    "pruning/modules": [
        "lanes layouts",
        "watched",
        "flax_module module_plan torch_module",
        "linen_module masks module_training nnx_module",
        "module_pass",
    ],
    "pruning": ["memory prune_module", "loaded_pass", "pipeline", "dry_run", "__init__"],
    "experiments": [
        "names plots* read/* tracking",
        "task",
        "config datasets",
        "runs tasks/*",
        "report",
        "comparison",
    ],
    "shell": ["*"],
    "__main__": ["*"],
}
ROOMS = list(HOUSE)
# Two front-ends on one core, neither of which knows the other.
APART = ({"trend", "layers"}, {"trend", "models"}, {"trend", "pruning"})


def place_of(name):
    """The room, the line and the entry of a file or, with a slash at its end, a folder; None where it has none.

    An `__init__.py`, of a room or of a folder in it, that the room does not list lies below the room: it imports
    nothing of it.
    """
    path = (name + "__init__.py" if name.endswith("/") else name).removesuffix(".py")
    room = max((room for room in ROOMS if f"{path}/".startswith(f"{room}/")), key=len)
    inside = path.removeprefix(room).lstrip("/") or "__init__"
    entries = [(line, entry) for line, text in enumerate(HOUSE[room]) for entry in text.split()]
    fitting = [place for place in entries if fnmatch.fnmatch(inside, place[1].replace("*", "[!_]*"))]
    if inside.endswith("__init__"):
        fitting = fitting or [(-1, "")]
    # The longest entry, so that * comes last.
    return (ROOMS.index(room), *max(fitting, key=lambda place: len(place[1]))) if fitting else None


def modules_imported(file):
    """Paths below the package, with extension, of every sparseopt module a file imports, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            below = PACKAGE / Path(*name.split(".")[1:])
            if name.startswith("sparseopt.") and (below.with_suffix(".py").is_file() or below.is_dir()):
                yield below.relative_to(PACKAGE).as_posix() + (".py" if below.with_suffix(".py").is_file() else "/")


FILES = sorted(f for f in PACKAGE.rglob("*.py") if f.parent != PACKAGE or f.name != "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(PACKAGE).as_posix())
def test_a_file_imports_only_from_floors_below(file):
    name = file.relative_to(PACKAGE).as_posix()
    place = place_of(name)
    assert place, f"{name} stands on no floor; name it in HOUSE"
    for other in modules_imported(file):
        below = place_of(other)
        assert below[:2] < place[:2] or below == place, f"{name} imports {other}"
        assert {name.split("/")[0], other.split("/")[0]} not in APART, f"{name} imports {other}"


def test_the_core_and_trend_filter_import_nothing_heavy():
    code = (
        "import sys, sparseopt"
        "; heavy = {'flax', 'transformers', 'matplotlib', 'torch', 'tokenizers', 'networkx', 'sklearn', 'optax'}"
        "; heavy |= {'pandas', 'jinja2'}"
        "; heavy |= {'scipy.' + name for name in ('optimize', 'ndimage', 'linalg', 'special', 'sparse.csgraph')}"
        "; heavy |= {'pandas'}"
        "; found = heavy & set(sys.modules); assert not found, found; sparseopt.pruning.prune_layer"
        "; found = {'transformers', 'matplotlib', 'torch'} & set(sys.modules); assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_exists():
    import sparseopt

    for name in sparseopt.__all__:
        assert getattr(sparseopt, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'; it has"):
        _ = sparseopt.nothing


@pytest.mark.parametrize("room", ["", ".core", ".trend", ".models", ".pruning"])
def test_dir_shows_the_public_names_and_nothing_else(room):
    module = importlib.import_module(f"sparseopt{room}")
    assert dir(module) == sorted(module.__all__)

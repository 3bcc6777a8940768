"""The architecture, checked on the imports: a file imports only from lower floors."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sparseopt"

# The first entry whose prefix fits decides. Files of one entry may import each other.
FLOORS = [
    ("system/", 0),
    ("core/types", 0),
    ("core/mesh", 0),
    ("core/arguments", 1),
    ("core/thresholds", 1),
    ("core/dense", 1),
    ("core/operators", 1),
    ("core/speed", 2),
    ("core/slabs", 1.5),  # made of the differences of one device
    ("core/parts", 1.75),
    ("core/divided_differences", 1.5),  # built on the operators
    ("core/grouping", 1.5),  # row tables are linear maps
    ("core/matrices", 1.5),  # built on the operators
    ("core/edge_lists", 2),
    ("core/patterns", 2),
    ("core/penalties", 2),
    ("core/group_penalties", 2),
    ("core/constraints", 2),
    ("core/combined_penalties", 2.5),  # made of other penalties
    ("core/penalty_names", 2.5),
    ("core/losses", 2),
    ("core/units", 2),
    ("core/fidelity", 2),
    ("core/scalar_losses", 2),
    ("core/count_and_label_losses", 2),
    ("core/matrix_losses", 2.75),
    ("core/problem", 3),
    ("core/certify", 3.25),
    ("core/differentiate", 3.375),  # asks what has a conjugate
    ("core/iterate", 3.5),
    ("core/padding", 4),
    ("core/solvers/", 4),
    ("core/solve.", 4.5),  # chooses among the solvers
    ("core/", 4),
    ("trend/graph", 5),
    ("trend/files", 5),
    ("trend/node_tables", 5.05),
    ("trend/volumes", 5.05),
    ("trend/signal", 5.1),
    ("trend/layout", 5.1),
    ("trend/freedom", 5.2),
    ("trend/ground", 5.2),
    ("trend/pieces", 5.25),
    ("trend/job", 5.3),
    ("trend/plan", 5.4),
    ("trend/methods/__init__", 5.6),  # the choice among the methods
    ("trend/methods/", 5.5),
    ("trend/polynomials", 5.6),
    ("trend/losses", 5.7),
    ("trend/solver", 5.7),
    ("trend/levelling", 5.75),
    ("trend/filter", 5.8),
    ("trend/total_variation", 5.8),
    ("trend/samples", 5.85),
    ("trend/estimator", 5.9),
    ("trend/reweighting", 5.9),
    ("trend/largest_weight", 5.9),
    ("trend/levels", 5.92),
    ("trend/path", 5.94),
    ("trend/selection", 5.96),
    ("trend/images", 5.97),
    ("trend/", 5),  # the room itself
    ("models/errors", 5.01),
    ("models/fields", 5.05),
    ("models/folder", 5.05),
    ("models/safetensors_file", 5.1),
    ("models/layers", 5.1),
    ("models/rope", 5.1),
    ("models/packed", 5.15),
    ("models/settings", 5.15),  # of the layers and the rope
    ("models/gguf_", 5.2),
    ("models/hub", 5.2),
    ("models/source", 5.25),
    ("models/attention", 5.2),
    ("models/experts", 5.2),
    ("models/decoder", 5.3),
    ("models/generate", 5.35),
    ("models/tokenizer", 5.35),
    ("models/prunable", 5.35),
    ("models/family.", 5.35),
    ("models/families", 5.45),
    ("models/torch_", 5.5),
    ("models/streaming", 5.6),  # opens a model of either kind
    ("models/export", 5.65),
    ("models/shrunk", 5.65),
    ("models/reordered", 5.65),
    ("models/__init__", 5.9),
    ("models/", 5.4),  # a family, one file each
    ("pruning/patterns", 6),
    ("pruning/compiled", 6),
    ("pruning/permutation", 6),
    ("pruning/activations", 6),
    ("pruning/options", 6),
    ("pruning/documents", 6),
    ("pruning/targets", 6),
    ("pruning/texts", 6.05),
    ("pruning/reports", 6),
    ("pruning/layer", 6.1),
    ("pruning/token_time", 6.1),
    ("pruning/calibration", 6.1),
    ("pruning/torch_runner", 6.2),
    ("pruning/training", 6.2),
    ("pruning/reconstruction", 6.3),
    ("pruning/methods/", 6.2),
    ("pruning/allocation", 6.2),
    ("pruning/blocked", 6.3),
    ("pruning/propagation", 6.4),
    ("pruning/evaluation", 6.3),
    ("pruning/scoring", 6.4),
    ("pruning/side_by_side", 6.4),
    ("pruning/api", 6.4),  # one layer; what follows is for whole models
    ("pruning/distillation", 6.45),
    ("pruning/effort", 6.45),
    ("pruning/pass_recipe", 6.5),
    ("pruning/recipe", 6.55),
    ("pruning/zero_shot", 6.5),
    ("pruning/shrinking", 6.55),
    ("pruning/card", 6.6),
    ("pruning/plan", 6.6),
    ("pruning/run_folder", 6.65),  # reads plans
    ("pruning/drawn", 6.7),
    ("pruning/quality", 6.7),
    ("pruning/variants", 6.7),
    ("pruning/survey", 6.7),
    ("pruning/block_removal", 6.7),
    ("pruning/block.", 6.7),
    ("pruning/mixing", 6.75),
    ("pruning/shaping", 6.8),
    ("pruning/cost", 6.8),
    ("pruning/footprint", 6.85),
    ("pruning/branch", 6.85),
    ("pruning/pipeline", 6.9),
    ("pruning/inspection", 6.9),
    ("pruning/", 6.95),
    ("experiments/", 7),
    ("shell/", 8),
    ("__main__", 9),
]
ROOT = 5  # sparseopt/__init__.py gathers the core and the trend filter


def entry_of(name):
    return next((entry for entry in FLOORS if name.startswith(entry[0])), (None, None))


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
    entry = entry_of(name)
    assert entry[0], f"{name} stands on no floor; name it in FLOORS"
    for other in modules_imported(file):
        below = entry_of(other)
        assert below[1] < entry[1] or below == entry, f"{name} imports {other}"
        assert {name.split("/")[0], other.split("/")[0]} != {"trend", "pruning"}, f"{name} imports {other}"


def test_the_core_and_trend_filter_import_nothing_heavy():
    code = (
        "import sys, sparseopt"
        "; heavy = {'flax', 'transformers', 'matplotlib', 'torch', 'tokenizers', 'networkx', 'sklearn', 'optax'}"
        "; heavy |= {'scipy.' + name for name in ('optimize', 'ndimage', 'linalg', 'special', 'sparse.csgraph')}"
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

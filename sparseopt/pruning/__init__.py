"""Pruning of language models, from one layer (`prune_layer`) to a whole model (`prune_model`)."""

from typing import Any

from sparseopt.layers.methods import (
    METHODS,
    AdmmPruning,
    Flap,
    GroupRemoval,
    Magnitude,
    MaihtPruning,
    SparseGpt,
    SplicePruning,
    Wanda,
    find_method,
)
from sparseopt.layers.problem import LayerJob, LayerMethod, LayerReport, Pruned, ScaledLayer, solve_layer
from sparseopt.layers.prune_layer import LayerResult, prune_layer
from sparseopt.pruning.base.records import Footprint, LayerRecord
from sparseopt.pruning.base.reports import ModuleReport, PruneReport
from sparseopt.pruning.dry_run import DryRun, dry_run
from sparseopt.pruning.evaluate.audit import LayerAudit, PatternAudit, audit_pattern, audit_sparsity
from sparseopt.pruning.evaluate.perplexity import perplexity
from sparseopt.pruning.memory import BudgetError
from sparseopt.pruning.modules.masks import masks
from sparseopt.pruning.pipeline import prune_model, shrink_model
from sparseopt.pruning.prune_module import prune_module
from sparseopt.pruning.recipe.prune_recipe import Recipe
from sparseopt.pruning.recipe.shrink_recipe import ShrinkRecipe
from sparseopt.pruning.run.block import Stopped
from sparseopt.pruning.run.part import PruningError
from sparseopt.pruning.text.chats import TextError
from sparseopt.pruning.text.documents import load_text
from sparseopt.pruning.text.windows import text_windows, token_digest, token_windows

__all__ = [
    "METHODS",
    "AdmmPruning",
    "BudgetError",
    "DryRun",
    "Flap",
    "Footprint",
    "GroupRemoval",
    "LayerAudit",
    "LayerJob",
    "LayerMethod",
    "LayerRecord",
    "LayerReport",
    "LayerResult",
    "Magnitude",
    "MaihtPruning",
    "ModuleReport",
    "PatternAudit",
    "PruneReport",
    "Pruned",
    "PruningError",
    "Recipe",
    "ScaledLayer",
    "ShrinkRecipe",
    "SparseGpt",
    "SplicePruning",
    "Stopped",
    "TextError",
    "Wanda",
    "audit_pattern",
    "audit_sparsity",
    "dry_run",
    "find_method",
    "load_text",
    "masks",
    "perplexity",
    "prune_layer",
    "prune_model",
    "prune_module",
    "shrink_model",
    "solve_layer",
    "text_windows",
    "token_digest",
    "token_windows",
]


def __dir__() -> list[str]:
    return sorted(__all__)


# Names that have ended, and what to use instead.
_ENDED = {
    "inspect_model": "so.pruning.dry_run(source, output, recipe)",
    "prune_models": "a loop over prune_model, which measures the dense model once",
}


def __getattr__(name: str) -> Any:
    if name in _ENDED:
        raise AttributeError(f"sparseopt.pruning.{name} has ended: use {_ENDED[name]}")
    raise AttributeError(f"module 'sparseopt.pruning' has no attribute {name!r}; it has {', '.join(__all__)}")

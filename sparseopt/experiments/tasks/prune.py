"""The task `prune`: prune a language model, and score it on text that was not used for pruning."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from sparseopt.experiments import plots
from sparseopt.experiments.names import PenaltyConfig
from sparseopt.experiments.task import Record
from sparseopt.experiments.tasks.model import ModelTask, settings_of
from sparseopt.models import PrunableModel
from sparseopt.pruning import PruneReport, Recipe, audit_sparsity

_Settings: Any = settings_of(Recipe, without=("method", "penalty", "score"))


class Prune(_Settings, ModelTask):
    """Prune a causal language model and measure its perplexity.

    Its further keys are those of `ModelTask` and the fields of `Recipe`.

    Attributes:
        penalty: chooses the support instead of L0 (method maiht); given by name, or by name or path with arguments.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "perplexity", "mean_relative_error", "mean_heldout_error", "solver_seconds", "seconds",
    )  # fmt: skip
    kind: ClassVar[type[Recipe]] = Recipe
    size: ClassVar[str] = "sparsity"
    plot: ClassVar[Callable[..., Any]] = plots.plot_comparison

    task: Literal["prune"]
    penalty: PenaltyConfig | None = None

    @field_validator("penalty", mode="before")
    @classmethod
    def _penalty_by_name(cls, penalty: Any) -> Any:
        # The sparsity sets the weight.
        return {"name": penalty, "weight": 1.0} if isinstance(penalty, str) else penalty

    @property
    def label(self) -> str:
        label = self.method_label
        if not self.has_own_method:
            label = f"{label} {self.preset or 'tuned'}" if label == "maiht" else label
            label = f"{label} {self.penalty.label}" if self.penalty else label
        return label if self.pattern == "unstructured" or self.is_dense else f"{label} {self.pattern}"

    def recipe(self) -> Recipe:
        return Recipe(**self.recipe_values() | {"penalty": self.penalty.build() if self.penalty else None})

    def figures(self, model: PrunableModel, report: PruneReport | None) -> Record:
        if report is None:
            return {"sparsity": 0.0}
        audits = audit_sparsity(model)
        whole = sum(a.zeros for a in audits) / sum(a.size for a in audits)
        return {"sparsity": whole, "pruned_sparsity": report.sparsity}

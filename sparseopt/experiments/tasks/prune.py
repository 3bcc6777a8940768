"""The task `prune`: prune a language model, and score what is left on text that the pruner did not see."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from sparseopt.experiments import plots
from sparseopt.experiments.names import PenaltyConfig
from sparseopt.experiments.task import Estimate, Record
from sparseopt.experiments.tasks.model import BUNDLED, MethodConfig, ModelTask, settings_of
from sparseopt.models import PrunableModel
from sparseopt.pruning import PruneReport, Recipe, audit_sparsity

# Of a whole SmolLM2-135M at 50 %, on two cores, with survey and reconstruction; other methods take a few seconds.
SOLVER_SECONDS = {"best": 250, "maiht": 55, "admm": 60, "admm_splice": 150, "splice": 170, "sparsegpt": 30}

_Settings: Any = settings_of(Recipe, without=("method", "penalty", "score"))


class Prune(_Settings, ModelTask):
    """Prune a causal language model and measure its perplexity.

    Its further keys are those of `ModelTask` and the fields of `Recipe`.

    Attributes:
        penalty: chooses the support in place of L0 (method maiht), by name, or by name or path with arguments.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "perplexity", "mean_relative_error", "mean_heldout_error", "solver_seconds", "seconds",
    )  # fmt: skip
    kind: ClassVar[type[Recipe]] = Recipe
    size: ClassVar[str] = "sparsity"
    plot: ClassVar[Callable[..., Any]] = plots.plot_perplexity

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
        if not isinstance(self.method, MethodConfig):
            label = f"{label} {self.preset or 'best'}" if label == "maiht" else label
            label = f"{label} {self.penalty.label}" if self.penalty else label
        return label if self.pattern == "unstructured" or self.method == "dense" else f"{label} {self.pattern}"

    def recipe(self) -> Recipe:
        return Recipe(**self.recipe_values() | {"penalty": self.penalty.build() if self.penalty else None})

    def estimate(self) -> Estimate:
        """Known for the bundled model on two cores: blocks, then calibration and evaluation by their tokens."""
        if self.source != BUNDLED:
            return Estimate()
        seconds = 4 + 0.0016 * self.evaluation_windows * self.evaluation_seqlen
        if self.method != "dense":
            seconds += 20 + 0.0035 * (self.recipe().window_count + self.heldout_samples) * self.seqlen
            seconds += SOLVER_SECONDS.get(self.method if isinstance(self.method, str) else "", 5)
        return Estimate(seconds, int(1.1 * 2**30))

    def figures(self, model: PrunableModel, report: PruneReport | None) -> Record:
        if report is None:
            return {"sparsity": 0.0}
        audits = audit_sparsity(model)
        whole = sum(a.zeros for a in audits) / sum(a.size for a in audits)
        return {"sparsity": whole, "pruned_sparsity": report.sparsity}

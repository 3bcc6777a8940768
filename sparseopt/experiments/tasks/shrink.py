"""The task `shrink`: make a smaller dense model of a language model, and score it on other text."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from sparseopt.experiments import plots
from sparseopt.experiments.task import Record
from sparseopt.experiments.tasks.model import DENSE, ModelTask, settings_of
from sparseopt.models import StreamedModel, sizes_of
from sparseopt.pruning import PruneReport, ShrinkRecipe
from sparseopt.pruning.recipe.shrink_recipe import SHARES, parameters_of

_Settings: Any = settings_of(ShrinkRecipe, without=("method", "score"))


class Shrink(_Settings, ModelTask):
    """Make a smaller dense model of a causal language model and measure its perplexity.

    Its further keys are those of `ModelTask` and the fields of `ShrinkRecipe`.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "parameters", "perplexity", "mean_heldout_error", "solver_seconds", "seconds",
    )  # fmt: skip
    kind: ClassVar[type[ShrinkRecipe]] = ShrinkRecipe
    size: ClassVar[str] = "parameters"
    task: Literal["shrink"]

    @staticmethod
    def plot(lines: Mapping[str, Sequence[Any]], dense: float | None) -> Any:
        """Sizes and perplexities, without the times."""
        found = {label: (sizes, scores) for label, (sizes, scores, _) in lines.items()}
        return plots.plot_perplexity(found, dense=dense, of="parameters")

    @property
    def label(self) -> str:
        """The method and what is reduced: all fractions of the same parts form one line in a figure."""
        fields = self.kind.model_fields
        reduced = [part for part in (*SHARES, "parameters") if getattr(self, part) != fields[part].default]
        return DENSE if self.is_dense else f"{self.method_label} {'+'.join(reduced)}"

    def recipe(self) -> ShrinkRecipe:
        return ShrinkRecipe(**self.recipe_values())

    def figures(self, model: StreamedModel, report: PruneReport | None) -> Record:
        sizes = sizes_of(model)
        return {
            "parameters": parameters_of(model),
            "channels": sizes.channels,
            "kv_heads": sizes.kv_heads,
            "experts": sizes.experts,
            "blocks": len(sizes.blocks),
            "removed": list(report.shape.removed) if report is not None and report.shape is not None else [],
        }

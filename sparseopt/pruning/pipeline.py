"""Floor 6: the pipeline, a plain loop over blocks.

    source --embedding--> activations
    for each block:   load it; for each recipe: prune its linears, store the shard, run it on  (see `branch`)
    index, config, tokenizer; audit

Memory holds one block and the activations, never the model. Every block sees what the pruned blocks before it
give, so later blocks make up for earlier ones' errors. Several recipes share one pass: the blocks are read once,
and so are computed the Grams in front of the first block, the dense model's own activations, and the survey behind
an allocation.

On several devices the windows of calibration are shared among them (`activations`), and so are the linears of a block,
whole ones side by side or each cut by its outputs (`side_by_side`, `devices`). Of several processes each runs this same
loop with the devices that it has; all read the source, and the first of them alone writes, and tells the others how far
an earlier run came.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from sparseopt.core.mesh import Devices, device_line
from sparseopt.models import (
    OUTER_TAG,
    PrunableModel,
    Source,
    TorchModel,
    check_window,
    open_model,
    unread,
)
from sparseopt.pruning.activations import disk_store, embed_batches, spread_batches
from sparseopt.pruning.branch import Branch, PruningError, Shared, Stopped, Stream
from sparseopt.pruning.budget import choose_footprint
from sparseopt.pruning.devices import check_cut
from sparseopt.pruning.identity import Identity, recipe_identity
from sparseopt.pruning.layer import LayerMethod, check_method
from sparseopt.pruning.patterns import Pattern, parse_pattern
from sparseopt.pruning.recipe import Recipe
from sparseopt.pruning.reports import Event, Footprint, PruneReport
from sparseopt.pruning.run_folder import Progress, claimed, is_finished, progress_in, read_report
from sparseopt.pruning.survey import survey
from sparseopt.pruning.texts import TextError, begin_windows, check_vocabulary, text_windows
from sparseopt.pruning.torch_calibration import runner_of
from sparseopt.pruning.torch_recipe import fitting_recipe
from sparseopt.system import processes
from sparseopt.system.machine import parse_bytes, return_freed_memory

__all__ = [
    "CalibrationWindows",
    "Observer",
    "PruningError",
    "Stopped",
    "calibration_windows",
    "ignore",
    "layer_patterns",
    "never",
    "prune_model",
    "prune_models",
]

Observer = Callable[[Event, int], None]
# What recipes must agree in to share a pass.
CALIBRATION_FIELDS = ("samples", "seqlen", "heldout_samples", "windows", "seed", "bos")


def ignore(event: Event, total: int) -> None:
    """The observer that shows nothing."""
    del event, total


def never() -> bool:
    """What asks no run to stop."""
    return False


def prune_model(
    source: str | Path | Source,
    output: str | Path,
    recipe: Recipe | None = None,
    *,
    observer: Observer = ignore,
    stop: Callable[[], bool] = never,
    memory: int | str | None = None,
    devices: Devices = None,
) -> PruneReport:
    """Prune all linears of a causal language model and write a folder that transformers loads.

    Args:
        source: a Hugging Face model folder (safetensors), a GGUF file, or a name on the Hugging Face hub, `OWNER/NAME`
            or `OWNER/NAME@REVISION`; or what `open_source` made of one.
        output: a folder that does not exist yet or is empty; or one in which the same run was broken off: it goes on
            behind the last finished block, and its result is that of an unbroken run to the bit; or one in which the
            same run is finished: nothing is done, and its report is returned.
        recipe: what to do; default: mAIHT, 50 %.
        observer: called with every `Event`, a layer's record above all, and the number of layers in all.
        stop: asked behind every block; True ends the run there, to be gone on with later.
        memory: what the run may take, device and host together, in bytes or as in "8GiB". Activations between blocks
            lie on the output folder's disk where the estimate asks for it; the result is the same to the bit. None:
            what the machine has available decides where they lie, and nothing is refused.
        devices: to work on, a number or "all", see `core.mesh`; None for one, and in several processes for all of
            them. Results agree to rounding whatever the number; a run may be gone on with on another. Several processes
            make the same call, see the output folder and the source under the same names, and return together.

    Returns:
        A `PruneReport`, `kept` where the run was finished before; the same figures lie in `output/records.jsonl` and
        `output/summary.json`.

    Raises:
        ValueError: before any work, for a recipe, a model, a text or a folder that cannot be used; a folder with
            another run in it, telling what differs; a budget of memory that the run does not fit in, telling what takes
            it; a disk with too little room; devices that there are not, or that the run cannot use.
        Stopped: if `stop` asked for it.
        PruningError: if activations or a solve become non-finite (finished shards stay), or if what was stored, read
            back, breaks the pattern.
    """
    return prune_models(
        source, [(recipe or Recipe(), output)], observer=observer, stop=stop, memory=memory, devices=devices
    )[0]


def prune_models(
    source: str | Path | Source,
    plans: Sequence[tuple[Recipe, str | Path]],
    *,
    observer: Observer = ignore,
    stop: Callable[[], bool] = never,
    memory: int | str | None = None,
    devices: Devices = None,
) -> list[PruneReport]:
    """Prune one model by several recipes in one pass over its blocks, each into its own folder.

    Args:
        source: as in `prune_model`.
        plans: recipes and output folders; the recipes must agree in all that concerns the calibration tokens.
        observer: as in `prune_model`; the number of layers is that of all plans together.
        stop: as in `prune_model`.
        memory: as in `prune_model`, of the whole pass.
        devices: as in `prune_model`.

    Returns:
        A report a plan, in their order; times of forward passes are those of the whole pass. Plans that are finished
        in their folders take no part in it.

    Raises:
        ValueError: as `prune_model` does, and for recipes that differ in their calibration.
        PruningError: as `prune_model` does; one plan's failure ends them all.
    """
    start = time.perf_counter()
    budget = None if memory is None else parse_bytes(memory)
    if not plans:
        raise ValueError("nothing to do: give at least one recipe and its output folder")
    methods = [recipe.check() for recipe, _ in plans]
    first = plans[0][0]
    _check_same_calibration([recipe for recipe, _ in plans])
    folders = [Path(output).expanduser().resolve() for _, output in plans]
    if len(set(folders)) < len(folders):
        raise ValueError(f"every recipe needs an output folder of its own, given {', '.join(map(str, folders))}")
    mesh = device_line("all" if devices is None and processes.count() > 1 else devices)
    if mesh is not None and budget is not None:
        raise ValueError(
            f"a budget of memory is for one device, given {memory} and {mesh.size} devices: leave one of the two out"
        )
    model = open_model(source)
    if mesh is not None and isinstance(model, TorchModel):
        raise ValueError(
            f"the blocks of a {model.config.model_type} model, whose family is not known here, run in torch, which is "
            f"for one device; given {mesh.size}: leave devices out"
        )
    plans = [(fitting_recipe(model, recipe), output) for recipe, output in plans]
    for (recipe, _), method in zip(plans, methods, strict=True):
        for key, pattern in layer_patterns(model, recipe, method).items():
            check_cut(pattern, model.weight_shape(key), mesh)
    windows = calibration_windows(model, first)
    recipes = [recipe for recipe, _ in plans]
    processes.agree(
        {
            "recipes": [recipe_identity(recipe) for recipe in recipes],
            "calibration tokens": [windows.calibration.tolist(), windows.heldout.tolist()],
            "model": [model.source.name, model.source.config],
            "output folders": [str(folder) for folder in folders],
        }
    )
    named = list(zip(recipes, methods, folders, strict=True))
    identity = Identity(model, windows.calibration, windows.heldout)
    # One process holds the folders for all.
    with claimed(folders) if processes.is_first() else contextlib.nullcontext():
        found = [is_finished(folder, identity, recipe) for recipe, _, folder in named] if processes.is_first() else []
        finished = processes.told(found)
        rest = [plan for plan, done in zip(named, finished, strict=True) if not done]
        made: list[PruneReport] = []
        if rest:
            footprint = choose_footprint(model, rest, *windows[:2], budget, spread=mesh is not None)
            return_freed_memory()
            made = _Pass(model, rest, identity, footprint, observer, mesh).run(windows, stop, start)
        reports = iter(made)
        return [
            read_report(folder, identity, recipe) if done else next(reports)
            for (recipe, _, folder), done in zip(named, finished, strict=True)
        ]


class CalibrationWindows(NamedTuple):
    """What a pass reads.

    Attributes:
        calibration: token ids `[samples, seqlen]`, int32, BOS included.
        heldout: the same of the held-out windows, `[heldout_samples, seqlen]`.
        bos: the id of the token that was put in front of every window; None for none.
    """

    calibration: np.ndarray
    heldout: np.ndarray
    bos: int | None


class _Pass:
    """One pass over a model's blocks for several recipes, into folders that are claimed."""

    def __init__(
        self,
        model: PrunableModel,
        plans: list[tuple[Recipe, LayerMethod, Path]],
        identity: Identity,
        footprint: Footprint,
        observer: Observer,
        mesh: Mesh | None,
    ) -> None:
        self.model, self.plans, self.identity, self.footprint, self.mesh = model, plans, identity, footprint, mesh
        self.recipes = [recipe for recipe, *_ in plans]
        self.runner = runner_of(model, disk_store(plans[0][2]) if footprint.activations == "disk" else list)
        self.total = len(plans) * sum(map(len, identity.linears))
        self.observer = observer

    def run(self, windows: CalibrationWindows, stop: Callable[[], bool], start: float) -> list[PruneReport]:
        """Prune block by block, report; `start` is when the run began."""
        model, (calibration, heldout, bos) = self.model, windows
        self._told(self.footprint)
        branches = self._begin()
        embedded = self._embed(calibration, heldout)
        before = self.runner.seconds
        surveys = survey(model, self.recipes, embedded, calibration, int(bos is not None), self.runner, self._told)
        survey_seconds = self.runner.seconds - before
        for branch, found in zip(branches, surveys, strict=True):
            patterns = layer_patterns(model, branch.recipe, branch.method, found.shares)
            branch.start(embedded, patterns, found.weights)
        dense = embedded if any(branch.recipe.needs_dense_stream for branch in branches) else None
        del embedded
        for index in range(model.num_blocks):
            shared = Shared(model.block(index), index, dense, self.runner)
            for branch in branches:
                step = branch.skip_block if index < branch.finished else branch.prune_block
                step(shared, self.runner, self._told)
            dense = shared.dense_outputs if dense and index + 1 < model.num_blocks else None
            # The next block is read when this one and its Grams are gone.
            del shared, step
            if index + 1 < model.num_blocks and processes.any_of(stop()):
                done = f"stopped behind block {index + 1} of {model.num_blocks}"
                raise Stopped(f"{done}; the same call goes on from there")
        seconds = time.perf_counter() - start
        return [
            branch.finish(self.runner, self.footprint, len(branches), survey_seconds, seconds, bos)
            for branch in branches
        ]

    def _begin(self) -> list[Branch]:
        """Make the folders, or find out how far earlier runs came there."""
        model, found = self.model, []
        if processes.is_first():
            found = [progress_in(folder, self.identity, recipe).as_dict() for recipe, _, folder in self.plans]
        progress = [Progress.from_dict(each) for each in processes.told(found)]
        begun = all(OUTER_TAG in found.tags for found in progress)
        outer = {} if begun else unread(model.source, model.outer_keys())
        return [
            Branch(model, recipe, method, folder, outer, found, self.mesh)
            for (recipe, method, folder), found in zip(self.plans, progress, strict=True)
        ]

    def _embed(self, calibration: np.ndarray, heldout: np.ndarray) -> Stream:
        """The streams in front of the first block; of the embedding only the rows of these tokens are read."""
        rows, ids = np.unique(np.concatenate([calibration.ravel(), heldout.ravel()]), return_inverse=True)
        embedding, ids = self.model.embedding(rows), ids.astype(np.int32)
        parts = ids[: calibration.size].reshape(calibration.shape), ids[calibration.size :].reshape(heldout.shape)
        if self.mesh is not None:
            return Stream(*(spread_batches(embedding, part, self.mesh) for part in parts))
        return Stream(*(embed_batches(embedding, part, self.runner.store) for part in parts))

    def _told(self, event: Event) -> None:
        self.observer(event, self.total)


def _check_same_calibration(recipes: Sequence[Recipe]) -> None:
    """Recipes of one pass see the same tokens."""
    first = recipes[0]
    for recipe in recipes[1:]:
        differing = [name for name in CALIBRATION_FIELDS if getattr(recipe, name) != getattr(first, name)]
        if not _same_text(recipe.calibration, first.calibration):
            differing.append("calibration")
        if differing:
            raise ValueError(
                f"recipes of one pass must share their calibration tokens; these differ in {', '.join(differing)}: "
                "prune them one by one"
            )


def _same_text(one: object, other: object) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return isinstance(one, str) and isinstance(other, str) and one == other
    return np.array_equal(np.asarray(one), np.asarray(other))


def layer_patterns(
    model: PrunableModel, recipe: Recipe, method: LayerMethod, shares: Mapping[str, float] | None = None
) -> dict[str, Pattern]:
    """The pattern of every linear, by the key of its weight.

    Args:
        model: opened.
        recipe: gives the pattern, and the share of zeros of every linear unless `shares` does.
        method: has to take the pattern.
        shares: share of zeros by the key of the weight.

    Raises:
        ValueError: naming the layer, if the pattern is impossible there or the method cannot take it.
    """
    patterns: dict[str, Pattern] = {}
    checked: set[tuple[int, ...]] = set()
    for index in range(model.num_blocks):
        for name in model.block_linears(index):
            key = model.weight_key(index, name)
            shape = model.weight_shape(key)
            try:
                patterns[key] = parse_pattern(recipe.pattern, shares[key] if shares else recipe.sparsity, shape)
                if shape not in checked:
                    check_method(method, patterns[key], shape)
            except ValueError as error:
                raise ValueError(f"{key.removesuffix('.weight')}: {error}") from error
            checked.add(shape)
    return patterns


def calibration_windows(model: PrunableModel, recipe: Recipe) -> CalibrationWindows:
    """Calibration and held-out windows; held-out ones follow the calibration's text.

    Raises:
        TextError: for a text that is too short, or token ids that do not fit.
        ModelError: for windows that are longer than the model is made for, or a BOS that the tokenizer does not have.
    """
    bos = None
    if isinstance(recipe.calibration, str):
        check_window(recipe.seqlen, model.config.max_positions)
        count = recipe.samples + recipe.heldout_samples
        found = text_windows(
            model.source, recipe.calibration, "calibration", count, recipe.seqlen,
            bos=recipe.bos, choice=recipe.windows, seed=recipe.seed or 0,
        )  # fmt: skip
        windows, bos = begin_windows(*found), found.bos
    else:
        windows = np.asarray(recipe.calibration)
        if windows.ndim != 2 or not np.issubdtype(windows.dtype, np.integer) or windows.shape[1] < 2:
            raise TextError(
                "calibration token ids must be integers of shape [samples, seqlen], given "
                f"{windows.dtype} of shape {list(windows.shape)}"
            )
        if len(windows) <= recipe.heldout_samples:
            raise TextError(
                f"{len(windows)} windows of token ids leave none for calibration after "
                f"{recipe.heldout_samples} held-out windows; give more or set heldout_samples=0"
            )
        check_window(windows.shape[1], model.config.max_positions)
    check_vocabulary(windows, model.config.vocab_size)
    split = len(windows) - recipe.heldout_samples
    return CalibrationWindows(windows[:split].astype(np.int32), windows[split:].astype(np.int32), bos)

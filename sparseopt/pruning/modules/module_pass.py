"""The pass over a module: takes all batches from one part to the next, and prunes each part.

    for each part, in the order of execution:   all batches stop before it (see `lanes`)
        inputs of its layers -> Grams -> prune, train, round to a grid; run it as it is now, and continue

A part is a block if the module has a list of blocks, and otherwise a linear layer. So a block runs twice on every
batch, and every part receives the outputs of the pruned parts before it.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.core.base.types import Observer
from sparseopt.layers.bits import Bits, parse_bits
from sparseopt.layers.compiled import mesh_of
from sparseopt.layers.problem import LayerJob, reads_variances
from sparseopt.layers.side_by_side import LayerTask, solve_block
from sparseopt.pruning.base.grams import Grams
from sparseopt.pruning.base.records import BlockRecord, GridRecord, LayerRecord
from sparseopt.pruning.modules.flax_module import FlaxModule
from sparseopt.pruning.modules.lanes import Lane, PartCall, lanes
from sparseopt.pruning.modules.module_plan import ModulePlan
from sparseopt.pruning.modules.module_training import check_trainable, train_part, weights_of_outputs
from sparseopt.pruning.modules.watched import Sums, Watched, added, check_outside, is_expert, sum_of
from sparseopt.pruning.run.block import PruningError, layer_record, propagated
from sparseopt.pruning.run.rounding import grid_task, round_linears
from sparseopt.pruning.train.training import Training

# The cost of a batch and the module's output for it: a number to differentiate.
Loss = Callable[[Any, Any], Any]


@dataclass
class ModulePass:
    """The pass over a module; `dense` is the module as it was, if the recipe needs it."""

    module: Watched
    dense: Watched | None
    plan: ModulePlan
    batches: list[Any]
    loss: Loss | None
    observer: Observer

    def __post_init__(self) -> None:
        self.layers: list[LayerRecord] = []
        self.grids: list[GridRecord] = []
        self.blocks: list[BlockRecord] = []
        self.parts: list[str] = []
        rounded = () if self.plan.recipe.bits is None else self.plan.patterns.keys() - self.plan.left_out.keys()
        self.total = len(self.plan.patterns) + len(rounded)
        self.output_weights: Mapping[str, np.ndarray] = {}

    def tell(self, record: Any) -> None:
        self.observer(record, len(self.layers) + len(self.grids), self.total)

    def run(self) -> None:
        recipe, module = self.plan.recipe, self.module
        if recipe.distillation is not None and isinstance(module, FlaxModule):
            check_trainable(module, "", [((batch,), {}) for batch in self.batches])
        if recipe.output_weights == "gradient" and self.loss is not None and isinstance(module, FlaxModule):
            layouts = self.plan.layouts(module, list(self.plan.patterns))
            self.output_weights = weights_of_outputs(module, self.batches, self.loss, layouts)
        self._run_parts()
        if self.plan.last:
            self._run_last()
        if recipe.distillation is not None and self.dense is not None:
            inputs: list[Any] = [((batch,), {}) for batch in self.batches]
            outputs = [self.dense.call(batch) for batch in self.batches]
            self._train("", list(self.plan.patterns), inputs, outputs, recipe.distillation, everything=True)

    def _run_parts(self) -> None:
        """All batches from one part to the next."""
        dense = self.dense
        order = {name: place for place, name in enumerate(self.plan.parts)}
        waiting = set(order)
        with (
            _stopping(self.module, waiting, order, self.batches) as here,
            _stopping(dense, waiting, order, self.batches) as there,
        ):
            for lane in (*here, *there) if order else ():
                lane.resume()
            while stopped := {lane.at.name for lane in here if lane.at}:
                name = min(stopped, key=order.__getitem__)
                others: Sequence[Lane | None] = there or [None] * len(here)
                stops = [
                    _Stop(own, _at(other, name)) for own, other in zip(here, others, strict=True) if _at(own, name)
                ]
                self._part(name, stops)
                waiting.discard(name)
                if not waiting:
                    return
                for stop in stops:
                    _go_on(stop.lane, self.module)
                for lane in there:
                    # Also a lane whose batch does not reach this part in the pruned module.
                    if dense is not None and _at(lane, name):
                        _go_on(lane, dense)
        for name in sorted(waiting, key=order.__getitem__):
            self._part(name, [])  # the pruned module does not call it

    def _part(self, name: str, stops: Sequence["_Stop"]) -> None:
        """Prune the layers of the part before which these batches wait, in the module and in the dense one."""
        names, recipe, dense = self.plan.parts[name], self.plan.recipe, self.dense
        layouts = self.plan.layouts(self.module, names)
        total: Sums | None = None
        for stop in stops:
            inputs = None
            if stop.dense is not None and dense is not None and recipe.propagate:
                inputs = stop.dense.work(partial(dense.inputs, stop.dense.call, layouts))
                # As in a folder: other tokens, even if as many, may reach an expert in the dense module.
                inputs = {each: values for each, values in inputs.items() if not is_expert(each)}
            new = stop.lane.work(partial(self.module.observed, stop.lane.call, layouts, inputs))
            for each, grams in new.found.items():
                given, expected = len(grams.gram), self.module.linears[each].shape[1]
                if given != expected:
                    where = f"batch {stop.lane.batch}, counted from 0,"
                    raise ValueError(f"{where} gives {each} {given} inputs, and it has {expected}: give it that width")
            total = added(total, new)
        train = None
        if recipe.reconstruction is not None and dense is not None and name not in names:
            # A single layer has been fitted to these outputs already.
            train = partial(self._train_block, name, stops, dense)
        self._solve(name, names, Sums({}) if total is None else total, train)

    def _train_block(self, name: str, stops: Sequence["_Stop"], dense: Watched) -> None:
        both = [stop for stop in stops if stop.dense is not None]
        outputs = [stop.dense.work(partial(dense.output, stop.dense.call)) for stop in both if stop.dense]
        inputs = [(stop.lane.call.args, stop.lane.call.kwargs) for stop in both]
        if self.plan.recipe.reconstruction is not None and both:
            self._train(name, self.plan.parts[name], inputs, outputs, self.plan.recipe.reconstruction)

    def _train(
        self, part: str, names: Sequence[str], inputs: Sequence[Any], outputs: Sequence[Any], settings: Training, *,
        everything: bool = False,
    ) -> None:  # fmt: skip
        module = self.module
        assert isinstance(module, FlaxModule)  # others raise an error earlier
        masks = {each: jnp.asarray(module.kernel(each)) != 0 for name in names for each in self.plan.readers[name]}
        index = len(self.parts) - (1 if part else 0)
        record = train_part(module, part, masks, inputs, outputs, settings, index, everything=everything)
        self.blocks.append(record)
        self.tell(record)

    def _run_last(self) -> None:
        """Prune layers that are called more than once, after all others."""
        names = self.plan.last
        layouts = self.plan.layouts(self.module, names)
        total: Sums | None = None
        for batch in self.batches:
            total = added(total, self.module.read_by(batch, layouts))
        assert total is not None
        self._solve("shared", names, total)

    def _solve(self, part: str, names: Sequence[str], sums: Sums, train: Callable[[], None] | None = None) -> None:
        index, recipe, method = len(self.parts), self.plan.recipe, self.plan.method
        self.parts.append(part)
        grams = {name: self._grams(name, sums) for name in names}
        tasks = [self._task(name, grams[name]) for name in names]
        try:
            for name, solved in zip(names, solve_block(tasks, method, None), strict=True):
                tokens, starved = int(grams[name].tokens), self._starved(name, grams[name])
                pattern = self.plan.patterns[name]
                record = layer_record(index, name, solved, method, pattern, tokens, starved, False)
                self._write(name, np.asarray(solved.report.weight))
                self.layers.append(record)
                self.tell(record)
            if train is not None:
                train()
            if recipe.bits is not None:
                self._round(index, names, grams, parse_bits(recipe.bits))
        except MemoryError as error:
            raise PruningError(str(error)) from error

    def _grams(self, name: str, sums: Sums) -> Grams:
        """The Grams of all layers that have this weight, on one device."""
        found = [sums[each] for each in self.plan.readers[name] if each in sums]
        if not any(bool(jnp.any(each.gram)) for each in found):
            if not is_expert(name):
                raise PruningError(
                    f"no batch reaches {name}, or only empty ones or zeros: nothing says what its inputs are; give "
                    "other batches, or leave it out with the recipe's ignore"
                )
            width = self.module.linears[name].shape[1]
            zeros = jnp.zeros((width, width), jnp.float32), jnp.zeros(width, jnp.float32)
            return Grams(zeros[0], jnp.float32(0), jnp.int32(0), zeros[1])
        whole = jax.tree.map(
            lambda leaf: jnp.asarray(np.asarray(leaf)) if mesh_of(leaf) else leaf, reduce(sum_of, found)
        )
        if not all(bool(jnp.isfinite(part).all()) for part in whole if part is not None):
            raise PruningError(
                f"{name} reads values that are not finite, or whose squares are not: the module overflows there, or a "
                "batch has NaN or infinite values"
            )
        return whole

    def _starved(self, name: str, grams: Grams) -> bool:
        return is_expert(name) and int(grams.tokens) < max(1, self.plan.recipe.min_expert_tokens)

    def _task(self, name: str, grams: Grams) -> LayerTask:
        recipe, pattern = self.plan.recipe, self.plan.patterns[name]
        weight, starved = self.module.read(name), self._starved(name, grams)
        shape = (weight.shape[0], weight.shape[1])

        def job() -> LayerJob:
            target = weight.astype(np.float32) if weight.itemsize > 4 else weight
            if recipe.propagate and grams.drift is not None and not starved:
                target = propagated(target, grams, recipe.propagate, None)
            variances = None
            if reads_variances(self.plan.method):
                variances = np.ones(shape[1], np.float32) if starved else np.asarray(grams.variances)
            # Too few tokens to rank the weights: all inputs count the same.
            gram = jnp.eye(shape[1], dtype=jnp.float32) if starved else grams.gram
            outputs = None if starved else self.output_weights.get(name)
            return LayerJob(target, gram, None, pattern, outputs, variances, weight != 0 if recipe.keep_zeros else None)

        return LayerTask(name, shape, (shape, weight.dtype, jax.tree.structure(pattern)), job)

    def _write(self, name: str, pruned: np.ndarray) -> None:
        """Set a weight in its own dtype; unchanged entries stay identical."""
        given = self.module.read(name)
        if given.dtype != pruned.dtype:
            same = (given.astype(pruned.dtype) == pruned) & (pruned != 0)
            pruned = np.where(same, given, pruned.astype(given.dtype))
        self.module.write(name, pruned)

    def _round(self, index: int, names: Sequence[str], grams: Mapping[str, Grams], bits: Bits) -> None:
        """Round layers of a part to a grid, as closely as their own dtype holds it."""
        tasks, grids = [], dict[str, Bits]()
        for name in (each for each in names if each not in self.plan.left_out):
            weight = self.module.read(name)
            bits.check_weight(weight)
            tasks.append(self._grid_task(name, weight.astype(np.float32), grams[name]))
            grids[name] = replace(bits, dtype=weight.dtype.name if weight.itemsize < 4 else bits.dtype)

        def told(record: GridRecord) -> None:
            self.grids.append(record)
            self.tell(record)

        for name, weight in round_linears(index, tasks, grids, None, told).items():
            self._write(name, weight)

    def _grid_task(self, name: str, weight: np.ndarray, grams: Grams) -> LayerTask:
        gram = jnp.eye(weight.shape[1], dtype=jnp.float32) if self._starved(name, grams) else grams.gram
        return grid_task(name, weight, lambda: gram, self.output_weights.get(name))


class _Stop(NamedTuple):
    """A batch that waits before a part, in the module and, if it waits there too, in the dense one."""

    lane: Lane
    dense: Lane | None


def _at(lane: Lane | None, name: str) -> Lane | None:
    return lane if lane is not None and lane.at is not None and lane.at.name == name else None


def _go_on(lane: Lane, module: Watched) -> None:
    lane.resume(lane.work(partial(module.output, lane.call)))


@contextlib.contextmanager
def _stopping(
    module: Watched | None, waiting: Collection[str], parts: Collection[str], batches: Sequence[Any]
) -> Iterator[list[Lane]]:
    """A lane for each batch, which stops at the parts in `waiting`; none without a module."""

    def forward(module: Watched, batch: Any, lane: Lane) -> Any:
        def visit(call: PartCall) -> Any:
            if call.name not in parts:
                return call.run()
            check_outside(call)
            # Called again, after it was pruned.
            return lane.stop_at(call) if call.name in waiting else module.output(call)

        return module.forward(batch, visit)

    with lanes([] if module is None else [partial(forward, module, batch) for batch in batches]) as found:
        yield found

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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.core.base.types import Observer
from sparseopt.layers.bits import parse_bits
from sparseopt.layers.compiled import mesh_of
from sparseopt.pruning.base.grams import Grams, is_expert
from sparseopt.pruning.base.records import BlockRecord, GridRecord, LayerRecord
from sparseopt.pruning.modules.flax_module import FlaxModule
from sparseopt.pruning.modules.lanes import Lane, PartCall, lanes
from sparseopt.pruning.modules.module_plan import ModulePlan
from sparseopt.pruning.modules.module_training import check_trainable, train_part, weights_of_outputs
from sparseopt.pruning.modules.watched import Sums, Watched, added, check_outside, sum_of
from sparseopt.pruning.run.part import PartLayer, PruningError, is_starved, round_part, solve_part
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
                pairs = zip(here, others, strict=True)
                stops = [(own, other if _at(other, name) else None) for own, other in pairs if _at(own, name)]
                self._part(name, stops)
                waiting.discard(name)
                if not waiting:
                    return
                for own, _ in stops:
                    own.resume(own.work(partial(self.module.output, own.call)))
                for lane in there:
                    # Also a lane whose batch does not reach this part in the pruned module.
                    if dense is not None and _at(lane, name):
                        lane.resume(lane.work(partial(dense.output, lane.call)))
        for name in sorted(waiting, key=order.__getitem__):
            self._part(name, [])  # the pruned module does not call it

    def _part(self, name: str, stops: Sequence[tuple[Lane, Lane | None]]) -> None:
        """Prune the layers of the part before which these batches wait, in the module and in the dense one."""
        names, recipe, dense = self.plan.parts[name], self.plan.recipe, self.dense
        layouts = self.plan.layouts(self.module, names)
        total: Sums | None = None
        for lane, other in stops:
            inputs = None
            if other is not None and dense is not None and recipe.propagate:
                inputs = other.work(partial(dense.inputs, other.call, layouts))
                # As in a folder: other tokens, even if as many, may reach an expert in the dense module.
                inputs = {each: values for each, values in inputs.items() if not is_expert(each)}
            new = lane.work(partial(self.module.observed, lane.call, layouts, inputs))
            for each, grams in new.found.items():
                given, expected = len(grams.gram), self.module.linears[each].shape[1]
                if given != expected:
                    where = f"batch {lane.batch}, counted from 0,"
                    raise ValueError(f"{where} gives {each} {given} inputs, and it has {expected}: give it that width")
            total = added(total, new)
        layers = self._solve(name, names, Sums({}) if total is None else total)
        both = [(lane, other) for lane, other in stops if other is not None]
        # A single layer has been fitted to the dense outputs already.
        if recipe.reconstruction is not None and dense is not None and name not in names and both:
            outputs = [other.work(partial(dense.output, other.call)) for _, other in both]
            arguments = [(lane.call.args, lane.call.kwargs) for lane, _ in both]
            self._train(name, names, arguments, outputs, recipe.reconstruction)
        self._round(layers)

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
        layouts = self.plan.layouts(self.module, self.plan.last)
        total = reduce(added, (self.module.read_by(batch, layouts) for batch in self.batches))
        self._round(self._solve("shared", self.plan.last, total))

    def _solve(self, part: str, names: Sequence[str], sums: Sums) -> list[PartLayer]:
        layers = [self._layer(name, self._grams(name, sums)) for name in names]
        self.parts.append(part)
        for record, weight in solve_part(
            layers, self.plan.method, self.plan.recipe.propagate, len(self.parts) - 1, None
        ):
            self._write(record.layer, weight)
            self.layers.append(record)
            self.tell(record)
        return layers

    def _round(self, layers: Sequence[PartLayer]) -> None:
        if self.plan.recipe.bits is None:
            return
        bits, grids = parse_bits(self.plan.recipe.bits), {}
        layers = [each for each in layers if each.name not in self.plan.left_out]
        layers = [replace(each, weight=self.module.read(each.name)) for each in layers]
        for each in layers:
            # As closely as the layer's own dtype holds the grid.
            dtype = each.weight.dtype
            grids[each.name] = replace(bits, dtype=dtype.name) if dtype.itemsize < 4 else bits
        for record, weight in round_part(layers, grids, len(self.parts) - 1, None):
            self._write(record.layer, weight)
            self.grids.append(record)
            self.tell(record)

    def _layer(self, name: str, grams: Grams) -> PartLayer:
        recipe, weight, tokens = self.plan.recipe, self.module.read(name), int(grams.tokens)
        return PartLayer(
            name=name,
            weight=weight,
            dtype=np.dtype(np.float32) if weight.itemsize > 4 else weight.dtype,
            grams=lambda: grams,
            tokens=tokens,
            starved=is_starved(name, tokens, recipe.min_expert_tokens),
            pattern=self.plan.patterns[name],
            outputs=self.output_weights.get(name),
            support=lambda weight: weight != 0 if recipe.keep_zeros else None,
        )

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

    def _write(self, name: str, pruned: np.ndarray) -> None:
        """Set a weight in its own dtype; unchanged entries stay identical."""
        given = self.module.read(name)
        if given.dtype != pruned.dtype:
            same = (given.astype(pruned.dtype) == pruned) & (pruned != 0)
            pruned = np.where(same, given, pruned.astype(given.dtype))
        self.module.write(name, pruned)


def _at(lane: Lane | None, name: str) -> bool:
    return lane is not None and lane.at is not None and lane.at.name == name


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

"""What a smaller model keeps, chosen before the first block is pruned.

A recipe's fractions fix how much stays; which blocks stay is measured. With a budget both are chosen, so that the model
meets it with the smallest loss:

    minimise over c, k, n    rise(c channels) + rise(k groups) + rise(n blocks)    subject to cost(c, k, n) <= budget

A rise is the increase of the mean loss per token if only this part of the dense model is reduced, on the held-out
windows or, without any, on calibration windows. It is measured before the pass:

| part | where | how |
|---|---|---|
| channels, groups | at a few numbers that stay | zeros in all blocks, chosen and fitted with the recipe's method |
| blocks | at every number | removal in turn, see `block_removal` |

Between measured numbers a curve is interpolated with a cubic that is monotone where the measured values are. No part is
reduced further than the budget would need with that part alone. Blocks are removed until the rise exceeds the rise of
the best mix that keeps all blocks. The cost is the number of parameters, which is exact. A budget may be exceeded by
half a unit of its third digit.

Adding rises is an approximation. In SmolLM2-135M, mixes of two and three parts cost 1 to 4 % less than the sum
(rises of 0.28 to 0.69), and an interpolated rise was 7 % too small. The effect of training afterwards is not measured.

Source of the interpolation: Fritsch and Butland, "A method for constructing local monotone piecewise cubic
interpolants", 1984.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import numpy as np
from scipy.interpolate import PchipInterpolator

from sparseopt.models import ModelError, Sizes, StreamedModel, sizes_of, smaller_model
from sparseopt.pruning.base.activations import Stream
from sparseopt.pruning.base.records import RemovalRecord, ShapeRecord
from sparseopt.pruning.measure.block_removal import Trial, removal_order, trial_of
from sparseopt.pruning.recipe.shrink_recipe import (
    BUDGET_ROUNDING,
    ShrinkRecipe,
    channel_choices,
    kv_head_choices,
    parameters_of,
    smallest_sizes,
)
from sparseopt.pruning.run.block import DenseBlock, masked_blocks
from sparseopt.pruning.run.folder_pass import Pass
from sparseopt.pruning.run.plan import Plan, SmallerPlan, shrink_plan
from sparseopt.system import processes

# Numbers of channels, and of groups, at which a curve is measured besides the dense model's.
LEVELS = 4
# In nats per token; larger rises, and rises of models that overflow, are set to this.
LARGEST_RISE = 100.0
# Rises that differ by less count as equal, and the larger model is chosen.
TIE = 1e-4

# By part, pairs (what stays, rise), as in a `ShapeRecord`.
Curves = dict[str, list[list[float]]]


# What a smaller model keeps, and the removed blocks, in order; the curves of a budget.
Mix = tuple[Sizes, list[RemovalRecord], Curves | None]


@dataclass(frozen=True)
class Costs:
    """Parameters of smaller models: `outer + sum over blocks of (base + channel * channels + group * groups)`.

    Base, channel and group are `[blocks]`.
    """

    outer: float
    base: np.ndarray
    channel: np.ndarray
    group: np.ndarray

    def of(self, channels: np.ndarray | int, groups: np.ndarray | int, blocks: Sequence[int]) -> np.ndarray:
        """The cost with so many channels and groups in each of these blocks; the arrays broadcast."""
        base, channel, group = (part[list(blocks)].sum() for part in (self.base, self.channel, self.group))
        return self.outer + base + channel * channels + group * groups


@dataclass(frozen=True)
class Search:
    """The mixes to choose from within a budget; no part is reduced further than it would be alone.

    Attributes:
        channels: numbers of channels, ascending, the dense model's last.
        groups: the same for key-value groups.
        removals: largest number of blocks to remove.
    """

    costs: Costs
    budget: float
    channels: list[int]
    groups: list[int]
    removals: int


def choose_shape(work: Pass, stream: Stream) -> Plan:
    """The plan of a pass with the sizes of its smaller model; a plan that only makes zeros is unchanged.

    Sizes are written to the run's folder; sizes that an earlier start chose are used again. `stream` is the stream
    before the first block; layers are fitted to the dense model's calibration stream.

    Raises:
        ModelError: if no mix meets the budget, with the smallest possible one.
        RuntimeError: if the loss of the dense model is not finite.
        PruningError: as `prune_block` does.
    """
    if not work.plan.smaller:
        return work.plan
    plan, model, start = cast(SmallerPlan, work.plan), work.model, time.perf_counter()
    if work.progress.shape is None:
        gone = model.num_blocks - len(plan.stays)
        if plan.recipe.has_budget:
            mix = choose_mix(work, plan, stream)
        else:
            mix = plan.sizes, removal_order(trial_of(work, work.windows.calibration), gone) if gone else [], None
        work.keep(_shape(model, plan, mix, time.perf_counter() - start))
    assert work.progress.shape is not None
    return shrink_plan(model, plan, work.progress.shape.sizes)


def choose_mix(work: Pass, plan: SmallerPlan, stream: Stream) -> Mix:
    """What the smaller model of a plan with a budget keeps; the plan has the dense model's sizes.

    Losses use about `block_removal.TOKENS` tokens of the pass, the same for all curves.
    """
    model, windows, search = work.model, work.windows, _search(work.model, plan.recipe)
    trial = trial_of(work, windows.heldout if len(windows.heldout) else windows.calibration)
    levels = _levels(model, search)
    dense, *losses = masked_losses(trial, [_trial_plan(model, plan, sizes) for sizes in levels], stream)
    trial.known[frozenset()] = dense
    trial.dense_loss()  # raises if it is not finite
    rises = [min(loss - dense, LARGEST_RISE) for loss in losses]
    curves = _curves(model, list(zip(levels, rises, strict=True)))
    order = removal_order(trial, search.removals, most=best_mix(search, curves, []).rise)
    return _mix(model, search, curves, order)


def masked_losses(trial: Trial, plans: Sequence[Plan], stream: Stream) -> list[float]:
    """The loss of the dense model, then the losses with what each plan removes set to zero.

    Every block is fitted to the dense model's stream; `stream` is the stream before the first block. All processes
    continue with the losses of the first one.
    """
    model, runner = trial.work.model, trial.work.runner
    stream = Stream(stream.calibration, stream.calibration.empty())
    whole, streams = trial.batches, [trial.batches] * len(plans)
    for index in range(model.num_blocks):
        block = DenseBlock(model, index, None, runner)
        staying = [place for place, plan in enumerate(plans) if plan.place(index) is not None]
        masked = masked_blocks([plans[place] for place in staying], block, stream)
        for place, own in zip(staying, masked, strict=True):
            streams[place] = runner.forward(own, streams[place])
        whole = runner.forward(block.block, whole)
        if index + 1 < model.num_blocks:
            stream = runner.through(block.block, stream)
        trial.work.observer("loss curves, block", index + 1, model.num_blocks)
    head = model.head()
    return processes.told([trial.loss(head, each) for each in (whole, *streams)])


def parameter_costs(model: StreamedModel, recipe: ShrinkRecipe) -> Costs:
    """Exact, because the parameters of a block are linear in its channels and in its groups."""
    whole, least = sizes_of(model), smallest_sizes(model, recipe)
    outline = smaller_model(model, whole)

    def of_blocks(sizes: Sizes) -> np.ndarray:
        small = smaller_model(model, sizes)
        keys = (small.block_keys(index).values() for index in range(small.num_blocks))
        return np.array([sum(math.prod(small.source.tensors[key].shape) for key in own) for own in keys])

    dense = of_blocks(whole)
    channel = (dense - of_blocks(replace(whole, channels=least.channels))) // max(1, whole.channels - least.channels)
    group = (dense - of_blocks(replace(whole, kv_heads=least.kv_heads))) // max(1, whole.kv_heads - least.kv_heads)
    outer = parameters_of(outline) - int(dense.sum())
    return Costs(outer, dense - channel * whole.channels - group * whole.kv_heads, channel, group)


def _search(model: StreamedModel, recipe: ShrinkRecipe) -> Search:
    costs, dense = parameter_costs(model, recipe), sizes_of(model)
    budget = parameters_of(model.whole) * ((recipe.parameters or 0) + BUDGET_ROUNDING)

    def alone(numbers: list[int], fits: list[bool]) -> list[int]:
        """From the largest number that meets the budget while all else stays; all numbers if none does."""
        return numbers[max((place for place, fit in enumerate(fits) if fit), default=0) :]

    channels, groups = channel_choices(model, recipe), kv_head_choices(model)
    by_cost = np.argsort([costs.of(dense.channels, dense.kv_heads, [block]) for block in dense.blocks]).tolist()
    needed = (
        count for count in range(len(by_cost)) if costs.of(dense.channels, dense.kv_heads, by_cost[count:]) <= budget
    )
    return Search(
        costs, budget,
        channels=alone(channels, [bool(costs.of(c, dense.kv_heads, dense.blocks) <= budget) for c in channels]),
        groups=alone(groups, [bool(costs.of(dense.channels, k, dense.blocks) <= budget) for k in groups]),
        removals=next(needed, len(by_cost) - 1),
    )  # fmt: skip


def _levels(model: StreamedModel, search: Search) -> list[Sizes]:
    """The sizes at which the curves of channels and of groups are measured."""

    def spread(numbers: list[int]) -> list[int]:
        places = np.linspace(0, len(numbers) - 1, min(LEVELS + 1, len(numbers)))
        return [numbers[place] for place in np.round(places[:-1]).astype(int)]

    dense = sizes_of(model)
    return [
        *(replace(dense, channels=channels) for channels in spread(search.channels)),
        *(replace(dense, kv_heads=groups) for groups in spread(search.groups)),
    ]


def _trial_plan(model: StreamedModel, plan: SmallerPlan, sizes: Sizes) -> SmallerPlan:
    # The stream is the dense model's, so there is no upstream error to correct.
    return shrink_plan(model, replace(plan, recipe=plan.recipe.model_copy(update={"propagate": 0})), sizes)


def _curves(model: StreamedModel, measured: list[tuple[Sizes, float]]) -> Curves:
    """The curves of channels and of groups; of blocks only the dense model's point."""
    dense = sizes_of(model)
    channels = [[sizes.channels, rise] for sizes, rise in measured if sizes.channels < dense.channels]
    heads = [[sizes.kv_heads, rise] for sizes, rise in measured if sizes.kv_heads < dense.kv_heads]
    return {
        "channels": [*channels, [dense.channels, 0.0]],
        "heads": [*heads, [dense.kv_heads, 0.0]],
        "blocks": [[len(dense.blocks), 0.0]],
    }


def _mix(model: StreamedModel, search: Search, curves: Curves, order: list[RemovalRecord]) -> Mix:
    dense = sizes_of(model)
    left = [[len(dense.blocks) - count, min(each.rise, LARGEST_RISE)] for count, each in enumerate(order, 1)]
    curves = curves | {"blocks": [*left[::-1], *curves["blocks"]]}
    best = best_mix(search, curves, [record.block for record in order])
    if not math.isfinite(best.rise):
        raise ModelError("no choice of channels, heads and blocks meets the budget: give a larger one")
    return replace(dense, channels=best.channels, kv_heads=best.groups), order[: best.removed], curves


def _shape(model: StreamedModel, plan: SmallerPlan, mix: Mix, seconds: float) -> ShapeRecord:
    dense, (sizes, removed, curves), whole = sizes_of(model), mix, model.whole
    tensors = whole.source.tensors
    gone = tuple(record.block for record in removed)
    sizes = replace(sizes, blocks=tuple(block for block in dense.blocks if block not in gone))
    return ShapeRecord(
        channels=sizes.channels,
        kv_heads=sizes.kv_heads,
        experts=sizes.experts,
        blocks=sizes.blocks,
        removed=gone,
        rises=tuple(record.rise for record in removed),
        dense=(dense.channels, dense.kv_heads, len(dense.blocks), dense.experts),
        parameters=parameters_of(shrink_plan(model, plan, sizes).target),
        dense_parameters=parameters_of(whole),
        dense_bytes=sum(math.prod(tensors[key].shape) * tensors[key].dtype.itemsize for key in whole.exported_keys()),
        seconds=seconds,
        curves=curves,
    )


class Best(NamedTuple):
    """The smallest sum of rises, infinite if no mix meets the budget, and its mix."""

    rise: float
    channels: int
    groups: int
    removed: int


def best_mix(search: Search, curves: Curves, order: list[int]) -> Best:
    """The mix with the smallest rise that meets the budget; blocks are removed in this order."""
    channels, groups, total = np.array(search.channels), np.array(search.groups), len(search.costs.base)
    kept = [[block for block in range(total) if block not in order[:count]] for count in range(len(order) + 1)]
    costs = np.stack([search.costs.of(channels[:, None], groups, own) for own in kept], axis=-1)
    rises = (
        interpolated(curves["channels"], channels)[:, None, None]
        + interpolated(curves["heads"], groups)[:, None]
        + interpolated(curves["blocks"], total - np.arange(len(kept)))
    )
    rises = np.where(costs <= search.budget, rises, np.inf)
    place = int(np.argmax(np.where(rises <= rises.min() + TIE, costs, -np.inf)))
    c, k, n = np.unravel_index(place, rises.shape)
    return Best(float(rises.flat[place]), int(channels[c]), int(groups[k]), int(n))


def interpolated(curve: list[list[float]], at: np.ndarray) -> np.ndarray:
    """The rises that a curve of pairs (number, rise), ascending, gives for other numbers in its range."""
    numbers, rises = np.array(curve, float).T
    return PchipInterpolator(numbers, rises)(at) if len(numbers) > 1 else np.full(len(at), rises[0])

"""What the smaller models of one pass keep, chosen before the first block is pruned.

How much stays follows from the recipe's shares, or is chosen for its budget (see `mixing`). Which blocks stay is
measured once for all plans of a pass. Both are written to the plans' folders, where an interrupted run finds them.
"""

import math
import time
from dataclasses import replace

from sparseopt.models import PrunableModel, sizes_of
from sparseopt.pruning.base.activations import Stream
from sparseopt.pruning.base.records import RemovalRecord, ShapeRecord
from sparseopt.pruning.measure.block_removal import removal_order, trial_of
from sparseopt.pruning.measure.mixing import Mix, choose_mixes
from sparseopt.pruning.recipe.shrink_recipe import BlockScore, parameters_of
from sparseopt.pruning.run.plan import SmallerPlan, shrink_plan
from sparseopt.pruning.run.shared_pass import Pass


def choose_shapes(work: Pass, stream: Stream) -> None:
    """Give the plans of a pass the sizes of their smaller models; plans that only make zeros are unchanged.

    Sizes that an earlier start chose are taken as they are. `stream` is that before the first block.
    """
    start, model = time.perf_counter(), work.model
    smaller = [(branch, branch.plan) for branch in work.branches if isinstance(branch.plan, SmallerPlan)]
    new = [(branch, plan) for branch, plan in smaller if branch.progress.shape is None]
    # Each score orders the blocks once for all plans.
    counts: dict[BlockScore, int] = {}
    for _, plan in new:
        if removed := model.num_blocks - len(plan.stays):  # by the recipe's share; none yet with a budget
            counts[plan.recipe.block_score] = max(removed, counts.get(plan.recipe.block_score, 0))
    orders: dict[BlockScore, list[RemovalRecord]] = {}
    if counts:
        trial = trial_of(model, work.windows, work.runner, work.observer, kind=work.batches)
        orders = {score: removal_order(trial, count, score=score) for score, count in counts.items()}
    budgets = [plan for _, plan in new if plan.recipe.has_budget]
    mixes = iter(choose_mixes(work, budgets, stream) if budgets else [])
    seconds = time.perf_counter() - start
    for branch, plan in new:
        order = orders.get(plan.recipe.block_score, [])
        mix = next(mixes) if plan.recipe.has_budget else _by_shares(model, plan, order)
        branch.keep(_shape(model, plan, mix, seconds))
    for branch, plan in smaller:
        if (shape := branch.progress.shape) is not None:
            branch.plan = plan.with_shape(model, shape)
            work.tell(shape)


def _by_shares(model: PrunableModel, plan: SmallerPlan, order: list[RemovalRecord]) -> Mix:
    gone = order[: model.num_blocks - len(plan.stays)]
    blocks = {record.block for record in gone}
    return Mix(replace(plan.sizes, blocks=tuple(i for i in sizes_of(model).blocks if i not in blocks)), gone)


def _shape(model: PrunableModel, plan: SmallerPlan, mix: Mix, seconds: float) -> ShapeRecord:
    dense, sizes, tensors = sizes_of(model), mix.sizes, model.source.tensors
    return ShapeRecord(
        channels=sizes.channels,
        kv_heads=sizes.kv_heads,
        experts=sizes.experts,
        blocks=sizes.blocks,
        removed=tuple(record.block for record in mix.removed),
        rises=tuple(record.rise for record in mix.removed),
        dense=(dense.channels, dense.kv_heads, len(dense.blocks), dense.experts),
        parameters=parameters_of(shrink_plan(model, plan, sizes).target),
        dense_parameters=parameters_of(model),
        dense_bytes=sum(math.prod(tensors[key].shape) * tensors[key].dtype.itemsize for key in model.exported_keys()),
        seconds=seconds,
        curves=mix.curves,
    )

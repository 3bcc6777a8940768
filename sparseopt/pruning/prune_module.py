"""`prune_module`: opens, checks and prunes any module in memory, part by part, and returns it."""

import contextlib
import copy
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sparseopt.core.base.dense import activations_in
from sparseopt.core.base.types import Observer
from sparseopt.models.files.in_memory import is_torch_module
from sparseopt.pruning.base.reports import ModuleReport
from sparseopt.pruning.modules.module_pass import Loss, ModulePass
from sparseopt.pruning.modules.module_plan import module_recipe, plan_module
from sparseopt.pruning.modules.watched import Watched
from sparseopt.pruning.recipe.prune_recipe import Recipe


def prune_module(
    module: Any,
    batches: Iterable[Any],
    recipe: Recipe | None = None,
    *,
    params: Any = None,
    call: Callable[[Any, Any], Any] | None = None,
    targets: Any = None,
    loss: Loss | None = None,
    inplace: bool = False,
    observer: Observer | None = None,
) -> tuple[Any, ModuleReport]:
    """Prune the linear layers of a module in memory: Flax NNX, Flax Linen, or torch (extra `torch`).

        minimise over V    1/2 ||X Vᵀ - X Wᵀ||²    subject to V in the pattern

    for each weight W `[out, in]`, with X its inputs in the pruned module over all batches. Linear layers are `Linear`,
    `LinearGeneral`, `Einsum` and `Conv` of NNX, including the projections of attention; `Dense`, `DenseGeneral`,
    `Einsum` and `Conv` of Linen; `Linear`, `Conv1d` to `Conv3d` and transformers' `Conv1D` of torch. The inputs of a
    convolution are its patches, channel by channel. The module's own code runs unchanged, as after training: without
    dropout, with stored statistics. Each pass over an NNX module begins with the caches, counters and random numbers
    that it was given, and the pruned module has these again. Layers that run inside a transformation of the module
    itself (jit, remat, scan) cannot be observed: an error names them, unless they are left out.

    If the module has lists of blocks (entries of one class, like the layers of a transformer or of a stage of a
    ResNet), the layers in them are pruned, one block at a time, and layers outside are left out unless targets name
    them. Without such lists every layer is pruned, one after the other. A weight that several layers share is pruned
    once, on the inputs of all, when the others are done. `distil_epochs` trains the whole module on the outputs of the
    dense one: all its parameters, unpruned ones too, and every zero stays.

    Args:
        module: the module; a Linen module needs `params` as well.
        batches: what it is called with, one after the other; any pytrees. Arrays may be sharded over the devices of a
            mesh.
        recipe: what to do; default: `Recipe()`. Fields about texts and folders raise an error.
        params: for a Linen module, its variables `{"params": ..., ...}` or the parameters alone; they are returned in
            the same form, pruned.
        call: `call(module, batch)` feeds the module; default: `module(batch)`. A Linen module is passed bound.
        targets: which layers to prune, written as in the recipe, by their names in the module.
        loss: `loss(output, batch)`, a number, for `output_weights="gradient"`, in JAX.
        inplace: change the given module instead of a copy. Not for Linen.
        observer: called with each record, the number of layers done and their total.

    Returns:
        The pruned module, or the variables of Linen, and a report of what was done.

    Raises:
        ValueError: before any work, if the recipe, targets or batches cannot be used, or if the first batch does not
            reach a layer, or a layer's weight is not finite or tied to one left out (the message names it); or later,
            if a part cannot be trained or a batch has another width. Errors of the module are passed on, with a note.
        PruningError: if inputs of a layer or a solve are not finite, or no batch reaches a layer with numbers but 0.
    """
    start = time.perf_counter()
    if isinstance(batches, Mapping) or hasattr(batches, "shape"):
        kind = type(batches).__name__
        raise ValueError(f"batches must be several, given one {kind}: say [batch], or list(batches) if it holds some")
    batches = list(batches)
    if not batches:
        raise ValueError("no batches: give at least one, nothing else says what the layers read")
    recipe = Recipe() if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe must be a Recipe, as in Recipe(sparsity=0.5), given a {type(recipe).__name__}")
    opened = _opened(module, batches[0], call, params, inplace)
    trains = not is_torch_module(module)
    recipe, not_done = module_recipe(recipe, trains=trains, has_loss=loss is not None)
    dense = opened.dense() if recipe.needs_dense_stream else None
    with activations_in(recipe.precision), opened.watching(), dense.watching() if dense else contextlib.nullcontext():
        plan = plan_module(opened, opened.discover(batches[0]), recipe, targets)
        work = ModulePass(opened, dense, plan, batches, loss, observer or (lambda *_: None))
        work.run()
        result = opened.result()
    found = work.layers, work.parts, plan.left_out, not_done, work.grids, work.blocks
    return result, ModuleReport(*found, time.perf_counter() - start)


def _opened(module: Any, batch: Any, call: Any, params: Any, inplace: bool) -> Watched:
    import flax.linen
    from flax import nnx

    if isinstance(module, flax.linen.Module):
        from sparseopt.pruning.modules.linen_module import LinenModule

        if params is None:
            raise ValueError("a Linen module holds no parameters: give its variables, as in params=variables")
        if inplace:
            raise ValueError("the variables of a Linen module cannot change in place: use the returned ones")
        return LinenModule(module, params, batch, call)
    if params is not None:
        raise ValueError(f"params is for Linen modules; a {type(module).__name__} holds its own: leave it out")
    if isinstance(module, nnx.Module):
        from sparseopt.pruning.modules.nnx_module import NnxModule

        return NnxModule(module, call, inplace=inplace)
    if is_torch_module(module):
        from sparseopt.pruning.modules.torch_module import TorchModule

        try:
            return TorchModule(module if inplace else copy.deepcopy(module), call)
        except RuntimeError as error:
            # As with weights that an older weight_norm, or torch's own pruning, computes from others.
            raise ValueError(f"the module cannot be copied, say inplace=True: {error}") from error
    raise ValueError(
        f"module must be one of Flax (NNX, or Linen with params=) or torch, given a {type(module).__name__}; for a "
        "single weight see `prune_layer`, for a model in a folder `prune_model`"
    )

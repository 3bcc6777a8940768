"""Gradients of a Flax module: to train a part, or all of it, on the dense module's outputs, and to weight outputs.

    minimise over the kept weights    mean over batches of  stream_loss(part(x), y)

with y the dense part's outputs for its own inputs. Loss, optimiser and choice of the best state are as in `train`. If
the output is several arrays, the first array of floats counts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparseopt.pruning.base.records import BlockRecord
from sparseopt.pruning.measure.survey import output_weights
from sparseopt.pruning.modules.flax_module import (
    FlaxModule,
    Rest,
    Structure,
    Values,
    Wanted,
    compiled_for,
    cut,
    joined,
    placed_as,
)
from sparseopt.pruning.modules.lanes import PartCall
from sparseopt.pruning.modules.layouts import Layout
from sparseopt.pruning.train.reconstruction import OutputTrainer, output_loss, output_step
from sparseopt.pruning.train.training import Data, TrainedEntries, Training, entries_of

# Arguments of a part: positional and keyword arguments.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _floats(output: Any) -> Float[Array, "... D"]:
    """The first array of floats in an output."""
    for leaf in jax.tree.leaves(output):
        if isinstance(leaf, jax.Array | np.ndarray) and jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(leaf)
    raise ValueError(f"the output, a {type(output).__name__}, holds no array of floats to train on: say 0 epochs")


def _with(params: Any, trained: Mapping[int, Array]) -> Any:
    """Parameters with the trained ones in place, in their own dtypes."""
    leaves, tree = jax.tree.flatten(params)
    for index, value in trained.items():
        leaves[index] = value.astype(leaves[index].dtype)
    return jax.tree.unflatten(tree, leaves)


class _Part(NamedTuple):
    """What no step changes of a part, see `Fixed`; parameters are trained by their place among the leaves."""

    structure: Structure
    values: Values
    kept: list[TrainedEntries]

    def output(self, trained: Mapping[int, Array], given: tuple[list[Any], Rest]) -> Array:
        params, others = self.values
        args, kwargs = joined(given[0], given[1].value)
        return _floats(self.structure((_with(params, trained), others), args, kwargs, None)).astype(jnp.float32)


class _PartTrainer(OutputTrainer):
    # Of `jit`, which knows all settings of JAX that the module's code may depend on.
    programs = (jax.jit(output_step), jax.jit(output_loss))


# Of no output: shows whether a part can be compiled.
_traced = jax.jit(lambda structure, values, arrays, rest: [structure(values, *joined(arrays, rest.value), None)][:0])


@compiled_for("training", "say train_epochs=0 and distil_epochs=0")
def check_trainable(module: FlaxModule, name: str, inputs: Sequence[Arguments]) -> list[tuple[list[Any], Rest]]:
    """The arguments of a part, cut for a program; a ValueError if none can be compiled, as for objects in them."""
    structure, values = module.part(name)
    given = []
    for arguments in inputs:
        found = cut(arguments, structure)
        if found is None:
            epochs = "train_epochs" if name else "distil_epochs"
            raise ValueError(
                f"{name or 'the module'} cannot be trained: it is given, or has, objects that no program can be "
                f"compiled for, where arrays, numbers and texts are; say {epochs}=0"
            )
        given.append((found[0], Rest(found[1])))
        _traced.eval_shape(structure, values, *given[-1])
    return given


def train_part(
    module: FlaxModule, name: str, masks: Mapping[str, Array], inputs: Sequence[Arguments], outputs: Sequence[Any],
    settings: Training, index: int, *, everything: bool = False,
) -> BlockRecord:  # fmt: skip
    """Train the kept weights of a part, in place.

    Args:
        module: the pruned module.
        name: name of the part; "" is the module itself, whose argument is a batch.
        masks: the kept entries of each kernel, by the name of its layer.
        inputs: arguments of the part, by batch.
        outputs: the dense part's outputs for its own inputs.
        settings: settings of the training.
        index: index of the part, for the record.
        everything: whether to train weights without a mask too; else, of these, only biases and scales with one axis.

    Raises:
        ValueError: as `check_trainable` does.
    """
    given = check_trainable(module, name, inputs)
    structure, values = module.part(name)
    params, kept = dict[int, Array](), list[TrainedEntries]()
    for place, (path, leaf) in enumerate(jax.tree_util.tree_flatten_with_path(values[0])[0]):
        # The last key in NNX is an attribute of its variable.
        keys = [str(getattr(key, "key", getattr(key, "idx", ""))) for key in path]
        owner, _, last = ".".join(part for part in (name, *keys) if part).rpartition(".")
        mask = masks.get(owner) if last == "kernel" else None
        if mask is not None or (jnp.issubdtype(leaf.dtype, jnp.floating) and (everything or leaf.ndim < 2)):
            params[place] = leaf.astype(jnp.float32)
            kept.append(entries_of(leaf, mask))
    pairs = (given, [_floats(each).astype(jnp.float32) for each in outputs])

    def store(_: int, best: Any) -> None:
        module.set_params(name, jax.tree.map(placed_as, _with(values[0], best), values[0]))

    trainer = _PartTrainer([_Part(structure, values, kept)], [params], store, Data(pairs, pairs), settings)
    return BlockRecord(block=index, **trainer.train())


@compiled_for("output_weights='gradient'", "say 'uniform', without loss")
def weights_of_outputs(
    module: FlaxModule, batches: Sequence[Any], loss: Callable[[Any, Any], Any], layouts: Mapping[str, Layout]
) -> dict[str, Float[np.ndarray, "out"]]:
    """For each layer, weights of squared errors at its outputs, from the mean square of the loss's gradient there."""
    structure, values = module.part("")
    wanted = Wanted("squares", tuple(layouts.items()))
    squares: dict[str, np.ndarray] = {}
    for batch in batches:
        found = cut(batch, (structure, loss))
        if found is None:
            new = _squares(structure, values, batch, loss, layouts)
        else:
            new = _compiled_squares(structure, values, found[0], Rest((found[1], loss)), wanted)
        for name, square in new.items():
            squares[name] = squares.get(name, 0) + np.asarray(square, np.float64)
    return {name: output_weights(square.astype(np.float32)) for name, square in squares.items()}


@jax.jit
def _compiled_squares(structure: Structure, values: Values, arrays: list[Any], rest: Rest, wanted: Wanted) -> Any:
    others, loss = rest.value
    return _squares(structure, values, joined(arrays, others), loss, dict(wanted.layouts))


def _squares(
    structure: Structure, values: Values, batch: Any, loss: Callable[[Any, Any], Any], layouts: Mapping[str, Layout]
) -> dict[str, Array]:
    """The squared gradients at the outputs of layers, summed over the tokens of a batch, `[out]`."""
    shapes: dict[str, list[Any]] = {}

    def noted(call: PartCall) -> Any:
        output = call.run()
        if call.name in layouts:
            shapes.setdefault(call.name, []).append(jax.ShapeDtypeStruct(output.shape, output.dtype))
        return output

    jax.eval_shape(lambda: structure(values, (batch,), {}, noted))

    def run(errors: dict[str, list[Array]]) -> Array:
        left = {name: iter(each) for name, each in errors.items()}

        def moved(call: PartCall) -> Any:
            output = call.run()
            return output + next(left[call.name]) if call.name in left else output

        found = jnp.asarray(loss(structure(values, (batch,), {}, moved), batch))
        if found.ndim:
            raise ValueError(f"loss must give a number, given an array of shape {list(found.shape)}")
        return found

    gradients = jax.grad(run)({name: [jnp.zeros(s.shape, s.dtype) for s in own] for name, own in shapes.items()})
    squares = {}
    for name, own in gradients.items():
        found = [layouts[name].by_output(jnp.asarray(gradient, jnp.float32) ** 2) for gradient in own]
        squares[name] = sum(found[1:], found[0])
    return squares

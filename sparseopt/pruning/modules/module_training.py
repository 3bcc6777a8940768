"""Gradients of a Flax module: to train a part, or all of it, on the dense module's outputs, and to weight outputs.

    minimise over the kept weights    mean over batches of  stream_loss(part(x), y)

with y the dense part's outputs for its own inputs. Loss, optimiser and choice of the best state are as in `train`. If
the output is several arrays, the first array of floats counts.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

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
from sparseopt.pruning.train.reconstruction import channel_weights, stream_loss
from sparseopt.pruning.train.training import (
    TrainedEntries,
    Trainer,
    Training,
    TrainState,
    start_state,
    updated,
)

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


def _loss(
    trained: Any, structure: Structure, values: Values, weights: Array, arrays: list[Any], rest: Rest, target: Array
) -> Array:
    params, others = values
    args, kwargs = joined(arrays, rest.value)
    output = structure((_with(params, trained), others), args, kwargs, None)
    return stream_loss(_floats(output).astype(jnp.float32), target, weights)


@jax.jit
def _step(state: TrainState, kept: list[TrainedEntries], rate: Array, clip: Array, *given: Any) -> Any:
    loss, gradient = jax.value_and_grad(_loss)(state.params, *given)
    state, norm = updated(state, gradient, kept, rate, clip)
    return state, loss, norm


_loss_of_batch = jax.jit(_loss)


class _PartTrainer(Trainer):
    """Trains one part, one batch per step."""

    exact = 1e-12

    def __init__(
        self, structure: Structure, values: Values, masks: Mapping[int, Array | None], inputs: Sequence[Arguments],
        targets: Sequence[Array], settings: Training,
    ) -> None:  # fmt: skip
        settings.check()
        self.settings, self.structure, self.values = settings, structure, values
        leaves = jax.tree.leaves(values[0])
        params = {index: leaves[index].astype(jnp.float32) for index in masks}
        self.calibration = self.judges = (list(inputs), list(targets))  # type: ignore[assignment]
        self.epochs = self.steps = self.best_epoch = self.total = 0
        self.states, self.kept = [start_state(params)], []
        every = {index: jnp.asarray(True) if mask is None else mask for index, mask in masks.items()}
        self.entries = [
            TrainedEntries(mask, jnp.maximum(jnp.sum(jnp.broadcast_to(mask, params[index].shape)), 1))
            for index, mask in every.items()
        ]

    @cached_property
    def weights(self) -> Float[np.ndarray, "D"]:
        return channel_weights(self.calibration[1])

    def orders(self) -> list[list[tuple[int, np.ndarray]]]:
        rng, whole = np.random.default_rng(self.settings.seed), np.zeros(0, np.int32)
        count = len(self.calibration[0])
        return [[(int(i), whole) for i in rng.permutation(count)] for _ in range(self.settings.epochs)]

    def _given(self, arguments: Arguments, target: Array) -> tuple[Any, ...]:
        found = cut(arguments, self.structure)
        assert found is not None
        return self.structure, self.values, self.weights, found[0], Rest(found[1]), target

    def step(self, index: int, rows: np.ndarray, rate: np.float32) -> tuple[Array, Array]:
        inputs, targets = self.calibration
        given = self._given(inputs[index], targets[index])  # type: ignore[arg-type]
        self.states[0], loss, norm = _step(self.states[0], self.entries, rate, np.float32(self.settings.clip), *given)
        return loss, norm

    def loss(self, inputs: Any, targets: Any) -> float:
        pairs = zip(inputs, targets, strict=True)
        return float(np.mean([float(_loss_of_batch(self.states[0].params, *self._given(*pair))) for pair in pairs]))

    def keep(self) -> None:
        self.kept = [jax.tree.map(jnp.copy, self.states[0].params)]

    def params(self) -> Any:
        """The parameters of the part, in the best state."""
        params = self.values[0]
        return jax.tree.map(placed_as, _with(params, self.kept[0]), params) if self.kept else params


# Of no output: shows whether a part can be compiled.
_traced = jax.jit(lambda structure, values, arrays, rest: [structure(values, *joined(arrays, rest.value), None)][:0])


@compiled_for("training", "say train_epochs=0 and distil_epochs=0")
def check_trainable(module: FlaxModule, name: str, inputs: Sequence[Arguments]) -> None:
    """Raise a ValueError if a part cannot be compiled for its arguments, for example because some are objects."""
    structure, values = module.part(name)
    for arguments in inputs:
        found = cut(arguments, structure)
        if found is None:
            epochs = "train_epochs" if name else "distil_epochs"
            raise ValueError(
                f"{name or 'the module'} cannot be trained: it is given, or has, objects that no program can be "
                f"compiled for, where arrays, numbers and texts are; say {epochs}=0"
            )
        _traced.eval_shape(structure, values, found[0], Rest(found[1]))


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
    check_trainable(module, name, inputs)
    structure, values = module.part(name)
    trained: dict[int, Array | None] = {}
    for place, (path, leaf) in enumerate(jax.tree_util.tree_flatten_with_path(values[0])[0]):
        # The last key in NNX is an attribute of its variable.
        keys = [str(getattr(key, "key", getattr(key, "idx", ""))) for key in path]
        owner, _, last = ".".join(part for part in (name, *keys) if part).rpartition(".")
        if last == "kernel" and owner in masks:
            trained[place] = masks[owner]
        elif jnp.issubdtype(leaf.dtype, jnp.floating) and (everything or leaf.ndim < 2):
            trained[place] = None
    targets = [_floats(each).astype(jnp.float32) for each in outputs]
    trainer = _PartTrainer(structure, values, trained, inputs, targets, settings)
    record = BlockRecord(block=index, **trainer.train())
    module.set_params(name, trainer.params())
    return record


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

"""Floor 6: block reconstruction: the kept weights of a pruned block are trained until it answers as the dense block.

    minimise over the kept weights    mean over tokens t of    mean_d (block(x)_td - y_td)² / mean_d y_td²

with x the stream before the pruned block, y the dense block's output for the same tokens, `[B, T, D]` both. Dividing by
the token's own size makes the loss a relative error of the residual stream, as weighting "residual" does in
`calibration`: some tokens carry a stream that is hundreds of times larger, and would decide alone. A token whose target
is zero counts nothing. Masks are frozen; linears without a mask keep their weights.

Adam (Kingma and Ba, 2015) with the gradient's global norm clipped, a linear warm-up and a cosine to zero. The answer
is the best of the start and the states after each epoch by the judging loss: the loss on held-out tokens, or on the
calibration tokens without any. So it is never worse there than the start.
"""

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sparseopt.models import Block
from sparseopt.models.experts import stacked_name
from sparseopt.pruning.activations import Batches, Stream
from sparseopt.pruning.compiled import Compiled, Timed
from sparseopt.pruning.reports import BlockRecord

# A mean square error below this is what float32 leaves of two programs for one block: there is nothing to train.
ROUNDING = 1e-12


class TrainingStatus(enum.Enum):
    """How a reconstruction ended; the value is one sentence for a person. The best state was kept in every case."""

    FINISHED = "all epochs were run"
    STOPPED = "the judging loss no longer fell"
    EXACT = "the block already gave the dense block's answer"
    DIVERGED = "the judging loss rose far above the start's: use a smaller learning rate"
    NONFINITE = (
        "a loss or gradient became infinite or NaN: use a smaller learning rate, or check the activations "
        "for non-finite or huge values"
    )


@dataclass(frozen=True)
class Reconstruction:
    """How a block is trained.

    Attributes:
        epochs: passes over the calibration tokens, at most.
        learning_rate: Adam's largest step; a weight moves by about this much a step.
        warmup: share of all steps in which the rate rises linearly; then it falls to zero as a cosine.
        windows: windows of tokens a step, at most; the largest divisor of a batch's windows that is not above it.
        clip: largest global norm of the gradient. Those of SmolLM2's blocks are near 0.06. Adam ignores a common
            factor, so a low value does no harm and lets no window weigh more than the others.
        patience: epochs without a better judging loss before training stops.
        divergence: training stops if the judging loss after an epoch is above this multiple of the start's.
        train_norms: train the weights of the block's norms as well.
        seed: of the order in which windows are drawn.
    """

    epochs: int = 8
    learning_rate: float = 1e-3
    warmup: float = 0.1
    windows: int = 1
    clip: float = 0.03
    patience: int = 3
    divergence: float = 2.0
    train_norms: bool = True
    seed: int = 0

    def check(self) -> None:
        """Raise a `ValueError` that lists all that is wrong, one line each."""
        problems = [
            f"{name} must be a whole number of {least} or more, given {value!r}"
            for name, least in (("epochs", 1), ("windows", 1), ("patience", 1), ("seed", 0))
            if not isinstance(value := getattr(self, name), int) or value < least
        ]
        for name in ("learning_rate", "clip"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                problems.append(f"{name} must be positive and finite, given {value!r}")
        if not 0 <= self.warmup < 1:
            problems.append(f"warmup must be a share of the steps in [0, 1), given {self.warmup!r}")
        if not self.divergence > 1:
            problems.append(f"divergence must be a multiple above 1 (inf never stops), given {self.divergence!r}")
        if problems:
            raise ValueError("the reconstruction cannot be used:\n  " + "\n  ".join(problems))

    def rates(self, steps: int) -> Float[np.ndarray, "steps"]:
        """The learning rate of each of `steps` steps in all; the schedule is taken at the middle of each step."""
        time = (np.arange(steps) + 0.5) / steps
        rise = time / self.warmup if self.warmup else np.ones(steps)
        fall = 0.5 + 0.5 * np.cos(np.pi * np.clip((time - self.warmup) / (1 - self.warmup), 0, 1))
        return (self.learning_rate * np.minimum(rise, 1) * fall).astype(np.float32)


class TrainState(NamedTuple):
    """What a step changes: the trained parameters and Adam's moments of them."""

    params: Any
    moments: Any


class Fixed(NamedTuple):
    """What a step does not change: the block's structure, the parameters that are not trained, the entries kept."""

    graph: Any
    frozen: Any
    kept: Any


# Adam's eps is far below the gradient of a kept weight (about 1e-6), yet an input that never fires stays at rest.
_adam = optax.scale_by_adam(b1=0.9, b2=0.99, eps=1e-10)


def stream_loss(output: Float[Array, "B T D"], target: Float[Array, "B T D"]) -> Float[Array, ""]:
    """Mean over tokens of the squared error, relative to the target's own square; zero targets count nothing."""
    error = jnp.sum((output - target) ** 2, axis=-1)
    size = jnp.sum(target**2, axis=-1)
    # `size == 0` and not `size > 0`, which would drop a token whose target is NaN without a word.
    return jnp.mean(jnp.where(size == 0, 0, error / jnp.where(size == 0, 1, size)))


def _loss(params: Any, fixed: Fixed, x: Array, target: Array) -> Array:
    return stream_loss(nnx.merge(fixed.graph, params, *fixed.frozen)(x), target)


def _train_step(
    state: TrainState,
    fixed: Fixed,
    inputs: Float[Array, "B T D"],
    targets: Float[Array, "B T D"],
    rows: Int[Array, "windows"],
    rate: Float[Array, ""],
    clip: Float[Array, ""],
) -> tuple[TrainState, Array, Array]:
    """One update from some windows of a batch; returns the state, the loss before it and the gradient's norm."""
    x, target = jnp.take(inputs, rows, axis=0), jnp.take(targets, rows, axis=0)
    loss, gradient = jax.value_and_grad(_loss)(state.params, fixed, x, target)
    gradient = jax.tree.map(lambda kept, g: jnp.where(kept, g, 0), fixed.kept, gradient)
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradient)))
    gradient = jax.tree.map(lambda g: g * (clip / jnp.maximum(norm, clip)), gradient)
    updates, moments = _adam.update(gradient, state.moments)
    # Masked again: not even a non-finite gradient, whose state is discarded, may fill a pruned entry.
    params = jax.tree.map(lambda kept, p, u: jnp.where(kept, p - rate * u, 0), fixed.kept, state.params, updates)
    return TrainState(params, moments), loss, norm


_Order = list[tuple[int, np.ndarray]]

_step_of_rows = Compiled(_train_step, donate_argnums=(0,))
_loss_of_batch = Compiled(_loss)


class _Trainer:
    def __init__(
        self, block: Block, masks: Mapping[str, Array], stream: Stream, targets: Stream, settings: Reconstruction
    ) -> None:
        pruned = {stacked_name(name)[0] for name in masks}

        def trained(path: tuple[Any, ...], _: Any) -> bool:
            owner = ".".join(map(str, path[:-1]))
            return owner in pruned or (settings.train_norms and owner.endswith("norm"))

        graph, start, *frozen = nnx.split(block, trained, ...)
        kept = jax.tree.map(lambda parameter: jnp.ones(parameter.shape, bool), start)
        for name, mask in masks.items():
            stacked, expert = stacked_name(name)
            leaf = kept
            for part in (*stacked.split("."), "weight"):
                leaf = leaf[part]
            leaf[...] = jnp.asarray(mask) if expert is None else leaf[...].at[expert].set(jnp.asarray(mask))
        self.fixed = Fixed(graph, frozen, kept)
        # A copy: the step program takes over its state's buffers, and the start's belong to the block.
        params = jax.tree.map(jnp.copy, start)
        self.state = TrainState(params, _adam.init(params))
        self.settings = settings
        self.calibration = (stream.calibration, targets.calibration)
        # Their loss chooses the best state.
        self.judges = (stream.heldout, targets.heldout) if stream.heldout else self.calibration
        self.seconds = self.compile_seconds = 0.0
        self.epochs = self.steps = self.best_epoch = 0
        # The best judging loss, and the parameters then; None for the start's.
        self.best, self.params = math.inf, None

    def loss(self, inputs: Batches, targets: Batches) -> float:
        pairs = zip(inputs, targets, strict=True)
        losses = [self._account(_loss_of_batch(self.state.params, self.fixed, x, target)) for x, target in pairs]
        return float(np.mean([float(loss) for loss in losses]))

    def epoch(self, order: _Order, rates: np.ndarray) -> bool:
        """A step for each entry of the order and rate; False after the first loss or gradient that is not finite."""
        (inputs, targets), clip = self.calibration, np.float32(self.settings.clip)
        for (index, rows), rate in zip(order, rates, strict=True):
            arguments = (self.state, self.fixed, inputs[index], targets[index], rows, rate, clip)
            self.state, loss, norm = self._account(_step_of_rows(*arguments))
            self.steps += 1
            if not (np.isfinite(loss) and np.isfinite(norm)):
                return False
        self.epochs += 1
        return True

    def run(self, first: float) -> TrainingStatus:
        settings, rng = self.settings, np.random.default_rng(self.settings.seed)
        orders = [_draw_order(self.calibration[0], settings.windows, rng) for _ in range(settings.epochs)]
        rates = settings.rates(sum(map(len, orders))).reshape(settings.epochs, -1)
        for order, epoch_rates in zip(orders, rates, strict=True):
            if not self.epoch(order, epoch_rates):
                return TrainingStatus.NONFINITE
            # A parameter that is not finite makes outputs NaN, so a finite loss vouches for them all.
            judged = self.loss(*self.judges)
            if judged < self.best:
                self.best, self.best_epoch = judged, self.epochs
                self.params = jax.tree.map(jnp.copy, self.state.params)
            if not math.isfinite(judged):
                return TrainingStatus.NONFINITE
            if judged > settings.divergence * first:
                return TrainingStatus.DIVERGED
            if self.epochs - self.best_epoch >= settings.patience and self.epochs < settings.epochs:
                return TrainingStatus.STOPPED
        return TrainingStatus.FINISHED

    def _account(self, timed: Timed) -> Any:
        self.seconds += timed.seconds
        self.compile_seconds += timed.compile_seconds
        return timed.value


def reconstruct_block(
    block: Block,
    masks: Mapping[str, Bool[Array, "out in"]],
    stream: Stream,
    targets: Stream,
    settings: Reconstruction | None = None,
    index: int = 0,
) -> BlockRecord:
    """Train the kept weights of a pruned block, in place.

    Args:
        block: the pruned block; it is left in the best state seen.
        masks: True for kept entries, by the linear's name; the biases of these linears are trained too, other
            linears stay unchanged.
        stream: before the block, in equal batches as `make_batches` gives.
        targets: what the dense block gave for the same tokens.
        settings: default: `Reconstruction()`.
        index: the number of the block in the record.

    Raises:
        ValueError: before any work, for settings, masks or batches that cannot be used.
    """
    settings = settings or Reconstruction()
    settings.check()
    _check_masks(block, masks)
    _check_paired(stream.calibration, targets.calibration, "calibration")
    _check_paired(stream.heldout, targets.heldout, "held-out")
    if not stream.calibration:
        raise ValueError("no calibration batches to train on; give at least one")
    heldout = bool(stream.heldout)

    trainer = _Trainer(block, masks, stream, targets, settings)
    trainer.best = first = trainer.loss(*trainer.judges)
    first_loss = last_loss = trainer.loss(*trainer.calibration) if heldout else first
    if not (math.isfinite(first) and math.isfinite(first_loss)):
        status = TrainingStatus.NONFINITE
    elif first <= ROUNDING:
        status = TrainingStatus.EXACT
    else:
        status = trainer.run(first)
    if trainer.params is not None:
        nnx.update(block, trainer.params)
        trainer.state = trainer.state._replace(params=trainer.params)
        last_loss = trainer.loss(*trainer.calibration) if heldout else trainer.best
    return BlockRecord(
        block=index,
        first_loss=first_loss,
        last_loss=last_loss,
        heldout_first=first if heldout else None,
        heldout_best=trainer.best if heldout else None,
        epochs=trainer.epochs,
        status=status.name,
        seconds=trainer.seconds,
        compile_seconds=trainer.compile_seconds,
        best_epoch=trainer.best_epoch,
        steps=trainer.steps,
    )


def _draw_order(batches: Batches, windows: int, rng: np.random.Generator) -> _Order:
    """An epoch in random order: a batch's index and the rows to take of it, every row of every batch once."""
    size = batches.shapes[0][0]
    width = next(w for w in range(min(windows, size), 0, -1) if size % w == 0)
    parts = [
        (index, rows)
        for index in range(len(batches))
        for rows in rng.permutation(size).astype(np.int32).reshape(-1, width)
    ]
    return [parts[place] for place in rng.permutation(len(parts))]


def _check_masks(block: Block, masks: Mapping[str, Array]) -> None:
    unknown = [name for name in masks if name not in block.linears]
    if unknown or not masks:
        raise ValueError(
            f"masks must name linears of the block ({', '.join(block.linears)}), given "
            f"{', '.join(unknown) if unknown else 'none'}"
        )
    stacked = {stacked_name(name)[0] for name in masks if ".experts." in name}
    missing = [name for name in block.linears if stacked_name(name)[0] in stacked and name not in masks]
    if missing:
        raise ValueError(f"experts are trained together: masks lack {', '.join(missing)}; give all or none")
    for name, mask in masks.items():
        weight = block.read(f"{name}.weight")
        if mask.shape != weight.shape or mask.dtype != bool:
            raise ValueError(
                f"the mask of {name} must be bool of shape {list(weight.shape)}, True for kept weights; given "
                f"{mask.dtype} of shape {list(mask.shape)}"
            )
        stray = int(jnp.sum((weight != 0) & ~mask))
        if stray:
            raise ValueError(
                f"{name} has {stray:,} non-zero weights off its mask; prune the block before, as in "
                "`jnp.where(mask, weight, 0)`"
            )


def _check_paired(inputs: Batches, targets: Batches, tokens: str) -> None:
    given, wanted = inputs.shapes, targets.shapes
    if given != wanted or any(shape != given[0] for shape in given):
        raise ValueError(
            f"{tokens} inputs and targets must be as many batches, all of one shape, as `make_batches` gives; given "
            f"inputs {given} and targets {wanted}"
        )

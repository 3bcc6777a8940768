"""Training on stored activations: settings, one Adam update, the loop over epochs and the choice of the state.

The trainers define what is minimised and what a step does: `reconstruction` for one block or one part of a module,
`distillation` for a whole model. The optimiser is Adam (Kingma and Ba, 2015) with clipped gradient norm, linear warm-up
and cosine decay to zero. A step is relative to the root mean square of its tensor (Shazeer and Stern, "Adafactor",
2018, section 8): layers have 0.2 in SmolLM2 and 0.04 in Gemma 3, whose norm weights reach 340. Of the start and the
states after each epoch, the one with the smallest judging loss is kept: the loss on held-out tokens or, without any, on
calibration tokens. So it is never worse there than the start.
"""

import enum
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sparseopt.layers.compiled import Stopwatch
from sparseopt.models import Block
from sparseopt.models.decoder.experts import stacked_name
from sparseopt.pruning.base.activations import Stream

# True for the entries that are trained, by layer name.
Masks = Mapping[str, Bool[Array, "out in"]]


class TrainingStatus(enum.Enum):
    """How a training ended; the value is one sentence for readers. The best state was kept in every case."""

    FINISHED = "all epochs were run"
    STOPPED = "the judging loss no longer fell"
    EXACT = "the dense answer was given before any training"
    DIVERGED = "the judging loss rose far above the start's: use a smaller learning rate"
    NONFINITE = (
        "a loss or gradient became infinite or NaN: use a smaller learning rate, or check the activations "
        "for non-finite or huge values"
    )


@dataclass(frozen=True)
class Training:
    """Settings of a training.

    Attributes:
        epochs: largest number of passes over the calibration windows.
        learning_rate: Adam's largest step; a weight moves by about this fraction of the root mean square of its tensor.
        warmup: fraction of all steps in which the rate rises linearly; then it falls to zero like a cosine.
        windows: most windows of tokens per step; the largest divisor of a batch's windows up to this is used.
        clip: largest norm of a block's gradient. Adam ignores a common factor, so a low value does no harm, and no
            window counts more than the others.
        patience: epochs without a better judging loss before training stops.
        divergence: training stops if the judging loss after an epoch is above this multiple of the start's.
        seed: seed of the order in which windows are drawn.
    """

    epochs: int
    learning_rate: float
    clip: float
    warmup: float = 0.1
    windows: int = 1
    patience: int = 3
    divergence: float = 2.0
    seed: int = 0

    what: ClassVar[str]  # the kind of training, as errors call it

    def check(self) -> None:
        """Raise a `ValueError` that lists everything that is wrong, one line each."""
        problems = [
            f"{name} must be a whole number of {least} or more, given {value!r}"
            for name, least in (("epochs", 1), ("windows", 1), ("patience", 1), ("seed", 0))
            if not isinstance(value := getattr(self, name), int) or value < least
        ]
        for name in ("learning_rate", "clip"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                problems.append(f"{name} must be positive and finite, given {value!r}")
        if not 0 <= self.warmup < 1:
            problems.append(f"warmup must be a fraction of the steps in [0, 1), given {self.warmup!r}")
        if not self.divergence > 1:
            problems.append(f"divergence must be a multiple above 1 (inf never stops), given {self.divergence!r}")
        if problems:
            raise ValueError(f"the {self.what} cannot be used:\n  " + "\n  ".join(problems))

    def rates(self, steps: int) -> Float[np.ndarray, "steps"]:
        """The learning rates of `steps` steps; the schedule is evaluated at the middle of each step."""
        time = (np.arange(steps) + 0.5) / steps
        rise = time / self.warmup if self.warmup else np.ones(steps)
        fall = 0.5 + 0.5 * np.cos(np.pi * np.clip((time - self.warmup) / (1 - self.warmup), 0, 1))
        return (self.learning_rate * np.minimum(rise, 1) * fall).astype(np.float32)


# Lower bound of what a step is relative to, so that a zero bias is trained too.
LEAST_SIZE = 1e-3


class TrainState(NamedTuple):
    """What a step changes: the trained parameters of a block and their Adam moments."""

    params: Any
    moments: Any


class TrainedEntries(NamedTuple):
    """The trained entries of a parameter: the mask, of its shape or one True for all, and their number.

    The number is at least one, since it is a divisor.
    """

    mask: Array
    number: Array


class Fixed(NamedTuple):
    """What a step does not change.

    Attributes:
        graph: a block's structure.
        frozen: the parameters that are not trained.
        kept: for each leaf of the others, see `kept_entries`.
        multiples: for each leaf, the multiples of a weight `[..., out, in]` on a grid, whose scales
            `[..., out, groups]` are trained; None for others, and without grids.
    """

    graph: Any
    frozen: Any
    kept: list[TrainedEntries]
    multiples: list[Array | None] | None = None

    def weights(self, params: Any) -> Any:
        """The parameters with weights instead of scales."""
        if self.multiples is None:
            return params
        leaves, tree = jax.tree.flatten(params)
        pairs = zip(leaves, self.multiples, strict=True)
        return jax.tree.unflatten(tree, [leaf if each is None else scaled(each, leaf) for leaf, each in pairs])

    def module(self, params: Any) -> Block:
        return nnx.merge(self.graph, self.weights(params), *self.frozen)

    def output(self, params: Any, x: Array) -> Array:
        return self.module(params)(x)

    def store(self, block: Block, params: Any) -> None:
        """Set the trained parameters of the block."""
        nnx.update(block, self.weights(params))


def scaled(multiples: Float[Array, "*n out in"], scales: Float[Array, "*n out groups"]) -> Float[Array, "*n out in"]:
    """The weights on a grid."""
    return (multiples.reshape(*scales.shape, -1) * scales[..., None]).reshape(multiples.shape)


# Adam's eps is far below the gradient of a kept weight (about 1e-6), but weights of an input that never fires stay.
_adam = optax.scale_by_adam(b1=0.9, b2=0.99, eps=1e-10)


def start_state(params: Any) -> TrainState:
    """The state before the first step, a copy: step programs take over its buffers, which must not be the block's."""
    params = jax.tree.map(jnp.copy, params)
    return TrainState(params, _adam.init(params))


def kept_entries(params: Any, masks: Masks) -> list[TrainedEntries]:
    """The trained entries for each leaf of `params`: all entries of a leaf without a mask.

    The bias of a layer with an all-False mask is not trained either.
    """
    parts: dict[str, dict[int | None, Array]] = {}
    for name, mask in masks.items():
        stacked, expert = stacked_name(name)
        parts.setdefault(f"{stacked}.weight", {})[expert] = jnp.asarray(mask)
    found = {
        name: by_expert[None] if None in by_expert else jnp.stack([by_expert[i] for i in range(len(by_expert))])
        for name, by_expert in parts.items()
    }
    found |= {f"{name.removesuffix('.weight')}.bias": jnp.any(mask) for name, mask in found.items()}
    return [entries_of(param, found.get(".".join(map(str, path)))) for path, param in nnx.to_flat_state(params)]


def entries_of(param: Any, mask: Array | None) -> TrainedEntries:
    """The trained entries of a parameter with this mask; all without one."""
    mask = jnp.asarray(True) if mask is None else mask
    return TrainedEntries(mask, jnp.maximum(jnp.sum(jnp.broadcast_to(mask, param.shape)), 1))


def updated(
    state: TrainState, gradient: Any, kept: list[TrainedEntries], rate: Float[Array, ""], clip: Float[Array, ""]
) -> tuple[TrainState, Float[Array, ""]]:
    """Do one step of Adam; also return the gradient's norm before clipping."""
    kept = jax.tree.unflatten(jax.tree.structure(gradient), kept)
    gradient = jax.tree.map(lambda g, kept: jnp.where(kept.mask, g, 0), gradient, kept)
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradient)))
    gradient = jax.tree.map(lambda g: g * (clip / jnp.maximum(norm, clip)), gradient)
    updates, moments = _adam.update(gradient, state.moments)

    def moved(p: Array, u: Array, kept: TrainedEntries) -> Array:
        size = jnp.maximum(jnp.sqrt(jnp.sum(jnp.where(kept.mask, p * p, 0)) / kept.number), LEAST_SIZE)
        # Masked again: not even a non-finite gradient, whose state is discarded, may change an entry that is not
        # trained.
        return jnp.where(kept.mask, p - rate * size * u, p)

    return TrainState(jax.tree.map(moved, state.params, updates, kept), moments), norm


class Data(NamedTuple):
    """What a training uses: pairs of inputs and targets, each by batch.

    Attributes:
        calibration: the pairs that steps draw from.
        judges: the pairs whose loss chooses the best state; the same if there are no held-out ones.
        windows: number of windows of a batch; None if a step takes a batch whole.
    """

    calibration: tuple[Any, Any]
    judges: tuple[Any, Any]
    windows: int | None = None


class Trainer(ABC):
    """Trains parameters: the loop over the epochs, and the choice of the best state.

    Attributes:
        exact: with a judging loss up to this, there is nothing to train.
        fixed: what no step changes, for each block.
        states: what a step changes, for each block.
        kept: the best states so far, for each block; empty until one is better than the start.
        best_epoch: the epoch that ended with the best state, 0 for the start.
        total: number of steps in all epochs.
    """

    exact: ClassVar[float]

    def __init__(
        self, fixed: Sequence[Any], params: Sequence[Any], store: Callable[[int, Any], None], data: Data,
        settings: Training,
    ) -> None:  # fmt: skip
        """Set up with a function that puts the best parameters of a block, by its index, where they belong."""
        settings.check()
        self.fixed, self.data, self.settings = fixed, data, settings
        self.epochs = self.steps = self.best_epoch = self.total = 0
        self.best, self.store = math.inf, store
        self.states = [start_state(each) for each in params]
        self.kept: list[Any] = []

    @abstractmethod
    def step(self, index: int, rows: Int[np.ndarray, "windows"], rate: np.float32) -> tuple[Array, Array]:
        """Update the states from some windows of a batch; return the loss before it and the gradient's norm."""

    @abstractmethod
    def loss(self, inputs: Any, targets: Any) -> float:
        """The mean loss of the states."""

    def keep(self) -> None:
        """Keep the states as the best."""
        for i, state in enumerate(self.states):
            # A copy, since step programs take over the buffers of a state. It replaces the block's last one at once.
            self.kept[i : i + 1] = [jax.tree.map(jnp.copy, state.params)]
            self.store(i, self.kept[i])

    def restore(self) -> None:
        """Return to the best states; no step follows."""
        self.states = [state._replace(params=params) for state, params in zip(self.states, self.kept, strict=True)]

    def train(self) -> dict[str, Any]:
        """Train to the end and leave the best state; returns the fields of a `TrainingRecord`."""
        watch, (calibration, judges, _) = Stopwatch(), self.data
        heldout = judges is not calibration
        self.best = first = self.loss(*judges)
        first_loss = last_loss = self.loss(*calibration) if heldout else first
        if not (math.isfinite(first) and math.isfinite(first_loss)):
            status = TrainingStatus.NONFINITE
        elif first <= self.exact:
            status = TrainingStatus.EXACT
        else:
            status = self._run(first)
        if self.best_epoch:
            self.restore()
            last_loss = self.loss(*calibration) if heldout else self.best
        seconds, compiling = watch.read()
        return {
            "first_loss": first_loss,
            "last_loss": last_loss,
            "heldout_first": first if heldout else None,
            "heldout_best": self.best if heldout else None,
            "epochs": self.epochs,
            "status": status.name,
            "seconds": seconds,
            "compile_seconds": compiling,
            "best_epoch": self.best_epoch,
            "steps": self.steps,
        }

    def _run(self, first: float) -> TrainingStatus:
        settings = self.settings
        orders = draw_orders(len(self.data.calibration[0]), self.data.windows or 1, settings)
        self.total = sum(map(len, orders))
        rates = settings.rates(self.total).reshape(settings.epochs, -1)
        for order, epoch_rates in zip(orders, rates, strict=True):
            for (index, rows), rate in zip(order, epoch_rates, strict=True):
                loss, norm = self.step(index, rows, rate)
                self.steps += 1
                if not (np.isfinite(loss) and np.isfinite(norm)):
                    return TrainingStatus.NONFINITE
            self.epochs += 1
            # A non-finite parameter makes outputs NaN, so a finite loss means that all are finite.
            judged = self.loss(*self.data.judges)
            if judged < self.best:
                self.best, self.best_epoch = judged, self.epochs
                self.keep()
            if not math.isfinite(judged):
                return TrainingStatus.NONFINITE
            if judged > settings.divergence * first:
                return TrainingStatus.DIVERGED
            if self.epochs - self.best_epoch >= settings.patience and self.epochs < settings.epochs:
                return TrainingStatus.STOPPED
        return TrainingStatus.FINISHED


def paired(inputs: Stream, targets: Stream) -> Data:
    """The batches of two streams, all of one shape."""
    calibration = (inputs.calibration, targets.calibration)
    judges = (inputs.heldout, targets.heldout) if inputs.heldout else calibration
    return Data(calibration, judges, inputs.calibration.shapes[0][0])


def draw_orders(batches: int, size: int, settings: Training) -> list[list[tuple[int, np.ndarray]]]:
    """The steps of each epoch for batches of `size` rows: a batch's index and its rows to use, in random order."""
    rng = np.random.default_rng(settings.seed)
    width = next(w for w in range(min(settings.windows, size), 0, -1) if size % w == 0)
    orders = []
    for _ in range(settings.epochs):
        parts = [
            (index, rows)
            for index in range(batches)
            for rows in rng.permutation(size).astype(np.int32).reshape(-1, width)
        ]
        orders.append([parts[place] for place in rng.permutation(len(parts))])
    return orders

"""The two kinds of training on a tiny model: of its first block alone, and of all its blocks together."""

import math
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseopt.pruning.base.activations import Batches, Stream
from sparseopt.pruning.train.distillation import Distillation, distil
from sparseopt.pruning.train.reconstruction import Reconstruction, channel_weights, reconstruct_block, stream_loss
from tests.jitted import run
from tests.models.tiny import VOCAB

WINDOWS, HELDOUT, TIME = 8, 4, 24


def through(blocks, x):
    for block in blocks:
        x = run(block, x)
    return x


def parameters(blocks):
    flat = [nnx.to_flat_state(nnx.state(block)) for block in blocks]
    return {f"{i}.{'.'.join(path)}": np.array(value) for i, state in enumerate(flat) for path, value in state}


def assert_same_bits(before, after):
    for name, value in before.items():
        assert value.tobytes() == after[name].tobytes(), name


def told_nothing(*_):
    pass


class OfBlock:
    """The first block, trained alone."""

    exact, numbers = 1e-12, (0,)
    # Whole batches a step: the forward programs of training and judging are then the same.
    quick = Reconstruction(epochs=6, learning_rate=3e-2, patience=6)
    falls = (0.5, 0.8)
    # A warm-up over nearly all steps: the first epochs are calm, then the rate becomes far too large.
    wild = Reconstruction(epochs=20, learning_rate=1.0, warmup=0.99, patience=20, divergence=1.5)
    long = Reconstruction(epochs=200, patience=200, divergence=math.inf)

    def __init__(self, model):
        self.model = model
        tokens = np.random.default_rng(4).integers(0, len(VOCAB), (WINDOWS + HELDOUT, TIME))
        # Some tokens are far larger than the others, as in real models.
        x = model.embedding()(jnp.asarray(tokens)).at[:, 0].multiply(self.large)
        before = [x[start : start + HELDOUT] for start in range(0, len(x), HELDOUT)]
        after = [through(self.dense(), part) for part in before]
        self.streams = tuple(Stream(Batches(each[:-1]), Batches(each[-1:])) for each in (before, after))

    large = 100

    def dense(self):
        return [self.model.block(index) for index in self.numbers]

    def pruned(self):
        """The blocks with the larger half of every linear, and the masks of what is kept."""
        blocks, masks = self.dense(), []
        for block in blocks:
            weights = {name: block.read(f"{name}.weight") for name in block.linears}
            masks.append({name: jnp.abs(weight) > jnp.median(jnp.abs(weight)) for name, weight in weights.items()})
            block.write({f"{name}.weight": jnp.where(masks[-1][name], weights[name], 0) for name in weights})
        return blocks, masks

    def train(self, blocks, masks, settings=None, streams=None, told=told_nothing):
        return reconstruct_block(blocks[0], masks[0], *(streams or self.streams), settings or self.quick)

    def without_masks(self, blocks):
        return [{name: jnp.ones(block.weight_shape(name), bool) for name in block.linears} for block in blocks]

    def loss(self, blocks, x, dense):
        return float(stream_loss(through(blocks, x), dense, channel_weights(self.streams[1].calibration)))


class OfModel(OfBlock):
    """All blocks, trained together on the logits."""

    exact, numbers, large = 1e-6, (0, 1, 2), 1
    quick = Distillation(epochs=12, learning_rate=2e-2, windows=4, patience=12)
    falls = (0.5, 0.9)
    wild = replace(quick, epochs=30, learning_rate=1.0, warmup=0.99, patience=30, divergence=1.2)

    def train(self, blocks, masks, settings=None, streams=None, told=told_nothing):
        return distil(blocks, self.model.head(), *(streams or self.streams), settings or self.quick, told, masks)

    def without_masks(self, blocks):
        return None

    def loss(self, blocks, x, dense):
        """The divergence in float64, from the definition."""
        head = self.model.head()
        p, q = (np.asarray(head(rows), np.float64) for rows in (dense, through(blocks, x)))
        p, q = (np.exp(z - z.max(-1, keepdims=True)) for z in (p, q))
        p, q = (z / z.sum(-1, keepdims=True) for z in (p, q))
        return float(np.mean(np.sum(p * np.log(p / q), axis=-1)))

"""Models to measure against: the tokens that one predicts, and one without some of its blocks."""

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.models import load_decoder


def predicted(folder, ids, start=0):
    """Each token after `start` is the model's likeliest next one: it predicts them worse when something goes."""
    decoder, ids = load_decoder(folder), ids.astype(np.int32)
    step = jax.jit(lambda decoder, ids: jnp.argmax(decoder(ids), axis=-1))
    for time in range(start, ids.shape[1] - 1):
        ids[:, time + 1] = step(decoder, ids)[:, time]
    return ids


def without(tensors, blocks, gone):
    """The tensors of a model of so many blocks without some of them; the others are numbered anew."""
    found = {name: value for name, value in tensors.items() if ".layers." not in name}
    for new, old in enumerate(block for block in range(blocks) if block not in gone):
        start = f"model.layers.{old}."
        found |= {name.replace(start, f"model.layers.{new}."): v for name, v in tensors.items() if start in name}
    return found

"""Variants of the calibration windows, in which the dense model has resampled some of the tokens.

    token_t  ~  p( . | the tokens before t in the window)        for a random fraction of the positions t

Weights fitted to few tokens generalise badly, and users often have few. The dense model is the target anyway, so
windows that it draws itself can be added.

All positions are drawn at once, so a round is one forward pass. The next round draws them again with the same noise,
from the windows of the round before: a position is right once the positions before it no longer change (Jacobi
iteration, as in Song, Meng, Liao, Ermon, "Accelerating feedforward computation via parallel nonlinear equation
solving", 2021).

Source: Kobayashi, "Contextual augmentation", 2018; pruning with text that the model draws, as in Williams,
Chrysostomou, Aletras, "Self-calibration for language model quantization and pruning", 2025.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparseopt.core.base.types import Observer
from sparseopt.layers.compiled import Compiled
from sparseopt.layers.side_by_side import agreed
from sparseopt.models import StreamedModel
from sparseopt.pruning.base.activations import Batches, embed_windows
from sparseopt.pruning.base.grams import BlockRunner
from sparseopt.pruning.evaluate.perplexity import LOGIT_ROWS
from sparseopt.pruning.run.calibration import CalibrationWindows

# The fraction of positions that are drawn again, and the rounds. Perplexity of SmolLM2-135M at 2:4 with SparseGPT, 16 ×
# 512 tokens, three variants of each window: 121.2 without them, 110.2 with 0.15 in one round, 106.6 with 0.3 in two,
# 114.8 with 0.6 in three; 104.8 with 64 windows of text.
SHARE, ROUNDS = 0.3, 2
# Most bytes of the logits of a slice. Drawing needs four times as much; with the 262,144 tokens of Gemma 3, 256 rows at
# a time needed 2.6 GB more in the same time.
LOGIT_BYTES = 2**26


def with_variants(
    model: StreamedModel,
    windows: CalibrationWindows,
    count: int,
    kind: Batches,
    runner: BlockRunner,
    observer: Observer,
) -> CalibrationWindows:
    """The windows, with `count` variants of each after the calibration windows; held-out windows stay.

    Args:
        model: the dense model.
        windows: windows of token ids.
        count: 0 or more.
        kind: batches that say where activations are stored.
        runner: runs the blocks.
        observer: called with ("variants, block", blocks done, blocks of all rounds).
    """
    if not count:
        return windows
    tokens = np.tile(windows.calibration, (count, 1))
    number, length = tokens.shape
    rng, size = np.random.default_rng(0), max(1, round(SHARE * (length - 1)))
    # Nothing precedes the first position.
    places = np.sort(rng.permuted(np.tile(np.arange(1, length), (number, 1)), axis=1)[:, :size], axis=1)
    keys, head = jax.random.split(jax.random.key(0), (number, size)), model.head()
    for step in range(ROUNDS):
        [stream] = embed_windows(model, kind, tokens)
        for index in range(model.num_blocks):
            stream = runner.forward(model.block(index), stream)
            observer("variants, block", step * model.num_blocks + index + 1, ROUNDS * model.num_blocks)
        drawn, start = [], 0
        for x in stream.on_one_device():
            own = slice(start, start := start + len(x))
            rows = jnp.take_along_axis(x, jnp.asarray(places[own, :, None] - 1), axis=1)
            arguments = (rows.reshape(-1, x.shape[-1]), keys[own].reshape(-1), model.config.vocab_size)
            drawn.append(_drawn(head, *arguments))
        np.put_along_axis(tokens, places, agreed(np.concatenate(drawn)).reshape(places.shape), axis=1)
    return windows._replace(calibration=np.concatenate([windows.calibration, tokens]))


def draw(head: Any, x_RD: Float[Array, "R D"], key_R: Array) -> Int[Array, "R"]:
    """Draw a token for each row of last activations, with the Gumbel-max trick."""
    logits_RV = head(x_RD[None])[0]
    return jnp.argmax(logits_RV + jax.vmap(lambda key: jax.random.gumbel(key, logits_RV.shape[1:]))(key_R), axis=-1)


_draw = Compiled(draw)


def _drawn(head: Any, x_RD: Array, key_R: Array, vocabulary: int) -> np.ndarray:
    """`draw` for slices of rows, whose logits fit in memory; compiled."""
    found, size = [], min(LOGIT_ROWS, max(1, LOGIT_BYTES // (4 * vocabulary)))
    for start in range(0, len(x_RD), size):
        own = slice(start, start + size)
        found.append(np.asarray(_draw(head, x_RD[own], key_R[own])))
    return np.concatenate(found)

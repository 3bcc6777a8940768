"""The token-level perplexity of a model.

    perplexity = exp( - sum log p(token_t | tokens before it in its window) / number of predicted tokens )

over non-overlapping windows; a window of n tokens predicts n - 1, or n - 2 if it begins with BOS (see `windows`).
The model is streamed block by block over as many windows as fit in `PASS_BYTES`, then again over the next ones; a model
of an unknown family is loaded whole.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparseopt.core.base.types import Observer
from sparseopt.layers.compiled import Compiled
from sparseopt.models import Decoder, Head, LoadedModel, ModelSource, check_window, open_any
from sparseopt.pruning.base.activations import PASS_BYTES, windows_per_batch
from sparseopt.pruning.base.grams import BlockRunner
from sparseopt.pruning.text.windows import begin_windows, check_vocabulary, token_array
from sparseopt.system.machine import freed_memory_kept, return_freed_memory

# Tokens whose logits are in memory at a time: 256 rows of a vocabulary of 50,000 are 50 MB.
LOGIT_ROWS = 256


def log_probabilities(logits_RV: Float[Array, "R V"], target_R: Int[Array, "R"]) -> Float[Array, "R"]:
    """`log softmax(logits)` at each row's target."""
    chosen_R = jnp.take_along_axis(logits_RV, target_R[:, None], axis=-1)[:, 0]
    return chosen_R - jax.nn.logsumexp(logits_RV, axis=-1)


def negative_log_likelihood(
    head: Head, x_TD: Float[Array, "T D"], tokens_T: Int[Array, "T"], skipped: Int[Array, ""] | int = 0
) -> Float[Array, ""]:
    """`- sum_t log p(tokens[t + 1])` of a window from its last activations, without the first `skipped` predictions."""
    rows = min(LOGIT_ROWS, x_TD.shape[0])
    padding = -x_TD.shape[0] % rows
    targets = jnp.pad(tokens_T[1:], (0, 1 + padding))
    time_T = jnp.arange(x_TD.shape[0] + padding)
    counts = (skipped <= time_T) & (time_T < x_TD.shape[0] - 1)
    x = jnp.pad(x_TD, ((0, padding), (0, 0)))

    # Rematerialised, so that a gradient too holds the logits of one slice only.
    @jax.checkpoint
    def slice_loss(piece: tuple[Array, Array, Array]) -> Array:
        x_RD, target_R, counted_R = piece
        return -jnp.sum(jnp.where(counted_R, log_probabilities(head(x_RD[None])[0], target_R), 0))

    pieces = (x.reshape(-1, rows, x.shape[-1]), targets.reshape(-1, rows), counts.reshape(-1, rows))
    return jnp.sum(jax.lax.map(slice_loss, pieces))


def perplexity(
    model: ModelSource,
    token_ids: Any,
    seqlen: int = 1024,
    *,
    bos: int | None = None,
    observer: Observer | None = None,
) -> float:
    """Perplexity of a model on token ids in non-overlapping windows.

    Args:
        model: a model folder, a GGUF file, a name on the hub, an opened model, or one in memory: a transformers model
            in torch, or a `Decoder`.
        token_ids: integer ids, `[n]` (split into windows from the start; the rest is dropped) or `[windows, seqlen]`.
        seqlen: tokens per window when `token_ids` is flat.
        bos: the id of a token to put first in every window, whose last token is then dropped. The token after it is not
            counted. `models.start_token` returns the id for a model. None for none.
        observer: called with ("block", blocks done, blocks in all).

    Raises:
        ValueError: if ids are outside the vocabulary, if there are fewer tokens than one window, or if windows predict
            nothing or are longer than the model supports.
    """
    return float(np.exp(window_losses(model, token_ids, seqlen, bos=bos, observer=observer).mean()))


@freed_memory_kept()
def window_losses(
    model: ModelSource,
    token_ids: Any,
    seqlen: int = 1024,
    *,
    bos: int | None = None,
    observer: Observer | None = None,
) -> Float[np.ndarray, "windows"]:
    """The mean negative log-likelihood of the predictions of each window, in nats; arguments as for `perplexity`."""
    opened: Any = _InMemory(model) if isinstance(model, Decoder) else open_any(model)
    ids = token_array(token_ids)
    if not np.issubdtype(ids.dtype, np.integer) or ids.ndim not in (1, 2):
        raise ValueError(f"token_ids must be integers [n] or [windows, seqlen], given {ids.dtype} {list(ids.shape)}")
    if ids.ndim == 1:
        if seqlen < 2:
            raise ValueError(f"a window needs 2 tokens or more to predict one, given seqlen {seqlen}")
        if len(ids) < seqlen:
            raise ValueError(f"{len(ids)} tokens are fewer than one window of {seqlen}; give more or a shorter seqlen")
        ids = ids[: len(ids) // seqlen * seqlen].reshape(-1, seqlen)
    if not ids.shape[0] or ids.shape[1] < (2 if bos is None else 3):
        after = "" if bos is None else " after BOS"
        raise ValueError(f"windows of shape {list(ids.shape)} predict nothing{after}; give more or longer windows")
    ids = begin_windows(ids.astype(np.int64), bos)
    check_window(ids.shape[1], opened.config.max_positions)
    check_vocabulary(ids, opened.config.vocab_size)
    skipped, (count, length) = int(bos is not None), ids.shape

    if isinstance(opened, LoadedModel):
        losses = []
        for done, row in enumerate(ids, 1):
            losses.append(opened.loss(row, skipped))
            if observer:
                observer("window", done, count)
        return np.asarray(losses) / (length - 1 - skipped)
    batches = list(ids.astype(np.int32).reshape(-1, windows_per_batch(count, length), length))
    found = [
        window_loss(head, x, row, skipped)
        for batch, (head, x_BTD) in zip(batches, streamed(opened, batches, observer), strict=True)
        for x, row in zip(x_BTD, batch, strict=True)
    ]
    return np.asarray(found) / (length - 1 - skipped)


class _InMemory:
    """A whole decoder with the parts of an opened model."""

    def __init__(self, decoder: Decoder) -> None:
        self.config, self.num_blocks = decoder.embed_tokens.config, len(decoder.layers)
        self.block, self.head = decoder.layers.__getitem__, lambda: decoder.head
        self.embedding = lambda rows: lambda ids: decoder.embed_tokens(jnp.asarray(rows)[ids])


def streamed(
    model: Any, batches: Sequence[Int[np.ndarray, "B T"]], observer: Observer | None, what: str = "block"
) -> Iterator[tuple[Any, Float[Array, "B T D"]]]:
    """The head of a model, and the activations of each batch of token ids before it.

    The blocks run over as many batches as fit in `PASS_BYTES`, then again over the next ones.
    """
    passes: list[list[np.ndarray]] = [[]]
    held, runner = 0, BlockRunner()
    for batch in batches:
        size = 4 * batch.size * model.config.hidden_size
        if passes[-1] and held + size > PASS_BYTES:
            passes.append([])
            held = 0
        passes[-1].append(batch)
        held += size
    done = 0
    for part in passes:
        activations = embedded(model, part)
        for index in range(model.num_blocks):
            block = model.block(index)
            for i, x in enumerate(activations):
                activations[i] = runner.run(block, x)
            return_freed_memory()
            done += 1
            if observer:
                observer(what, done, len(passes) * model.num_blocks)
        head = model.head()
        yield from ((head, x) for x in activations)


_loss_of_window = Compiled(negative_log_likelihood)


def window_loss(head: Any, x_TD: Array, tokens_T: Int[np.ndarray, "T"], skipped: int) -> float:
    """`negative_log_likelihood` of a window, compiled."""
    return float(_loss_of_window(head, x_TD, tokens_T, skipped))


def embedded(model: Any, ids: Sequence[Int[np.ndarray, "B T"]]) -> list[Array]:
    """Token ids before the first block; as many rows of the embedding are read as there are tokens, at most."""
    used = np.unique(np.concatenate([batch.ravel() for batch in ids]))
    # Padded to a number of rows that depends on the shapes alone, so that other texts reuse the compiled programs.
    spare = np.setdiff1d(np.arange(model.config.vocab_size), used)[: sum(batch.size for batch in ids) - len(used)]
    rows = np.union1d(used, spare)
    embedding = model.embedding(rows)
    return [embedding(jnp.asarray(np.searchsorted(rows, batch), jnp.int32)) for batch in ids]

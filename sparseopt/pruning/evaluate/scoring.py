"""Log-likelihoods of continuations, many at a time, with the model streamed block by block.

    log p(continuation | context) = sum_t log softmax(logits)[token_t],  t over the continuation's tokens

The model reads `context + continuation[:-1]`, and equal inputs once, such as those of one-token answers to a question.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparseopt.core.base.types import Observer
from sparseopt.layers.compiled import Compiled
from sparseopt.models import Head, StreamedModel, check_window
from sparseopt.models.decoder.settings import DecoderConfig
from sparseopt.pruning.base.activations import BATCH_TOKENS
from sparseopt.pruning.evaluate.perplexity import LOGIT_ROWS, log_probabilities, streamed
from sparseopt.pruning.text.windows import check_vocabulary
from sparseopt.system.machine import freed_memory_kept

Ids = Sequence[int]

_SHORTEST = 16


class Score(NamedTuple):
    """The log-likelihood of a continuation, and whether each of its tokens is the most likely one."""

    log_likelihood: float
    greedy: bool


@freed_memory_kept()
def score_continuations(
    model: StreamedModel, pairs: Sequence[tuple[Ids, Ids]], *, observer: Observer | None = None
) -> list[Score]:
    """The scores of (context, continuation) pairs of token ids, in order; both need at least one token.

    The observer is called with ("log-likelihoods", blocks done, blocks in all).

    Raises:
        ValueError: if a context or continuation is empty, ids are outside the vocabulary, or there are more tokens than
            the model supports.
        RuntimeError: if a log-likelihood is not finite.
    """
    if not pairs:
        return []
    askers: dict[Ids, list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        if not len(context) or not len(continuation):
            raise ValueError(
                f"pair {index} has an empty context or an empty continuation: {len(context)} and {len(continuation)} "
                "tokens (a text without context is scored after the model's start token)"
            )
        askers.setdefault((*context, *continuation[:-1]), []).append(index)
    check_window(max(map(len, askers)), model.config.max_positions)
    check_vocabulary(np.concatenate([np.asarray((*c, *t)) for c, t in pairs]), model.config.vocab_size)
    batches, found = list(_batches(list(askers), model.config)), dict[int, Score]()
    streams = streamed(model, [tokens for tokens, _ in batches], observer, "log-likelihoods")
    for (_, inputs), (head, x_BTD) in zip(batches, streams, strict=True):
        x = np.asarray(x_BTD)
        asked = [(row, ids, index) for row, ids in enumerate(inputs) for index in askers[ids]]
        x_RD = np.concatenate([x[row, len(pairs[index][0]) - 1 : len(ids)] for row, ids, index in asked])
        ends = np.cumsum([len(pairs[index][1]) for *_, index in asked])[:-1]
        scores = _scored(head, x_RD, np.concatenate([pairs[index][1] for *_, index in asked]))
        for (*_, index), log_p, best in zip(asked, *(np.split(each, ends) for each in scores), strict=True):
            found[index] = Score(float(np.sum(log_p, dtype=np.float64)), bool(np.all(best)))
    bad = np.count_nonzero(~np.isfinite([score.log_likelihood for score in found.values()]))
    if bad:
        raise RuntimeError(
            f"{bad} of {len(pairs)} log-likelihoods are not finite: activations overflow in {model.source.path}; "
            "check the model with `sparseopt eval`"
        )
    return [found[index] for index in range(len(pairs))]


def padded_length(length: int) -> int:
    """The next multiple of a quarter of the power of two below: few lengths to compile, and little padding."""
    step = max(_SHORTEST, 2 ** ((length - 1).bit_length() - 3)) if length > 1 else _SHORTEST
    return -(-length // step) * step


def _batches(inputs: list[Ids], config: DecoderConfig) -> Iterator[tuple[Int[np.ndarray, "rows time"], list[Ids]]]:
    """Inputs as padded rows, the longest first; each length has one number of rows, but for the last batch.

    Padding leaves the rotary frequencies of an input as they are.
    """
    rotations, longest_first = functools.cache(config.rotations), sorted(inputs, key=len, reverse=True)
    for own, group in itertools.groupby(longest_first, key=lambda ids: rotations(len(ids))):
        left = list(group)
        while left:
            length = len(left[0])
            time = min(padded_length(length), config.max_positions or padded_length(length))
            tokens = np.zeros((min(max(1, BATCH_TOKENS // time), 2 ** (len(left) - 1).bit_length()), time), np.int32)
            if rotations(time) != own:
                tokens = tokens[:, :length]
            taken, left = left[: len(tokens)], left[len(tokens) :]
            for row, ids in zip(tokens, taken, strict=False):
                row[: len(ids)] = ids
            yield tokens, taken


def _row_scores(
    head: Head, x_RD: Float[Array, "R D"], target_R: Int[Array, "R"]
) -> tuple[Float[Array, "R"], Bool[Array, "R"]]:
    logits_RV = head(x_RD[None])[0]
    return log_probabilities(logits_RV, target_R), jnp.argmax(logits_RV, axis=-1) == target_R


_scores_of_rows = Compiled(_row_scores)


def _scored(head: Head, x_RD: Float[np.ndarray, "R D"], target_R: Int[np.ndarray, "R"]) -> list[np.ndarray]:
    """The log-probability of each row's target, and whether it is the likeliest; one program for `LOGIT_ROWS` rows."""
    x = np.pad(x_RD, ((0, -len(target_R) % LOGIT_ROWS), (0, 0)))
    targets = np.pad(target_R, (0, len(x) - len(target_R))).astype(np.int32)
    starts = range(0, len(x), LOGIT_ROWS)
    pieces = [_scores_of_rows(head, x[i : i + LOGIT_ROWS], targets[i : i + LOGIT_ROWS]) for i in starts]
    return [np.concatenate(parts)[: len(target_R)] for parts in zip(*pieces, strict=True)]

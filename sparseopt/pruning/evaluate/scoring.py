"""Log-likelihoods of continuations, many at a time, with the model streamed block by block.

    log p(continuation | context) = sum_t log softmax(logits)[token_t],  t over the continuation's tokens

The model reads `context + continuation[:-1]`. An input that is a prefix of another shares its pass: attention is
causal, so later tokens do not change it. One-token answers to one question thus cost one forward pass. If the rotary
frequencies depend on the length, inputs share a pass, and are padded, only as long as the frequencies stay the same.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparseopt.core.base.types import Observer
from sparseopt.layers.compiled import Compiled
from sparseopt.models import Head, StreamedModel, check_window
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


class _Batch(NamedTuple):
    tokens: Int[np.ndarray, "rows time"]  # padded
    inputs: list[int]  # the index of each row's input


@freed_memory_kept()
def score_continuations(
    model: StreamedModel,
    pairs: Sequence[tuple[Ids, Ids]],
    *,
    observer: Observer | None = None,
) -> list[Score]:
    """The scores of (context, continuation) pairs of token ids, in order; both need at least one token.

    The observer is called with ("log-likelihoods", blocks done, blocks in all).

    Raises:
        ValueError: if a context or continuation is empty, ids are outside the vocabulary, or there are more tokens than
            the model supports.
        RuntimeError: if a log-likelihood is not finite.
    """
    for index, (context, continuation) in enumerate(pairs):
        if not len(context) or not len(continuation):
            raise ValueError(
                f"pair {index} has {len(context)} context and {len(continuation)} continuation tokens; both need one "
                "or more (a text without context is scored after the model's start token)"
            )
    if not pairs:
        return []
    inputs = [(*context, *continuation[:-1]) for context, continuation in pairs]
    longest = model.config.max_positions
    check_window(max(map(len, inputs)), longest)
    check_vocabulary(np.concatenate([np.asarray((*c, *t)) for c, t in pairs]), model.config.vocab_size)
    rotations = functools.cache(model.config.rotations)
    alike: dict[bytes, list[int]] = {}
    for index, ids in enumerate(inputs):
        alike.setdefault(rotations(len(ids)), []).append(index)

    def padded(length: int) -> int:
        time = min(padded_length(length), longest or sys.maxsize)
        return time if rotations(time) == rotations(length) else length

    members: dict[int, list[int]] = {}
    batches: list[_Batch] = []
    for group in alike.values():
        shared = shared_inputs(inputs, group)
        members |= shared
        batches += _make_batches(inputs, list(shared), padded)
    log_p, likeliest = [np.zeros(0)] * len(pairs), [False] * len(pairs)
    streams = streamed(model, [batch.tokens for batch in batches], observer, "log-likelihoods")
    for batch, (head, x) in zip(batches, streams, strict=True):
        places = [
            (row, len(pairs[member][0]) - 1 + step, token, member)
            for row, host in enumerate(batch.inputs)
            for member in members[host]
            for step, token in enumerate(pairs[member][1])
        ]
        rows, times, targets, owners = np.asarray(places).T
        scores, best = _score_rows(head, x, rows, times, targets)
        for member in np.unique(owners):
            log_p[member] = scores[owners == member]
            likeliest[member] = bool(np.all(best[owners == member]))
    totals = [float(np.sum(values, dtype=np.float64)) for values in log_p]
    if not np.all(np.isfinite(totals)):
        bad = int(np.count_nonzero(~np.isfinite(totals)))
        raise RuntimeError(
            f"{bad} of {len(pairs)} log-likelihoods are not finite: activations overflow in {model.source.path}; "
            "check the model with `sparseopt eval`"
        )
    return [Score(value, greedy) for value, greedy in zip(totals, likeliest, strict=True)]


def shared_inputs(inputs: Sequence[tuple[int, ...]], chosen: Sequence[int]) -> dict[int, list[int]]:
    """The chosen inputs that are no prefix of another, each with all its prefixes among them, itself included.

    In descending order, a prefix of others comes directly after one of them.
    """
    found: dict[int, list[int]] = {}
    host = None
    for index in sorted(chosen, key=lambda i: inputs[i], reverse=True):
        if host is None or inputs[host][: len(inputs[index])] != inputs[index]:
            host = index
        found.setdefault(host, []).append(index)
    return found


def padded_length(length: int) -> int:
    """The next multiple of a quarter of the power of two below: few lengths to compile, and little padding."""
    step = max(_SHORTEST, 2 ** ((length - 1).bit_length() - 3)) if length > 1 else _SHORTEST
    return -(-length // step) * step


def _make_batches(inputs: Sequence[tuple[int, ...]], chosen: list[int], padded: Callable[[int], int]) -> list[_Batch]:
    """Longest first, so that neighbours have similar lengths. Each length has one number of rows.

    Only the last batch may have fewer rows, a power of two.
    """
    left = sorted(chosen, key=lambda i: -len(inputs[i]))
    batches = []
    while left:
        time = padded(len(inputs[left[0]]))
        rows = min(max(1, BATCH_TOKENS // time), 2 ** (len(left) - 1).bit_length())
        taken, left = left[:rows], left[rows:]
        tokens = np.zeros((rows, time), np.int32)
        for row, index in enumerate(taken):
            tokens[row, : len(inputs[index])] = inputs[index]
        batches.append(_Batch(tokens, taken))
    return batches


def _row_scores(
    head: Head, x_RD: Float[Array, "R D"], target_R: Int[Array, "R"]
) -> tuple[Float[Array, "R"], Bool[Array, "R"]]:
    logits_RV = head(x_RD[None])[0]
    return log_probabilities(logits_RV, target_R), jnp.argmax(logits_RV, axis=-1) == target_R


_scores_of_rows = Compiled(_row_scores)


def _score_rows(
    head: Head, x_BTD: Float[Array, "B T D"], rows: np.ndarray, times: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Only the requested logits, `LOGIT_ROWS` at a time, so that one program serves all."""
    flat = np.asarray(x_BTD).reshape(-1, x_BTD.shape[-1])[rows * x_BTD.shape[1] + times]
    padding = -len(targets) % LOGIT_ROWS
    flat = np.pad(flat, ((0, padding), (0, 0)))
    padded = np.pad(targets, (0, padding)).astype(np.int32)
    pieces = [
        _scores_of_rows(head, flat[i : i + LOGIT_ROWS], padded[i : i + LOGIT_ROWS])
        for i in range(0, len(padded), LOGIT_ROWS)
    ]
    scores, best = (np.concatenate([np.asarray(piece[k]) for piece in pieces]) for k in (0, 1))
    return scores[: len(targets)], best[: len(targets)]

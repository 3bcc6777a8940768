"""Calibration and evaluation text as token windows, packed or one per document.

If the model's tokenizer begins texts with BOS, every window begins with it: `BOS, t_0, ..., t_{T-2}` for the T tokens
of the window. BOS is never predicted, and the prediction of `t_0`, which no text precedes, does not count: losses start
with `t_1`.
"""

import hashlib
import itertools
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Int

from sparseopt.models import Bos, PrunableModel, Source, chat_writer, encode_text, load_tokenizer, start_token
from sparseopt.pruning.text.chats import TextError, is_chat
from sparseopt.pruning.text.documents import Part, load_documents, part_of_text

WindowChoice = Literal["first", "spread", "random"]
DocumentChoice = Literal["packed", "separate"]

# The default number of calibration windows gives the widest layer this many tokens per input.
TOKENS_AN_INPUT, LEAST_WINDOWS, MOST_WINDOWS = 4, 16, 128
# Windows whose perplexity is measured before and after, as a fraction of the calibration windows.
SCORED = 0.25

# Documents are read as far as needed, but at least this many characters.
LEAST_READ = 2**22
# Characters for each requested token, four times as many as English needs, so that windows can be spread.
_READ_A_TOKEN = 16


def widest_input(model: PrunableModel, keys: Collection[str] = ()) -> int:
    """The largest number of inputs of a layer in the model's blocks, or among the given keys, if any."""
    return max(model.weight_shape(key)[1] for key in keys or model.linear_keys())


def default_windows(model: PrunableModel, seqlen: int, factor: int = 1) -> int:
    """The default number of calibration windows of `seqlen` tokens for a model, times a factor below the maximum.

    The number depends on the model alone, so that a run resumes with the same one on any machine; activations that do
    not fit in memory go to disk.
    """
    wanted = factor * max(LEAST_WINDOWS, -(-TOKENS_AN_INPUT * widest_input(model) // seqlen))
    return min(MOST_WINDOWS, wanted)


def count_help(input_: str, factor: int = 1) -> str:
    """How `default_windows` counts, in words."""
    tokens, least = factor * TOKENS_AN_INPUT, factor * LEAST_WINDOWS
    return f"{tokens} tokens for each {input_} of the widest layer, in {least} to {MOST_WINDOWS} windows"


def scored_windows(count: int) -> int:
    """The number of windows whose perplexity is measured before and after, for a number of calibration windows."""
    return max(2, round(SCORED * count))


class Windows(NamedTuple):
    """Token windows of a text, int32, without BOS, and the id of the BOS that each should begin with; None for none."""

    ids: Int[np.ndarray, "count length"]
    bos: int | None


def text_windows(
    source: Source,
    text: Any,
    part: Part,
    count: int,
    length: int,
    *,
    bos: Bos = "auto",
    choice: WindowChoice = "first",
    seed: int = 0,
    split: str | None = None,
    column: str | None = None,
    documents: DocumentChoice = "packed",
    least: int | None = None,
) -> Windows:
    """Windows of a text in a model's tokens, with the model's BOS (`models.start_token`).

    Chats become text with the model's own chat template (`models.chat_writer`). Only the beginning of a large source is
    read: 16 characters for each requested token, and at least 4 million.

    Args:
        source: the model's source.
        text: a specification, a list or a `Dataset`; for this, `part`, `split` and `column` see `load_documents`.
        part: which documents to read.
        count: number of windows.
        length: tokens per window.
        bos: whether windows begin with BOS.
        choice: which windows, see `token_windows`.
        seed: see `token_windows`.
        split: the split of a hub data set.
        column: the column of the rows.
        documents: "packed" joins all documents, texts with blank lines and chats with nothing, and cuts windows from
            them; "separate" cuts one window from the start of each document that is long enough.
        least: number of windows that is enough if the text does not have `count`.

    Raises:
        TextError: if the text cannot be read or is too short.
        ModelError: if the tokenizer cannot be used, has no BOS although `bos` is "yes", or has no chat template.
    """
    if documents not in get_args(DocumentChoice):
        raise TextError(f"documents must be {' or '.join(get_args(DocumentChoice))}, given {documents!r}")
    tokenizer = load_tokenizer(source)
    start = start_token(source, tokenizer, bos)
    of_chats, texts = written_texts(source, text, part, split=split, column=column)

    def encoded(written: str) -> np.ndarray:
        tokens = encode_text(tokenizer, written)
        # A template may write the BOS with which every window begins anyway.
        return tokens[1:] if of_chats and len(tokens) and tokens[0] == start else tokens

    separate, found, seen = documents == "separate", [], 0
    for batch in batches_of(texts, max(LEAST_READ, _READ_A_TOKEN * count * length)):
        if separate:
            found += [tokens[:length] for tokens in map(encoded, batch) if len(tokens) >= length]
        else:
            found.append(encoded(("" if of_chats else "\n\n").join([""] * bool(found) + batch)))
        seen += len(batch)
        available = len(found) if separate else sum(map(len, found)) // max(length, 1)
        if available >= count:
            break
    if least is not None:
        count = max(least, min(count, available))
    try:
        if separate and available < max(count, 1):
            raise TextError(
                f"{count} windows that begin a document need as many documents of {length} tokens or more, and "
                f"{available} of {seen} have that many; use documents packed, fewer windows or a shorter seqlen"
            )
        # Concatenated whole windows are cut into the same windows.
        return Windows(token_windows(np.concatenate(found), count, length, choice, seed=seed), start)
    except TextError as error:
        raise TextError(f"{part_of_text(text, part, split)}: {error}") from error


def written_texts(
    source: Source, text: Any, part: Part, *, split: str | None = None, column: str | None = None
) -> tuple[bool, Iterator[str]]:
    """Whether a part of a text has chats, and its documents; chats are written with the model's own template.

    Arguments and errors are as for `text_windows`.
    """
    loaded: Iterator[Any] = load_documents(text, part, split=split, column=column)
    first = next(loaded)
    texts = itertools.chain([first], loaded)
    return is_chat(first), map(chat_writer(source), texts) if is_chat(first) else texts


def batches_of(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Group the texts into lists of at least `size` characters."""
    batch: list[str] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text)
        if held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def token_digest(*ids: np.ndarray) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of token ids as little-endian int32, one array after the other."""
    state = hashlib.sha256()
    for array in ids:
        state.update(np.ascontiguousarray(array, "<i4").tobytes())
    return state.hexdigest()[:16]


def begin_windows(ids: Int[np.ndarray, "count length"], bos: int | None) -> Int[np.ndarray, "count length"]:
    """The windows with BOS first and without their last token; unchanged if `bos` is None."""
    return ids if bos is None else np.concatenate([np.full_like(ids[:, :1], bos), ids[:, :-1]], axis=1)


def token_windows(
    tokens: np.ndarray, count: int, length: int, choice: WindowChoice = "first", *, seed: int = 0
) -> np.ndarray:
    """Cut `count` non-overlapping windows of `length` tokens, `[count, length]` int32.

    Args:
        tokens: all token ids of a text, `[n]`.
        count: number of windows.
        length: tokens per window.
        choice: "first" cuts from the start of the text. "spread" spaces windows evenly over the whole text, in an order
            in which any run of them covers it evenly: held-out windows, the last ones, lie between the calibration
            windows. "random" draws without replacement, with `seed`.
        seed: see `choice`.

    Raises:
        TextError: if the text has too few tokens, with the numbers.
    """
    if count < 1 or length < 2:
        raise TextError(f"need at least 1 window of at least 2 tokens, given {count} windows of {length}")
    if choice not in get_args(WindowChoice):
        raise TextError(f"windows must be one of {', '.join(get_args(WindowChoice))}, given {choice!r}")
    available = len(tokens) // length
    if available < count:
        raise TextError(
            f"{count} windows of {length} tokens need {count * length:,} tokens, the text has "
            f"{len(tokens):,} ({available} windows); use a longer text, fewer windows or a shorter seqlen"
        )
    windows = np.asarray(tokens[: available * length], np.int32).reshape(available, length)
    if choice == "random":
        return windows[np.random.default_rng(seed).permutation(available)[:count]]
    if choice == "spread":
        # Multiples of the golden ratio, modulo 1, fill the interval evenly from the first one on.
        ranks = np.argsort(np.argsort(np.arange(count) * (1 + 5**0.5) / 2 % 1))
        return windows[ranks * available // count]
    return windows[:count]


def token_array(given: Any) -> np.ndarray:
    """Token ids of any array library as an array; a `TextError` if windows have different lengths."""
    try:
        # torch does not convert GPU tensors to NumPy.
        return np.asarray(given.cpu() if hasattr(given, "cpu") else given)
    except ValueError:
        raise TextError("all windows of token ids must have the same number of tokens") from None


def check_vocabulary(ids: np.ndarray, vocab_size: int) -> None:
    """Raise a `TextError` if token ids are outside a model's vocabulary."""
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise TextError(
            f"token ids must lie in 0..{vocab_size - 1}, given {ids.min()}..{ids.max()}; "
            "were they made with another tokenizer?"
        )

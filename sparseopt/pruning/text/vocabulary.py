"""A model with the tokens that a text uses most, see `models.reshape.vocabulary`, and what that costs other text."""

import contextlib
from dataclasses import replace
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from sparseopt.models import ModelError, Source, StreamedModel, chat_writer, encode_text, load_tokenizer
from sparseopt.models.reshape.vocabulary import Vocabulary, fewer_tokens
from sparseopt.pruning.base.records import VocabularyRecord
from sparseopt.pruning.text.chats import TextError
from sparseopt.pruning.text.documents import Part, part_of_text
from sparseopt.pruning.text.windows import LEAST_READ, batches_of, written_texts

# Most characters of a text whose tokens are counted, and of the text outside of it.
MOST_COUNTED, MOST_OTHER = 2**24, 2**20
# What a chat template writes around messages stays as it is; a template may reject some of these chats.
_SPEAKERS = (("user", "assistant", "user"), ("system", "user", "assistant", "user"))


def with_vocabulary(
    model: StreamedModel,
    wanted: float | None,
    text: Any,
    *,
    split: str | None = None,
    column: str | None = None,
    other: Any = None,
) -> tuple[StreamedModel, VocabularyRecord]:
    """The model with fewer tokens, and what is known about them.

    Args:
        model: an open model.
        wanted: number of tokens that stay, the most frequent ones of the text; a float is a fraction of all; None for
            those that the text uses.
        text: a text as for `text_windows`, of which the calibration part is counted, at most `MOST_COUNTED` characters.
        split: as there.
        column: as there.
        other: the text to measure tokens for each byte on; None for the evaluation part of `text`, if it has one;
            "none" for no text.

    Raises:
        TextError: if a text cannot be read, or has fewer tokens than stay.
        ModelError: if the tokenizer is of a kind that cannot lose tokens, or the number is impossible.
    """
    vocabulary, reading = Vocabulary(model), {"split": split, "column": column}
    tokenizer, total = vocabulary.tokenizer, len(vocabulary.tokens)
    texts = _read(model.source, text, "calibration", MOST_COUNTED, reading)
    ids = np.concatenate([encode_text(tokenizer, each) for each in texts])
    counts = np.bincount(ids, minlength=model.config.vocab_size)
    size = round(wanted * total) if isinstance(wanted, float) else wanted
    kept = vocabulary.kept(counts, size, _of_template(model.source, tokenizer))
    named = part_of_text(text, "calibration", split)
    if (seen := int(counts.sum())) < len(kept):
        raise TextError(
            f"{named} has {seen:,} tokens, too few to choose the {len(kept):,} of the vocabulary that stay: give a "
            "longer text"
        )
    made, gone = fewer_tokens(model, vocabulary, kept), 1 - int(counts[kept].sum()) / seen
    record = VocabularyRecord(len(kept), total, named, seen, gone, None, 0, None, None)
    if other == "none" or not isinstance(other or text, str):
        return made, record
    try:
        texts = _read(model.source, other or text, "evaluation", MOST_OTHER, {} if other else reading)
    except TextError:
        # What is left of a short text may be nothing.
        if other is not None:
            raise
        return made, record
    nbytes = sum(len(each.encode()) for each in texts)
    before, after = (
        sum(len(encode_text(each, text)) for text in texts) / nbytes
        for each in (tokenizer, load_tokenizer(made.source))
    )
    named = part_of_text(other or text, "evaluation", None if other else split)
    return made, replace(record, other_text=named, other_bytes=nbytes, before=before, after=after)


def _read(source: Source, text: Any, part: Part, most: int, reading: dict[str, Any]) -> list[str]:
    """The documents of a part of a text, joined as for windows, until they have so many characters."""
    of_chats, texts = written_texts(source, text, part, **reading)
    found, held = list[str](), 0
    for batch in batches_of(texts, min(most, LEAST_READ)):
        found.append(("" if of_chats else "\n\n").join([""] * bool(found) + batch))
        held += len(found[-1])
        if held >= most:
            break
    found[-1] = found[-1][: len(found[-1]) - max(0, held - most)]
    return found


def _of_template(source: Source, tokenizer: Tokenizer) -> set[int]:
    """The ids of the tokens that the chat template writes, if there is one."""
    found = set[int]()
    with contextlib.suppress(ModelError):
        write = chat_writer(source)
        for speakers in _SPEAKERS:
            with contextlib.suppress(ModelError):
                written = write([{"role": role, "content": "."} for role in speakers])
                found.update(encode_text(tokenizer, written).tolist())
    return found

"""A model with the tokens that a text uses most, see `models.reshape.vocabulary`, and what that costs other text.

    uses(token) = n if the text has it n times, else e / (1 + e),    e = sum over the text's places of p(token | before)

Most tokens of a large vocabulary occur in no text that a user has, and some of them will occur in the next text of the
kind. The model knows the language and the subject: it tells them apart. WikiText-2, Gemma 3 with 73,700 of 262,144
tokens, 128 windows: 0.8 % more tokens in another part of the text, where the first tokens of the vocabulary in place of
the likeliest ones give 4.5 %. Between tokens that the text has, its counts decide: sums of both were no better.
"""

import contextlib
import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tokenizers import Tokenizer

from sparseopt.core.base.types import Observer
from sparseopt.layers.compiled import Compiled
from sparseopt.models import (
    ModelError,
    Source,
    StreamedModel,
    chat_writer,
    encode_text,
    load_tokenizer,
    start_token,
)
from sparseopt.models.reshape.vocabulary import Vocabulary, fewer_tokens
from sparseopt.pruning.base.records import VocabularyRecord
from sparseopt.pruning.evaluate.perplexity import streamed
from sparseopt.pruning.text.chats import TextError
from sparseopt.pruning.text.documents import Part, part_of_text
from sparseopt.pruning.text.windows import LEAST_READ, batches_of, begin_windows, written_texts
from sparseopt.system import processes
from sparseopt.system.files import write_whole

# Most characters of a text whose tokens are counted, and of the text outside of it.
MOST_COUNTED, MOST_OTHER = 2**24, 2**20
# Most windows of the text in which the model predicts tokens, and their length.
WINDOWS, LENGTH = 64, 512
# Most bytes of the logits of a slice of a window.
LOGIT_BYTES = 2**26
# What a chat template writes around messages stays as it is; a template may reject some of these chats.
_SPEAKERS = (("user", "assistant", "user"), ("system", "user", "assistant", "user"))


@dataclass
class TokenChoice:
    """The choice of the tokens that stay: the most used ones of a text.

    Attributes:
        model: an open model.
        wanted: number of tokens that stay; a float is a fraction of all; None for those that the text uses.
        text: a text as for `text_windows`, of which the calibration part is counted, at most `MOST_COUNTED` characters.
        split: as there.
        column: as there.
        other: the text to measure tokens for each byte on; None for the evaluation part of `text`, if it has one;
            "none" for no text.

    Raises:
        TextError: if a text cannot be read, or has fewer tokens than stay.
        ModelError: if the tokenizer is of a kind that cannot lose tokens, or the number is impossible.
    """

    model: StreamedModel
    wanted: float | None
    text: Any
    split: str | None = None
    column: str | None = None
    other: Any = None

    def __post_init__(self) -> None:
        self.vocabulary = vocabulary = Vocabulary(self.model)
        tokenizer = vocabulary.tokenizer
        total, source = len(vocabulary.tokens), self.model.source
        self._size = round(self.wanted * total) if isinstance(self.wanted, float) else self.wanted
        texts = _read(source, self.text, "calibration", MOST_COUNTED, self._reading)
        self._ids = np.concatenate([encode_text(tokenizer, each) for each in texts])
        self._counts = np.bincount(self._ids, minlength=self.model.config.vocab_size)
        self._needed = _of_template(source, tokenizer)
        #: The ids that stay by the counts alone, ascending.
        self.counted = vocabulary.kept(self._counts, self._size, self._needed)
        named, seen = part_of_text(self.text, "calibration", self.split), len(self._ids)
        if seen < len(self.counted):
            raise TextError(
                f"{named} has {seen:,} tokens, too few to choose the {len(self.counted):,} of the vocabulary that "
                "stay: give a longer text"
            )
        self._record = VocabularyRecord(len(self.counted), total, named, seen, 0, 0.0, None, 0, None, None)
        used = vocabulary.kept(self._counts, None, self._needed)
        #: Whether more tokens stay than the text uses, so that the model has a say in them.
        self.is_open = len(used) < len(self.counted)
        _ = self._other

    @property
    def _reading(self) -> dict[str, Any]:
        return {"split": self.split, "column": self.column}

    @cached_property
    def _other(self) -> list[str]:
        """The text that is not counted; none if there is no such text."""
        if self.other == "none" or not isinstance(self.other or self.text, str):
            return []
        reading = {} if self.other else self._reading
        try:
            return _read(self.model.source, self.other or self.text, "evaluation", MOST_OTHER, reading)
        except TextError:
            # What is left of a short text may be nothing.
            if self.other is not None:
                raise
            return []

    def made(self, kept: Int[np.ndarray, "size"], predicted: int = 0) -> tuple[StreamedModel, VocabularyRecord]:
        """The model with the tokens `kept`, and what is known about them; `predicted` tokens helped to choose."""
        made = fewer_tokens(self.model, self.vocabulary, kept)
        gone = 1 - int(self._counts[kept].sum()) / len(self._ids)
        record = replace(self._record, predicted_tokens=predicted, split=gone)
        if not (texts := self._other):
            return made, record
        nbytes = sum(len(each.encode()) for each in texts)
        before, after = (
            sum(len(encode_text(each, text)) for text in texts) / nbytes
            for each in (self.vocabulary.tokenizer, load_tokenizer(made.source))
        )
        named = part_of_text(self.other or self.text, "evaluation", None if self.other else self.split)
        return made, replace(record, other_text=named, other_bytes=nbytes, before=before, after=after)

    def predicted(self, file: Path, observer: Observer) -> tuple[StreamedModel, VocabularyRecord]:
        """`made` of the tokens that stay by counts and predictions of the model.

        Another machine may round predictions differently, so the choice is read from the file of a run, if it has it.
        `keep` writes it.

        Args:
            file: of the run's folder.
            observer: called with ("predicting tokens, block", blocks done, blocks in all).
        """
        windows = self._windows()
        kept = _read_choice(file, self._digest) if processes.is_first() else None
        if processes.told(kept is None):
            sums = predictions(self.model, windows, observer)
            expected = sums * (len(self._ids) / sums.sum())
            uses = np.where(self._counts > 0, self._counts, expected / (1 + expected))
            kept = self.vocabulary.kept(uses, self._size, self._needed).tolist()
        self.chosen = np.asarray(processes.told(kept))
        return self.made(self.chosen, windows.size)

    def keep(self, file: Path) -> None:
        """Write what `predicted` chose into a file."""
        write_whole(file, json.dumps({"of": self._digest, "tokens": self.chosen.tolist()}) + "\n")

    @property
    def _digest(self) -> str:
        """A digest of what decides the choice, for one model."""
        decided = json.dumps([self._size, sorted(self._needed), WINDOWS, LENGTH]).encode()
        return hashlib.sha256(self._ids.tobytes() + decided).hexdigest()[:32]

    def _windows(self) -> Int[np.ndarray, "windows length"]:
        """Windows that are spread evenly over the text."""
        length = min(LENGTH, self.model.config.max_positions or LENGTH, len(self._ids))
        count = min(WINDOWS, len(self._ids) // length)
        starts = np.linspace(0, len(self._ids) - length, count).astype(int)
        bos = start_token(self.model.source, self.vocabulary.tokenizer)
        return begin_windows(self._ids[starts[:, None] + np.arange(length)], bos).astype(np.int32)


def predictions(
    model: StreamedModel, windows: Int[np.ndarray, "windows length"], observer: Observer
) -> Float[np.ndarray, "tokens"]:
    """The probability of each token, summed over the places of the windows."""
    length = windows.shape[1]
    # Slices of one size, so that one program serves all.
    rows = min(length, max(1, LOGIT_BYTES // (4 * model.config.vocab_size)))
    counts_T = np.pad(np.ones(length, np.float32), (0, -length % rows))
    found = np.zeros(model.config.vocab_size)
    for head, x_BTD in streamed(model, list(windows[:, None]), observer, "predicting tokens, block"):
        x_TD = jnp.pad(x_BTD[0], ((0, -length % rows), (0, 0)))
        found += np.asarray(_predicted(head, x_TD.reshape(-1, rows, x_TD.shape[-1]), counts_T.reshape(-1, rows)))
    return found


def predicted(head: Any, x_SRD: Float[Array, "S R D"], count_SR: Float[Array, "S R"]) -> Float[Array, "V"]:
    """The probabilities of the tokens after the rows of last activations, times the rows' counts, summed."""

    def of_slice(piece: tuple[Array, Array]) -> Array:
        x_RD, count_R = piece
        return count_R @ jax.nn.softmax(head(x_RD[None])[0], axis=-1)

    return jnp.sum(jax.lax.map(of_slice, (x_SRD, count_SR)), axis=0)


_predicted = Compiled(predicted)


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


def _read_choice(file: Path, digest: str) -> list[int] | None:
    """The tokens in a file; None if it has none of this choice."""
    try:
        found = json.loads(file.read_text())
        return found["tokens"] if found["of"] == digest else None
    except (OSError, ValueError, TypeError, KeyError):
        return None

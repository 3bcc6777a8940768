"""Fewer tokens: which can go, and the model without them.

A token of byte-pair encoding (BPE) is joined from two others, in the end from letters or bytes. As long as with each
token its two parts stay, a text is split into the same tokens as before wherever all of these stay, since merges keep
their order: what joins first in the whole tokenizer joins first in the smaller one. A token that is gone becomes its
parts. In a unigram tokenizer, which chooses the most probable split, tokens have no parts, and the same holds.

Tokens go one by one: of those that are part of no other, the one that a text uses least, of equals the last (early
merges are the most frequent in the text that the tokenizer was made from). Its parts inherit its count.

Source: Purason, Chizhov, Yamshchikov and Fishel, "Teaching old tokenizers new words: efficient tokenizer adaptation for
pre-trained models", 2025 (leaf-based pruning).
"""

import heapq
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from tokenizers import Tokenizer

from sparseopt.models.base.errors import ModelError, guarded
from sparseopt.models.base.fields import shown
from sparseopt.models.decoder.tokenizer import load_tokenizer
from sparseopt.models.files.gguf.header import PickedTensor, Value, count
from sparseopt.models.files.gguf.reader import GGUFSource
from sparseopt.models.files.gguf.tokenizer import SPECIAL, padding_token
from sparseopt.models.files.gguf.vocabulary import chat_template, parsed
from sparseopt.models.files.safetensors import TensorInfo, picked_rows
from sparseopt.models.streaming.streamed import StreamedModel

# The fields of configurations, tokenizers and metadata that hold ids of tokens, alone or in lists.
_IDS = re.compile(r"(?:\w+_)?token_(?:ids?|index)|(?:begin_)?suppress_tokens|bad_words_ids|pad_id|ids|sep|cls")
# Other files with the whole vocabulary, which no longer fit; transformers reads tokenizer.json.
_OTHERS = (
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt", "vocab.bpe",
    "encoder.json", "tiktoken.model", "tekken.json",
)  # fmt: skip
# Files with ids, and the parts of tokenizer.json that have them besides the vocabulary.
_CONFIGS, _WITH_IDS = ("generation_config.json", "tokenizer_config.json"), ("post_processor", "padding")
# Metadata of GGUF files that are wrong for fewer tokens.
_OF_THE_WHOLE = ("tokenizer.huggingface.json", "general.size_label", "general.parameter_count")
_BYTES = frozenset(f"<0x{number:02X}>" for number in range(256))
_PREFIX = "tokenizer.ggml."


class Vocabulary:
    """The tokens of a model, and how they are joined.

    Attributes:
        tokenizer: the whole tokenizer.
        stored: the same as in tokenizer.json.
        tokens: the id of each token by its text, including added tokens.
        fixed: ids that always stay: special and added tokens, ids in configurations, letters or bytes.

    Raises:
        ModelError: if the tokenizer is neither BPE nor unigram, or is neither in a tokenizer.json nor in a GGUF file.
    """

    def __init__(self, model: StreamedModel) -> None:
        source, rows = model.source, model.config.vocab_size
        of_file = isinstance(source, GGUFSource)
        files = {} if of_file else source.sidecars()
        if not of_file and "tokenizer.json" not in files:
            raise ModelError(
                f"{source.name} has no tokenizer.json, from which tokens could be removed; make one: "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        self.tokenizer = load_tokenizer(source)
        self.stored: dict[str, Any] = json.loads(self.tokenizer.to_str())
        inner = self.stored["model"]
        odd = [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if inner.get(name)]
        if inner["type"] not in ("BPE", "Unigram") or odd:
            given = f"{odd[0]}={shown(inner[odd[0]])}" if odd else f"the model {inner['type']}"
            raise ModelError(
                f"{source.name} has a tokenizer with {given}, and tokens can be removed from BPE and Unigram without "
                "such additions: leave vocabulary out"
            )
        self.tokens: dict[str, int]
        unknown: int | None
        if inner["type"] == "BPE":
            self.tokens = dict(inner["vocab"])
            unknown = self.tokens.get(inner["unk_token"])
        else:
            self.tokens, unknown = {token: number for number, (token, _) in enumerate(inner["vocab"])}, inner["unk_id"]
        in_bytes = inner["byte_fallback"] and self.tokens.keys() >= _BYTES
        letters = _BYTES if in_bytes else [token for token in self.tokens if len(token) == 1]
        self._added: set[int] = {each["id"] for each in self.stored["added_tokens"]}
        self.fixed = self._added | {self.tokens[token] for token in letters}
        self.fixed |= set() if unknown is None else {unknown}
        self.tokens |= {each["content"]: each["id"] for each in self.stored["added_tokens"]}
        tables = [source.config, {name: self.stored[name] for name in _WITH_IDS}]
        tables += [parsed(files, name, source) for name in _CONFIGS]
        tables += [_inner(source.values)] if isinstance(source, GGUFSource) else []
        for table in tables:
            _renumbered(table, self.fixed.add)
        self.fixed = {number for number in self.fixed if 0 <= number < rows}
        if (most := max(self.tokens.values())) >= rows:
            raise ModelError(
                f"{source.name} has a token with the id {most} and an embedding of {rows} rows; take the tokenizer "
                "that belongs to the model"
            )

    @cached_property
    def parts(self) -> dict[int, tuple[int, int]]:
        """The two tokens that form each token when it is merged from letters, by id; none for those never merged."""
        ranks = {(left, right): rank for rank, (left, right) in enumerate(self.stored["model"].get("merges", ()))}
        ways = Counter(left + right for left, right in ranks)
        last = {left + right: (left, right) for left, right in ranks}
        last |= {token: _last_merge(token, ranks) for token, number in ways.items() if number > 1}
        ids = self.tokens
        found = {ids[token]: (ids[pair[0]], ids[pair[1]]) for token, pair in last.items() if pair is not None}
        # Added tokens are found before any merge.
        return {number: pair for number, pair in found.items() if number not in self._added}

    def kept(
        self, uses: Float[np.ndarray, "rows"], size: int | None, needed: Collection[int] = ()
    ) -> Int[np.ndarray, "size"]:
        """The ids that stay, ascending.

        Args:
            uses: how often a text uses each token, or is expected to, `[rows]`.
            size: number of tokens that stay; None for those that the text uses, and the tokens that form them.
            needed: further ids that stay.

        Raises:
            ModelError: if the size is larger than the vocabulary or smaller than what must stay, with these numbers.
        """
        parts, fixed, uses = self.parts, {*self.fixed, *needed}, uses.astype(float)
        stay = {*self.tokens.values(), *fixed}
        if size is not None and size > len(stay):
            raise ModelError(f"vocabulary {size:,} is more than the {len(stay):,} tokens of the model: give fewer")
        users = Counter(part for pair in parts.values() for part in pair)
        ends = [(uses[token], -token) for token in stay if not users[token] and token not in fixed]
        heapq.heapify(ends)
        while ends and (ends[0][0] == 0 if size is None else len(stay) > size):
            number, token = heapq.heappop(ends)
            stay.remove(-token)
            for part in parts.get(-token, ()):
                uses[part] += number
                users[part] -= 1
                if not users[part] and part not in fixed:
                    heapq.heappush(ends, (uses[part], -part))
        if size is not None and len(stay) > size:
            raise ModelError(
                f"vocabulary {size:,} is too small: {len(stay):,} tokens must stay, which are letters or bytes, "
                "special and added tokens, those that the chat template writes, and what these are joined from; give "
                f"{len(stay):,} or more"
            )
        return np.array(sorted(stay))


def fewer_tokens(model: StreamedModel, vocabulary: Vocabulary, kept: Int[np.ndarray, "size"]) -> StreamedModel:
    """The model with these tokens alone, renumbered in their order: tokenizer, embedding, head and configurations.

    Nothing is read: rows are cut when they are. A GGUF file stays one, with its other metadata and its storage types.

    Raises:
        ModelError: if the smaller tokenizer cannot be read back.
    """
    source, config = model.source, model.config
    new = {old: number for number, old in enumerate(kept.tolist())}
    sizes = config.vocab_size, len(kept)
    before, after = (model.family.expected_shapes(replace(config, vocab_size=size)) for size in sizes)
    shapes = {key: shape for key, shape in after.items() if shape != before[key]}
    if isinstance(source, GGUFSource):
        tensors = {key: source.tensors[key] for key in shapes}
        picked = {
            key: PickedTensor(shape, each.dtype, each.file, each.start, each.kind, kept, each)
            for (key, shape), each in zip(shapes.items(), tensors.values(), strict=True)
        }
        return StreamedModel(source.changed(_fewer_values(source.values, new), picked), model)
    return StreamedModel(_Fewer(model, _fewer_in(vocabulary, new), new, shapes), model)


class _Fewer:
    """A source with some of the tokens of the source of a model, whose new ids are `new`."""

    def __init__(
        self, model: StreamedModel, tokenizer: Tokenizer, new: Mapping[int, int], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        source, table = model.source, model.family.sizes.table
        self.path, self.name, self.revision = source.path, source.name, source.revision
        self.follow_links, self._source, self._tokenizer = source.follow_links, source, tokenizer
        self._new, self._rows, self._shapes = new, np.array([*new]), shapes
        config = _renumbered(source.config, lambda number: new.get(number, number))
        (config if table is None else config[table])["vocab_size"] = len(new)
        self.config: dict[str, Any] = config
        # Without a second copy of a tied head.
        self.tensors: dict[str, TensorInfo] = {key: source.tensors[key] for key in model.exported_keys()}
        self.tensors |= {key: TensorInfo(shape, self.tensors[key].dtype) for key, shape in shapes.items()}

    def read(self, name: str) -> np.ndarray:
        return np.concatenate(list(self.pieces(name))) if name in self._shapes else self._source.read(name)

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        pieces = self._source.pieces(name)
        return picked_rows(pieces, self._rows) if name in self._shapes else pieces

    def sidecars(self) -> dict[str, bytes]:
        files, new = self._source.sidecars(), self._new
        tables: dict[str, Any] = {name: parsed(files, name, self._source) for name in (*_CONFIGS, "added_tokens.json")}
        for name, table in tables.items():
            tables[name] = _renumbered(table, lambda number: new.get(number, number))
        added, decoder = tables["added_tokens.json"], tables["tokenizer_config.json"].get("added_tokens_decoder", {})
        tables["added_tokens.json"] = {token: new[number] for token, number in added.items() if number in new}
        if decoder:
            own = {str(new[int(number)]): token for number, token in decoder.items() if int(number) in new}
            tables["tokenizer_config.json"]["added_tokens_decoder"] = own
        written = {name: json.dumps(table, indent=2, ensure_ascii=False) for name, table in tables.items()}
        written["tokenizer.json"] = self._tokenizer.to_str(pretty=True)
        others = {name: content for name, content in files.items() if name not in _OTHERS}
        return others | {name: text.encode() for name, text in written.items() if name in files}

    def stored_tokenizer(self) -> tuple[Tokenizer, dict[str, Any]]:
        files = self._source.sidecars()
        table = parsed(files, "tokenizer_config.json", self._source)
        settings = {name: table[name] for name in SPECIAL if table.get(name) is not None}
        settings = {name: each["content"] if isinstance(each, dict) else each for name, each in settings.items()}
        return self._tokenizer, settings | {"chat_template": chat_template(files, table)}


def _fewer_values(values: Mapping[str, Value], new: Mapping[int, int]) -> dict[str, Value]:
    """The metadata of a GGUF file with fewer entries in the tables of its tokenizer."""
    tokens: list[str] = values[f"{_PREFIX}tokens"].value
    texts = {tokens[number] for number in new}
    found = {key: value for key, value in values.items() if key not in _OF_THE_WHOLE}
    for name, given in _inner(found).items():
        if name == "merges":
            pairs = [(merge, merge.split(" ", 1)) for merge in given]
            made = [merge for merge, pair in pairs if texts >= {*pair, "".join(pair)}]
        elif name == "tokens":
            # A row without a token is named by its number.
            empty = {old for old in new if tokens[old] == padding_token(old)}
            made = [padding_token(new[old]) if old in empty else tokens[old] for old in new]
        elif isinstance(given, list) and len(given) == len(tokens):
            made = [given[old] for old in new]
        else:
            made = _renumbered({name: given}, lambda number: new.get(number, number))[name]
        found[_PREFIX + name] = values[_PREFIX + name]._replace(value=made)
    return found | {key: count(len(new)) for key in found if key.endswith(".vocab_size")}


def _inner(values: Mapping[str, Value]) -> dict[str, Any]:
    """The metadata of the tokenizer, by the rest of their keys."""
    return {key.removeprefix(_PREFIX): each.value for key, each in values.items() if key.startswith(_PREFIX)}


def _fewer_in(vocabulary: Vocabulary, new: Mapping[int, int]) -> Tokenizer:
    """The tokenizer with the tokens that have new ids."""
    stored, inner = vocabulary.stored, dict(vocabulary.stored["model"])
    if inner["type"] == "BPE":
        vocab = inner["vocab"] = {token: new[number] for token, number in inner["vocab"].items() if number in new}
        inner["merges"] = [(a, b) for a, b in inner["merges"] if vocab.keys() >= {a, b, a + b}]
    else:
        inner["vocab"] = [each for number, each in enumerate(inner["vocab"]) if number in new]
        inner["unk_id"] = new.get(inner["unk_id"])
    added = [each | {"id": new[each["id"]]} for each in stored["added_tokens"]]
    ends = {name: _renumbered(stored[name], new.__getitem__) for name in _WITH_IDS}
    made, what = stored | {"model": inner, "added_tokens": added} | ends, "no tokenizer with these tokens can be built"
    found = guarded(lambda: Tokenizer.from_str(json.dumps(made)), what, "; leave vocabulary out")
    if found.get_vocab() != {token: new[number] for token, number in vocabulary.tokens.items() if number in new}:
        raise ModelError(f"{what}, since its added tokens would have other ids; leave vocabulary out")
    return found


def _last_merge(token: str, ranks: Mapping[tuple[str, str], int]) -> tuple[str, str] | None:
    """The pair that is joined last when a token is merged from its letters; None if merges do not lead to it."""
    pieces = list(token)
    while len(pieces) > 2:
        rank, place = min((ranks.get(pair, math.inf), i) for i, pair in enumerate(itertools.pairwise(pieces)))
        if rank == math.inf:
            return None
        pieces[place : place + 2] = ["".join(pieces[place : place + 2])]
    left, right = pieces
    return (left, right) if (left, right) in ranks else None


def _renumbered(value: Any, new: Callable[[int], Any], key: str = "") -> Any:
    """A table, with the new id for each id in it."""
    if isinstance(value, dict):
        return {name: _renumbered(each, new, name) for name, each in value.items()}
    if isinstance(value, list):
        return [_renumbered(each, new, key) for each in value]
    return new(value) if type(value) is int and _IDS.fullmatch(key) else value

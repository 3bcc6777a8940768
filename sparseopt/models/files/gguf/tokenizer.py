"""The tokenizer described by a GGUF file's metadata, built with the `tokenizers` package."""

import math
from collections.abc import Callable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sparseopt.models.base.errors import ModelError, checked, guarded

_PREFIX = "tokenizer.ggml."

# Token types of the format: 2 unknown, 3 control, 4 user-defined, 5 unused. The others are plain or bytes.
_UNKNOWN, _CONTROL, _USER, _UNUSED = 2, 3, 4, 5

# Characters; longer tokens would only make the search for merges slow.
_LONGEST_TOKEN = 1024

# Names of special tokens in Hugging Face and in GGUF.
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

_TABLES: dict[str, TypeAdapter[Any]] = {
    "tokens": TypeAdapter(list[str]),
    "merges": TypeAdapter(list[str]),
    "scores": TypeAdapter(list[float]),
    "token_type": TypeAdapter(list[int]),
}

# GPT-2's words for all scripts; models differ in how many digits they group.
_WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _single_digits() -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])


def _words_with(digits: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(_WORD_PATTERN.replace("DIGITS", digits)), "isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# How text is split into words before byte-pair merging, by `tokenizer.ggml.pre`, and whether a whole word is looked up
# before it is merged. Of synonyms, the first is written.
WORDS: dict[str, tuple[Callable[[], pre_tokenizers.PreTokenizer], bool]] = {
    "smollm": (_single_digits, False),
    "gpt-2": (lambda: pre_tokenizers.ByteLevel(add_prefix_space=False), False),
    "llama-bpe": (lambda: _words_with(r"\p{N}{1,3}"), True),
    "qwen2": (lambda: _words_with(r"\p{N}"), False),
    "smaug-bpe": (lambda: _words_with(r"\p{N}{1,3}"), False),
    "dbrx": (lambda: _words_with(r"\p{N}{1,3}"), False),
    "starcoder": (_single_digits, False),
}


def padding_token(number: int) -> str:
    """The name that converters give to a row of the embedding without a token."""
    return f"[PAD{number}]"


def build_tokenizer(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    """The tokenizer of a GGUF file: byte-level BPE ("gpt2") or SentencePiece BPE ("llama").

    Raises:
        ModelError: if the file has no tokenizer, or one of an unknown kind, or its tables are corrupt.
    """
    return guarded(lambda: _build(metadata, path), f"{path} has a tokenizer that cannot be built")


def _build(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    stored = {key.removeprefix(_PREFIX): value for key, value in metadata.items() if key.startswith(_PREFIX)}
    if not stored.get("tokens"):
        raise ModelError(f"{path} carries no tokenizer; use the model's Hugging Face folder instead")
    _check_tables(stored, path)
    kind = stored.get("model")
    if kind == "gpt2":
        tokenizer = _byte_level(stored, path)
    elif kind == "llama":
        stored["tokens"] = _spelled(stored["tokens"])
        by_ids = str(metadata.get("general.architecture")).startswith("gemma")
        tokenizer = _sentencepiece(stored, by_ids, path)
    else:
        raise ModelError(f"{path} has a tokenizer of kind {repr(kind)[:100]}; known are 'gpt2' and 'llama'")
    _add_marked_tokens(tokenizer, stored)
    # The defaults are llama.cpp's: Llama 3 begins with BOS, and so does SentencePiece.
    first = _end_token(stored, "bos", kind == "llama" or stored.get("pre") == "llama-bpe")
    last = _end_token(stored, "eos", False)
    if first or last:
        whole = [*first, "$A", *last]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=whole,
            pair=[*whole, *first, "$B", *last],
            special_tokens=[(token, stored["tokens"].index(token)) for token in {*first, *last}],
        )
    return tokenizer


def _end_token(stored: Mapping[str, Any], name: str, default: bool) -> list[str]:
    """The token that every text begins ("bos") or ends ("eos") with, if the file asks for one."""
    number = stored.get(f"{name}_token_id")
    wanted = stored.get(f"add_{name}_token", default)
    return [stored["tokens"][number]] if wanted and number is not None else []


def _check_tables(stored: Mapping[str, Any], path: Path) -> None:
    """Check the types of the tables and that the special ids are ids of tokens."""
    for name, kind in _TABLES.items():
        checked(kind, stored.get(name, []), f"{path} has a corrupt table {_PREFIX}{name}")
    tokens, marks = stored["tokens"], stored.get("token_type")
    longest = max(map(len, tokens))
    if longest > _LONGEST_TOKEN:
        raise ModelError(f"{path} has a token of {longest} characters, at most {_LONGEST_TOKEN} make sense")
    if len(set(tokens)) < len(tokens):
        raise ModelError(f"{path} has a token twice in {_PREFIX}tokens; download it again")
    if marks and len(marks) != len(tokens):
        raise ModelError(f"{path} has {len(tokens)} tokens and {len(marks)} token types; download it again")
    for name in SPECIAL.values():
        number = stored.get(f"{name}_token_id")
        if number is not None and (type(number) is not int or not 0 <= number < len(tokens)):
            raise ModelError(
                f"{path} has {_PREFIX}{name}_token_id = {repr(number)[:100]}, which is none of its "
                f"{len(tokens)} tokens; convert the model again"
            )


def _vocabulary(stored: Mapping[str, Any]) -> dict[str, int]:
    """The ids of tokens, without tokens that only pad the rows of the embedding."""
    marks = zip_longest(stored["tokens"], stored.get("token_type", []))
    padding = {i for i, (token, mark) in enumerate(marks) if mark == _UNUSED and token == padding_token(i)}
    return {token: i for i, token in enumerate(stored["tokens"]) if i not in padding}


def _byte_level(stored: Mapping[str, Any], path: Path) -> Tokenizer:
    words = stored.get("pre")
    # In a list: a damaged file may give a value that cannot be hashed.
    if words not in list(WORDS):
        raise ModelError(f"{path} splits words by {repr(words)[:100]} ({_PREFIX}pre); known are {', '.join(WORDS)}")
    split, looks_up = WORDS[str(words)]
    merges = [tuple(merge.split(" ", 1)) for merge in stored.get("merges", [])]
    vocab = _vocabulary(stored)
    if any(len(merge) != 2 or not vocab.keys() >= {*merge, "".join(merge)} for merge in merges):
        raise ModelError(f"{path} has a tokenizer with a merge whose parts or whole are no token; download it again")
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=looks_up))
    tokenizer.pre_tokenizer = split()
    tokenizer.decoder = decoders.ByteLevel()
    if words == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentencepiece(stored: Mapping[str, Any], by_ids: bool, path: Path) -> Tokenizer:
    """SentencePiece's BPE: the whole text is one word, spaces are "▁", unknown characters become bytes.

    Tokens are merged in the order of their scores, or, in Gemma, of their ids (`by_ids`).
    """
    tokens, scores, marks = stored["tokens"], stored.get("scores", []), stored.get("token_type", [])
    if len(scores) != len(tokens):
        raise ModelError(f"{path} has {len(tokens)} tokens and {len(scores)} scores; download it again")
    if stored.get("remove_extra_whitespaces") or "precompiled_charsmap" in stored:
        raise ModelError(
            f"{path} has a tokenizer that normalises text ({_PREFIX}remove_extra_whitespaces or precompiled_charsmap), "
            "which is not supported; use the model's Hugging Face folder instead"
        )
    ranks: list[float] = list(range(len(tokens)))
    if not by_ids:
        # The stored score of a user-defined token is ignored: the token comes first.
        ranks = [-math.inf if mark == _USER else -score for score, mark in zip_longest(scores, marks)]
    vocab = _vocabulary(stored)
    merges = _implied_merges(vocab, ranks)
    unknown = stored.get("unknown_token_id")
    unk_token = None if unknown is None else tokens[unknown]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True))
    prefix = stored.get("add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    last = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    return tokenizer


def _spelled(tokens: list[str]) -> list[str]:
    """The tokens as SentencePiece spells them: user-defined runs of spaces are stored as spaces, not as "▁"."""
    known = set(tokens)

    def spell(token: str) -> str:
        run = "▁" * len(token)
        return run if token and not token.strip(" ") and run not in known else token

    return [spell(token) for token in tokens]


def _implied_merges(vocab: Mapping[str, int], ranks: list[float]) -> list[tuple[str, str]]:
    """The merges that a vocabulary implies: every split of a token into two, by rank, then by longest left part."""
    cuts = [
        (ranks[token_id], -cut, token[:cut], token[cut:])
        for token, token_id in vocab.items()
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    return [(left, right) for *_, left, right in sorted(cuts, key=lambda entry: entry[:2])]


def _add_marked_tokens(tokenizer: Tokenizer, stored: Mapping[str, Any]) -> None:
    """Make control and user-defined tokens atomic: they are found before the text is split into words."""
    marked = list(zip(stored["tokens"], stored.get("token_type", []), strict=False))
    special = [token for token, mark in marked if mark in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    plain = [token for token, mark in marked if mark == _USER]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])


def tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json: class, named special tokens, longest context, chat template."""
    tokens = metadata[f"{_PREFIX}tokens"]
    architecture = metadata.get("general.architecture")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get(f"{architecture}.context_length", 1_000_000),
    }
    for name, short in SPECIAL.items():
        number = metadata.get(f"{_PREFIX}{short}_token_id")
        if number is not None:
            config[name] = tokens[number]
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return config

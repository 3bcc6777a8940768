"""Floor 5: the tokenizer that a GGUF file's metadata describe, built with the `tokenizers` package."""

import math
from collections.abc import Callable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sparseopt.models.errors import ModelError, guarded

# Token types of the format: 2 unknown, 3 control, 4 user-defined. The others are plain or bytes.
_UNKNOWN, _CONTROL, _USER = 2, 3, 4

# Characters; longer tokens would only make the search for merges slow.
_LONGEST_TOKEN = 1024

# Special tokens by their names in Hugging Face and in GGUF.
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

# GPT-2's words for all scripts; models differ in how many digits stay together.
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


# How text is split into words before byte-pair merging, by `tokenizer.ggml.pre`.
_WORDS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": _single_digits,
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-bpe": lambda: _words_with(r"\p{N}{1,3}"),
    "qwen2": lambda: _words_with(r"\p{N}"),
}


def build_tokenizer(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    """The tokenizer of a GGUF file: byte-level BPE ("gpt2") or SentencePiece BPE ("llama").

    Raises:
        ModelError: if the file has no tokenizer, or one of another kind, naming those known, or its tables are corrupt.
    """
    return guarded(lambda: _build(metadata, path), f"{path} has a tokenizer that cannot be built")


def _build(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ModelError(f"{path} carries no tokenizer; use the model's Hugging Face folder instead")
    _check_tables(metadata, path)
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, path)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, path)
    else:
        raise ModelError(f"{path} has a tokenizer of kind {repr(kind)[:100]}; known are 'gpt2' and 'llama'")
    _add_marked_tokens(tokenizer, metadata)
    # The defaults are those of llama.cpp: Llama 3 begins with BOS, and so does SentencePiece.
    first = _end_token(metadata, "bos", kind == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe")
    last = _end_token(metadata, "eos", False)
    if first or last:
        whole = [*first, "$A", *last]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=whole,
            pair=[*whole, *first, "$B", *last],
            special_tokens=[(token, tokens.index(token)) for token in {*first, *last}],
        )
    return tokenizer


def _end_token(metadata: Mapping[str, Any], name: str, default: bool) -> list[str]:
    """The token that every text begins ("bos") or ends ("eos") with, if the file asks for one."""
    number = metadata.get(f"tokenizer.ggml.{name}_token_id")
    wanted = metadata.get(f"tokenizer.ggml.add_{name}_token", default)
    return [metadata["tokenizer.ggml.tokens"][number]] if wanted and number is not None else []


def _check_tables(metadata: Mapping[str, Any], path: Path) -> None:
    """Check the types of the tables and that the special ids are ids of tokens."""
    kinds = {"tokens": str, "merges": str, "scores": float, "token_type": int}
    tables = {name: metadata.get(f"tokenizer.ggml.{name}", []) for name in kinds}
    for name, table in tables.items():
        if not isinstance(table, list) or not all(type(item) is kinds[name] for item in table):
            raise ModelError(f"{path} has a corrupt table tokenizer.ggml.{name}; download it again")
    longest = max(map(len, tables["tokens"]), default=0)
    if longest > _LONGEST_TOKEN:
        raise ModelError(f"{path} has a token of {longest} characters, at most {_LONGEST_TOKEN} make sense")
    if len(set(tables["tokens"])) < len(tables["tokens"]):
        raise ModelError(f"{path} has a token twice in tokenizer.ggml.tokens; download it again")
    if tables["token_type"] and len(tables["token_type"]) != len(tables["tokens"]):
        raise ModelError(
            f"{path} has {len(tables['tokens'])} tokens and {len(tables['token_type'])} token types; download it again"
        )
    for name in _SPECIAL.values():
        number = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None and (type(number) is not int or not 0 <= number < len(tables["tokens"])):
            raise ModelError(
                f"{path} has tokenizer.ggml.{name}_token_id = {repr(number)[:100]}, which is none of its "
                f"{len(tables['tokens'])} tokens; convert the model again"
            )


def _byte_level(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    words = metadata.get("tokenizer.ggml.pre")
    if not isinstance(words, str) or words not in _WORDS:
        raise ModelError(
            f"{path} splits words by {repr(words)[:100]} (tokenizer.ggml.pre); known are {', '.join(_WORDS)}"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    if any(len(merge) != 2 or not vocab.keys() >= {*merge, "".join(merge)} for merge in merges):
        raise ModelError(f"{path} has a tokenizer with a merge whose parts or whole are no token; download it again")
    # Llama 3 looks a whole word up before it merges.
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=words == "llama-bpe"))
    tokenizer.pre_tokenizer = _WORDS[words]()
    tokenizer.decoder = decoders.ByteLevel()
    if words == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    """SentencePiece's BPE: the whole text is one word, spaces are "▁", unknown characters become bytes."""
    tokens, scores = _spelled(metadata), metadata.get("tokenizer.ggml.scores", [])
    if len(scores) != len(tokens):
        raise ModelError(f"{path} has {len(tokens)} tokens and {len(scores)} scores; download it again")
    if metadata.get("tokenizer.ggml.remove_extra_whitespaces") or "tokenizer.ggml.precompiled_charsmap" in metadata:
        raise ModelError(
            f"{path} has a tokenizer that normalises text (tokenizer.ggml.remove_extra_whitespaces or "
            "precompiled_charsmap), which is not supported; use the model's Hugging Face folder instead"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = _implied_merges(vocab, _ranks(metadata))
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    unk_token = None if unknown is None else tokens[unknown]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True))
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    last = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    return tokenizer


def _ranks(metadata: Mapping[str, Any]) -> list[float]:
    """The order in which tokens are merged; user-defined ones, whose stored score means nothing, come first."""
    scores = metadata["tokenizer.ggml.scores"]
    if str(metadata.get("general.architecture")).startswith("gemma"):
        # Gemma's merges follow its ids.
        return list(range(len(scores)))
    marks = metadata.get("tokenizer.ggml.token_type", [])
    return [-math.inf if mark == _USER else -score for score, mark in zip_longest(scores, marks)]


def _spelled(metadata: Mapping[str, Any]) -> list[str]:
    """The tokens as SentencePiece spells them: user-defined runs of spaces are stored as spaces, not as "▁"."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
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


def _add_marked_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Make control and user-defined tokens atomic: they are found before the text is split into words."""
    tokens = _spelled(metadata) if metadata["tokenizer.ggml.model"] == "llama" else metadata["tokenizer.ggml.tokens"]
    marks = metadata.get("tokenizer.ggml.token_type", [])
    marked = list(zip(tokens, marks, strict=False))
    special = [token for token, mark in marked if mark in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    plain = [token for token, mark in marked if mark == _USER]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])


def tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json: class, named special tokens, longest context, chat template."""
    tokens = metadata["tokenizer.ggml.tokens"]
    architecture = metadata.get("general.architecture")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get(f"{architecture}.context_length", 1_000_000),
    }
    for name, short in _SPECIAL.items():
        number = metadata.get(f"tokenizer.ggml.{short}_token_id")
        if number is not None:
            config[name] = tokens[number]
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return config

"""Floor 5: the tokenizer that a GGUF file's metadata describe, built with the `tokenizers` package."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sparseopt.models.errors import ModelError

# Token types of the format: 2 unknown, 3 control, 4 user-defined. The others are plain or bytes.
_UNKNOWN, _CONTROL, _USER = 2, 3, 4

# Named special tokens: in Hugging Face and in the format.
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _gpt2_words() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_words()])


def _llama3_words() -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# How text is cut into words before byte-pair merging, by `tokenizer.ggml.pre`.
_WORDS = {"smollm": _single_digits, "gpt-2": _gpt2_words, "llama-bpe": _llama3_words}


def build_tokenizer(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    """The tokenizer of a GGUF file: byte-level BPE ("gpt2") or SentencePiece BPE ("llama").

    Raises:
        ModelError: if the file has no tokenizer, or one of another kind, naming those known.
    """
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
        raise ModelError(f"{path} has a tokenizer of kind {kind!r}; known are 'gpt2' and 'llama'")
    _add_marked_tokens(tokenizer, metadata)
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if metadata.get("tokenizer.ggml.add_bos_token", kind == "llama") and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A",
            pair=f"{tokens[bos]} $A {tokens[bos]} $B",
            special_tokens=[(tokens[bos], bos)],
        )
    return tokenizer


def _check_tables(metadata: Mapping[str, Any], path: Path) -> None:
    """Check the types of the tables and that the special ids are ids of tokens.

    Raises:
        ModelError: naming the first that is wrong.
    """
    kinds = {"tokens": str, "merges": str, "scores": float, "token_type": int}
    tables = {name: metadata.get(f"tokenizer.ggml.{name}", []) for name in kinds}
    for name, table in tables.items():
        if not isinstance(table, list) or not all(type(item) is kinds[name] for item in table):
            raise ModelError(f"{path} has a corrupt table tokenizer.ggml.{name}; download it again")
    for name in _SPECIAL.values():
        number = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None and (type(number) is not int or not 0 <= number < len(tables["tokens"])):
            raise ModelError(
                f"{path} has tokenizer.ggml.{name}_token_id = {number!r}, which is none of its "
                f"{len(tables['tokens'])} tokens; convert the model again"
            )


def _byte_level(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    words = metadata.get("tokenizer.ggml.pre")
    if not isinstance(words, str) or words not in _WORDS:
        raise ModelError(f"{path} cuts words by {words!r} (tokenizer.ggml.pre); known are {', '.join(_WORDS)}")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    if any(len(merge) != 2 or not vocab.keys() >= {*merge, "".join(merge)} for merge in merges):
        raise ModelError(f"{path} has a tokenizer with a merge whose parts or whole are no token; download it again")
    # Llama 3 looks a whole word up before it merges.
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=words == "llama-bpe"))
    tokenizer.pre_tokenizer = _WORDS[words]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.scores", [])
    if len(scores) != len(tokens):
        raise ModelError(f"{path} has {len(tokens)} tokens and {len(scores)} scores; download it again")
    vocab = {token: i for i, token in enumerate(tokens)}
    # The merges are implied: every cut of a token into two tokens, the best-scored token first.
    ranked = [
        (-scores[vocab[token]], vocab[token[:cut]], vocab[token[cut:]], token[:cut], token[cut:])
        for token in tokens
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    merges = [(left, right) for *_, left, right in sorted(ranked)]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    unk_token = None if unknown is None else tokens[unknown]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True))
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    last = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    return tokenizer


def _add_marked_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Make control and user-defined tokens atomic: they are found in text before words are cut."""
    tokens = metadata["tokenizer.ggml.tokens"]
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

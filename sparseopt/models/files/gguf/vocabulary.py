"""A Hugging Face tokenizer as GGUF metadata: the inverse of `tokenizer`.

Two kinds have names there: byte-level BPE ("gpt2") and SentencePiece BPE ("llama"), whose merges are stored as scores
of the tokens. The result is read back and must be the same tokenizer.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from gguf import GGUFValueType, TokenType
from tokenizers import Tokenizer, models, pre_tokenizers

from sparseopt.models.base.errors import JSON_OBJECT, ModelError, checked, guarded
from sparseopt.models.base.fields import shown
from sparseopt.models.files.folder import parse_json
from sparseopt.models.files.gguf.base import Config
from sparseopt.models.files.gguf.header import Value, count, flag, text
from sparseopt.models.files.gguf.tokenizer import SPECIAL, WORDS, build_tokenizer, padding_token
from sparseopt.models.files.source import Source

_PREFIX = "tokenizer.ggml."
# Scores of tokens that no merge makes, as in converters.
_MARKED_SCORE = -1000.0

# Tokenizers in older files.
_OLDER = frozenset(("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"))
_INSTEAD = "write the model as a Hugging Face folder instead"


def tokenizer_values(source: Source, config: Config, architecture: str) -> dict[str, Value]:
    """The metadata of a model's tokenizer, by key; empty for a model without tokenizer.json.

    The vocabulary is padded to the rows of the embedding, since llama.cpp assumes that both have the same size.

    Args:
        source: a model with its tokenizer in files.
        config: its Hugging Face configuration.
        architecture: the name in GGUF.

    Raises:
        ModelError: if the tokenizer is of another kind.
    """
    files = source.sidecars()
    if "tokenizer.json" not in files:
        if other := sorted(_OLDER & files.keys()):
            raise ModelError(
                f"{source.path} has {other[0]} and no tokenizer.json, from which a GGUF file's tokenizer is made; make "
                "one: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        return {}
    settings = parsed(files, "tokenizer_config.json", source)
    what = f"{source.path} has no valid tokenizer.json"
    tokenizer = guarded(lambda: Tokenizer.from_str(files["tokenizer.json"].decode()), what)
    # Older files write it differently.
    stored = json.loads(tokenizer.to_str())
    model = stored["model"]
    if model["type"] != "BPE":
        raise _unknown(source, f"the model {model['type']}", "BPE")
    refused = {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}
    if given := sorted(name for name in refused if model[name]):
        raise _unknown(source, f"{given[0]}={shown(model[given[0]])}", "BPE without it")
    write = _sentencepiece if model["byte_fallback"] else _byte_level
    values = write(stored, _listed_tokens(stored, config, source), source)
    ids = _special_ids(tokenizer, config, settings, parsed(files, "generation_config.json", source))
    values |= {f"{name}_token_id": count(number) for name, number in ids.items()}
    for name, adds in _ends(tokenizer, ids, settings, source).items():
        values[f"add_{name}_token"] = flag(adds)
    found = {_PREFIX + name: value for name, value in values.items()}
    if (template := chat_template(files, settings)) is not None:
        found["tokenizer.chat_template"] = text(template)
    _check(stored, found, architecture, source)
    return found


def parsed(files: Mapping[str, bytes], name: str, source: Source) -> dict[str, Any]:
    """The object in a JSON file; empty if the file does not exist."""
    what = f"{source.path / name} is no valid JSON"
    return checked(JSON_OBJECT, guarded(lambda: parse_json(files.get(name, b"{}")), what), what)


def _unknown(source: Source, given: str, expected: str) -> ModelError:
    return ModelError(f"{source.path} has a tokenizer with {given}, GGUF has a name for {expected}; {_INSTEAD}")


def _listed_tokens(stored: Mapping[str, Any], config: Config, source: Source) -> list[tuple[str, TokenType]]:
    """Text and type of every token by its id, up to the rows of the embedding."""
    vocab: dict[str, int] = stored["model"]["vocab"]
    types = dict.fromkeys(vocab.values(), TokenType.NORMAL)
    names = {number: token for token, number in vocab.items()}
    for added in stored["added_tokens"]:
        names[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    rows = config["vocab_size"]
    if max(names, default=0) >= rows:
        raise ModelError(
            f"{source.path} has a token with the id {max(names)} and an embedding of {rows} rows; take the tokenizer "
            "that belongs to the model"
        )
    return [(names.get(i, padding_token(i)), types.get(i, TokenType.UNUSED)) for i in range(rows)]


def _tables(tokens: list[tuple[str, TokenType]]) -> dict[str, Value]:
    texts, types = [token for token, _ in tokens], [int(kind) for _, kind in tokens]
    return {
        "tokens": Value(texts, GGUFValueType.ARRAY, GGUFValueType.STRING),
        "token_type": Value(types, GGUFValueType.ARRAY, GGUFValueType.INT32),
    }


def _byte_level(stored: Mapping[str, Any], tokens: list[tuple[str, TokenType]], source: Source) -> dict[str, Value]:
    """Words are split as a name in `WORDS` says. NFC is omitted, since it has no name."""
    words, whole = _plain_words(stored["pre_tokenizer"]), stored["model"]["ignore_merges"]
    known = [name for name, (make, looks_up) in WORDS.items() if looks_up == whole and words == _words_of(make)]
    if not known:
        given = f"the pre-tokenizer {shown(stored['pre_tokenizer'])} and ignore_merges={whole}"
        raise _unknown(source, given, f"those of {', '.join(WORDS)}")
    if any(step["type"] != "NFC" for step in _steps(stored["normalizer"], "normalizers")):
        raise _unknown(source, f"the normalizer {shown(stored['normalizer'])}", "none and NFC")
    merges = [" ".join(merge) for merge in _merges(stored)]
    # GGUF has no empty lists.
    table = {"merges": Value(merges, GGUFValueType.ARRAY, GGUFValueType.STRING)} if merges else {}
    return {"model": text("gpt2"), "pre": text(known[0]), **_tables(tokens), **table}


def _sentencepiece(stored: Mapping[str, Any], tokens: list[tuple[str, TokenType]], source: Source) -> dict[str, Value]:
    """The earlier a merge makes a token, the higher its score."""
    order: dict[str, int] = {}
    for left, right in _merges(stored):
        order.setdefault(left + right, len(order))
    unknown, typed, scores = stored["model"]["unk_token"], [], []
    for token, kind in tokens:
        score = -float(order.get(token, len(order)))
        if token == unknown:
            kind, score = TokenType.UNKNOWN, _MARKED_SCORE
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kind, score = TokenType.BYTE, 0.0
        elif kind == TokenType.USER_DEFINED:
            # They are searched in the original text, before its spaces become "▁".
            token, score = token.replace("▁", " "), _MARKED_SCORE
        elif kind != TokenType.NORMAL:
            score = _MARKED_SCORE
        typed.append((token, kind))
        scores.append(score)
    return {
        "model": text("llama"),
        "pre": text("default"),
        **_tables(typed),
        "scores": Value(scores, GGUFValueType.ARRAY, GGUFValueType.FLOAT32),
        "add_space_prefix": flag(_begins_with_space(stored, source)),
    }


def _begins_with_space(stored: Mapping[str, Any], source: Source) -> bool:
    """Whether texts get a leading space, for a tokenizer that turns spaces into "▁" and does not split words."""
    steps = _steps(stored["normalizer"], "normalizers") + _steps(stored["pre_tokenizer"], "pretokenizers")
    prefix = replaces = False
    for step in steps:
        if step == {"type": "Prepend", "prepend": "▁"}:
            prefix = True
        elif step == {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
            replaces = True
        elif step["type"] == "Metaspace" and step["replacement"] == "▁" and step.get("split") is False:
            prefix, replaces = prefix or step.get("prepend_scheme") != "never", True
        # Gemma splits at spaces after it has replaced them all.
        elif not (step["type"] == "Split" and step["pattern"] == {"String": " "} and replaces):
            raise _unknown(source, f"the step {shown(step)}", "whole texts with ▁ for spaces")
    if not replaces:
        raise _unknown(source, "byte fallback and spaces as they are", "whole texts with ▁ for spaces")
    return prefix


def _steps(step: Any, inner: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, one by one; none for None."""
    if step is None:
        return []
    return [one for part in step[inner] for one in _steps(part, inner)] if step["type"] == "Sequence" else [step]


def _plain_words(step: Any) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, without the field that changes offsets and no words."""
    steps = _steps(step, "pretokenizers")
    return [{name: value for name, value in one.items() if name != "trim_offsets"} for one in steps]


def _words_of(make: Callable[[], pre_tokenizers.PreTokenizer]) -> list[dict[str, Any]]:
    """The same for a pre-tokenizer of `WORDS`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = make()
    return _plain_words(json.loads(tokenizer.to_str())["pre_tokenizer"])


def _merges(stored: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(left, right) for left, right in stored["model"]["merges"]]


def _special_ids(
    tokenizer: Tokenizer, config: Config, settings: Mapping[str, Any], generation: Mapping[str, Any]
) -> dict[str, int]:
    """Ids of the special tokens by GGUF name, from the tokenizer or else from the configurations."""
    found: dict[str, int] = {}
    for name, short in SPECIAL.items():
        named = settings.get(name)
        content = named.get("content") if isinstance(named, dict) else named
        numbers = [tokenizer.token_to_id(content) if isinstance(content, str) else None]
        numbers += [table.get(f"{name}_id") for table in (config, generation)]
        # A configuration may name several end tokens.
        numbers = [number[0] if isinstance(number, list) and number else number for number in numbers]
        valid = [number for number in numbers if type(number) is int and 0 <= number < config["vocab_size"]]
        if valid:
            found[short] = valid[0]
    return found


def _ends(tokenizer: Tokenizer, ids: Mapping[str, int], settings: Mapping[str, Any], source: Source) -> dict[str, bool]:
    """Whether texts begin with BOS and end with EOS, as the settings say or else as the tokenizer does."""
    whole, inner = tokenizer.encode("a").ids, tokenizer.encode("a", add_special_tokens=False).ids
    start = next((i for i in range(len(whole)) if whole[i : i + len(inner)] == inner), len(whole))
    around = {"bos": whole[:start], "eos": whole[start + len(inner) :]}
    found = {}
    for name, numbers in around.items():
        asked = settings.get(f"add_{name}_token")
        if numbers and numbers != [ids.get(name)]:
            raise _unknown(source, f"the tokens {numbers} around every text", "one BOS and one EOS")
        found[name] = asked if asked is True or asked is False else bool(numbers)
    return found


def chat_template(files: Mapping[str, bytes], settings: Mapping[str, Any]) -> str | None:
    """The chat template, preferably from its own file; among several, the one called default."""
    given = files["chat_template.jinja"].decode() if "chat_template.jinja" in files else settings.get("chat_template")
    if isinstance(given, list):
        given = next((each.get("template") for each in given if each.get("name") == "default"), None)
    return given if isinstance(given, str) else None


def _check(stored: Mapping[str, Any], values: Mapping[str, Value], architecture: str, source: Source) -> None:
    """Raise if the merges of the tokenizer differ when it is read back."""
    metadata = {"general.architecture": architecture} | {key: value for key, (value, *_) in values.items()}
    back = json.loads(build_tokenizer(metadata, source.path).to_str())
    # Special tokens are found before any merge.
    apart = {added["content"] for added in stored["added_tokens"] if added["special"]}
    if not architecture.startswith("gemma") and metadata[f"{_PREFIX}model"] == "llama":
        apart |= {added["content"] for added in stored["added_tokens"]}
    before, after = ([merge for merge in _merges(each) if "".join(merge) not in apart] for each in (stored, back))
    made, made_back = (list(dict.fromkeys(map("".join, merges))) for merges in (before, after))
    if set(before) != set(after) or made != made_back:
        raise _unknown(source, "merges that do not follow from an order of its tokens", "such as do")

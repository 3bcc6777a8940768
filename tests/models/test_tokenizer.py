"""Tokenizers from GGUF metadata and folders, and what an export hands on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseopt.models import ModelError, encode_text, load_tokenizer, open_source
from sparseopt.models.gguf_tokenizer import build_tokenizer
from tests.models.tiny import VOCAB, random_tensors, tiny_config, write_folder, write_gguf

TEXT = "hello the 2024 hell!\n<|stop|>he's"


@pytest.fixture
def source(tmp_path: Path, rng: np.random.Generator) -> Any:
    return open_source(write_gguf(tmp_path / "m.gguf", tiny_config(), random_tensors(tiny_config(), rng)))


def ids(*tokens: str) -> list[int]:
    return [VOCAB.index(token) for token in tokens]


def test_byte_level_tokens_from_gguf(source: Any) -> None:
    tokenizer = load_tokenizer(source)
    got = encode_text(tokenizer, TEXT)
    assert got.dtype == np.int32
    hello = ["he", "ll", "o", "Ġt", "he"]
    digits = ["Ġ", "2", "0", "2", "4"]
    rest = ["Ġ", "he", "ll", "!", "Ċ", "<|stop|>", "he", "'", "s"]
    assert got.tolist() == ids(*hello, *digits, *rest)
    assert tokenizer.decode(got.tolist(), skip_special_tokens=False) == TEXT


def test_an_export_gives_the_same_ids(tmp_path: Path, source: Any) -> None:
    from transformers import AutoTokenizer

    out = tmp_path / "out"
    write_folder(out, source.config, {name: source.read(name) for name in source.tensors})
    for name, content in source.sidecars().items():
        (out / name).write_bytes(content)
    expected = encode_text(load_tokenizer(source), TEXT).tolist()
    assert encode_text(load_tokenizer(open_source(out)), TEXT).tolist() == expected
    theirs = AutoTokenizer.from_pretrained(out)
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == expected
    assert theirs.decode(expected) == TEXT
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)
    assert "<|start|>{{ m['content'] }}<|stop|>" in theirs.chat_template


def test_a_saved_cut_or_padding_is_taken_off(tmp_path: Path, source: Any) -> None:
    tokenizer = load_tokenizer(source)
    whole = encode_text(tokenizer, TEXT).tolist()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=64)
    write_folder(tmp_path, source.config, {})
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert encode_text(load_tokenizer(open_source(tmp_path)), TEXT).tolist() == whole


def test_folders_without_a_usable_tokenizer(tmp_path: Path) -> None:
    source = open_source(write_folder(tmp_path, tiny_config(), {}))
    with pytest.raises(ModelError, match=r"no tokenizer\.json and transformers cannot make one"):
        load_tokenizer(source)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="no valid tokenizer"):
        load_tokenizer(source)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"tokenizer.ggml.tokens": []}, "carries no tokenizer"),
        ({"tokenizer.ggml.model": "bert"}, "kind 'bert'; known are 'gpt2' and 'llama'"),
        ({"tokenizer.ggml.pre": "odd"}, "cuts words by 'odd'.*known are smollm, gpt-2, llama-bpe"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "corrupt table tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.eos_token_id": 49}, "eos_token_id = 49, which is none of its 49 tokens"),
        ({"tokenizer.ggml.merges": ["q z"]}, "a merge whose parts or whole are no token"),
        ({"tokenizer.ggml.model": "llama"}, "49 tokens and 0 scores"),
    ],
)
def test_metadata_that_describe_no_known_tokenizer(changes: dict, text: str) -> None:
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": VOCAB}
    with pytest.raises(ModelError, match=text):
        build_tokenizer(metadata | changes, Path("m.gguf"))


@pytest.mark.parametrize(
    ("pre", "words"), [("smollm", [*"1234", "Ġab"]), ("gpt-2", ["1234", "Ġab"]), ("llama-bpe", ["123", "4", "Ġab"])]
)
def test_words_are_cut_as_named(pre: str, words: list[str]) -> None:
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": VOCAB}
    tokenizer = build_tokenizer(metadata, Path("m.gguf"))
    assert [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str("1234 ab")] == words


def test_sentencepiece_tokens_from_gguf() -> None:
    plain = ["▁", "h", "e", "l", "o", "▁h", "el", "lo", "hel", "▁hello", "▁hel"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *plain]
    # Better pieces have higher scores: "▁h" first, then "el", then "lo", ...
    scores = [0.0] * 259 + [-50.0] * 5 + [-1.0, -2.0, -3.0, -4.0, -6.0, -5.0]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(plain),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer = build_tokenizer(metadata, Path("m.gguf"))
    assert tokenizer.encode("hello", add_special_tokens=False).tokens == ["▁hello"]
    assert tokenizer.encode("hello").tokens == ["<s>", "▁hello"]
    assert tokenizer.encode("hel é", add_special_tokens=False).tokens == ["▁hel", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("hello hel é").ids) == "hello hel é"

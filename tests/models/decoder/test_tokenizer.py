"""Tokenizers from GGUF metadata and folders, and in exports."""

import json
import re
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from sparseopt.models import ModelError, encode_text, load_tokenizer, open_source, start_token
from sparseopt.models.files.gguf.tokenizer import build_tokenizer
from tests.models.tiny import (
    MERGES,
    VOCAB,
    byte_level_metadata,
    random_tensors,
    sentencepiece_metadata,
    tiny_config,
    write_folder,
    write_gguf,
)

TEXT = "hello the 2024 hell!\n<|stop|>he's"


@pytest.fixture
def source(tmp_path: Path, rng: np.random.Generator) -> Any:
    return open_source(write_gguf(tmp_path / "m.gguf", tiny_config(), random_tensors(tiny_config(), rng)))


def ids(*tokens: str) -> list[int]:
    return [VOCAB.index(token) for token in tokens]


def test_byte_level_tokens_from_gguf(source):
    tokenizer = load_tokenizer(source)
    got = encode_text(tokenizer, TEXT)
    assert got.dtype == np.int32
    hello = ["he", "ll", "o", "Ġt", "he"]
    digits = ["Ġ", "2", "0", "2", "4"]
    rest = ["Ġ", "he", "ll", "!", "Ċ", "<|stop|>", "he", "'", "s"]
    assert got.tolist() == ids(*hello, *digits, *rest)
    assert tokenizer.decode(got.tolist(), skip_special_tokens=False) == TEXT


def test_an_export_gives_the_same_ids(tmp_path, source):
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


def test_a_saved_cut_or_padding_is_taken_off(tmp_path, source):
    tokenizer = load_tokenizer(source)
    whole = encode_text(tokenizer, TEXT).tolist()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=64)
    write_folder(tmp_path, source.config, {})
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert encode_text(load_tokenizer(open_source(tmp_path)), TEXT).tolist() == whole


DIGITS = {"smollm": [*"1234"], "gpt-2": ["1234"], "llama-bpe": ["123", "4"], "qwen2": [*"1234"]}


@pytest.mark.parametrize(("pre", "digits"), DIGITS.items())
def test_words_are_cut_as_named(pre, digits):
    tokenizer = build_tokenizer(byte_level_metadata(pre), Path("m.gguf"))
    assert [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str("1234 ab")] == [*digits, "Ġab"]


def test_qwen2_cuts_and_normalises_as_the_reference():
    from transformers import Qwen2Tokenizer

    metadata = byte_level_metadata("qwen2")
    ours = build_tokenizer(metadata, Path("m.gguf"))
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    theirs = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(VOCAB)}, merges=merges).backend_tokenizer
    for text in ["he's HE'S 123.45", "  the \n\n  the\t", "cafe\u0301 caf\u00e9", "日本語 ok", "a\r\n b", "x" * 30]:
        cut = ours.normalizer.normalize_str(text)
        assert cut == theirs.normalizer.normalize_str(text)
        assert ours.pre_tokenizer.pre_tokenize_str(cut) == theirs.pre_tokenizer.pre_tokenize_str(cut), text
        assert ours.encode(text).ids == theirs.encode(text).ids, text


TRICKY = [
    *("hello the hell", " hello", "the  the   the    the", "\n\n\nhello\n", "<b>hello<b> the", "<eos>hello <bos>"),
    *("aaaa aaa", "é e\u0301 é", "日本 🦙\t", "Hello, 12", "a▁b", " ", ""),
]


def pieces_by_definition(text: str, metadata: dict, prefix: bool) -> list[str]:
    """SentencePiece's BPE by definition: marked tokens are cut out, then the best pair is merged, leftmost first."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    score = {
        token: value
        for token, value, kind in zip(tokens, metadata["tokenizer.ggml.scores"], kinds, strict=True)
        if kind == 1
    }
    marked = sorted(
        (token for token, kind in zip(tokens, kinds, strict=True) if kind in (2, 3, 4)), key=len, reverse=True
    )
    found: list[str] = []
    for part in re.split("(" + "|".join(map(re.escape, marked)) + ")", text):
        if part in marked:
            found.append("▁" * len(part) if part.isspace() and part[0] == " " else part)
            continue
        symbols = list(("▁" if prefix and part else "") + part.replace(" ", "▁"))
        while pairs := [
            (score[left + right], -i) for i, (left, right) in enumerate(pairwise(symbols)) if left + right in score
        ]:
            i = -max(pairs)[1]
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        for symbol in symbols:
            found += [symbol] if symbol in score else [f"<0x{byte:02X}>" for byte in symbol.encode()]
    return found


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_sentencepiece_merges_by_definition(architecture):
    metadata = sentencepiece_metadata(prefix=False) | {"general.architecture": architecture}
    tokenizer = build_tokenizer(metadata, Path("m.gguf"))
    for text in TRICKY:
        got = tokenizer.encode(text, add_special_tokens=False)
        assert got.tokens == pieces_by_definition(text, metadata, prefix=False), text
        assert tokenizer.decode(got.ids, skip_special_tokens=False) == text.replace("▁", " "), text


def test_a_prefixed_space_goes_before_every_stretch_of_text():
    metadata = sentencepiece_metadata(prefix=True)
    metadata["tokenizer.ggml.token_type"] = [1 if kind == 4 else kind for kind in metadata["tokenizer.ggml.token_type"]]
    # Plain tokens need plain scores, and no spaces.
    plain = ["qq", "ww", "xx", "yy", "zz"]
    metadata["tokenizer.ggml.tokens"][4:9], metadata["tokenizer.ggml.scores"][4:9] = plain, [-900.0] * 5
    tokenizer = build_tokenizer(metadata, Path("m.gguf"))
    for text in TRICKY:
        got = tokenizer.encode(text, add_special_tokens=False)
        assert got.tokens == pieces_by_definition(text, metadata, prefix=True), text
    assert tokenizer.encode("hello<eos>the").tokens == ["<bos>", "▁hello", "<eos>", "▁the"]
    assert tokenizer.decode(tokenizer.encode("hello  the").ids) == "hello  the"


def test_text_begins_and_ends_as_the_file_says():
    metadata = sentencepiece_metadata(prefix=False)
    for bos, eos in product((True, False), repeat=2):
        flags = {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
        tokenizer = build_tokenizer(metadata | flags, Path("m.gguf"))
        ends = ["<bos>"] * bos, ["<eos>"] * eos
        assert tokenizer.encode("lo").tokens == [*ends[0], "lo", *ends[1]]
        assert tokenizer.encode("lo", "he").tokens == [*ends[0], "lo", *ends[1], *ends[0], "he", *ends[1]]


def test_sentencepiece_tokens_from_gguf():
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


def with_tokenizer(folder: Path, tokenizer: Any, config: dict | None = None, **settings: Any) -> Any:
    """A folder with this tokenizer, and with a tokenizer_config.json if there is anything to say in it."""
    write_folder(folder, config or tiny_config(), {})
    tokenizer.save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return open_source(folder)


def beginning_with(token: str) -> Any:
    """The tokenizer of `source`, with a post-processor that puts a token in front and one behind."""
    tokenizer = build_tokenizer(byte_level_metadata("smollm"), Path("m.gguf"))
    number = VOCAB.index(token)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[token, "$A", token], special_tokens=[(token, number)]
    )
    return tokenizer


def test_text_begins_with_what_the_tokenizer_itself_puts_in_front(tmp_path, source):
    plain = load_tokenizer(source)
    for name, tokenizer, settings, expected in [
        ("a", plain, {}, None),
        ("b", beginning_with("<|start|>"), {}, 1),
        ("c", beginning_with("<|stop|>"), {"bos_token": "<|start|>"}, 2),
        ("d", plain, {"add_bos_token": True, "bos_token": {"content": "<|stop|>"}}, 2),
        ("e", plain, {"add_bos_token": True}, 1),  # bos_token_id of the model
        ("f", plain, {"add_bos_token": True, "bos_token": None}, None),
        ("g", beginning_with("<|start|>"), {"add_bos_token": False}, None),
    ]:
        made = with_tokenizer(tmp_path / name, tokenizer, **settings)
        assert start_token(made, load_tokenizer(made)) == expected, name
        assert start_token(made, load_tokenizer(made), "no") is None


def test_yes_takes_the_named_token_and_refuses_a_tokenizer_without(tmp_path, source):
    plain = load_tokenizer(source)
    assert start_token(source, plain, "yes") == 1  # tokenizer.ggml.bos_token_id
    for name, config, settings in [
        ("a", tiny_config(), {"bos_token": None}),
        ("b", tiny_config(bos_token_id=None), {}),
    ]:
        made = with_tokenizer(tmp_path / name, plain, config, **settings)
        with pytest.raises(ModelError, match=r"has no BOS token .*bos must be auto or no"):
            start_token(made, plain, "yes")
    with pytest.raises(ModelError, match="bos must be one of auto, yes, no, given 'si'"):
        start_token(source, plain, "si")


def test_a_gguf_file_says_whether_text_begins_with_bos(tmp_path, source):
    tokenizer = load_tokenizer(source)
    assert start_token(source, tokenizer) is None  # add_bos_token is false there
    metadata = sentencepiece_metadata(prefix=False)
    begins = build_tokenizer(metadata | {"tokenizer.ggml.add_bos_token": True}, Path("m.gguf"))
    assert start_token(source, begins) == metadata["tokenizer.ggml.bos_token_id"]
    silent = {name: value for name, value in byte_level_metadata("qwen2").items() if "add_bos" not in name}
    silent |= {"tokenizer.ggml.bos_token_id": 1}
    for words, expected in (("qwen2", None), ("llama-bpe", 1)):
        assert start_token(source, build_tokenizer(silent | {"tokenizer.ggml.pre": words}, Path("m.gguf"))) == expected

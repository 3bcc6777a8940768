"""Tokenizers from GGUF metadata and folders, and in exports."""

import json
import re
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from sparseopt.models import ModelError, encode_text, load_tokenizer, open_source, start_token
from sparseopt.models.files.gguf.tokenizer import build_tokenizer
from tests.fuzz.damage import refused
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
def source(tmp_path, rng):
    return open_source(write_gguf(tmp_path / "m.gguf", tiny_config(), random_tensors(tiny_config(), rng)))


def ids(*tokens):
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


def test_an_export_gives_the_same_ids_and_a_saved_cut_or_padding_is_taken_off(tmp_path, source):
    """`tests.oracle.test_families` has the ids of transformers."""
    write_folder(tmp_path, source.config, {})
    for name, content in source.sidecars().items():
        (tmp_path / name).write_bytes(content)
    tokenizer = load_tokenizer(source)
    whole = encode_text(tokenizer, TEXT).tolist()
    assert encode_text(load_tokenizer(open_source(tmp_path)), TEXT).tolist() == whole
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert encode_text(load_tokenizer(open_source(tmp_path)), TEXT).tolist() == whole


def test_words_are_cut_as_named():
    for pre, digits in {"smollm": [*"1234"], "gpt-2": ["1234"], "llama-bpe": ["123", "4"], "qwen2": [*"1234"]}.items():
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


def pieces_by_definition(text, metadata, prefix):
    """SentencePiece's BPE by definition: marked tokens are cut out, then the best pair is merged, leftmost first."""
    columns = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    rows = list(zip(*columns, strict=True))
    score = {token: value for token, value, kind in rows if kind == 1}
    marked = sorted((token for token, _, kind in rows if kind in (2, 3, 4)), key=len, reverse=True)
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


def plain_pieces(prefix):
    """Without user-defined tokens: plain tokens have plain scores, and no spaces."""
    metadata = sentencepiece_metadata(prefix)
    if prefix:
        del metadata["tokenizer.ggml.add_space_prefix"]  # the default
    metadata["tokenizer.ggml.token_type"] = [1 if kind == 4 else kind for kind in metadata["tokenizer.ggml.token_type"]]
    metadata["tokenizer.ggml.tokens"][4:9] = ["qq", "ww", "xx", "yy", "zz"]
    metadata["tokenizer.ggml.scores"][4:9] = [-900.0] * 5
    return metadata


MERGING = {
    **{name: (sentencepiece_metadata(False) | {"general.architecture": name}, False) for name in ("llama", "gemma2")},
    "a space before": (plain_pieces(True), True),
}


@pytest.mark.parametrize(("metadata", "prefix"), MERGING.values(), ids=MERGING)
@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(TRICKY) | st.lists(st.sampled_from(["hello", "the", "<b>", "<eos>", *" \naeloé日"])).map("".join)
)
def test_sentencepiece_merges_by_definition(metadata, prefix, text):
    # Longer runs than the longest token of spaces, here 4 and in real vocabularies 31, depend on who cuts them.
    text = re.sub(" {5,}", 4 * " ", text)
    tokenizer = build_tokenizer(metadata, Path("m.gguf"))
    got = tokenizer.encode(text, add_special_tokens=False)
    assert got.tokens == pieces_by_definition(text, metadata, prefix), text
    if not prefix:
        assert tokenizer.decode(got.ids, skip_special_tokens=False) == text.replace("▁", " "), text


def test_a_prefixed_space_goes_before_every_stretch_of_text():
    tokenizer = build_tokenizer(plain_pieces(prefix=True), Path("m.gguf"))
    assert tokenizer.encode("hello<eos>the").tokens == ["<bos>", "▁hello", "<eos>", "▁the"]
    assert tokenizer.encode("hel é", add_special_tokens=False).tokens[-1] == "é"
    assert tokenizer.decode(tokenizer.encode("hello  the").ids) == "hello  the"


def test_text_begins_and_ends_as_the_file_says():
    metadata = sentencepiece_metadata(prefix=False)
    for bos, eos in product((True, False), repeat=2):
        flags = {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
        tokenizer = build_tokenizer(metadata | flags, Path("m.gguf"))
        ends = ["<bos>"] * bos, ["<eos>"] * eos
        assert tokenizer.encode("lo").tokens == [*ends[0], "lo", *ends[1]]
        assert tokenizer.encode("lo", "he").tokens == [*ends[0], "lo", *ends[1], *ends[0], "he", *ends[1]]


def with_tokenizer(folder, tokenizer, config=None, **settings):
    """A folder with this tokenizer and tokenizer_config.json."""
    write_folder(folder, config or tiny_config(), {})
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return open_source(folder)


def beginning_with(token):
    """The tokenizer of `source`, with a post-processor that puts a token in front and one behind."""
    tokenizer = build_tokenizer(byte_level_metadata("smollm"), Path("m.gguf"))
    special = [(token, VOCAB.index(token))]
    tokenizer.post_processor = processors.TemplateProcessing(single=[token, "$A", token], special_tokens=special)
    return tokenizer


def test_text_begins_with_what_the_tokenizer_itself_puts_in_front(tmp_path, source):
    plain = load_tokenizer(source)
    for number, (tokenizer, said, expected) in enumerate(
        [
            (plain, {}, None),
            (beginning_with("<|start|>"), {}, 1),
            (beginning_with("<|stop|>"), {"bos_token": "<|start|>"}, 2),
            (plain, {"add_bos_token": True, "bos_token": {"content": "<|stop|>"}}, 2),
            (plain, {"add_bos_token": True}, 1),  # bos_token_id of the model
            (plain, {"add_bos_token": True, "bos_token": None}, None),
            (beginning_with("<|start|>"), {"add_bos_token": False}, None),
        ]
    ):
        made = with_tokenizer(tmp_path / str(number), tokenizer, **said)
        assert start_token(made, load_tokenizer(made)) == expected, number
        assert start_token(made, load_tokenizer(made), "no") is None


def test_yes_takes_the_named_token_and_refuses_a_tokenizer_without(tmp_path, source):
    plain = load_tokenizer(source)
    assert start_token(source, plain, "yes") == 1  # tokenizer.ggml.bos_token_id
    for made in (
        with_tokenizer(tmp_path / "a", plain, bos_token=None),
        with_tokenizer(tmp_path / "b", plain, tiny_config(bos_token_id=None)),
    ):
        refused(ModelError, r"has no BOS token .*bos must be auto or no", start_token, made, plain, "yes")
    refused(ModelError, "bos must be one of auto, yes, no, given 'si'", start_token, source, plain, "si")


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

"""GGUF files and tokenizers that are damaged or hostile."""

import copy
import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseopt.models import ModelError, load_tokenizer, open_model, open_source
from sparseopt.models.files.gguf.header import read_header
from sparseopt.models.files.gguf.tokenizer import build_tokenizer, tokenizer_config
from tests.fuzz.damage import a_value_or, damaged, damaged_json, damaged_values, fuzzed, refused, written
from tests.fuzz.model_seeds import folders, ggufs, tokenizer
from tests.models import tiny


def opened(file):
    source = open_source(file)
    source.sidecars()
    open_model(source)


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(values, tensors=(), data=b""):
    """A file of metadata (key, type, bytes) and entries of the tensor table."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    head += b"".join(text(key) + struct.pack("<I", kind) + raw for key, kind, raw in values) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def with_tensors(*entries):
    """A file of llama with this tensor table: names, sizes, types and offsets."""
    table = [text(name) + struct.pack(f"<I{len(n)}QIQ", len(n), *n, kind, at) for name, n, kind, at in entries]
    return gguf([LLAMA], table, bytes(32))


def head(version, tensors, values, rest=b"", order="<"):
    return b"GGUF" + struct.pack(f"{order}IQQ", version, tensors, values) + rest


def with_tokens(tokens, **more):
    """A file of llama with a tokenizer of these tokens."""
    table = struct.pack("<IQ", 8, len(tokens)) + b"".join(map(text, tokens))
    scores = struct.pack(f"<IQ{len(tokens)}f", 6, len(tokens), *range(len(tokens)))
    values = {"tokens": (9, table), "model": (8, text("llama")), "scores": (9, scores)} | more
    return gguf([LLAMA, *((f"tokenizer.ggml.{name}", kind, raw) for name, (kind, raw) in values.items())])


LLAMA = ("general.architecture", 8, text("llama"))
NESTED = b"".join(struct.pack("<IQ", 9, 1) for _ in range(5000)) + struct.pack("<IQ", 0, 0)
FILES = [
    *((content, "does not begin with 'GGUF'") for content in (b"", b"PK\x03\x04" + bytes(60))),
    *((head(version, 0, 0), f"GGUF version {version}") for version in (1, 9)),
    (head(3, 0, 0, order=">"), "GGUF version 50331648"),
    *((head(3, *counts), "items claimed") for counts in ((2**63, 0), (0, 2**63))),
    (head(3, 0, 1, b"\xff" * 32), "bytes wanted"),
    (head(3, 0, 1, struct.pack("<Q", 1) + b"\xff" + bytes(20)), "not UTF-8"),
    (gguf([("a", 8, struct.pack("<Q", 2) + b"\xff\xfe")]), "not UTF-8"),
    (gguf([(*LLAMA[:2], struct.pack("<Q", 2**62))]), "bytes wanted"),
    (gguf([("a", 9, struct.pack("<IQ", 0, 2**62))]), "items claimed"),
    (gguf([("a", 9, NESTED)]), "nested arrays"),
    (gguf([LLAMA, LLAMA]), "given twice"),
    (gguf([("a", 99, b"")]), "unknown metadata type 99"),
    (gguf([LLAMA, ("general.alignment", 4, bytes(4))]), "general.alignment is 0"),
    (gguf([LLAMA, ("general.alignment", 10, b"\xff" * 8)]), "general.alignment"),
    (gguf([]), "unknown architecture None"),
    (gguf([("general.architecture", 4, bytes(4))]), "unknown architecture 0"),
    (gguf([(*LLAMA[:2], text("mamba"))]), "unknown architecture 'mamba'; known are llama, qwen2"),
    (gguf([LLAMA, ("llama.block_count", 4, b"\xff" * 4)]), "at most 10,000 make sense"),
    (with_tensors(("a", [4], 0, 0), ("a", [4], 0, 0)), "name is given twice"),
    (with_tensors(("a", [4], 0, 0), ("b", [4], 0, 0)), "in the tensor before it"),
    *((with_tensors(("a", sizes, 0, 0)), "has the sizes") for sizes in ([2**63] * 4, [1] * 5)),
    (with_tensors(("a", [4], 0, 2**62)), "ends at byte"),
    (with_tensors(("a", [4], 999, 0)), "unknown type 999"),
    (with_tokens(["a", "b", "a"]), "has a token twice"),
    (with_tokens(["a", "a" * 10**6]), "has a token of 1000000 characters"),
    (with_tokens(["a"], bos_token_id=(4, struct.pack("<I", 7))), "none of its 1 tokens"),
    (with_tokens(["$:x", "b"], bos_token_id=(4, bytes(4))), "cannot be built"),
]


@pytest.mark.parametrize(("content", "part"), FILES, ids=lambda value: repr(value)[-40:])
def test_a_bad_gguf_file(tmp_path, content, part):
    refused(ModelError, part, opened, written(tmp_path, **{"m.gguf": content}) / "m.gguf")


def test_rows_of_another_number_of_heads_than_the_file_says(tmp_path):
    key = b"llama.attention.head_count" + struct.pack("<I", 4)
    four, five = (key + struct.pack("<I", heads) for heads in (4, 5))
    assert ggufs()[-1].count(four) == 1
    source = open_source(written(tmp_path, **{"m.gguf": ggufs()[-1].replace(four, five)}) / "m.gguf")
    refused(ModelError, "has no rows of 5 heads", source.read, "model.layers.0.self_attn.q_proj.weight")


def test_every_cut_of_a_gguf_file_is_noticed(tmp_path):
    file, whole = tmp_path / "a.gguf", ggufs()[-1]
    file.write_bytes(whole)
    # The file may end with padding after its last tensor; a cut in it loses nothing.
    end = max(tensor.start + tensor.nbytes for tensor in read_header(file).tensors.values())
    for length in (*range(200), *range(200, end, 997), end - 1):
        file.write_bytes(whole[:length])
        refused(ModelError, "truncated|no GGUF file", open_source, file)


PIECES = {name.removeprefix("tokenizer.ggml."): value for name, value in tiny.sentencepiece_metadata(True).items()}
METADATA = [
    ({"tokens": ["\ud800", *tiny.VOCAB[1:]]}, "cannot be built"),
    ({"tokens": []}, "carries no tokenizer"),
    ({"tokens": [1, 2]}, "corrupt table tokenizer.ggml.tokens"),
    ({"model": "bert"}, "kind 'bert'; known are 'gpt2' and 'llama'"),
    ({"pre": "odd"}, "splits words by 'odd'.*known are smollm, gpt-2, llama-bpe, qwen2"),
    ({"eos_token_id": 49}, "eos_token_id = 49, which is none of its 49 tokens"),
    ({"merges": ["q z"]}, "a merge whose parts or whole are no token"),
    ({"model": "llama"}, "49 tokens and 0 scores"),
    ({"token_type": [1] * 50}, "49 tokens and 50 token types"),
    (PIECES | {"remove_extra_whitespaces": True}, "normalises text"),
    (PIECES | {"precompiled_charsmap": [1]}, "normalises text"),
]


@pytest.mark.parametrize(("changes", "part"), METADATA)
def test_a_bad_tokenizer_of_a_gguf_file(tmp_path, changes, part):
    fields = {"model": "gpt2", "pre": "smollm", "tokens": tiny.VOCAB} | changes
    metadata = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    refused(ModelError, part, build_tokenizer, metadata, tmp_path / "m.gguf")


def panicking():
    """A tokenizer at which the tokenizers package panics: the merge is "" and "x"."""
    stored = copy.deepcopy(tokenizer())
    stored["model"]["vocab"] |= {"": len(stored["model"]["vocab"])}
    stored["model"]["continuing_subword_prefix"] = "longer than any token"
    return json.dumps(stored).encode()


def test_a_bad_tokenizer_of_a_folder(tmp_path):
    source = open_source(written(tmp_path, **folders()[0]))
    refused(ModelError, r"no tokenizer\.json and transformers cannot make one", load_tokenizer, source)
    for content in (b"{}", panicking()):
        source = open_source(written(tmp_path, **{"tokenizer.json": content}))
        refused(ModelError, "is no valid tokenizer", load_tokenizer, source)


def test_what_is_damaged_is_accepted_whole(tmp_path):
    for content in ggufs():
        opened(written(tmp_path, **{"m.gguf": content}) / "m.gguf")


@fuzzed
@given(data=st.data())
def test_a_damaged_gguf_file(tmp_path, data):
    content = data.draw(st.sampled_from(ggufs()))
    # Most of a file is numbers; damage belongs into what describes them.
    content = data.draw(damaged(content[:12_000])) + content[12_000:]
    file = written(tmp_path, **{"m.gguf": content}) / "m.gguf"
    with a_value_or(ModelError):
        opened(file)
        source = open_source(file)
        for name in source.tensors:
            source.read(name)


TABLES = [*map(tiny.byte_level_metadata, ("qwen2", "smollm")), tiny.sentencepiece_metadata(True)]
SEEDS = [{"general.architecture": "llama", "tokenizer.ggml.add_bos_token": True} | table for table in TABLES]


@fuzzed
@given(metadata=damaged_values(*SEEDS))
def test_a_damaged_tokenizer_of_a_gguf_file(metadata):
    with a_value_or(ModelError):
        build_tokenizer(metadata, Path("m.gguf")).encode("hello  the 42 é\n")
        json.dumps(tokenizer_config(metadata))


@fuzzed
@given(content=damaged_json(tokenizer()))
def test_a_damaged_tokenizer_of_a_folder(tmp_path, content):
    folder = written(tmp_path, **folders()[0], **{"tokenizer.json": content})
    with a_value_or(ModelError):
        load_tokenizer(open_source(folder))

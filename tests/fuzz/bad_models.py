"""Bad models: safetensors and GGUF files, configurations, indices, tokenizers and pickles."""

import json
import os
import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparseopt.models import load_tokenizer, open_model, open_source
from sparseopt.models.files.folder import PACKED_INDEX
from sparseopt.models.files.gguf.tokenizer import build_tokenizer
from sparseopt.models.files.safetensors import read_header
from tests.fuzz.making import Make, reading, write
from tests.fuzz.targets import seed_folders, seed_gguf, seed_tokenizer, with_header
from tests.models.tiny import VOCAB, sentencepiece_metadata
from tests.oracle.make_golden import CASES

INF = float("inf")
# Negative, with a positive product, beyond 64 bits, behind a zero, too many axes, and no whole numbers.
SHAPES: tuple[Any, ...] = (
    *([-4], [-2, -2], [-6, -4], [2**62, 2**62], [2**40, 2**40], [0, 2**62], [1] * 1000, [6, 4] + [1] * 63),
    *([4, True], [24, True], [4.7], [6, 4.0], [INF], "4", "64"),
)

# safetensors ---------------------------------------------------------------------------


def _safetensors(content: bytes) -> Make:
    return reading(read_header, "model.safetensors", content)


def _tensors(header: Any, data: int = 16) -> Make:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return _safetensors(with_header(raw, bytes(data)))


def _entry(**changes: Any) -> Make:
    return _tensors({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes})


NO_SHAPE, NO_PLACE = (f"corrupt header.*{what}" for what in ("an impossible shape", "two whole numbers"))
NO_TEXT = "corrupt header.*metadata that is no text"
SAFETENSORS = (
    ("an empty file", _safetensors(b""), "truncated or no safetensors file"),
    ("a header longer than the file", _safetensors(b"\xff" * 8 + b"{}"), "claims a header"),
    ("a cut header", _safetensors(with_header(b'{"a": {"dty', b"")), "corrupt header"),
    ("a header that is no text", _tensors(b"\xff" * 16), "corrupt header"),
    ("a header in another encoding", _tensors("{}".encode("utf-16")), "corrupt header"),
    ("a header that is a list", _tensors([1, 2]), "corrupt header.*no JSON object"),
    ("a tensor that is a number", _tensors({"a": 3}), "corrupt header"),
    ("a tensor without a place", _tensors({"a": {"dtype": "F32", "shape": [4]}}), "corrupt header"),
    ("deep nesting", _tensors(b"[" * 100_000), "corrupt header"),
    ("a name twice", _tensors(b'{"a": 1, "a": 2}'), "given twice"),
    *((f"the shape {shape!r:.30}", _entry(shape=shape), NO_SHAPE) for shape in SHAPES),
    ("an infinite offset", _entry(data_offsets=[0, INF]), NO_PLACE),
    ("infinite offsets", _entry(data_offsets=[INF, INF]), NO_PLACE),
    ("a tensor behind the end", _entry(shape=[400], data_offsets=[0, 1600]), "is truncated"),
    ("a tensor longer than its place", _entry(data_offsets=[0, 12]), "needs bytes 0 to 16"),
    ("a hole before the tensor", _entry(data_offsets=[4, 20]), "needs bytes 0 to 16"),
    ("an unknown dtype", _entry(dtype="F8_E4M3"), "stores F8_E4M3"),
    *(
        (f"the metadata {value!r}", _tensors({"__metadata__": value}, 0), NO_TEXT)
        for value in ([1], {"a": 1}, "text", None)
    ),
    ("half a character", _tensors(b'{"\\ud800": 1}'), "surrogates not allowed"),
)

# Model folders -------------------------------------------------------------------------


def _folder(which: int | None, changes: Mapping[str, bytes | None], read: Callable[[Path], Any] = open_model) -> Make:
    """A valid model, or an empty folder, with some files replaced; None leaves one out."""

    def make(folder: Path) -> Callable[[], Any]:
        files = ({} if which is None else seed_folders()[which]) | dict(changes)
        write({name: content for name, content in files.items() if content is not None}, folder)
        return lambda: read(folder)

    return make


def _config(raw: bytes | None = None, base: str | None = None, **changes: Any) -> Make:
    def make(folder: Path) -> Callable[[], Any]:
        config = json.loads(seed_folders()[0]["config.json"]) | ({} if base is None else CASES[base])
        return _folder(0, {"config.json": json.dumps(config | changes).encode() if raw is None else raw})(folder)

    return make


CONFIG = (
    ("no file", _folder(0, {"config.json": None}), "has no config.json; it holds model.safetensors"),
    ("no JSON", _config(b"{"), "no valid JSON"),
    ("bytes that are no UTF-8", _config(b'{"model_type": "\xff"}'), "no valid JSON"),
    ("a list", _config(b"[]"), "no JSON object"),
    ("nothing", _config(b"{}"), "unknown model_type None; known are"),
    ("deep nesting", _config(b'{"a": ' + b"[" * 60 + b"]" * 60 + b"}"), "nested blocks"),
    ("very deep nesting", _config(b'{"a": ' * 100_000), "no valid JSON"),
    ("a key twice", _config(b'{"model_type": "llama", "model_type": "opt"}'), "'model_type' is given twice"),
    ("NaN", _config(rms_norm_eps=float("nan")), "NaN is not allowed in JSON"),
    ("an infinite size", _config(rms_norm_eps=INF), "rms_norm_eps must be a positive float"),
    ("more than any configuration", _config(b" " * (5 * 2**20)), "which no such file needs"),
    ("ten thousand digits", _config(b'{"vocab_size": ' + b"9" * 10_000 + b"}"), "no valid JSON"),
    ("a list as model type", _config(model_type=["llama"]), "has the model_type ['llama'], expected a name"),
    ("a billion blocks", _config(num_hidden_layers=10**9),
     "holds 11 tensors, its configuration asks for 1000000000 blocks"),
    ("a truth value as blocks", _config(num_hidden_layers=True), "num_hidden_layers must be a positive int"),
    ("a size beyond 31 bits", _config(vocab_size=2**40), "at most 2147483647 is possible"),
    ("a size beyond all floats", _config(rms_norm_eps=10**400), "rms_norm_eps must be a positive float"),
    ("a negative size", _config(hidden_size=-8), "hidden_size must be a positive int"),
    ("a size that is text", _config(hidden_size="8"), "hidden_size must be a positive int"),
    ("no heads", _config(num_attention_heads=0), "num_attention_heads must be a positive int"),
    ("a rope that is a list", _config(rope_parameters=[1]), "rope_parameters must be a table"),
    ("a kind of rope that is a table", _config(rope_parameters={"rope_type": [1]}), "cannot have"),
    ("a rope's factor that is text", _config(rope_parameters={"rope_type": "linear", "factor": "x"}), "factor must be"),
    ("two ropes", _config(rope_scaling={"rope_type": "linear", "factor": 2.0}), "they differ in rope_type"),
    ("an activation that is a list", _config(hidden_act=["silu"]), "hidden_act"),
    ("many experts", _config(base="mixtral", num_local_experts=10**8), "asks for 300000000 experts"),
    ("layer types that are a number", _config(base="gemma2", layer_types=8), "cannot have"),
    *((f"dense blocks {at}", _config(base="qwen3_moe", mlp_only_layers=at), "cannot have") for at in (3, [[0]])),
    ("other weights", _config(hidden_size=16), "misshapen"),
)  # fmt: skip


def _index(weight_map: Any) -> Make:
    return _folder(1, {"model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()})


def _linked(name: str, read: Callable[[Path], Any] = open_model) -> Make:
    """A folder where one file is a link to its content elsewhere."""

    def make(folder: Path) -> Callable[[], Any]:
        inside, elsewhere = folder / "model", folder / "secret"
        inside.mkdir()
        files = {name: b"{}", **seed_folders()[1]}
        write(files, inside)
        elsewhere.write_bytes(files[name])
        (inside / name).unlink()
        (inside / name).symlink_to(os.path.relpath(elsewhere, inside))
        return lambda: read(inside)

    return make


def _tokenizer_of(folder: Path) -> Any:
    return load_tokenizer(open_source(folder))


def _copied(folder: Path) -> Any:
    return open_source(folder).sidecars()


CONFIG_FILE, EMPTY = {"config.json": b"{}"}, b""
PICKLE, RUNS_CODE = pickle.dumps({"w": [1.0]}), "pickled weights can run code when loaded and are not read"
SHARD, OTHER_INDEX = "model-00001-of-00002.safetensors", b'{"weight_map": {"w": "../x.safetensors"}}'
OUTSIDE, LINK = "files outside the folder", "is a link to .*, outside its folder, and is not followed"
ODD_NAMES = ("../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x", ".", "..", "", "x\x00y", "x" * 300)
INDEX = (
    *((f"a shard called {name!r:.30}", _index({"a": name}), OUTSIDE) for name in ODD_NAMES),
    ("half a character", _index({"a": "\ud800"}), "no valid JSON"),
    ("a shard that is a number", _index({"a": 3}), "no weight_map"),
    ("no table", _index([1]), "no weight_map"),
    ("a shard not there", _index({"a": "x.safetensors"}), "lacks shards that its index names: x.safetensors"),
    ("a shard of no weights", _index({"a": "config.json"}), "truncated or no safetensors file"),
    ("a tensor that its shard lacks", _index({"ghost": SHARD}),
     "names 1 tensors that their shards lack, the first ghost in model-00001"),
    ("a packed model", _folder(0, {"model.safetensors": None, PACKED_INDEX: EMPTY}), "which sparseopt 0.3 wrote"),
    *((f"{name} linked to elsewhere", _linked(name), LINK) for name in (
        SHARD, "config.json", "model.safetensors.index.json")),
    # transformers would convert the other names of a tokenizer.
    *((f"{name} linked to elsewhere", _linked(name, _tokenizer_of), LINK) for name in ("tokenizer.json", "vocab.json")),
    ("a tokenizer linked to elsewhere, to be copied", _linked("tokenizer.json", _copied), LINK),
    ("no path", lambda folder: lambda: open_source(folder / "no"), "does not exist; .*hf download"),
    ("a path of nobody", lambda _: lambda: open_model("~nobody-of-this-name/model"), "no model at"),
    ("a path longer than any", lambda _: lambda: open_model("x" * 300), "no model at"),
    ("a file of text", reading(open_source, "model.txt", EMPTY), "is a file but no .gguf"),
    ("a folder of text", _folder(None, {"model.txt": EMPTY}), "has no config.json; it holds model.txt"),
    ("a folder without weights", _folder(None, CONFIG_FILE | {"model.txt": EMPTY}),
     "no model.safetensors and no model.safetensors.index.json; it holds config.json, model.txt"),
    ("a folder of GGUF", _folder(None, CONFIG_FILE | {"part.gguf": EMPTY}), "give the path of one .gguf file"),
    *((f"pickled weights in {name}", _folder(None, CONFIG_FILE | {name: PICKLE}),
       f"has only pickled weights .*{RUNS_CODE}.*save_pretrained") for name in (
        "pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl", "model.npz")),
    *((f"a pickle given as a model, {name}", reading(open_source, name, PICKLE), RUNS_CODE) for name in (
        "model.bin", "model.PT", "model.npy")),
)  # fmt: skip

# GGUF ----------------------------------------------------------------------------------


def _open_gguf(file: Path) -> None:
    source = open_source(file)
    source.sidecars()
    open_model(source)


def _gguf(content: bytes) -> Make:
    return reading(_open_gguf, "m.gguf", content)


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _gguf_of(values: list[tuple[str, int, bytes]], tensors: list[bytes] = [], data: bytes = b"") -> Any:  # noqa: B006
    """A GGUF file of metadata (key, type, bytes) and entries of the tensor table."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    head += b"".join(_text(key) + struct.pack("<I", kind) + raw for key, kind, raw in values) + b"".join(tensors)
    return _gguf(head + bytes(-len(head) % 32) + data)


def _gguf_tensor(name: str, sizes: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return _text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def _table(*tensors: bytes) -> Make:
    return _gguf_of([LLAMA], list(tensors), bytes(32))


def _other_heads(folder: Path) -> Callable[[], Any]:
    """A file whose queries have rows of another number of heads than it says."""
    key = b"llama.attention.head_count" + struct.pack("<I", 4)
    content = seed_gguf()[-1]
    assert content.count(key) == 1
    changed = content.replace(key + struct.pack("<I", 4), key + struct.pack("<I", 5))
    file = write({"m.gguf": changed}, folder) / "m.gguf"
    return lambda: open_source(file).read("model.layers.0.self_attn.q_proj.weight")


LLAMA = ("general.architecture", 8, _text("llama"))
NESTED = b"".join(struct.pack("<IQ", 9, 1) for _ in range(5000)) + struct.pack("<IQ", 0, 0)
HEAD = struct.pack("<IQQ", 3, 0, 1)
GGUF = (
    ("an empty file", _gguf(b""), "does not begin with 'GGUF'"),
    ("another file", _gguf(b"PK\x03\x04" + bytes(60)), "does not begin with 'GGUF'"),
    ("another version", _gguf(b"GGUF" + struct.pack("<IQQ", 9, 0, 0)), "GGUF version 9"),
    ("the first version", _gguf(b"GGUF" + struct.pack("<IQQ", 1, 0, 0)), "GGUF version 1"),
    ("the other byte order", _gguf(b"GGUF" + struct.pack(">IQQ", 3, 0, 0)), "GGUF version 50331648"),
    ("too many tensors", _gguf(b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0)), "items claimed"),
    ("too many metadata", _gguf(b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63)), "items claimed"),
    ("a key too long", _gguf(b"GGUF" + HEAD + b"\xff" * 32), "bytes wanted"),
    ("a key that is no UTF-8", _gguf(b"GGUF" + HEAD + struct.pack("<Q", 1) + b"\xff" + bytes(20)), "not UTF-8"),
    ("a string too long", _gguf_of([(*LLAMA[:2], struct.pack("<Q", 2**62))]), "bytes wanted"),
    ("an array too long", _gguf_of([("a", 9, struct.pack("<IQ", 0, 2**62))]), "items claimed"),
    ("arrays of arrays of arrays", _gguf_of([("a", 9, NESTED)]), "nested arrays"),
    ("a string of other bytes", _gguf_of([("a", 8, struct.pack("<Q", 2) + b"\xff\xfe")]), "not UTF-8"),
    ("a key twice", _gguf_of([LLAMA, LLAMA]), "given twice"),
    ("a type that is unknown", _gguf_of([("a", 99, b"")]), "unknown metadata type 99"),
    ("an alignment of zero", _gguf_of([LLAMA, ("general.alignment", 4, bytes(4))]), "general.alignment is 0"),
    ("too large an alignment", _gguf_of([LLAMA, ("general.alignment", 10, b"\xff" * 8)]), "general.alignment"),
    ("a tensor twice", _table(*[_gguf_tensor("a", [4])] * 2), "name is given twice"),
    ("tensors in each other", _table(*(_gguf_tensor(name, [4]) for name in "ab")), "in the tensor before it"),
    ("sizes beyond 64 bits", _table(_gguf_tensor("a", [2**63] * 4)), "has the sizes"),
    ("five axes", _table(_gguf_tensor("a", [1] * 5)), "has the sizes"),
    ("a tensor behind the end", _table(_gguf_tensor("a", [4], 0, 2**62)), "ends at byte"),
    ("a tensor of an unknown type", _table(_gguf_tensor("a", [4], 999)), "unknown type 999"),
    ("no architecture", _gguf_of([]), "unknown architecture None"),
    ("a number as architecture", _gguf_of([("general.architecture", 4, bytes(4))]), "unknown architecture 0"),
    ("another architecture", _gguf_of([(*LLAMA[:2], _text("mamba"))]),
     "unknown architecture 'mamba'; known are llama, qwen2, qwen3, smollm3, gemma2"),
    ("four billion blocks", _gguf_of([LLAMA, ("llama.block_count", 4, b"\xff" * 4)]), "at most 10,000 make sense"),
    ("rows of other heads", _other_heads, "has no rows of 5 heads"),
)  # fmt: skip

# Tokenizers ----------------------------------------------------------------------------


def _tokens(tokens: list[str], **more: tuple[int, bytes]) -> Make:
    table = struct.pack("<IQ", 8, len(tokens)) + b"".join(map(_text, tokens))
    values = [LLAMA, ("tokenizer.ggml.tokens", 9, table), ("tokenizer.ggml.model", 8, _text("llama"))]
    scores = struct.pack("<IQ", 6, len(tokens)) + struct.pack(f"<{len(tokens)}f", *range(len(tokens)))
    values.append(("tokenizer.ggml.scores", 9, scores))
    return _gguf_of(values + [(f"tokenizer.ggml.{name}", kind, raw) for name, (kind, raw) in more.items()])


def _metadata(**changes: Any) -> Make:
    """The tokenizer of a GGUF file's metadata."""
    base = {"model": "gpt2", "pre": "smollm", "tokens": VOCAB} | changes
    metadata = {f"tokenizer.ggml.{name}": value for name, value in base.items()}
    return lambda folder: lambda: build_tokenizer(metadata, folder / "m.gguf")


def _panicking(folder: Path) -> Callable[[], Any]:
    """A tokenizer at which the tokenizers package panics: the merge is "" and "x"."""
    stored = json.loads(json.dumps(seed_tokenizer()))
    vocabulary = stored["model"]["vocab"]
    stored["model"]["vocab"] = {**vocabulary, "": len(vocabulary)}
    stored["model"]["continuing_subword_prefix"] = "longer than any token"
    return _folder(0, {"tokenizer.json": json.dumps(stored).encode()}, _tokenizer_of)(folder)


PIECES = {name.removeprefix("tokenizer.ggml."): value for name, value in sentencepiece_metadata(True).items()}
TOKENIZERS = (
    ("none in the folder", _folder(0, {}, _tokenizer_of), r"no tokenizer\.json and transformers cannot make one"),
    ("an empty table", _folder(0, {"tokenizer.json": b"{}"}, _tokenizer_of), "no valid tokenizer"),
    ("a panic", _panicking, "is no valid tokenizer"),
    ("a token twice", _tokens(["a", "b", "a"]), "has a token twice"),
    ("a token of a megabyte", _tokens(["a", "a" * 10**6]), "has a token of 1000000 characters"),
    ("no first token", _tokens(["a"], bos_token_id=(4, struct.pack("<I", 7))), "none of its 1 tokens"),
    ("a template as first token", _tokens(["$:x", "b"], bos_token_id=(4, bytes(4))), "cannot be built"),
    ("a token of half a character", _metadata(tokens=["\ud800", *VOCAB[1:]]), "cannot be built"),
    ("no tokens", _metadata(tokens=[]), "carries no tokenizer"),
    ("tokens that are numbers", _metadata(tokens=[1, 2]), "corrupt table tokenizer.ggml.tokens"),
    ("another kind", _metadata(model="bert"), "kind 'bert'; known are 'gpt2' and 'llama'"),
    ("other words", _metadata(pre="odd"), "splits words by 'odd'.*known are smollm, gpt-2, llama-bpe, qwen2"),
    ("a last token that is none", _metadata(eos_token_id=49), "eos_token_id = 49, which is none of its 49 tokens"),
    ("a merge of none", _metadata(merges=["q z"]), "a merge whose parts or whole are no token"),
    ("no scores", _metadata(model="llama"), "49 tokens and 0 scores"),
    ("a token type too many", _metadata(token_type=[1] * 50), "49 tokens and 50 token types"),
    ("spaces taken out", _metadata(**PIECES, remove_extra_whitespaces=True), "that normalises text"),
    ("characters replaced", _metadata(**PIECES, precompiled_charsmap=[1]), "that normalises text"),
)

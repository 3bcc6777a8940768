"""Bad models: safetensors and GGUF files, configurations, indices, links and pickles."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparseopt.models import load_tokenizer, open_model, open_source
from sparseopt.models.files.safetensors import read_header
from tests.fuzz.making import Make, write
from tests.fuzz.targets import FAMILY_CONFIGS, seed_folders, with_header

# safetensors ------------------------------------------------------------------------------------------------------


def _tensors(header: Any, data: int = 16) -> Make:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return _safetensors(with_header(raw, bytes(data)))


def _safetensors(content: bytes) -> Make:
    def make(folder: Path) -> Callable[[], Any]:
        write({"model.safetensors": content}, folder)
        return lambda: read_header(folder / "model.safetensors")

    return make


def _entry(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes}


SAFETENSORS = (
    ("an empty file", _safetensors(b""), "truncated or no safetensors file"),
    ("a header longer than the file", _safetensors(b"\xff" * 8 + b"{}"), "claims a header"),
    ("a cut header", _safetensors(with_header(b'{"a": {"dty', b"")), "corrupt header"),
    ("a header in another encoding", _tensors("{}".encode("utf-16")), "corrupt header"),
    ("a header that is a list", _tensors([1, 2]), "no JSON object"),
    ("deep nesting", _tensors(b"[" * 100_000), "corrupt header"),
    ("a name twice", _tensors(b'{"a": 1, "a": 2}'), "given twice"),
    ("a negative size", _tensors(_entry(shape=[-4])), "an impossible shape"),
    ("two negative sizes with a positive product", _tensors(_entry(shape=[-2, -2])), "an impossible shape"),
    ("a product beyond 64 bits", _tensors(_entry(shape=[2**62, 2**62])), "an impossible shape"),
    ("a size hidden behind a zero", _tensors(_entry(shape=[0, 2**62])), "an impossible shape"),
    ("a thousand axes", _tensors(_entry(shape=[1] * 1000)), "an impossible shape"),
    ("a size that is a truth value", _tensors(_entry(shape=[4, True])), "an impossible shape"),
    ("a size that is a fraction", _tensors(_entry(shape=[4.7])), "an impossible shape"),
    ("a shape that is text", _tensors(_entry(shape="4")), "an impossible shape"),
    ("an infinite offset", _tensors(_entry(data_offsets=[0, float("inf")])), "two whole numbers"),
    ("a tensor behind the end", _tensors(_entry(shape=[400], data_offsets=[0, 1600])), "is truncated"),
    ("a hole before the tensor", _tensors(_entry(data_offsets=[4, 20])), "needs bytes 0 to 16"),
    ("bytes that no tensor has", _tensors(_entry(), data=20), "too long"),
    ("an unknown dtype", _tensors(_entry(dtype="F8_E4M3")), "stores F8_E4M3"),
    ("metadata that are no text", _tensors({"__metadata__": {"a": 1}}, 0), "metadata that is no text"),
    ("half a character", _tensors(b'{"\\ud800": 1}'), "surrogates not allowed"),
)  # fmt: skip

# Model folders ----------------------------------------------------------------------------------------------------


def _folder(which: int, name: str, content: bytes | None) -> Make:
    """A valid model with one file replaced, or removed."""

    def make(folder: Path) -> Callable[[], Any]:
        files = {**seed_folders()[which], **({} if content is None else {name: content})}
        write({n: c for n, c in files.items() if n != name or content is not None}, folder)
        return lambda: open_model(folder)

    return make


def _config(raw: bytes | None = None, base: int | None = None, **changes: Any) -> Make:
    def make(folder: Path) -> Callable[[], Any]:
        config = json.loads(seed_folders()[0]["config.json"]) | ({} if base is None else FAMILY_CONFIGS[base])
        return _folder(0, "config.json", json.dumps(config | changes).encode() if raw is None else raw)(folder)

    return make


CONFIG = (
    ("no file", _folder(0, "config.json", None), "has no config.json"),
    ("no JSON", _config(b"{"), "no valid JSON"),
    ("bytes that are no UTF-8", _config(b'{"model_type": "\xff"}'), "no valid JSON"),
    ("a list", _config(b"[]"), "no JSON object"),
    ("deep nesting", _config(b'{"a": ' + b"[" * 60 + b"]" * 60 + b"}"), "nested blocks"),
    ("very deep nesting", _config(b'{"a": ' * 100_000), "no valid JSON"),
    ("a key twice", _config(b'{"model_type": "llama", "model_type": "opt"}'), "'model_type' is given twice"),
    ("NaN", _config(rms_norm_eps=float("nan")), "NaN is not allowed in JSON"),
    ("an infinite size", _config(rms_norm_eps=float("inf")), "rms_norm_eps must be a positive float"),
    ("more than any configuration", _config(b" " * (5 * 2**20)), "which no such file needs"),
    ("a number of ten thousand digits", _config(b'{"vocab_size": ' + b"9" * 10_000 + b"}"), "no valid JSON"),
    ("a model type that is a list", _config(model_type=["llama"]), "has the model_type ['llama'], expected a name"),
    ("a billion blocks", _config(num_hidden_layers=10**9), "asks for 1000000000 blocks"),
    ("blocks that are a truth value", _config(num_hidden_layers=True), "num_hidden_layers must be a positive int"),
    ("a size beyond 31 bits", _config(vocab_size=2**40), "at most 2147483647 is possible"),
    ("a size beyond all floats", _config(rms_norm_eps=10**400), "rms_norm_eps must be a positive float"),
    ("a negative size", _config(hidden_size=-8), "hidden_size must be a positive int"),
    ("a size that is text", _config(hidden_size="8"), "hidden_size must be a positive int"),
    ("no heads", _config(num_attention_heads=0), "num_attention_heads must be a positive int"),
    ("a rope that is a list", _config(rope_parameters=[1]), "rope_parameters must be a table"),
    ("a kind of rope that is a table", _config(rope_parameters={"rope_type": [1]}), "cannot have"),
    ("a rope's factor that is text", _config(rope_parameters={"rope_type": "linear", "factor": "x"}), "factor must be"),
    ("two ropes", _config(base=9, rope_parameters={"rope_type": "default"}), "they differ in rope_type"),
    ("an activation that is a list", _config(hidden_act=["silu"]), "hidden_act"),
    ("a hundred million experts", _config(base=0, num_local_experts=10**8), "asks for 100000000 experts"),
    ("layer types that are a number", _config(base=3, layer_types=3), "cannot have"),
    ("other weights", _config(hidden_size=16), "misshapen"),
)


def _index(weight_map: Any) -> Make:
    return _folder(1, "model.safetensors.index.json", json.dumps({"weight_map": weight_map}).encode())


def _linked(name: str, target: Callable[[Path], Path], read: Callable[[Path], Any] = open_model) -> Any:
    """A folder where one file is a link to its content elsewhere."""

    def make(folder: Path) -> Callable[[], Any]:
        inside = folder / "model"
        inside.mkdir()
        files = {"tokenizer.json": b"{}", **seed_folders()[1]}
        write(files, inside)
        elsewhere = target(folder)
        elsewhere.parent.mkdir(parents=True, exist_ok=True)
        elsewhere.write_bytes(files[name])
        (inside / name).unlink()
        (inside / name).symlink_to(os.path.relpath(elsewhere, inside))
        return lambda: read(inside)

    return make


def _pickles(name: str) -> Make:
    def make(folder: Path) -> Callable[[], Any]:
        write({"config.json": seed_folders()[0]["config.json"], name: pickle.dumps({"w": [1.0]})}, folder)
        return lambda: open_model(folder)

    return make


def _pickled_file(name: str) -> Make:
    def make(folder: Path) -> Callable[[], Any]:
        write({name: pickle.dumps({"w": [1.0]})}, folder)
        return lambda: open_source(folder / name)

    return make


OUTSIDE = "files outside the folder"
SHARD = "model-00001-of-00002.safetensors"
INDEX = (
    ("the folder above", _index({"a": "../x.safetensors"}), OUTSIDE),
    ("an absolute path", _index({"a": "/etc/passwd"}), OUTSIDE),
    ("a folder below", _index({"a": "sub/x.safetensors"}), OUTSIDE),
    ("a path of Windows", _index({"a": "..\\x"}), OUTSIDE),
    ("the folder itself", _index({"a": "."}), OUTSIDE),
    ("an empty name", _index({"a": ""}), OUTSIDE),
    ("a zero byte", _index({"a": "x\x00y"}), OUTSIDE),
    ("a name longer than any file's", _index({"a": "x" * 300}), OUTSIDE),
    ("half a character", _index({"a": "\ud800"}), "no valid JSON"),
    ("a shard that is a number", _index({"a": 3}), "no weight_map"),
    ("no table", _index([1]), "no weight_map"),
    ("a shard that is not there", _index({"a": "x.safetensors"}), "lacks shards that its index names"),
    ("a shard that is no weights", _index({"a": "config.json"}), "truncated or no safetensors file"),
    ("a shard linked to elsewhere", _linked(SHARD, lambda f: f / "secret"), "is a link to"),
    ("a configuration linked to elsewhere", _linked("config.json", lambda f: f / "secret"), "is a link to"),
    ("an index linked to elsewhere", _linked("model.safetensors.index.json", lambda f: f / "secret"), "is a link to"),
    (
        "a tokenizer linked to elsewhere",
        _linked("tokenizer.json", lambda f: f / "secret", lambda f: load_tokenizer(open_source(f))),
        "is a link to",
    ),
    (
        "a tokenizer linked to elsewhere, to be copied",
        _linked("tokenizer.json", lambda f: f / "secret", lambda f: open_source(f).sidecars()),
        "is a link to",
    ),
    *((f"pickled weights in {name}", _pickles(name), "pickled weights can run code") for name in (
        "pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl", "model.npz")),
    *((f"a pickle given as a model, {name}", _pickled_file(name), "pickled weights can run code") for name in (
        "model.bin", "model.PT", "model.npy")),
)  # fmt: skip

# GGUF -------------------------------------------------------------------------------------------------------------


def _gguf(content: bytes) -> Make:
    def make(folder: Path) -> Callable[[], Any]:
        file = write({"m.gguf": content}, folder) / "m.gguf"

        def use() -> None:
            source = open_source(file)
            source.sidecars()
            open_model(source)

        return use

    return make


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _gguf_of(values: list[tuple[str, int, bytes]], tensors: list[bytes] = [], data: bytes = b"") -> Any:  # noqa: B006
    """A GGUF file of metadata (key, type, bytes) and entries of the tensor table."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    head += b"".join(_text(key) + struct.pack("<I", kind) + raw for key, kind, raw in values) + b"".join(tensors)
    return _gguf(head + bytes(-len(head) % 32) + data)


def _gguf_tensor(name: str, sizes: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return _text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


LLAMA = ("general.architecture", 8, _text("llama"))
NESTED = b"".join(struct.pack("<IQ", 9, 1) for _ in range(5000)) + struct.pack("<IQ", 0, 0)


def _tokens(tokens: list[str], **more: tuple[int, bytes]) -> Make:
    table = struct.pack("<IQ", 8, len(tokens)) + b"".join(map(_text, tokens))
    values = [LLAMA, ("tokenizer.ggml.tokens", 9, table), ("tokenizer.ggml.model", 8, _text("llama"))]
    scores = struct.pack("<IQ", 6, len(tokens)) + struct.pack(f"<{len(tokens)}f", *range(len(tokens)))
    values.append(("tokenizer.ggml.scores", 9, scores))
    return _gguf_of(values + [(f"tokenizer.ggml.{name}", kind, raw) for name, (kind, raw) in more.items()])


GGUF = (
    ("an empty file", _gguf(b""), "does not begin with 'GGUF'"),
    ("another file", _gguf(b"PK\x03\x04" + bytes(60)), "does not begin with 'GGUF'"),
    ("another version", _gguf(b"GGUF" + struct.pack("<IQQ", 9, 0, 0)), "GGUF version 9"),
    ("more tensors than bytes", _gguf(b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0)), "items claimed"),
    ("more metadata than bytes", _gguf(b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63)), "items claimed"),
    ("a string longer than the file", _gguf_of([(*LLAMA[:2], struct.pack("<Q", 2**62))]), "bytes wanted"),
    ("an array longer than the file", _gguf_of([("a", 9, struct.pack("<IQ", 0, 2**62))]), "items claimed"),
    ("arrays of arrays of arrays", _gguf_of([("a", 9, NESTED)]), "nested arrays"),
    ("a string that is no UTF-8", _gguf_of([("a", 8, struct.pack("<Q", 2) + b"\xff\xfe")]), "not UTF-8"),
    ("a key twice", _gguf_of([LLAMA, LLAMA]), "given twice"),
    ("a type that is unknown", _gguf_of([("a", 99, b"")]), "unknown metadata type 99"),
    ("an alignment of zero", _gguf_of([LLAMA, ("general.alignment", 4, bytes(4))]), "general.alignment is 0"),
    ("an alignment beyond the file", _gguf_of([LLAMA, ("general.alignment", 10, b"\xff" * 8)]), "general.alignment"),
    ("a tensor twice", _gguf_of([LLAMA], [_gguf_tensor("a", [4])] * 2, bytes(32)), "name is given twice"),
    (
        "tensors in each other",
        _gguf_of([LLAMA], [_gguf_tensor(n, [4]) for n in "ab"], bytes(32)),
        "in the tensor before it",
    ),
    ("sizes beyond 64 bits", _gguf_of([LLAMA], [_gguf_tensor("a", [2**63] * 4)], bytes(32)), "has the sizes"),
    ("five axes", _gguf_of([LLAMA], [_gguf_tensor("a", [1] * 5)], bytes(32)), "has the sizes"),
    ("a tensor behind the end", _gguf_of([LLAMA], [_gguf_tensor("a", [4], 0, 2**62)], bytes(32)), "ends at byte"),
    ("a tensor of an unknown type", _gguf_of([LLAMA], [_gguf_tensor("a", [4], 999)], bytes(32)), "unknown type 999"),
    ("no architecture", _gguf_of([]), "unknown architecture None"),
    ("an architecture that is a number", _gguf_of([("general.architecture", 4, bytes(4))]), "unknown architecture 0"),
    ("four billion blocks", _gguf_of([LLAMA, ("llama.block_count", 4, b"\xff" * 4)]), "at most 10,000 make sense"),
    ("a token twice", _tokens(["a", "b", "a"]), "has a token twice"),
    ("a token of a megabyte", _tokens(["a", "a" * 10**6]), "has a token of 1000000 characters"),
    ("a first token that is none", _tokens(["a"], bos_token_id=(4, struct.pack("<I", 7))), "none of its 1 tokens"),
    ("a first token that is a template", _tokens(["$:x", "b"], bos_token_id=(4, bytes(4))), "cannot be built"),
)

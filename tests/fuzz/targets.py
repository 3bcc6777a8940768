"""The fuzz targets: for each reader, how an input is made, and its outcomes, a value or the documented error."""

import contextlib
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import sparseopt as so
from sparseopt.experiments.config import ConfigError, load_config
from sparseopt.experiments.read.files import FileError
from sparseopt.experiments.read.graph_files import read_edges, read_signal
from sparseopt.experiments.read.images import read_image
from sparseopt.models import ModelError, load_tokenizer, open_model, open_source
from sparseopt.models.files.gguf.header import read_header as read_gguf_header
from sparseopt.models.files.gguf.tokenizer import build_tokenizer, tokenizer_config
from sparseopt.models.files.safetensors import read_header
from tests.fuzz.choices import Choices, chance, json_bytes, mutated_bytes, mutated_json, pick
from tests.models import tiny
from tests.oracle.make_golden import CASES


@dataclass(frozen=True)
class Target:
    """A fuzz target.

    Attributes:
        name: of the target.
        make: an input from choices.
        run: uses it; whatever it raises, but for `errors`, is a crash.
        errors: the documented classes.
    """

    name: str
    make: Callable[[Choices], Any]
    run: Callable[[Any], None]
    errors: tuple[type[Exception], ...]

    def __call__(self, given: Any) -> bool:
        """Run on an input; whether it ended in a documented error."""
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                self.run(given)
        except self.errors:
            return True
        return False


@contextlib.contextmanager
def folder_of(files: dict[str, bytes]) -> Iterator[Path]:
    """A new folder with these files."""
    folder = Path(tempfile.mkdtemp(prefix="sparseopt-fuzz-"))
    try:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        yield folder
    finally:
        shutil.rmtree(folder)


@cache
def seed_folders() -> tuple[dict[str, bytes], ...]:
    """Valid models as files: one file, shards."""
    rng, found = np.random.default_rng(1), []
    with folder_of({}) as folder:
        config = tiny.tiny_config(num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=2)
        tensors = tiny.random_tensors(config, rng)
        tiny.write_folder(folder / "one", config, tensors)
        tiny.write_folder(folder / "shards", config, tensors, 2)
        for name in ("one", "shards"):
            found.append({f.name: f.read_bytes() for f in sorted((folder / name).iterdir())})
    return tuple(found)


def split_header(content: bytes) -> tuple[Any, bytes]:
    """The JSON header of a valid safetensors file, and its data."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def with_header(raw: bytes, data: bytes) -> bytes:
    """A safetensors file with this header."""
    return len(raw).to_bytes(8, "little") + raw + data


def any_safetensors(choices: Choices, content: bytes) -> bytes:
    if chance(choices, 3):
        return mutated_bytes(choices, [content])
    header, data = split_header(content)
    return with_header(json_bytes(choices, header), data[: choices.integer(0, 64)] if chance(choices, 4) else data)


def make_safetensors(choices: Choices) -> bytes:
    contents = [c for files in seed_folders() for name, c in files.items() if name.endswith("safetensors")]
    return any_safetensors(choices, pick(choices, contents))


def run_safetensors(content: bytes) -> None:
    with folder_of({"model.safetensors": content}) as folder:
        for tensor in read_header(folder / "model.safetensors").values():
            assert tensor.read().shape == tensor.shape


def make_folder(choices: Choices) -> dict[str, bytes]:
    files = dict(pick(choices, seed_folders()))
    name = pick(choices, sorted(files))
    if chance(choices, 3):
        base = json.loads(files["config.json"]) | pick(choices, list(CASES.values()))
        files["config.json"] = json_bytes(choices, base)
    elif name.endswith(".safetensors"):
        files[name] = any_safetensors(choices, files[name])
    else:
        files[name] = json_bytes(choices, json.loads(files[name]))
    return files


def run_folder(files: dict[str, bytes]) -> None:
    with folder_of(files) as folder:
        model = open_model(folder)
        for key in model.exported_keys():
            model.source.read(key)
        model.source.sidecars()


@cache
def seed_gguf() -> tuple[bytes, ...]:
    rng, found = np.random.default_rng(2), []
    with folder_of({}) as folder:
        for architecture, config in tiny.CONFIGS.items():
            small = config | {"num_hidden_layers": 1} | {k: config[k][:1] for k in ("layer_types",) if k in config}
            tensors = tiny.random_tensors(small, rng)
            found.append(tiny.write_architecture(folder / "m.gguf", architecture, small, tensors).read_bytes())
        config = tiny.tiny_config(num_hidden_layers=1)
        found.append(tiny.write_gguf(folder / "m.gguf", config, tiny.random_tensors(config, rng)).read_bytes())
        # The tensors' data are nothing to look into.
        header = read_gguf_header(folder / "m.gguf")
    assert header.tensors
    return tuple(found)


def make_gguf(choices: Choices) -> bytes:
    content = pick(choices, seed_gguf())
    # Most of a file is data; changes belong into what describes it.
    described = min(len(content), 12_000)
    return mutated_bytes(choices, [content[:described]]) + content[described:]


def run_gguf(content: bytes) -> None:
    with folder_of({"m.gguf": content}) as folder:
        source = open_source(folder / "m.gguf")
        source.sidecars()
        for name in source.tensors:
            source.read(name)
        open_model(source)


def make_gguf_metadata(choices: Choices) -> dict[str, Any]:
    bases = [tiny.byte_level_metadata("qwen2"), tiny.byte_level_metadata("smollm"), tiny.sentencepiece_metadata(True)]
    base = {"general.architecture": "llama", **pick(choices, bases), "tokenizer.ggml.add_bos_token": True}
    mutated = mutated_json(choices, base)
    return mutated if isinstance(mutated, dict) else {"tokenizer.ggml.tokens": mutated}


def run_gguf_tokenizer(metadata: dict[str, Any]) -> None:
    tokenizer = build_tokenizer(metadata, Path("m.gguf"))
    tokenizer.encode("hello  the 42 é\n")
    json.dumps(tokenizer_config(metadata))


@cache
def seed_tokenizer() -> Any:
    return json.loads(build_tokenizer(tiny.byte_level_metadata("qwen2"), Path("m.gguf")).to_str())


def make_tokenizer(choices: Choices) -> bytes:
    return json_bytes(choices, seed_tokenizer())


def run_tokenizer(content: bytes) -> None:
    with folder_of({**seed_folders()[0], "tokenizer.json": content}) as folder:
        load_tokenizer(open_source(folder))


CANARY, MCP = "tests.fuzz.canary.Canary", "sparseopt.core.penalties.entries.MCP"
SIGNAL: dict[str, Any] = {"name": "a", "task": "trend", "signal": "y.csv"}
DENOISE: dict[str, Any] = {"name": "a", "task": "denoise"}
SWEEP = {"grid": {"sparsity": [0.5, 0.6]}, "list": [{"seed": 1}]}
SEED_CONFIGS = (
    DENOISE | {"picture": {"name": "camera", "size": 32}, "penalty": {"name": "l1", "weight": 1}},
    {"name": "a", "task": "prune", "method": "wanda", "sweep": SWEEP},
    SIGNAL | {"graph": "edges.csv", "paper": {"source": "x", "differs": ["y"]}},
    {"name": "a", "task": CANARY, "method": {"name": CANARY, "weight": 1}},
    DENOISE | {"penalty": {"name": MCP, "weight": 1, "gamma": 2}},
    DENOISE | {"sweep": {"list": [{"penalty": {"name": "l0", "weight": w}} for w in (1, 2)]}},
)
YAML_PIECES = (
    "&a [*a]\n", "a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]\n", "<<: {x: 1}\n", "? [1]\n: 2\n",
    "!!python/name:os.system x\n", "x: !!binary =\n", "x: !!timestamp y\n", "x: !!int y\n", "x: 2020-13-45\n",
    "- " * 40, "[" * 40, '"\\ud800": 1\n', '"\\UFFFFFFFF"\n', "1: 2\n", "x: 1:99:99\n", "x: 0b\n", "x: .inf\n",
    "---\n...\n---\n", "%YAML 9.9\n---\n", "\t", "x: @\n", "seed: 9" + "9" * 5000 + "\n", "x: 1_000_\n", "=: =\n",
    "sweep: {grid: {a.b.c.d: [1]}}\n", "\x00", "\ufeff", "\u2028",
)  # fmt: skip


def make_config(choices: Choices) -> bytes:
    values = mutated_json(choices, pick(choices, SEED_CONFIGS))
    text = yaml.safe_dump(values, sort_keys=False).encode("utf-8", "surrogatepass")
    if chance(choices, 2):
        lines = text.splitlines(keepends=True)
        lines.insert(choices.integer(0, len(lines)), pick(choices, YAML_PIECES).encode("utf-8", "surrogatepass"))
        text = b"".join(lines)
    return mutated_bytes(choices, [text]) if chance(choices, 3) else text


def run_config(content: bytes) -> None:
    with folder_of({"a.yaml": content}) as folder:
        try:
            load_config(folder / "a.yaml")
        finally:
            assert CANARY.rpartition(".")[0] not in sys.modules, "code was imported that nobody allowed"


@cache
def seed_tables() -> tuple[tuple[str, bytes], ...]:
    import pyarrow
    import pyarrow.parquet

    rng, found = np.random.default_rng(3), []
    found += [(".csv", b"u,v,w\n0,1,0.5\n1,2,2\n"), (".csv", b"0,1\n2,\n"), (".csv", b"1\n2\n3\n")]
    for save in (np.savez, np.savez_compressed):
        for values in (rng.normal(size=(5, 2)), np.arange(6).reshape(3, 2), np.zeros((2, 2), np.float16)):
            stream = io.BytesIO()
            save(stream, edges=values, signal=values)
            found.append((".npz", stream.getvalue()))
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"u": [0, 1], "v": [1, 2]}), stream)
    return (*found, (".parquet", stream.getvalue()))


def make_table(choices: Choices) -> tuple[str, bytes]:
    ending, content = pick(choices, seed_tables())
    return ending, mutated_bytes(choices, [content])


def run_table(given: tuple[str, bytes]) -> None:
    ending, content = given
    with folder_of({f"t{ending}": content}) as folder:
        with contextlib.suppress(FileError):
            read_signal(folder / f"t{ending}")
        edges, weights = read_edges(folder / f"t{ending}")
    # The graph's own check, as the command does it: a ValueError that says which edge.
    with contextlib.suppress(ValueError):
        so.Graph.from_edges(edges, 10, weights)


@cache
def seed_images() -> tuple[bytes, ...]:
    from PIL import Image

    from sparseopt.experiments.read.images import write_image

    rng, found = np.random.default_rng(4), []
    with folder_of({}) as folder:
        for name, kind, shape in (
            ("a.png", np.uint8, (5, 4)), ("b.png", np.uint16, (5, 4, 3)), ("c.tif", np.uint8, (5, 4, 3)),
            ("d.tif", np.uint16, (5, 4)), ("e.bmp", np.uint8, (5, 4, 3)), ("f.jpg", np.uint8, (8, 8)),
            ("g.gif", np.uint8, (5, 4)), ("h.webp", np.uint8, (5, 4, 3)), ("i.ppm", np.uint8, (5, 4, 3)),
            ("j.tif", np.uint16, (5, 4, 3)),
        ):  # fmt: skip
            write_image(folder / name, rng.integers(0, 255, shape).astype(kind))
            found.append((folder / name).read_bytes())
        Image.new("P", (4, 4)).save(folder / "p.png")
        return (*found, (folder / "p.png").read_bytes())


def make_image(choices: Choices) -> bytes:
    return mutated_bytes(choices, seed_images())


def run_image(content: bytes) -> None:
    with folder_of({"image": content}) as folder:
        read_image(folder / "image")


READERS = (
    Target("safetensors", make_safetensors, run_safetensors, (ModelError,)),
    Target("model folder", make_folder, run_folder, (ModelError,)),
    Target("GGUF", make_gguf, run_gguf, (ModelError,)),
    Target("GGUF tokenizer", make_gguf_metadata, run_gguf_tokenizer, (ModelError,)),
    Target("tokenizer.json", make_tokenizer, run_tokenizer, (ModelError,)),
    Target("YAML config", make_config, run_config, (ConfigError,)),
    Target("graph and signal", make_table, run_table, (FileError,)),
    Target("picture", make_image, run_image, (FileError,)),
)

"""Model folders that are damaged, hostile or strange: their safetensors, configuration, index, links and pickles."""

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseopt.models import ModelError, load_tokenizer, open_model, open_source
from sparseopt.models.files.folder import PACKED_INDEX
from sparseopt.models.files.safetensors import read_header, write_tensors
from tests.fuzz.damage import a_value_or, damaged, damaged_json, fuzzed, refused, written
from tests.fuzz.model_seeds import folders
from tests.oracle.make_golden import CASES

INF = float("inf")
ONE, SHARDS = folders()
SHARD, INDEX = "model-00001-of-00002.safetensors", "model.safetensors.index.json"
WEIGHTS = [ONE["model.safetensors"], *(SHARDS[name] for name in SHARDS if name.endswith(".safetensors"))]


def with_header(header, data=bytes(16)):
    """A safetensors file."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def with_tensor(**changes):
    return with_header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes})


SAFETENSORS = [
    (b"", "truncated or no safetensors file"),
    (b"\xff" * 8 + b"{}", "claims a header"),
    *((with_header(raw), "corrupt header") for raw in (b'{"a": {"dty', "{}".encode("utf-16"), b"[" * 10**5, [1, 2])),
    (with_header({"a": {"dtype": "F32", "shape": [4]}}), "corrupt header"),
    (with_header(b'{"a": 1, "a": 2}'), "given twice"),
    (with_header(b'{"\\ud800": 1}'), "surrogates not allowed"),
    *((with_header({"__metadata__": value}, b""), "metadata that is no text") for value in ([1], {"a": 1}, None)),
    # With a positive product, beyond 64 bits, behind a zero, too many axes, and no whole numbers.
    *((with_tensor(shape=shape), "an impossible shape") for shape in ([-2, -2], [2**62, 2**62], [0, 2**62])),
    *((with_tensor(shape=shape), "an impossible shape") for shape in ([4] + [1] * 64, [4, True], [4.0], "4")),
    (with_tensor(data_offsets=[0, INF]), "two whole numbers"),
    (with_tensor(shape=[400], data_offsets=[0, 1600]), "is truncated"),
    *((with_tensor(data_offsets=place), "needs bytes 0 to 16") for place in ([0, 12], [4, 20])),
    (with_tensor(dtype="F8_E4M3"), "stores F8_E4M3"),
]


@pytest.mark.parametrize(("content", "part"), SAFETENSORS, ids=lambda value: repr(value)[:50])
def test_a_bad_safetensors_file(tmp_path, content, part):
    refused(ModelError, part, read_header, written(tmp_path, a=content) / "a")


def test_every_cut_of_a_safetensors_file_is_noticed(tmp_path):
    write_tensors(tmp_path / "a", {"a": np.eye(4), "b": np.ones(4, np.float32)})
    whole = (tmp_path / "a").read_bytes()
    for length in range(len(whole)):
        refused(ModelError, "truncated|corrupt", read_header, written(tmp_path, a=whole[:length]) / "a")
    refused(ModelError, "too long", read_header, written(tmp_path, a=whole + b"x") / "a")


def config(base=None, **changes):
    return {"config.json": json.dumps(json.loads(ONE["config.json"]) | CASES.get(base, {}) | changes).encode()}


def raw(text):
    return {"config.json": text}


# Beside the fields that `tests.models.test_families` refuses.
CONFIGS = [
    *((raw(text), "no valid JSON") for text in (b"{", b'{"model_type": "\xff"}', b'{"a": ' * 10**5)),
    (raw(b'{"vocab_size": ' + b"9" * 10_000 + b"}"), "no valid JSON"),
    (raw(b"[]"), "no JSON object"),
    (raw(b"{}"), "unknown model_type None; known are"),
    (raw(b'{"a": ' + b"[" * 60 + b"]" * 60 + b"}"), "nested blocks"),
    (raw(b'{"model_type": "llama", "model_type": "opt"}'), "'model_type' is given twice"),
    (raw(b" " * (5 * 2**20)), "which no such file needs"),
    (config(rms_norm_eps=float("nan")), "NaN is not allowed in JSON"),
    (config(model_type=["llama"]), r"model_type \['llama'\], expected a name"),
    (config(num_hidden_layers=10**9), "holds 11 tensors, its configuration asks for 1000000000 blocks"),
    (config(vocab_size=2**40), "at most 2147483647 is possible"),
    *((config(rms_norm_eps=value), "rms_norm_eps must be a positive float") for value in (INF, 10**400, "1")),
    (config(rope_parameters=[1]), "rope_parameters must be a table"),
    (config(rope_parameters={"rope_type": [1]}), "cannot have"),
    (config(hidden_act=["silu"]), "hidden_act"),
    (config("mixtral", num_local_experts=10**8), "asks for 300000000 experts"),
    (config("gemma2", layer_types=8), "cannot have"),
    (config("qwen3_moe", mlp_only_layers=[[0]]), "cannot have"),
    (config(hidden_size=16), "misshapen"),
]


def index(weight_map):
    return {INDEX: json.dumps({"weight_map": weight_map}).encode()}


ODD = ("../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x", ".", "..", "", "x\x00y", "x" * 300)
INDICES = [
    *((index({"a": name}), "files outside the folder") for name in ODD),
    (index({"a": "\ud800"}), "no valid JSON"),
    *((index(value), "no weight_map") for value in ({"a": 3}, [1])),
    (index({"a": "x.safetensors"}), "lacks shards that its index names: x.safetensors"),
    (index({"a": "config.json"}), "truncated or no safetensors file"),
    (index({"ghost": SHARD}), "names 1 tensors that their shards lack, the first ghost in model-00001"),
]


@pytest.mark.parametrize(
    ("files", "part"),
    [(ONE | changes, part) for changes, part in CONFIGS] + [(SHARDS | changes, part) for changes, part in INDICES],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_with_a_bad_configuration_or_index(tmp_path, files, part):
    refused(ModelError, part, open_model, written(tmp_path, **files))


PICKLED = "pickled weights can run code when loaded and are not read"
ONLY_PICKLED = f"has only pickled weights .*{PICKLED}.*save_pretrained"
PATHS = [
    ("", ["model.txt", "model.safetensors"], "has no config.json; it holds model.safetensors, model.txt"),
    ("", ["config.json"], f"no model.safetensors and no {INDEX}; it holds config.json"),
    ("", ["config.json", "part.gguf"], "give the path of one .gguf file"),
    ("", ["config.json", PACKED_INDEX], "which sparseopt 0.3 wrote"),
    *(("", ["config.json", f"model.{ending}"], ONLY_PICKLED) for ending in ("bin", "pt", "pth", "ckpt", "pkl", "npz")),
    ("no", [], "does not exist; .*hf download"),
    ("x" * 300, [], "no model at"),
    ("model.txt", ["model.txt"], "is a file but no .gguf"),
    *((name, [name], PICKLED) for name in ("model.bin", "model.PT", "model.npy")),
]


@pytest.mark.parametrize(("path", "files", "part"), PATHS, ids=lambda value: repr(value)[-60:])
def test_a_path_without_weights_to_read(tmp_path, path, files, part):
    refused(ModelError, part, open_model, written(tmp_path, **dict.fromkeys(files, b"{}")) / path)


def test_a_home_of_nobody():
    refused(ModelError, "no model at", open_model, "~nobody-of-this-name/model")


@pytest.mark.parametrize(
    ("name", "read"),
    [
        *((name, open_model) for name in (SHARD, "config.json", INDEX)),
        # transformers would convert the other names of a tokenizer.
        *((name, lambda folder: load_tokenizer(open_source(folder))) for name in ("tokenizer.json", "vocab.json")),
        ("tokenizer.json", lambda folder: open_source(folder).sidecars()),
    ],
)
def test_a_link_out_of_the_folder_is_not_followed(tmp_path, name, read):
    (tmp_path / "model").mkdir()
    model = written(tmp_path / "model", **{name: b"{}", **SHARDS})
    os.rename(model / name, tmp_path / "secret")
    (model / name).symlink_to("../secret")
    refused(ModelError, "is a link to .*, outside its folder, and is not followed", read, model)


@st.composite
def safetensors(draw):
    content = draw(st.sampled_from(WEIGHTS))
    end = 8 + int.from_bytes(content[:8], "little")
    header = draw(damaged_json(json.loads(content[8:end])))
    cut = draw(st.sampled_from([None, None, 0, 20]))
    return draw(damaged(content) | st.just(with_header(header, content[end:][:cut])))


def test_what_is_damaged_is_accepted_whole(tmp_path):
    """Otherwise all damage would end at the same door."""
    for files in (ONE, SHARDS):
        open_model(written(tmp_path, **files))


@fuzzed
@given(content=safetensors())
def test_damaged_safetensors(tmp_path, content):
    file = written(tmp_path, a=content) / "a"
    with a_value_or(ModelError):
        for tensor in read_header(file).values():
            assert tensor.read().shape == tensor.shape


@st.composite
def models(draw):
    files = dict(draw(st.sampled_from([ONE, SHARDS])))
    name = draw(st.sampled_from(["config.json", "config.json", *files]))
    if name.endswith(".safetensors"):
        return files | {name: draw(safetensors())}
    base = draw(st.sampled_from([{}, *CASES.values()])) if name == "config.json" else {}
    return files | {name: draw(damaged_json(json.loads(files[name]) | base))}


@fuzzed
@given(files=models())
def test_a_damaged_folder(tmp_path_factory, files):
    folder = written(tmp_path_factory.mktemp("model"), **files)
    with a_value_or(ModelError):
        model = open_model(folder)
        for key in model.exported_keys():
            model.source.read(key)
        model.source.sidecars()

"""Minimal cases found by fuzzing: each of them ended in an undocumented error, a panic or a memory crash."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sparseopt.experiments.config import ConfigError, load_config
from sparseopt.experiments.read.files import FileError
from sparseopt.experiments.read.graph_files import read_signal
from sparseopt.experiments.read.images import read_image
from sparseopt.models import ModelError, load_tokenizer, open_model, open_source
from sparseopt.models.files.gguf.tokenizer import build_tokenizer
from sparseopt.models.files.safetensors import read_header
from tests.fuzz.targets import FAMILY_CONFIGS, seed_folders, seed_tokenizer, with_header
from tests.models.tiny import random_tensors, tiny_config, write_folder, write_gguf
from tests.models.tiny_gguf import byte_level_metadata


@pytest.mark.parametrize("field", ["shape", "data_offsets"])
def test_infinity_in_a_header(tmp_path, field):
    """OverflowError: cannot convert float infinity to integer."""
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    entry[field] = [float("inf")] * len(entry[field])
    (tmp_path / "a").write_bytes(with_header(json.dumps({"a": entry}).encode(), bytes(16)))
    with pytest.raises(ModelError, match="corrupt header"):
        read_header(tmp_path / "a")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": ["llama"]}, "expected a name"),  # TypeError: unhashable type
        (FAMILY_CONFIGS[3] | {"layer_types": 8}, "cannot have"),  # TypeError: not iterable
        (FAMILY_CONFIGS[1] | {"mlp_only_layers": [[0]]}, "cannot have"),  # TypeError: unhashable type
        (FAMILY_CONFIGS[1] | {"mlp_only_layers": 3}, "cannot have"),
        ({"rope_parameters": {"rope_type": [1]}}, "cannot have"),
    ],
)
def test_configuration_values_of_other_types(tmp_path, changes, text):
    rng = np.random.default_rng(0)
    folder = write_folder(tmp_path, tiny_config(), random_tensors(tiny_config(), rng))
    (folder / "config.json").write_text(json.dumps(tiny_config() | changes))
    with pytest.raises(ModelError, match=text):
        open_model(folder)


def test_a_shard_s_name_that_no_file_system_takes(tmp_path):
    """OSError: File name too long."""
    (tmp_path / "config.json").write_bytes(seed_folders()[0]["config.json"])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x" * 300}}))
    with pytest.raises(ModelError, match="files outside the folder"):
        open_source(tmp_path)


def test_heads_of_a_gguf_file_that_its_rows_do_not_have(tmp_path):
    """ValueError: cannot reshape array."""
    config = tiny_config(num_hidden_layers=1)
    file = write_gguf(tmp_path / "m.gguf", config, random_tensors(config, np.random.default_rng(0)))
    key = b"llama.attention.head_count" + struct.pack("<I", 4)
    content = file.read_bytes()
    assert content.count(key) == 1
    file.write_bytes(content.replace(key + struct.pack("<I", 4), key + struct.pack("<I", 5)))
    with pytest.raises(ModelError, match="has no rows of 5 heads"):
        open_source(file).read("model.layers.0.self_attn.q_proj.weight")


def test_a_token_of_half_a_character():
    """TypeError out of the tokenizers package."""
    metadata = byte_level_metadata("smollm")
    metadata["tokenizer.ggml.tokens"] = ["\ud800", *metadata["tokenizer.ggml.tokens"][1:]]
    with pytest.raises(ModelError, match="cannot be built"):
        build_tokenizer(metadata, Path("m.gguf"))


def test_a_tokenizer_at_which_the_tokenizers_package_panics(tmp_path):
    """PanicException, which derives from BaseException: range end index out of range. The merge is "" and "x"."""
    stored = json.loads(json.dumps(seed_tokenizer()))
    vocabulary = stored["model"]["vocab"]
    stored["model"]["vocab"] = {**vocabulary, "": len(vocabulary)}
    stored["model"]["continuing_subword_prefix"] = "longer than any token"
    for name, content in seed_folders()[0].items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(ModelError, match="is no valid tokenizer"):
        load_tokenizer(open_source(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "name: a\ntask: prune\nsweep:\n  grid: true\n  list: [{seed: {}}]\n",  # TypeError: 'bool' not iterable
        "a: &a [*a]\n",  # RecursionError
        "name: a\ntask: [denoise]\n",  # TypeError: unhashable type
        "name: a\ntask: denoise\nseed: !!int x\n",  # ValueError
        'name: "\\UFFFFFFFF"\n',  # ValueError: chr() arg not in range
        "? !!binary aGk=\n: 1\n",
    ],
)
def test_configs(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.npz", b"PK\x03\x04"),  # zipfile.BadZipFile
        ("a.npz", b""),  # EOFError
        ("a.csv", b""),  # ValueError: cannot reshape
        ("a.parquet", b"PAR1\x00\x00\x00\x00\xff\xff\xff\xffPAR1"),
    ],
)
def test_tables(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileError):
        read_signal(tmp_path / name)


def test_archives_with_damaged_members(tmp_path):
    """zlib.error, EOFError, NotImplementedError, BadZipFile: bytes changed one by one."""
    np.savez_compressed(tmp_path / "whole.npz", signal=np.arange(6.0))
    whole = (tmp_path / "whole.npz").read_bytes()
    refused = 0
    for place in range(len(whole)):
        (tmp_path / "a.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            read_signal(tmp_path / "a.npz")
        except FileError:
            refused += 1
    assert refused > len(whole) // 2


@pytest.mark.parametrize(
    "content",
    [
        b"P6\n4 \x01\x00255\n" + bytes(60),  # ValueError: invalid literal for int()
        b"GIF87a\x04\x00\x05\x00\x80\x00\x00" + bytes(6) + b",\xff\x00\x00\x00\x04\x00\x05\x00\x00\x02",
        b"II*\x00\x08\x00\x00\x00\x01\x00" + bytes(20),
    ],
)
def test_pictures(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(FileError):
        read_image(tmp_path / "a")


DAMAGE = """
import io, sys, pathlib, numpy, pyarrow, pyarrow.parquet
from sparseopt.experiments.read.files import FileError
from sparseopt.experiments.read.graph_files import read_signal
stream, file, refused = io.BytesIO(), pathlib.Path(sys.argv[1]), 0
pyarrow.parquet.write_table(pyarrow.table({"u": [0, 1], "v": [1, 2]}), stream)
whole = stream.getvalue()
for place in range(4, len(whole)):
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    try:
        read_signal(file)
    except FileError:
        refused += 1
print(refused)
"""


@pytest.mark.processes
def test_a_parquet_file_whose_statistics_are_damaged_does_not_end_the_process(tmp_path):
    """std::terminate out of pyarrow: "Definition level histogram size mismatch"."""
    call = [sys.executable, "-c", DAMAGE, str(tmp_path / "a.parquet")]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert int(done.stdout) > 100

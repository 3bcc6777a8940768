"""Export: round trips, and only complete shards after an interrupt or on a full disk."""

import errno
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from sparseopt.models import OUTER_TAG, ModelError, ShardedWriter, StreamedModel, block_tag, open_model
from sparseopt.models import export as export_module
from sparseopt.models.files.folder import MAX_FILE
from sparseopt.models.files.safetensors import write_tensors
from sparseopt.system.files import DiskError
from tests.models.tiny import random_tensors, tiny_config, write_folder, write_gguf

CARRIED = (
    *("LICENSE", "NOTICE", "README.md", "preprocessor_config.json", "processor_config.json"),
    *("chat_template.jinja", "tekken.json", "vocab.txt", "modeling_tiny.py"),
)
LEFT = (
    *("pytorch_model.bin", "consolidated.00.PTH", "flax_model.msgpack", "tf_model.h5", "model.onnx", "model.onnx.data"),
    *("pytorch_model.bin.index.json", "model.gguf", ".gitattributes", ".git/config", "original/params.json"),
    # An earlier pruning's account of itself.
    *("run.json", "records.jsonl", "summary.json"),
)


@pytest.fixture
def model(tmp_path: Path, rng: np.random.Generator) -> StreamedModel:
    folder = write_folder(tmp_path / "source", tiny_config(), random_tensors(tiny_config(), rng), shards=2)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    for name in (*CARRIED, *LEFT):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{name} of the source")
    return open_model(folder)


def copy_model(model: StreamedModel, writer: ShardedWriter) -> None:
    for tag, keys in [
        (OUTER_TAG, model.outer_keys()),
        *((block_tag(i), list(model.block_keys(i).values())) for i in range(model.num_blocks)),
    ]:
        writer.write(tag, {key: model.source.read(key) for key in keys})
    writer.finish()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_copy_is_the_same_to_the_byte(tmp_path: Path, rng: np.random.Generator, dtype: type) -> None:
    config = tiny_config(dtype=np.dtype(dtype).name)
    (tmp_path / "source").mkdir()
    write_tensors(tmp_path / "source" / "model.safetensors", random_tensors(config, rng, dtype))
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    model = open_model(tmp_path / "source")
    copy_model(model, ShardedWriter(tmp_path / "out", model.source))
    copy = open_model(tmp_path / "out")
    assert copy.source.config == config
    assert set(copy.source.tensors) == set(model.source.tensors)
    for name in copy.source.tensors:
        assert copy.source.read(name).tobytes() == model.source.read(name).tobytes(), name


def test_one_shard_a_block_and_only_the_files_that_belong(tmp_path: Path, model: StreamedModel) -> None:
    copy_model(model, ShardedWriter(tmp_path / "deep" / "out", model.source))
    assert sorted({file.name for file in (tmp_path / "deep" / "out").iterdir()} - set(CARRIED)) == [
        "config.json",
        "model-block-0000.safetensors",
        "model-block-0001.safetensors",
        "model-block-0002.safetensors",
        "model-outer.safetensors",
        "model.safetensors.index.json",
        "tokenizer_config.json",
    ]
    for name in CARRIED:
        assert (tmp_path / "deep" / "out" / name).read_text() == f"{name} of the source"
    index = json.loads((tmp_path / "deep" / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(model.source.read(key).nbytes for key in model.source.tensors)


@pytest.mark.parametrize("named", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype")])
def test_another_dtype_is_named_in_the_configuration(tmp_path: Path, rng: np.random.Generator, named: tuple) -> None:
    config = tiny_config()
    del config["dtype"]
    config |= dict.fromkeys(named, "float32")
    model = open_model(write_folder(tmp_path / "source", config, random_tensors(config, rng)))
    copy_model(model, ShardedWriter(tmp_path / "out", model.source, dtype=ml_dtypes.bfloat16))
    copy = open_model(tmp_path / "out")
    assert copy.source.config == config | dict.fromkeys(named, "bfloat16")
    assert {info.dtype.name for info in copy.source.tensors.values()} == {"bfloat16"}


def test_a_quantised_source_is_written_as_float32_with_its_tokenizer(tmp_path: Path, rng: np.random.Generator) -> None:
    from gguf import GGMLQuantizationType

    config = tiny_config()
    model = open_model(write_gguf(tmp_path / "m.gguf", config, random_tensors(config, rng), GGMLQuantizationType.Q8_0))
    copy_model(model, ShardedWriter(tmp_path / "out", model.source))
    copy = open_model(tmp_path / "out")
    assert copy.config == model.config
    assert copy.source.config["dtype"] == "float32"
    name = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_array_equal(copy.source.read(name), model.source.read(name))
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(copy.source.sidecars())


def test_a_folder_that_holds_something_is_refused(tmp_path: Path, model: StreamedModel) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ModelError, match=r"not empty \(it holds thesis\.tex\)"):
        ShardedWriter(tmp_path / "out", model.source)
    with pytest.raises(ModelError, match=r"cannot use .* as output folder"):
        ShardedWriter(tmp_path / "out" / "thesis.tex", model.source)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_what_cannot_go_along_is_refused_before_work(tmp_path: Path, model: StreamedModel) -> None:
    (tmp_path / "secret").write_text("of someone else")
    (tmp_path / "source" / "NOTICE").unlink()
    (tmp_path / "source" / "NOTICE").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="NOTICE is a link to"):
        ShardedWriter(tmp_path / "out", model.source)
    (tmp_path / "source" / "NOTICE").unlink()
    with (tmp_path / "source" / "film.mp4").open("wb") as file:
        file.truncate(MAX_FILE + 1)
    with pytest.raises(ModelError, match=r"film\.mp4 has 524,288,001 bytes.* none has more than 524,288,000"):
        ShardedWriter(tmp_path / "out", model.source)
    assert not (tmp_path / "out").exists()


def test_too_small_a_disk_is_refused_before_work(
    tmp_path: Path, model: StreamedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(ModelError, match="1,000 bytes free, the model needs"):
        ShardedWriter(tmp_path / "out", model.source)


def test_a_full_disk_leaves_finished_shards_and_names_them(
    tmp_path: Path, model: StreamedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = ShardedWriter(tmp_path / "out", model.source)
    first, second = ({key: model.source.read(key) for key in model.block_keys(i).values()} for i in range(2))
    writer.write(block_tag(0), first)

    def fill_disk(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fill_disk)
    with pytest.raises(DiskError) as caught:
        writer.write(block_tag(1), second)
    assert "model-block-0001.safetensors: No space left on device" in str(caught.value)
    assert "safe are: model-block-0000.safetensors" in str(caught.value)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model-block-0000.safetensors"]
    monkeypatch.undo()
    writer.write(block_tag(1), second)
    assert writer.shards == ["model-block-0000.safetensors", "model-block-0001.safetensors"]


def test_an_interrupt_leaves_no_partial_file(
    tmp_path: Path, model: StreamedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = ShardedWriter(tmp_path / "out", model.source)

    def interrupt(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        writer.write(OUTER_TAG, {key: model.source.read(key) for key in model.outer_keys()})
    assert list((tmp_path / "out").iterdir()) == []


def test_only_tensors_of_the_model_are_written(tmp_path: Path, model: StreamedModel) -> None:
    writer = ShardedWriter(tmp_path / "out", model.source)
    norm = model.source.read("model.norm.weight")
    with pytest.raises(ModelError, match="ghost is no tensor of this model"):
        writer.write("a", {"ghost": norm})
    with pytest.raises(ModelError, match=r"shape \[2\], expected \[32\]"):
        writer.write("a", {"model.norm.weight": norm[:2]})
    with pytest.raises(ModelError, match=r"model.norm.weight holds NaN or infinity"):
        writer.write("a", {"model.norm.weight": norm * np.nan})
    with pytest.raises(ModelError, match="taken or not made of letters"):
        writer.write("../a", {"model.norm.weight": norm})
    writer.write("a", {"model.norm.weight": norm})
    with pytest.raises(ModelError, match="written already"):
        writer.write("b", {"model.norm.weight": norm})
    with pytest.raises(ModelError, match="taken or not"):
        writer.write("a", {})
    with pytest.raises(ModelError, match=r"28 tensors were not written"):
        writer.finish()


def test_overflow_in_a_narrow_dtype_is_named(tmp_path: Path, model: StreamedModel) -> None:
    writer = ShardedWriter(tmp_path / "out", model.source, dtype=np.float16)
    with pytest.raises(ModelError, match="NaN or infinity as float16"):
        writer.write("a", {"model.norm.weight": np.full(32, 1e6, np.float32)})
    for dtype, name in ((np.int8, "int8"), ("bf16", "bf16")):
        with pytest.raises(ModelError, match=f"cannot write dtype {name}"):
            ShardedWriter(tmp_path / "other", model.source, dtype=dtype)


def test_a_shard_that_could_not_be_replaced_stays(tmp_path: Path, model: StreamedModel) -> None:
    writer = ShardedWriter(tmp_path / "out", model.source)
    first = writer.write("a", {"model.norm.weight": np.ones(32, np.float32)})
    with pytest.raises(ModelError, match="NaN or infinity"):
        writer.write("b", {"model.norm.weight": np.full(32, np.nan, np.float32)}, instead="a")
    assert writer.shards == [first]
    second = writer.write("b", {"model.norm.weight": np.zeros(32, np.float32)}, instead="a")
    assert writer.shards == [second]

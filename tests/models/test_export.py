"""Export: the files that are written, what is refused, and only complete shards after an interrupt or a full disk."""

import errno
import json
import os
from contextlib import nullcontext

import ml_dtypes
import numpy as np
import pytest

from sparseopt.models import ModelError, ShardedWriter, block_tag, open_model
from sparseopt.models import export as export_module
from sparseopt.models.files.folder import MAX_FILE
from sparseopt.system.files import DiskError
from tests.models.tiny import copy_model, random_tensors, tiny_config, write_folder

CARRIED = "LICENSE NOTICE README.md preprocessor_config.json processor_config.json chat_template.jinja tekken.json"
CARRIED = (*CARRIED.split(), "vocab.txt", "modeling_tiny.py", "été 1.txt", "a[1].txt")
LEFT = "pytorch_model.bin consolidated.00.PTH flax_model.msgpack tf_model.h5 model.onnx model.onnx.data model.gguf"
LEFT += " pytorch_model.bin.index.json .gitattributes .git/config original/params.json"
# An earlier pruning's account of itself.
LEFT = (*LEFT.split(), "run.json", "records.jsonl", "summary.json", "report.html")
SHARDS = ("model-block-0000", "model-block-0001", "model-block-0002", "model-outer")


@pytest.fixture
def model(tmp_path, rng):
    folder = write_folder(tmp_path / "source", tiny_config(), random_tensors(tiny_config(), rng), shards=2)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    for name in (*CARRIED, *LEFT):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{name} of the source")
    return open_model(folder)


def test_one_shard_a_block_and_only_the_files_that_belong(tmp_path, model):
    out = tmp_path / "deep" / "out"
    copy_model(model, out)
    made = {"config.json", "model.safetensors.index.json", "tokenizer_config.json"}
    assert {file.name for file in out.iterdir()} - set(CARRIED) == made | {f"{name}.safetensors" for name in SHARDS}
    for name in CARRIED:
        assert (out / name).read_text() == f"{name} of the source"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(model.source.read(key).nbytes for key in model.source.tensors)


@pytest.mark.parametrize("named", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype")])
def test_another_dtype_is_named_in_the_configuration(tmp_path, rng, named):
    config = tiny_config()
    del config["dtype"]
    config |= dict.fromkeys(named, "float32")
    copy_model(
        open_model(write_folder(tmp_path / "source", config, random_tensors(config, rng))),
        tmp_path / "out",
        dtype=ml_dtypes.bfloat16,
    )
    copy = open_model(tmp_path / "out")
    assert copy.source.config == config | dict.fromkeys(named, "bfloat16")
    assert {info.dtype.name for info in copy.source.tensors.values()} == {"bfloat16"}


def test_what_cannot_be_used_or_go_along_is_refused_before_work(tmp_path, model, monkeypatch):
    def refused(words, output, **options):
        with pytest.raises(ModelError, match=words):
            ShardedWriter(output, model.source, **options)

    full, new, notice = tmp_path / "full", tmp_path / "out", tmp_path / "source" / "NOTICE"
    full.mkdir()
    (full / "thesis.tex").write_text("years of work")
    refused(r"not empty \(it holds thesis\.tex\)", full)
    refused(r"cannot use .* as output folder", full / "thesis.tex")
    assert (full / "thesis.tex").read_text() == "years of work"
    for dtype, name in ((np.int8, "int8"), ("bf16", "bf16")):
        refused(f"cannot write dtype {name}", new, dtype=dtype)
    with monkeypatch.context() as patch:
        patch.setattr(export_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
        refused("1,000 bytes free, the model needs", tmp_path / "other")
    (tmp_path / "secret").write_text("of someone else")
    notice.unlink()
    notice.symlink_to(tmp_path / "secret")
    refused("NOTICE is a link to", new)
    notice.unlink()
    with (tmp_path / "source" / "film.mp4").open("wb") as file:
        file.truncate(MAX_FILE + 1)
    refused(r"film\.mp4 has 524,288,001 bytes.* none has more than 524,288,000", new)
    assert not new.exists()


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_a_full_disk_or_an_interrupt_leaves_finished_shards_alone_and_names_them(tmp_path, model, monkeypatch, failure):
    writer = ShardedWriter(tmp_path / "out", model.source)
    first, second = ({key: model.source.read(key) for key in model.block_keys(i).values()} for i in range(2))
    writer.write(block_tag(0), first)

    def fail(handle):
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((DiskError, KeyboardInterrupt)) as caught:
        writer.write(block_tag(1), second)
    if isinstance(failure, OSError):
        assert "model-block-0001.safetensors: No space left on device" in str(caught.value)
        assert "safe are: model-block-0000.safetensors" in str(caught.value)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model-block-0000.safetensors"]
    monkeypatch.undo()
    writer.write(block_tag(1), second)
    assert writer.shards == ["model-block-0000.safetensors", "model-block-0001.safetensors"]


def test_only_tensors_of_the_model_are_written_each_once(tmp_path, model):
    writer = ShardedWriter(tmp_path / "out", model.source)
    name, norm = "model.norm.weight", model.source.read("model.norm.weight")
    for tag, tensors, words in [
        ("a", {"ghost": norm}, "ghost is no tensor of this model"),
        ("a", {name: norm[:2]}, r"shape \[2\], expected \[32\]"),
        ("a", {name: norm * np.nan}, "model.norm.weight holds NaN or infinity"),
        ("../a", {name: norm}, "taken or not made of letters"),
        ("a", {name: norm}, None),
        ("b", {name: norm}, "written already"),
        ("a", {}, "taken or not"),
    ]:
        with pytest.raises(ModelError, match=words) if words else nullcontext():
            writer.write(tag, tensors)
    with pytest.raises(ModelError, match="28 tensors were not written"):
        writer.finish()


def test_overflow_in_a_narrow_dtype_is_named_and_a_shard_that_could_not_be_replaced_stays(tmp_path, model):
    def norm(value):
        return {"model.norm.weight": np.full(32, value, np.float32)}

    with pytest.raises(ModelError, match="NaN or infinity as float16"):
        ShardedWriter(tmp_path / "narrow", model.source, dtype=np.float16).write("a", norm(1e6))
    writer = ShardedWriter(tmp_path / "out", model.source)
    first = writer.write("a", norm(1))
    with pytest.raises(ModelError, match="NaN or infinity"):
        writer.write("b", norm(np.nan), instead="a")
    assert writer.shards == [first]
    second = writer.write("b", norm(0), instead="a")
    assert writer.shards == [second]

"""A model pruned and packed, evaluated, and unpacked on the command line."""

import json

import ml_dtypes
import numpy as np
import pytest

from sparseopt.models import open_source
from sparseopt.models.files.packed import PACKED_INDEX, PackedTensor
from sparseopt.models.files.safetensors import write_tensors
from sparseopt.pruning import audit_sparsity
from tests.models.tiny import random_tensors, tiny_config
from tests.pruning.test_pipeline import TOKENIZER
from tests.tiers import often

TEXT = "the quick brown fox jumps over the lazy dog, and then the dog tells the fox all about it.\n" * 60


@pytest.fixture
def source(tmp_path, rng):
    folder = tmp_path / "source"
    folder.mkdir()
    config = tiny_config(dtype="bfloat16")
    write_tensors(folder / "model.safetensors", random_tensors(config, rng, ml_dtypes.bfloat16))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(TOKENIZER)
    (tmp_path / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture
def prune(tmp_path, source, command):
    """`sparseopt prune` into a folder of this name: what it printed."""

    def run(name, *options):
        status, out, err = command(
            "prune", source, "--output", tmp_path / name, "--calibration", f"file:{tmp_path / 'text.txt'}",
            "--windows", 4, "--seqlen", 32, "--heldout-windows", 0, *options,
        )  # fmt: skip
        assert status == 0, err
        return out

    return run


def model_files(folder):
    """All files but those that tell of the run that made them."""
    accounts = ("run.json", "summary.json", "records.jsonl")
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name not in accounts}


def linear_bytes(folder):
    tensors = open_source(folder).tensors
    return sum(t.bitmask.shape[0] + 2 * t.values.shape[0] for t in tensors.values() if isinstance(t, PackedTensor))


@pytest.mark.parametrize("method", often(["maiht", "admm", "wanda"], "wanda"))
def test_prune_packed_then_eval_then_unpack(tmp_path, prune, command, method):
    assert "bytes packed" not in prune("dense", "--method", method)
    out = prune("packed", "--method", method, "--pack")
    summary = json.loads((tmp_path / "packed" / "summary.json").read_text())
    dense, stored = summary["dense_bytes"], summary["stored_bytes"]
    assert f"tensors: {dense:,} bytes dense, {stored:,} bytes packed, ratio {stored / dense:.4f}" in out
    assert summary["recipe"]["pack"] is True
    other = json.loads((tmp_path / "dense" / "summary.json").read_text())
    assert other["dense_bytes"] == other["stored_bytes"] == dense
    # Half of the 27,648 weights of the linears, at 2 bytes, and a bit for each weight: no zero is a negative one.
    assert linear_bytes(tmp_path / "packed") == 0.5625 * 2 * 27_648 == stored - (dense - 2 * 27_648)

    text = ("--text", f"file:{tmp_path / 'text.txt'}", "--windows", 2, "--seqlen", 64, "--json")
    scores = []
    for name in ("dense", "packed"):
        status, out, err = command("eval", tmp_path / name, *text)
        assert status == 0, err
        scores.append({key: value for key, value in json.loads(out).items() if key != "model"})
    assert scores[0] == scores[1]
    assert scores[0]["zeros"] == 13_824

    status, out, err = command("unpack", tmp_path / "packed", "--output", tmp_path / "unpacked")
    assert status == 0, err
    assert f"wrote {tmp_path / 'unpacked'}" in out
    assert model_files(tmp_path / "unpacked") == model_files(tmp_path / "dense")


def test_pack_makes_of_a_dense_folder_what_prune_writes(tmp_path, prune, command):
    prune("dense", "--method", "magnitude", "--pattern", "2:4")
    prune("packed", "--method", "magnitude", "--pattern", "2:4", "--pack")
    status, out, err = command("pack", tmp_path / "dense", "--output", tmp_path / "repacked")
    assert status == 0, err
    assert "bytes packed, ratio 0." in out
    assert model_files(tmp_path / "repacked") == model_files(tmp_path / "packed")


@pytest.mark.thorough
def test_a_packed_model_is_pruned_again(tmp_path, prune, command):
    prune("half", "--method", "magnitude", "--pack")
    status, _, err = command(
        "prune", tmp_path / "half", "--output", tmp_path / "more", "--sparsity", 0.75, "--method", "magnitude",
        "--calibration", f"file:{tmp_path / 'text.txt'}", "--windows", 4, "--seqlen", 32,
    )  # fmt: skip
    assert status == 0, err
    assert {audit.sparsity for audit in audit_sparsity(tmp_path / "more")} == {0.75}
    assert (tmp_path / "more" / "model.safetensors.index.json").is_file()
    more, half = open_source(tmp_path / "more"), open_source(tmp_path / "half")
    for audit in audit_sparsity(tmp_path / "more"):
        name = f"{audit.layer}.weight"
        assert not np.any((more.read(name) != 0) & (half.read(name) == 0)), name


def test_mistakes_are_answered_by_one_sentence(tmp_path, source, command):
    status, _, err = command("unpack", source, "--output", tmp_path / "new")
    assert status == 2
    assert f"{source} is not packed: it has no {PACKED_INDEX}" in err
    status, _, err = command("unpack", tmp_path / "absent", "--output", tmp_path / "new")
    assert status == 2
    assert "there is no folder" in err
    status, _, err = command("pack", source, "--output", source)
    assert status == 2
    assert "is not empty" in err
    assert not (tmp_path / "new").exists()

"""A tiny model through the pipeline: data types, what the summary tells, dead inputs, and that maiht is worth it."""

import hashlib
import json
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

import sparseopt as so
from sparseopt.models import load_decoder, open_source
from sparseopt.pruning import Recipe, prune_model
from sparseopt.pruning.inspection import inspect_model
from sparseopt.pruning.run.facts import run_facts
from tests.jitted import run
from tests.models.tiny import tiny_config, write_gguf
from tests.pruning.whole_runs import TOKENIZER, make_tokens, stored, tensors_of, write_model


def test_a_quantised_file_leaves_in_bfloat16_unless_a_dtype_is_given(tmp_path, tokens):
    source = open_source(write_gguf(tmp_path / "m.gguf", tiny_config(), tensors_of(), GGMLQuantizationType.Q8_0))
    key = "model.layers.0.mlp.up_proj.weight"
    recipe = Recipe(method="magnitude", calibration=tokens, ignore="up_proj")
    for dtype, name in ((None, "bfloat16"), ("float32", "float32")):
        report = prune_model(source, tmp_path / name, recipe.model_copy(update={"dtype": dtype}))
        found = open_source(tmp_path / name)
        assert {info.dtype.name for info in found.tensors.values()} == {found.config["dtype"]} == {name}
        assert report.recipe["dtype"] == name
        assert any("rounds the file's quantised weights" in fact.text for fact in run_facts(report)) == (dtype is None)
        np.testing.assert_array_equal(found.read(key), source.read(key).astype(name))
        assert inspect_model(source, recipe.model_copy(update={"dtype": dtype})).dense_bytes == report.dense_bytes
    # What is not quantised keeps its dtype.
    plain = open_source(write_gguf(tmp_path / "plain.gguf", tiny_config(), tensors_of()))
    assert prune_model(plain, tmp_path / "plain", recipe).recipe["dtype"] is None


def test_the_summary_tells_what_was_read_and_by_what(tmp_path, source, tokens):
    prune_model(source, tmp_path / "out", Recipe(method="wanda", calibration=tokens))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["recipe"]["calibration"] == "token ids of shape [7, 24]"
    assert summary["calibration"] == {
        "windows": 3, "variants": 0, "heldout_windows": 4, "seqlen": 24, "inputs": 64, "why": None, "warning": None,
        "digest": hashlib.sha256(np.asarray(tokens, "<i4").tobytes()).hexdigest()[:16],
    }  # fmt: skip
    assert summary["sparsity"] == 0.5
    assert summary["versions"]["sparseopt"] == so.__version__
    assert summary["peak_memory_bytes"] > 0


def test_maiht_hurts_less_than_wanda(tmp_path, source, rng):
    # Two parts of one text.
    calibration, tokens = np.split(make_tokens(rng, 20), [12])
    dense = run(load_decoder(source), tokens)
    loss = {}
    for method in ("maiht", "wanda"):
        prune_model(source, tmp_path / method, Recipe(method=method, calibration=calibration))
        loss[method] = np.mean((np.asarray(run(load_decoder(tmp_path / method), tokens)) - dense) ** 2)
    assert loss["maiht"] < loss["wanda"]


def test_numbers_of_numpy_and_paths_are_as_good_as_pythons_own():
    given = Recipe(sparsity=np.float32(0.5), seqlen=np.int64(8), targets={"o_proj": np.float64(0.25)}, masks=Path("a"))
    plain = Recipe(sparsity=0.5, seqlen=8, targets={"o_proj": 0.25}, masks="a")
    assert json.dumps(given.as_dict()) == json.dumps(plain.as_dict())


def test_a_dead_input_is_reported(tmp_path, tokens):
    tensors = tensors_of()
    tensors["model.layers.0.input_layernorm.weight"][5] = 0
    source = write_model(tmp_path / "source", tensors=tensors)
    assert (source / "tokenizer.json").read_text() == TOKENIZER
    report = prune_model(source, tmp_path / "out", Recipe(method="maiht", calibration=tokens))
    dead = {r.layer: r.dead_inputs for r in report.layers}
    assert dead["model.layers.0.self_attn.q_proj"] == 1
    assert dead["model.layers.0.mlp.up_proj"] == 0
    assert (stored(tmp_path / "out")["model.layers.0.self_attn.q_proj.weight"][:, 5] == 0).all()

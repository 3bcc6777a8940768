"""A tiny model through the pipeline: data types, what the summary tells, dead inputs, and that maiht is worth it."""

import hashlib
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType

import sparseopt as so
from sparseopt.models import ModelError, load_decoder, open_model, open_source
from sparseopt.models.files.in_memory import MemorySource
from sparseopt.pruning import Recipe, dry_run, prune_model
from sparseopt.pruning.run.facts import run_facts
from sparseopt.system.run_folder import FolderError
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
        told = dry_run(source, tmp_path / "dry", recipe.model_copy(update={"dtype": dtype}))
        assert told.footprint.output_bytes == report.dense_bytes
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


def test_a_decoder_in_memory_is_pruned_as_its_folder_and_stays_as_it_is(tmp_path, source, tokens):
    decoder, recipe = load_decoder(source), Recipe(method="wanda", calibration=jnp.asarray(tokens))
    for name, model in {"folder": source, "memory": decoder}.items():
        prune_model(model, tmp_path / name, recipe)
        prune_model(model, tmp_path / f"{name}.gguf", recipe)
    assert (tmp_path / "memory.gguf").read_bytes() == (tmp_path / "folder.gguf").read_bytes()
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).glob("*.*")} for name in ("folder", "memory")]
    # Model card and records name the source and the time.
    same = {name for name in files[0] if files[0][name] == files[1][name]}
    assert same == files[0].keys() - {"README.md", "records.jsonl", "summary.json"}
    assert "Made from llama (in memory)" in files[1]["README.md"].decode()
    assert open_model(decoder).check_finite() == open_model(source).check_finite()
    # The same weights are the same run, and others are others.
    assert prune_model(decoder, tmp_path / "folder", recipe).kept
    decoder.embed_tokens.weight[...] = decoder.embed_tokens.weight[...].at[0, 0].add(1)
    with pytest.raises(FolderError, match=r"(?s)result of another run, these differ:.*weights"):
        prune_model(decoder, tmp_path / "folder", recipe)
    prune_model(decoder, tmp_path / "changed", recipe)
    embedding = stored(tmp_path / "changed")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(embedding, decoder.embed_tokens.weight[...])


def test_a_model_without_a_tokenizer_is_pruned_by_token_ids_alone(tmp_path, source, tokens, text):
    opened = open_model(load_decoder(source)).source
    alone = MemorySource("Alone", opened.config, opened.tensors, None)
    of_text = Recipe(method="wanda", calibration=text, windows=3, seqlen=24)
    for recipe in (Recipe(method="wanda", seqlen=24), of_text):
        with pytest.raises(ModelError, match=r"Alone \(in memory\) comes without a tokenizer.*give token ids"):
            prune_model(alone, tmp_path / "out", recipe)
    assert not list(tmp_path.glob("out/*.safetensors"))
    prune_model(alone, tmp_path / "alone", Recipe(method="wanda", calibration=tokens))
    report = prune_model(opened, tmp_path / "text", of_text)
    assert not (tmp_path / "alone" / "tokenizer.json").exists()
    assert (tmp_path / "text" / "tokenizer.json").read_text() == TOKENIZER
    assert [score.text for score in report.scores] == [f"the second half of {text}"]

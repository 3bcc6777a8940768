"""A tiny model through the pipeline: data types, what is told, dead inputs, models in memory."""

import hashlib
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType

import sparseopt as so
from sparseopt.models import ModelError, load_decoder, open_model, open_source
from sparseopt.models.files.in_memory import MemorySource
from sparseopt.pruning import LayerRecord, Recipe, dry_run, prune_model
from sparseopt.pruning.base.grams import BlockRunner
from sparseopt.pruning.base.records import Calibration, Footprint, Passed
from sparseopt.pruning.run.facts import run_facts
from sparseopt.system.run_folder import FolderError
from tests.models.tiny import tiny_config, write_gguf
from tests.pruning.whole_runs import SQUARE, TOKENIZER, stored, tensors_of, write_model

pytestmark = pytest.mark.usefixtures("several_batches")
FEW = {"method": "wanda", "heldout_windows": 2}


def test_a_quantised_file_leaves_in_bfloat16_unless_a_dtype_is_given(tmp_path, tokens):
    source = open_source(
        write_gguf(tmp_path / "m.gguf", tiny_config(**SQUARE), tensors_of("square"), GGMLQuantizationType.Q8_0)
    )
    key = "model.layers.0.mlp.up_proj.weight"
    recipe = Recipe(**FEW, calibration=tokens, ignore="up_proj")
    for dtype, name in ((None, "bfloat16"), ("float32", "float32")):
        given = recipe.model_copy(update={"dtype": dtype})
        report = prune_model(source, tmp_path / name, given)
        found = open_source(tmp_path / name)
        assert {info.dtype.name for info in found.tensors.values()} == {found.config["dtype"]} == {name}
        assert report.recipe["dtype"] == name
        assert any("rounds the file's quantised weights" in fact.text for fact in run_facts(report)) == (dtype is None)
        np.testing.assert_array_equal(found.read(key), source.read(key).astype(name))
        assert dry_run(source, tmp_path / "dry", given).footprint.output_bytes == report.dense_bytes
    # What is not quantised keeps its dtype.
    plain = open_source(write_gguf(tmp_path / "plain.gguf", tiny_config(**SQUARE), tensors_of("square")))
    assert prune_model(plain, tmp_path / "plain", recipe).recipe["dtype"] is None


def test_the_summary_tells_what_was_read_and_by_what_and_dead_inputs_are_reported(tmp_path, tokens):
    tensors = tensors_of("square")
    tensors["model.layers.0.input_layernorm.weight"][5] = 0
    source = write_model(tmp_path / "source", "square", tensors)
    report = prune_model(source, tmp_path / "out", Recipe(**FEW, calibration=tokens))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["recipe"]["calibration"] == "token ids of shape [7, 24]"
    assert summary["calibration"] == {
        "windows": 5, "heldout_windows": 2, "seqlen": 24, "inputs": 32, "why": None, "warning": None,
        "digest": hashlib.sha256(np.asarray(tokens, "<i4").tobytes()).hexdigest()[:16],
    }  # fmt: skip
    assert summary["sparsity"] == 0.5
    assert summary["versions"]["sparseopt"] == so.__version__
    assert summary["peak_memory_bytes"] > 0
    dead = {r.layer: r.dead_inputs for r in report.layers}
    assert dead["model.layers.0.self_attn.q_proj"] == 1
    assert dead["model.layers.0.mlp.up_proj"] == 0
    assert (stored(tmp_path / "out")["model.layers.0.self_attn.q_proj.weight"][:, 5] == 0).all()


def test_a_decoder_in_memory_is_pruned_as_its_folder_and_stays_as_it_is(tmp_path, source, tokens):
    decoder, recipe = load_decoder(source), Recipe(**FEW, calibration=jnp.asarray(tokens))
    for name, model in {"folder": source, "memory": decoder}.items():
        prune_model(model, tmp_path / name, recipe)
        prune_model(model, tmp_path / f"{name}.gguf", recipe)
    assert (tmp_path / "memory.gguf").read_bytes() == (tmp_path / "folder.gguf").read_bytes()
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).glob("*.*")} for name in ("folder", "memory")]
    # Model card and records name the source and the time.
    same = {name for name in files[0] if files[0][name] == files[1][name]}
    assert same == files[0].keys() - {"README.md", "records.jsonl", "summary.json"}
    assert "Made from square (in memory)" in files[1]["README.md"].decode()
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
    of_text = Recipe(**FEW, calibration=text, windows=5, seqlen=24)
    for recipe in (Recipe(method="wanda", seqlen=24), of_text):
        with pytest.raises(ModelError, match=r"Alone \(in memory\) comes without a tokenizer.*give token ids"):
            prune_model(alone, tmp_path / "out", recipe)
    assert not list(tmp_path.glob("out/*.safetensors"))
    prune_model(alone, tmp_path / "alone", Recipe(**FEW, calibration=tokens))
    report = prune_model(opened, tmp_path / "text", of_text)
    assert not (tmp_path / "alone" / "tokenizer.json").exists()
    assert (tmp_path / "text" / "tokenizer.json").read_text() == TOKENIZER
    assert [score.text for score in report.scores] == [f"the second half of {text}"]


def test_grams_are_gathered_once_for_each_block_that_is_pruned(tmp_path, source, tokens, monkeypatch):
    seen, events, grams = [], [], BlockRunner.grams
    monkeypatch.setattr(BlockRunner, "grams", lambda *given, **rest: seen.append(1) or grams(*given, **rest))
    some = ["re:.*layers.0", "re:.*layers.2"]
    recipe = Recipe(method="wanda", calibration=tokens, heldout_windows=0, targets=some)
    prune_model(source, tmp_path / "out", recipe, observer=lambda event, _, total: events.append((event, total)))
    assert len(seen) == 2
    blocks = [[LayerRecord] * count + [Passed] for count in (7, 0, 7)]
    assert [type(event) for event, _ in events] == [Calibration, Footprint, *itertools.chain(*blocks)]
    assert {total for _, total in events} == {14}

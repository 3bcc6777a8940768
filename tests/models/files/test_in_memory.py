"""Models in memory: a decoder has the tensors of the folder that it came from, until it is changed."""

from types import SimpleNamespace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from huggingface_hub import constants

from sparseopt.models import ModelError, load_decoder, load_tokenizer, open_model
from sparseopt.models.files.in_memory import MemorySource, _files_of
from tests.fuzz.damage import refused
from tests.models.tiny import GOLDEN, random_tensors, tiny_config, write_folder, write_gguf, write_golden

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path, tensors):
    return write_folder(tmp_path / "m", tiny_config(), tensors)


# A transposed family, biases and a tied head, experts, and an image encoder, which no decoder has.
@pytest.mark.parametrize("name", ["gpt2", "opt", "mixtral", "gemma3_images"])
def test_a_decoder_is_the_model_that_it_was_loaded_from(tmp_path, name):
    write_golden(GOLDEN / f"{name}.npz", tmp_path)
    model, again = open_model(tmp_path), open_model(load_decoder(tmp_path))
    assert again.exported_keys() == model.exported_keys()
    assert again.check_finite() == model.check_finite()
    assert again.source.sidecars() == model.source.sidecars()
    assert again.source.name == f"{tmp_path} (in memory)"


def test_what_is_read_are_the_weights_that_a_decoder_has_then(folder):
    decoder, dense = load_decoder(folder), open_model(folder)
    opened = open_model(decoder)
    dense_digest, twice = dense.check_finite(), 2 * dense.source.read(UP)
    decoder.layers[1].mlp.up_proj.weight[...] = jnp.asarray(twice)
    np.testing.assert_array_equal(opened.source.read(UP), twice)
    np.testing.assert_array_equal(open_model(load_decoder(decoder)).source.read(UP), twice)
    assert opened.check_finite() != dense_digest


def test_a_decoder_is_float32_whatever_the_file_stores(tmp_path, rng):
    tensors = random_tensors(tiny_config(), rng, ml_dtypes.bfloat16)
    source = open_model(load_decoder(write_gguf(tmp_path / "m.gguf", tiny_config(), tensors))).source
    assert {info.dtype.name for info in source.tensors.values()} == {"float32"}
    np.testing.assert_array_equal(source.read(UP), tensors[UP].astype(np.float32))
    assert load_tokenizer(source).get_vocab_size() == tiny_config()["vocab_size"]


def test_a_model_in_memory_that_cannot_be_opened_says_why(folder):
    decoder = load_decoder(folder)
    own = nnx.clone(decoder)
    own.layers[1].mlp.up_proj.weight[...] = jnp.ones((64, 32))
    refused(ModelError, r"no configuration is known.*nnx.update\(loaded, nnx.state\(decoder\)\)", open_model, own)
    # What the error says to do.
    nnx.update(decoder, nnx.state(own))
    np.testing.assert_array_equal(open_model(decoder).source.read(UP), np.ones((64, 32)))
    decoder.layers = nnx.List(list(decoder.layers)[:2])
    refused(ModelError, "has other parameters than it was loaded with", open_model, decoder)
    untied = load_decoder(folder)
    untied.head.lm_head.weight = nnx.Param(jnp.ones(untied.head.lm_head.weight.shape))
    refused(ModelError, "has other parameters", open_model, untied)
    refused(ModelError, r"a model is a path, .* given dict", open_model, {})
    odd = MemorySource("Odd", tiny_config(model_type="odd"), {}, None)
    refused(ModelError, r"Odd \(in memory\) has the model_type 'odd'.*pruning.prune_module", open_model, odd)


def test_the_files_of_a_model_are_those_of_its_folder_or_of_the_cache(tmp_path, monkeypatch, folder):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def files(name):
        return _files_of(SimpleNamespace(name_or_path=name, config=SimpleNamespace(_commit_hash="0123")))

    snapshot = write_folder(tmp_path / "cache" / "models--lab--tiny" / "snapshots" / "0123", tiny_config(), {})
    (tmp_path / "empty").mkdir()
    write_gguf(tmp_path / "m.gguf", tiny_config(), random_tensors(tiny_config(), np.random.default_rng(0)))
    assert files(str(folder)) == folder
    assert files("lab/tiny") == snapshot
    assert files("m.gguf").path.name == "m.gguf"
    assert [files(name) for name in ("", "empty", "lab/other", "no/such/folder")] == [None] * 4

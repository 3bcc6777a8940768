"""Folders of few bits as transformers loads them through the compressed-tensors package."""

from types import ModuleType

import numpy as np
import pytest

from sparseopt.layers.bits import parse_bits
from sparseopt.models import load_decoder, open_model, open_source
from sparseopt.models.files.compressed import compress_tensors
from sparseopt.pruning import Recipe, prune_model
from tests.jitted import run
from tests.models.files.test_compressed import DENSE, UP, on_grid, write_compressed
from tests.models.tiny import GOLDEN, write_golden
from tests.oracle.conftest import reference, reference_logits

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module", autouse=True)
def package() -> ModuleType:
    return pytest.importorskip("compressed_tensors", reason="SKIPPED: needs compressed-tensors (make test-oracle)")


@pytest.mark.parametrize(("name", "shards"), [("int8", 1), ("int4:32", 1), ("int4:16", 3)])
def test_transformers_loads_the_folder_with_our_logits(tmp_path, rng, name, shards):
    tensors = write_compressed(tmp_path, rng, name, shards)
    model, tokens = reference(tmp_path), rng.integers(0, 40, (2, 24)).astype(np.int32)
    # Packed until the first call.
    assert hasattr(model.get_submodule(UP.removesuffix(".weight")), "weight_packed")
    assert not hasattr(model.get_submodule(DENSE), "weight_packed")
    logits = reference_logits(model, tokens)
    np.testing.assert_allclose(run(load_decoder(tmp_path), tokens), logits, rtol=0, atol=1e-5)
    for key, value in tensors.items():
        np.testing.assert_array_equal(model.get_parameter(key).numpy(force=True), value, err_msg=key)


@pytest.mark.parametrize("case", ["mistral", "mixtral", "gemma3_text", "gemma3_images", "smollm3"])
@pytest.mark.parametrize("bits", ["int8", "int4:8"])
def test_transformers_loads_a_model_that_was_pruned_in_few_bits(tmp_path, rng, case, bits):
    write_golden(GOLDEN / f"{case}.npz", tmp_path / "dense")
    tokens = rng.integers(0, open_model(tmp_path / "dense").config.vocab_size, (5, 24)).astype(np.int32)
    recipe = Recipe(method="wanda", bits=bits, calibration=tokens, score="none", min_expert_tokens=1)
    prune_model(tmp_path / "dense", tmp_path / "few", recipe)
    logits = reference_logits(reference(tmp_path / "few"), tokens)
    np.testing.assert_allclose(run(load_decoder(tmp_path / "few"), tokens), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["int8", "int4:32"])
def test_a_folder_that_transformers_writes_again_is_the_same_model(tmp_path, rng, name):
    tensors = write_compressed(tmp_path / "few", rng, name)
    reference(tmp_path / "few").save_pretrained(tmp_path / "again", max_shard_size="10KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    source = open_model(tmp_path / "again").source
    assert source.tensors.keys() == open_source(tmp_path / "few").tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(source.read(key), value, err_msg=key)


@pytest.mark.parametrize(("name", "inputs"), [("int8", 20), ("int8", 7), ("int4:10", 20), ("int4:5", 5), ("int4", 256)])
def test_the_package_packs_and_unpacks_the_same_words(rng, name, inputs):
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    bits, num_bits = parse_bits(name), 8 if name == "int8" else 4
    weight = on_grid(rng, (6, inputs), bits)
    stored = compress_tensors({"a.weight": weight}, {"a.weight": bits})
    packed, scale = (torch.from_numpy(stored[f"a.weight_{part}"]) for part in ("packed", "scale"))
    multiples = unpack_from_int32(packed, num_bits, torch.Size(stored["a.weight_shape"].tolist()))
    assert torch.equal(pack_to_int32(multiples, num_bits), packed)
    dense = multiples.reshape(*scale.shape, -1) * scale[..., None]
    np.testing.assert_array_equal(dense.reshape(weight.shape).numpy(), weight)

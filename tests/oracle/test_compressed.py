"""Folders of few bits as transformers loads them through the compressed-tensors package."""

from types import ModuleType

import numpy as np
import pytest

from sparseopt.models import load_decoder, open_model, open_source
from sparseopt.pruning import Recipe, prune_model
from tests.jitted import run
from tests.models.files.test_compressed import DENSE, UP, write_compressed
from tests.models.tiny import GOLDEN, write_golden
from tests.oracle.conftest import reference, reference_logits

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module", autouse=True)
def package() -> ModuleType:
    return pytest.importorskip("compressed_tensors", reason="SKIPPED: needs compressed-tensors (make test-oracle)")


@pytest.mark.parametrize(("name", "shards"), [("int8", 1), ("int4:4", 3)])
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


@pytest.mark.parametrize(
    ("case", "bits"), [("mistral", "int4:8"), ("mixtral", "int8"), ("gemma3_images", "int4:8"), ("smollm3", "int8")]
)
def test_transformers_loads_a_model_that_was_pruned_in_few_bits(tmp_path, rng, case, bits):
    write_golden(GOLDEN / f"{case}.npz", tmp_path / "dense")
    tokens = rng.integers(0, open_model(tmp_path / "dense").config.vocab_size, (5, 24)).astype(np.int32)
    recipe = Recipe(method="wanda", bits=bits, calibration=tokens, score="none", min_expert_tokens=1)
    prune_model(tmp_path / "dense", tmp_path / "few", recipe)
    logits = reference_logits(reference(tmp_path / "few"), tokens)
    np.testing.assert_allclose(run(load_decoder(tmp_path / "few"), tokens), logits, rtol=0, atol=1e-5)


def test_a_folder_that_transformers_writes_again_is_the_same_model(tmp_path, rng):
    tensors = write_compressed(tmp_path / "few", rng, "int4:32")
    reference(tmp_path / "few").save_pretrained(tmp_path / "again", max_shard_size="10KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    source = open_model(tmp_path / "again").source
    assert source.tensors.keys() == open_source(tmp_path / "few").tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(source.read(key), value, err_msg=key)

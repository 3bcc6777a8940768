"""Comparisons with torch and transformers: recomputed golden files, loaded exports, a whole real model."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sparseopt.models import (
    OUTER_TAG,
    ShardedWriter,
    StreamedModel,
    block_tag,
    bundled_model,
    encode_text,
    load_tokenizer,
    open_model,
)
from sparseopt.models.files.safetensors import write_tensors
from tests.models.tiny import random_tensors, tiny_config, write_folder, write_gguf
from tests.oracle.make_golden import CASES, FOLDER, compute_case

pytestmark = pytest.mark.oracle

TEXT = (
    "The harbour lay quiet in the early light. In 1936 two hundred ships called here; by the end of the century "
    "hardly thirty did, and the cranes along the northern quay had long been sold for scrap."
)


def export(model: StreamedModel, folder: Path, **arguments: Any) -> Path:
    writer = ShardedWriter(folder, model.source, **arguments)
    writer.write(OUTER_TAG, {key: model.source.read(key) for key in model.outer_keys()})
    for i in range(model.num_blocks):
        writer.write(block_tag(i), {key: model.source.read(key) for key in model.block_keys(i).values()})
    writer.finish()
    return folder


def reference_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    with torch.no_grad():
        return model.float().eval()(input_ids=torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()


def reference_tensors(folder: Path) -> dict[str, Any]:
    """The parameters as transformers loads them, as raw bytes: torch's bfloat16 has no NumPy counterpart."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return {
        name: (tuple(value.shape), value.dtype, value.detach().contiguous().view(torch.uint8).numpy().tobytes())
        for name, value in model.named_parameters()
    }


@pytest.mark.parametrize("name", list(CASES))
def test_golden_files_are_what_the_reference_gives(name: str) -> None:
    stored, computed = dict(np.load(FOLDER / f"{name}.npz")), compute_case(name)
    assert set(stored) == set(computed)
    for key, value in computed.items():
        if key in ("hidden", "logits"):
            # Processors order the sums of float32 products differently: ten roundings or so of the largest value.
            np.testing.assert_allclose(stored[key], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=key)
        else:
            np.testing.assert_array_equal(stored[key], value, err_msg=key)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_an_export_loads_byte_for_byte_and_gives_our_logits(
    tmp_path: Path, rng: np.random.Generator, tied: bool, dtype: type
) -> None:
    import torch

    config = tiny_config(tie_word_embeddings=tied, attention_bias=True, dtype=np.dtype(dtype).name)
    source = write_folder(tmp_path / "source", config, {})
    tensors = random_tensors(config, rng, dtype)
    write_tensors(source / "model.safetensors", tensors)
    folder = export(open_model(source), tmp_path / "out")
    loaded = reference_tensors(folder)
    assert set(loaded) == set(tensors)
    for name, (shape, torch_dtype, raw) in loaded.items():
        assert (shape, raw) == (tensors[name].shape, tensors[name].tobytes()), name
        assert torch_dtype == getattr(torch, np.dtype(dtype).name), name
    tokens = rng.integers(0, config["vocab_size"], (2, 150)).astype(np.int32)
    expected = reference_logits(folder, tokens)
    np.testing.assert_allclose(open_model(folder).decoder()(tokens), expected, atol=1e-4)


def test_a_gguf_export_loads_with_its_tokenizer(tmp_path: Path, rng: np.random.Generator) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    config = tiny_config(tie_word_embeddings=False)
    model = open_model(write_gguf(tmp_path / "m.gguf", config, random_tensors(config, rng)))
    folder = export(model, tmp_path / "out")
    tokens = rng.integers(0, config["vocab_size"], (1, 20)).astype(np.int32)
    np.testing.assert_allclose(model.decoder()(tokens), reference_logits(folder, tokens), atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False)
    assert chat == "<|start|>he<|stop|>"
    assert GenerationConfig.from_pretrained(folder).eos_token_id == config["eos_token_id"]


def test_a_real_model_from_gguf_gives_the_reference_logits(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = open_model(bundled_model())
    folder = export(model, tmp_path / "out")
    tokens = encode_text(load_tokenizer(model.source), TEXT)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == tokens.tolist()
    assert theirs.decode(tokens) == TEXT
    expected = reference_logits(folder, tokens[None])
    np.testing.assert_allclose(model.decoder()(tokens[None]), expected, atol=2e-3, rtol=1e-4)

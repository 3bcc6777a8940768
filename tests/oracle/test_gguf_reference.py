"""GGUF files of every architecture as transformers reads them: tensors, configuration, logits and tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from sparseopt.models import Source, load_tokenizer, open_source
from sparseopt.models.files.safetensors import write_tensors
from tests.models.decoder.test_tokenizer import TRICKY
from tests.models.tiny_gguf import CONFIGS, sentencepiece_metadata, tensors_of, write_architecture
from tests.oracle.conftest import Proof

pytestmark = pytest.mark.oracle

# Written otherwise by transformers: left out of comparisons of configurations.
SPELLED_OTHERWISE = {"architectures", "dtype", "rope_theta", "rope_local_base_freq"}


def write_tiny(folder: Path, architecture: str, rng: np.random.Generator, **changes: Any) -> Source:
    # transformers takes no head_dim from a Qwen3 file and no scale of scores from a Gemma file, but these defaults, and
    # reads no scaling of rotary embeddings.
    heads = {"qwen3": {"head_dim": 128}, "gemma2": {"head_dim": 256}, "gemma3": {"head_dim": 256}}
    config = CONFIGS[architecture] | heads.get(architecture, {})
    # It counts tokens, not rows, where the file names no vocabulary.
    values = {"rope.scaling.type": None, "rope.scaling.factor": None, "vocab_size": config["vocab_size"]}
    written = {f"{architecture}.{name}": value for name, value in values.items()}
    tensors = tensors_of(architecture, config, rng)
    arguments = {"kind": GGMLQuantizationType.Q8_0} | changes
    return open_source(
        write_architecture(folder / "m.gguf", architecture, config, tensors, changes=written, **arguments)
    )


def rounded(value: Any) -> Any:
    """A float as the shortest decimal of its float32, which is what a file holds."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def export(source: Source, folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(source.config))
    write_tensors(folder / "model.safetensors", {name: source.read(name) for name in source.tensors})
    for name, content in source.sidecars().items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("architecture", CONFIGS)
def test_transformers_reads_the_same_model(
    tmp_path: Path, rng: np.random.Generator, architecture: str, proof: Proof
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source = write_tiny(tmp_path, architecture, rng)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    assert type(theirs).__name__ == source.config["architectures"][0]
    state = theirs.state_dict()
    assert set(state) - {"lm_head.weight"} == set(source.tensors) - {"lm_head.weight"}
    for name in source.tensors:
        np.testing.assert_array_equal(source.read(name), state[name].numpy(), err_msg=name)
    # Qwen2's class has no field for the width of a head.
    skipped = SPELLED_OTHERWISE | ({"head_dim"} if architecture == "qwen2" else set())
    expected = {name: value for name, value in source.config.items() if name not in skipped}
    assert {name: rounded(getattr(theirs.config, name)) for name in expected} == expected
    # A folder written from what was read is the same model.
    ours, report = AutoModelForCausalLM.from_pretrained(export(source, tmp_path / "out"), output_loading_info=True)
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    tokens = torch.from_numpy(rng.integers(0, 320, (2, 40)))
    with torch.no_grad():
        expected = theirs(input_ids=tokens, use_cache=False).logits
        torch.testing.assert_close(ours.eval()(input_ids=tokens, use_cache=False).logits, expected)
    proof.record(source.config["model_type"], "gguf", case=architecture)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_transformers_reads_the_same_tokens(tmp_path: Path, rng: np.random.Generator, architecture: str) -> None:
    from transformers import AutoTokenizer

    source = write_tiny(tmp_path, architecture, rng)
    ours = load_tokenizer(source)
    exported = AutoTokenizer.from_pretrained(export(source, tmp_path / "out"))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in TRICKY:
        expected = ours.encode(text).ids
        assert exported(text)["input_ids"] == expected, text
        assert exported.decode(expected) == ours.decode(expected, skip_special_tokens=False), text
        # transformers leaves Qwen's normalisation out when it reads a GGUF file.
        if "\u0301" not in text:
            assert theirs(text)["input_ids"] == expected, text
    assert (exported.bos_token_id, exported.eos_token_id, exported.pad_token_id) == (1, 2, 0)


def test_llama_2_tokens(tmp_path: Path, rng: np.random.Generator) -> None:
    from transformers import AutoTokenizer

    metadata = sentencepiece_metadata(prefix=True) | {
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.add_bos_token": True,
    }
    config, file = CONFIGS["llama"], tmp_path / "m.gguf"
    source = open_source(write_architecture(file, "llama", config, tensors_of("llama", config, rng), changes=metadata))
    ours, theirs = load_tokenizer(source), AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    exported = AutoTokenizer.from_pretrained(export(source, tmp_path / "out"))
    for text in TRICKY:
        assert exported(text)["input_ids"] == ours.encode(text).ids, text
        # transformers puts no prefix before text that begins with a space or follows a special token.
        if not text.startswith(" ") and not any(mark in text for mark in ("<", "\n\n", "  ")):
            assert theirs(text)["input_ids"] == ours.encode(text).ids, text

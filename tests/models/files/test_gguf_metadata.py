"""A model's configuration, tensors and tokenizer as GGUF metadata: what is written reads as what it was."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from sparseopt.models import open_source
from sparseopt.models.files.gguf.architectures import architecture_of
from sparseopt.models.files.gguf.header import Value, text
from sparseopt.models.files.gguf.scaling import ROPE_FACTORS
from tests.models.tiny import CONFIGS, random_tensors


def write(file: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], values: dict[str, Value]) -> Path:
    """A GGUF file with these metadata, as a writer makes it."""
    name, architecture = architecture_of(config)
    writer = gguf.GGUFWriter(file, name)
    for key, (value, kind, item) in values.items():
        if key != "general.architecture":
            writer.add_key_value(key, value, kind, sub_type=item)
    for key, tensor in tensors.items():
        writer.add_tensor(architecture.gguf_name(key), architecture.redo(key, tensor, config))
    if (factors := architecture.rope_factors(config)) is not None:
        writer.add_tensor(ROPE_FACTORS, factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def written(file: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Any:
    """The source of a file with the metadata of a configuration alone."""
    name, architecture = architecture_of(config)
    values = {f"{name}.{key}": value for key, value in architecture.write_config(config).items()}
    return open_source(write(file, config, tensors, {"general.architecture": text(name)} | values))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
CHANGED: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in CONFIGS},
    "linear": ("qwen3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000000.0}}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "yarn with factors": (
        "llama",
        {"rope_parameters": YARN | {"attention_factor": 1.25, "beta_fast": 24.0, "beta_slow": 2.0}},
    ),
    "llama3": ("llama", {"rope_theta": 500000.0, "rope_parameters": LLAMA3}),
    "heads that do not divide": ("qwen2", {"num_attention_heads": 3, "num_key_value_heads": 1}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "other sliding layers": ("gemma2", {"layer_types": ["sliding_attention"] * 2 + ["full_attention"]}),
    "all sliding": ("gemma3", {"layer_types": ["sliding_attention"] * 7}),
    "none sliding": ("gemma3", {"layer_types": ["full_attention"] * 7}),
    "the largest gemma2": (
        "gemma2",
        {"num_hidden_layers": 46, "query_pre_attn_scalar": 8, "layer_types": None},
    ),
    "a cap": ("gemma3", {"final_logit_softcapping": 20.0}),
}


@pytest.mark.parametrize(("architecture", "changes"), CHANGED.values(), ids=CHANGED)
def test_a_configuration_and_its_tensors_come_back(tmp_path, rng, architecture, changes):
    config = CONFIGS[architecture] | changes
    if config.get("layer_types", ()) is None:
        config["layer_types"] = ["sliding_attention", "full_attention"] * (config["num_hidden_layers"] // 2)
    tensors = random_tensors(config, rng)
    source = written(tmp_path / "m.gguf", config, tensors)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert source.config == {name: value for name, value in config.items() if name not in ids}
    assert set(source.tensors) == set(tensors)
    for name, tensor in tensors.items():
        # Gemma's norms have been through + 1 and - 1 in float32.
        atol = 2e-7 if architecture.startswith("gemma") and tensor.ndim == 1 else 0
        np.testing.assert_allclose(source.read(name), tensor, rtol=0, atol=atol, err_msg=name)

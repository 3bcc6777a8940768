"""Make tests/models/golden/*.npz with the reference implementation: `python -m tests.oracle.make_golden`.

A file holds one tiny random Llama: its configuration (JSON), weights (float16, exact), token ids, the output of
the embedding, of every block and of the whole model (logits), all computed by transformers in float32.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parents[1] / "models" / "golden"

_SIZES = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_NEW_ROPE = {key: value for key, value in _SIZES.items() if key != "rope_parameters"}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

CASES: dict[str, dict[str, Any]] = {
    "tied_grouped": _SIZES | {"tie_word_embeddings": True},
    "untied_biases": _SIZES | {"attention_bias": True, "mlp_bias": True, "head_dim": 6},
    "legacy_rope": _NEW_ROPE | {"rope_theta": 50.0, "num_key_value_heads": 4},
    "legacy_linear": _NEW_ROPE | {"rope_theta": 1000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama3_rope": _SIZES | {"rope_parameters": _LLAMA3, "num_key_value_heads": 1, "head_dim": 8},
}


def compute_case(name: str) -> dict[str, np.ndarray]:
    """The arrays of one golden file, from torch and transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    # The class may move entries of nested tables, so it gets a copy.
    config = json.loads(json.dumps(CASES[name]))
    model = LlamaForCausalLM(LlamaConfig(**config)).float().eval()
    generator = torch.Generator().manual_seed(list(CASES).index(name))
    arrays: dict[str, np.ndarray] = {"config": np.array(json.dumps(CASES[name]))}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
            parameter.copy_((drawn + ("norm" in key)).half().float())
            arrays[f"weight/{key}"] = parameter.numpy().astype(np.float16)
        tokens = torch.randint(0, config["vocab_size"], (2, 24), generator=generator)
        outputs: list[torch.Tensor] = []
        parts = [model.model.embed_tokens, *model.model.layers]
        for part in parts:
            part.register_forward_hook(lambda _, __, y: outputs.append(y[0] if isinstance(y, tuple) else y))
        logits = model(input_ids=tokens, use_cache=False).logits
    arrays["tokens"] = tokens.numpy().astype(np.int32)
    arrays["hidden"] = torch.stack(outputs).numpy()
    arrays["logits"] = logits.numpy()
    return arrays


def main() -> None:
    """Write all files."""
    FOLDER.mkdir(exist_ok=True)
    for name in CASES:
        np.savez_compressed(FOLDER / f"{name}.npz", **compute_case(name))


if __name__ == "__main__":
    main()

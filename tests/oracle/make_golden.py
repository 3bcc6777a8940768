"""Make tests/models/golden/*.npz with the reference implementation: `python -m tests.oracle.make_golden [NAME ...]`.

A file contains one tiny random model: its configuration (JSON) and weights (float16, exact) as transformers stores
them, token ids, the stream before every block and after the last (`hidden`), and the logits, all computed by
transformers in float32.
"""

import json
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parents[1] / "models" / "golden"

_SIZES = {"model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
_SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
_SIZES |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = _SIZES | {"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}
_OLD_ROPE = {key: value for key, value in _LLAMA.items() if key != "rope_parameters"}
_EXPERTS = {"num_experts_per_tok": 2, "tie_word_embeddings": False}


def _of(kind: str, **fields: Any) -> dict[str, Any]:
    return _SIZES | {"model_type": kind} | fields


def _rope(kind: str, theta: float = 100.0, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **fields}}


_HALF = _rope("default", partial_rotary_factor=0.5)
_LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
_LONG = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 5.0], "original_max_position_embeddings": 16}
_GEMMA3_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
}
_GEMMA = {"head_dim": 6, "sliding_window": 7, "query_pre_attn_scalar": 10}
_GEMMA3 = _SIZES | _GEMMA | {"rope_parameters": _GEMMA3_ROPES, "sliding_window_pattern": 3}
del _GEMMA3["model_type"]
_VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION |= {"image_size": 28, "patch_size": 14}
_SCALES = {"embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.4, "logits_scaling": 2.0}
_ROUTED = {"num_experts": 6, "moe_intermediate_size": 12, "mlp_only_layers": [1], "norm_topk_prob": True}

CASES: dict[str, dict[str, Any]] = {
    "tied_grouped": _LLAMA | {"tie_word_embeddings": True},
    "untied_biases": _LLAMA | {"attention_bias": True, "mlp_bias": True, "head_dim": 6},
    "legacy_rope": _OLD_ROPE | {"rope_theta": 50.0, "num_key_value_heads": 4},
    "legacy_linear": _OLD_ROPE | {"rope_theta": 1000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama3_rope": _LLAMA | _rope("llama3", **_LLAMA3) | {"num_key_value_heads": 1, "head_dim": 8},
    "dynamic_rope": _LLAMA | _rope("dynamic", factor=4.0) | {"max_position_embeddings": 12, "head_dim": 8},
    "yarn_rope": _LLAMA | _rope("yarn", factor=4.0, original_max_position_embeddings=12) | {"head_dim": 8},
    "mistral": _of("mistral", sliding_window=7, tie_word_embeddings=False),
    "qwen2": _of("qwen2", tie_word_embeddings=True),
    "qwen2_window": _of("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": _of("qwen3", head_dim=6, tie_word_embeddings=True),
    "smollm3": _of("smollm3", no_rope_layers=[1, 0, 1], tie_word_embeddings=True),
    "gemma2": _of("gemma2", **_GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3_text": {"model_type": "gemma3_text"} | _GEMMA3,
    "gemma3_images": {"model_type": "gemma3", "text_config": _GEMMA3, "vision_config": _VISION}
    | {"mm_tokens_per_image": 1},
    "phi3": _of("phi3", sliding_window=9, tie_word_embeddings=False),
    "phi3_longrope": _of("phi3", original_max_position_embeddings=16, tie_word_embeddings=False)
    | _rope("longrope", **_LONG),
    "olmo2": _of("olmo2", tie_word_embeddings=False),
    "starcoder2": _of("starcoder2", sliding_window=7),
    "stablelm": _of("stablelm", use_qkv_bias=True, **_HALF),
    "stablelm_parallel": _of("stablelm", use_parallel_residual=True, tie_word_embeddings=True, **_HALF),
    "granite": _of("granite", attention_bias=True, mlp_bias=True, tie_word_embeddings=True, **_SCALES),
    "cohere": _of("cohere", logit_scale=0.5),
    "cohere2": _of("cohere2", logit_scale=0.25, sliding_window=7, sliding_window_pattern=2)
    | {"attention_bias": True, "head_dim": 6, "tie_word_embeddings": False},
    "glm": _of("glm", head_dim=8, **_HALF),
    "glm4": _of("glm4", head_dim=8, attention_bias=False, tie_word_embeddings=True, **_HALF),
    "opt": _of("opt", ffn_dim=24, word_embed_proj_dim=16),
    "gpt2": {"model_type": "gpt2", "vocab_size": 40, "n_embd": 16, "n_head": 4, "n_layer": 3, "n_positions": 64},
    "gpt_neox": _of("gpt_neox", **_HALF),
    "gpt_neox_serial": _of("gpt_neox", use_parallel_residual=False, **_HALF),
    "mixtral": _of("mixtral", num_local_experts=4, **_EXPERTS),
    "qwen3_moe": _of("qwen3_moe", head_dim=6, **_ROUTED, **_EXPERTS),
}
# What older files say in their own way; transformers writes them anew, so the configuration here goes into the file.
AS_GIVEN = ("legacy_rope", "legacy_linear")


def _seed(name: str) -> int:
    """The same for a case whatever cases stand beside it."""
    return zlib.crc32(name.encode())


def build_model(name: str) -> Any:
    """The model of a case in torch, float32, with weights that float16 holds exactly."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    # The class may move entries of nested tables, so it gets a copy.
    fields = json.loads(json.dumps(CASES[name]))
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(_seed(name))
    offset = 0.0 if "gemma" in name else 1.0
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            scale = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
            norm = parameter.ndim == 1 and key.endswith("weight")
            parameter.copy_((scale + offset * norm).half().float())
    return model


def blocks_of(model: Any) -> Any:
    """The list of a model's blocks."""
    import torch

    count = model.config.get_text_config().num_hidden_layers
    lists = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == count]
    return lists[0]


def run_layers(model: Any, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The stream in front of every block and behind the last, `[L + 1, B, T, D]`, and the logits."""
    import torch

    streams: list[torch.Tensor] = []

    def in_front(_: Any, arguments: tuple, keywords: dict) -> None:
        streams.append(arguments[0] if arguments else keywords["hidden_states"])

    def behind(_: Any, __: Any, output: Any) -> None:
        streams.append(output[0] if isinstance(output, tuple) else output)

    blocks = blocks_of(model)
    hooks = [block.register_forward_pre_hook(in_front, with_kwargs=True) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(behind))
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(tokens).long(), use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return torch.stack(streams).numpy(), logits.numpy()


def compute_case(name: str) -> dict[str, np.ndarray]:
    """The arrays of one golden file, from torch and transformers."""
    from safetensors.numpy import load_file

    model = build_model(name)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        stored = load_file(Path(folder) / "model.safetensors")
        config = json.loads((Path(folder) / "config.json").read_text())
    given = CASES[name] if name in AS_GIVEN else config
    arrays: dict[str, np.ndarray] = {"config": np.array(json.dumps(given))}
    arrays |= {f"weight/{key}": value.astype(np.float16) for key, value in sorted(stored.items())}
    tokens = np.random.default_rng(_seed(name)).integers(0, 40, (2, 24)).astype(np.int32)
    arrays["tokens"] = tokens
    arrays["hidden"], arrays["logits"] = run_layers(model, tokens)
    return arrays


def main() -> None:
    """Write all files, or those named."""
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or CASES:
        np.savez_compressed(FOLDER / f"{name}.npz", **compute_case(name))


if __name__ == "__main__":
    main()

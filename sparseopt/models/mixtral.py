"""Floor 5: the Mixtral family: Mistral with a mixture of experts in every block."""

from collections.abc import Mapping
from typing import Any

from sparseopt.models.family import BLOCK_NAMES, Family, KeyTable, read_decoder, read_experts
from sparseopt.models.fields import require
from sparseopt.models.rope import read_rope
from sparseopt.models.settings import BlockKind, DecoderConfig


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A Hugging Face Mixtral configuration as a `DecoderConfig`.

    Raises:
        ModelError: naming the field that is missing, inconsistent or not supported.
    """
    given = {"num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, **config}
    window = None if config.get("sliding_window") is None else require(config, "sliding_window")
    kind = BlockKind(read_rope(config, 1e6), window, experts=True)
    experts = read_experts(given, "num_local_experts", "intermediate_size", normalise=True)
    return read_decoder(given, kinds=(kind,) * require(config, "num_hidden_layers"), experts=experts)


BLOCK = (
    *BLOCK_NAMES,
    ("block_sparse_moe.gate", "mlp.router"),
    ("block_sparse_moe.experts.*.w1", "mlp.experts.*.gate_proj"),
    ("block_sparse_moe.experts.*.w3", "mlp.experts.*.up_proj"),
    ("block_sparse_moe.experts.*.w2", "mlp.experts.*.down_proj"),
)

MIXTRAL = Family("mixtral", read_config, KeyTable(block=BLOCK))

"""Mistral and Mixtral, its mixture of experts."""

from sparseopt.models.base.fields import Config, optional, refuse_unless
from sparseopt.models.base.rope import read_rope
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig
from sparseopt.models.families.family import BLOCK_NAMES, Family, KeyTable, SizeFields, read_decoder, read_experts


def _read_mistral(config: Config) -> DecoderConfig:
    """The Mistral family: Llama with a sliding window."""
    refuse_unless(config, {"layer_types": (None,)})
    kind = BlockKind(read_rope(config), optional(config, "sliding_window", default=4096))
    return read_decoder(config, (kind,))


MISTRAL = Family("mistral", _read_mistral)


def _read_mixtral(config: Config) -> DecoderConfig:
    """The Mixtral family: Mistral with a mixture of experts in every block."""
    given = {"num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, **config}
    kind = BlockKind(read_rope(config, 1e6), optional(config, "sliding_window"), experts=True)
    experts = read_experts(given, "num_local_experts", "intermediate_size", normalise=True)
    return read_decoder(given, (kind,), experts=experts)


_MIXTRAL_BLOCK = (
    *BLOCK_NAMES,
    ("block_sparse_moe.gate", "mlp.router"),
    ("block_sparse_moe.experts.*.w1", "mlp.experts.*.gate_proj"),
    ("block_sparse_moe.experts.*.w3", "mlp.experts.*.up_proj"),
    ("block_sparse_moe.experts.*.w2", "mlp.experts.*.down_proj"),
)

MIXTRAL = Family("mixtral", _read_mixtral, KeyTable(block=_MIXTRAL_BLOCK), SizeFields(experts=("num_local_experts",)))

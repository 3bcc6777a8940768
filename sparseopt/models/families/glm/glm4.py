"""The GLM-4 family (GLM-4-0414): GLM with norms before and after each part."""

from sparseopt.models.base.fields import Config
from sparseopt.models.decoder.settings import DecoderConfig
from sparseopt.models.families.family import Family, KeyTable
from sparseopt.models.families.glm.glm import read_glm

NORMS = (
    ("input_layernorm", "attention_norm"),
    ("post_self_attn_layernorm", "attention_post_norm"),
    ("post_attention_layernorm", "mlp_norm"),
    ("post_mlp_layernorm", "mlp_post_norm"),
)


def _read_config(config: Config) -> DecoderConfig:
    return read_glm(config, norms=tuple(name for _, name in NORMS))


FAMILY = Family("glm4", _read_config, KeyTable(block=NORMS))

"""Gemma 3 with an image encoder: its text model; the encoder's tensors pass through unchanged."""

from collections.abc import Mapping
from dataclasses import replace

from sparseopt.models.base.errors import ModelError
from sparseopt.models.base.fields import Config
from sparseopt.models.decoder.settings import DecoderConfig
from sparseopt.models.families.family import OUTER_NAMES, Family, KeyTable, refuses_undivided_width
from sparseopt.models.families.gemma.gemma2 import GEMMA_NORMS
from sparseopt.models.families.gemma.gemma3 import SIZES, read_text_config


def _read_config(config: Config) -> DecoderConfig:
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise ModelError(f"the model configuration's text_config must be a table, given {text!r}")
    return read_text_config(text)


OUTER = tuple((f"language_model.{key}", path) for key, path in OUTER_NAMES)

FAMILY = Family(
    "gemma3", _read_config, KeyTable(OUTER, GEMMA_NORMS), replace(SIZES, table="text_config"), refuses_undivided_width
)

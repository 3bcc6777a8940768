"""Gemma 3 with an image encoder: its text model; the encoder's tensors pass through unchanged."""

from dataclasses import replace

from sparseopt.models.base.fields import Config
from sparseopt.models.decoder.settings import DecoderConfig
from sparseopt.models.families.family import OUTER_NAMES, Family, KeyTable, refuses_undivided_width
from sparseopt.models.families.gemma import gemma3
from sparseopt.models.families.gemma.gemma2 import GEMMA_NORMS


def _read_config(config: Config) -> DecoderConfig:
    return gemma3.read_text_config(SIZES.fields(config))


SIZES = replace(gemma3.SIZES, table="text_config")
OUTER = tuple((f"language_model.{key}", path) for key, path in OUTER_NAMES)

FAMILY = Family("gemma3", _read_config, KeyTable(OUTER, GEMMA_NORMS), SIZES, refuses_undivided_width)

"""Floor 5: Gemma 3 with an image encoder: its text model, beside which the encoder's tensors pass through."""

from collections.abc import Mapping
from typing import Any

from sparseopt.models.errors import ModelError
from sparseopt.models.family import OUTER_NAMES, Family, KeyTable
from sparseopt.models.gemma2 import GEMMA_NORMS
from sparseopt.models.gemma3 import read_config
from sparseopt.models.settings import DecoderConfig


def read_text_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The text part of a Gemma 3 configuration with an image encoder, as a `DecoderConfig`.

    Raises:
        ModelError: naming the field that is missing, inconsistent or not supported.
    """
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise ModelError(f"the model configuration's text_config must be a table, given {text!r}")
    return read_config(text)


OUTER = tuple((f"language_model.{key}", path) for key, path in OUTER_NAMES)

GEMMA3_IMAGES = Family("gemma3", read_text_config, KeyTable(OUTER, GEMMA_NORMS))

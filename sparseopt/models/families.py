"""Floor 5: the known model families by `model_type`. A new one is one file and one line here."""

from collections.abc import Mapping
from typing import Any

from sparseopt.models.errors import ModelError
from sparseopt.models.family import Family
from sparseopt.models.llama import LLAMA

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA,)}


def find_family(config: Mapping[str, Any]) -> Family:
    """The family that a Hugging Face configuration names.

    Raises:
        ModelError: if its `model_type` is absent or unknown, naming those known.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ModelError(f"unknown model_type {model_type!r}; known are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]

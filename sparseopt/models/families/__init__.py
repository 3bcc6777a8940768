"""The known model families by `model_type`. A new one is one file, with its `Family` called FAMILY, and one line here.

`family` defines what a family is. `FAMILIES` and `find_family` are exported here.
"""

from collections.abc import Collection, Mapping
from importlib import import_module
from typing import Any

from sparseopt.models.base.errors import ModelError
from sparseopt.models.families.family import Family

# The files of this folder, in the order of the documentation.
FILES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "gemma.gemma2",
    "gemma.gemma3",
    "gemma.gemma3_images",
    "phi3",
    "olmo2",
    "starcoder2",
    "stablelm",
    "granite",
    "cohere.cohere",
    "cohere.cohere2",
    "glm.glm",
    "glm.glm4",
    "gpts.opt",
    "gpts.gpt2",
    "gpts.gpt_neox",
    "mixtures.mixtral",
    "mixtures.qwen3_moe",
)
_FOUND: list[Family] = [import_module(f"{__name__}.{file}").FAMILY for file in FILES]
#: The known families by the `model_type` of a configuration.
FAMILIES = {family.model_type: family for family in _FOUND}


def find_family(config: Mapping[str, Any], names: Collection[str] = ()) -> Family:
    """The family that a Hugging Face configuration names, adapted to the names of a checkpoint's tensors.

    Raises:
        ModelError: if its `model_type` is absent or unknown, with a list of the known ones.
    """
    model_type = config.get("model_type")
    # In a list: a damaged file may give a value that cannot be hashed.
    if model_type not in list(FAMILIES):
        raise ModelError(f"unknown model_type {repr(model_type)[:100]}; known are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type].fitting(names)

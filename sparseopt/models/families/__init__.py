"""The known model families by `model_type`. A new one is a `Family` in one of these files, and one name here.

`family` defines what a family is. `FAMILIES` and `find_family` are exported here.
"""

from collections.abc import Collection, Mapping
from typing import Any

from sparseopt.models.base.errors import ModelError
from sparseopt.models.families.cohere import COHERE, COHERE2
from sparseopt.models.families.family import Family
from sparseopt.models.families.gemma import GEMMA2, GEMMA3, GEMMA3_WITH_IMAGES
from sparseopt.models.families.glm import GLM, GLM4
from sparseopt.models.families.gpts import GPT2, GPT_NEOX, OPT
from sparseopt.models.families.llama import GRANITE, LLAMA, SMOLLM3
from sparseopt.models.families.mistral import MISTRAL, MIXTRAL
from sparseopt.models.families.olmo2 import OLMO2
from sparseopt.models.families.phi3 import PHI3
from sparseopt.models.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from sparseopt.models.families.stablelm import STABLELM
from sparseopt.models.families.starcoder2 import STARCODER2

# In the order of the documentation.
_KNOWN = (
    *(LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, GEMMA2, GEMMA3, GEMMA3_WITH_IMAGES, PHI3, OLMO2, STARCODER2, STABLELM),
    *(GRANITE, COHERE, COHERE2, GLM, GLM4, OPT, GPT2, GPT_NEOX, MIXTRAL, QWEN3_MOE),
)
#: The known families by the `model_type` of a configuration.
FAMILIES: dict[str, Family] = {family.model_type: family for family in _KNOWN}


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

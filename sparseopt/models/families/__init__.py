"""The known model families by `model_type`. A new one is one file and one line here.

`family` says what a family is. `FAMILIES` and `find_family` are handed out here.
"""

from collections.abc import Collection, Mapping
from typing import Any

from sparseopt.models.base.errors import ModelError
from sparseopt.models.families.family import Family
from sparseopt.models.families.gemma.gemma2 import GEMMA2
from sparseopt.models.families.gemma.gemma3 import GEMMA3
from sparseopt.models.families.gemma.gemma3_images import GEMMA3_IMAGES
from sparseopt.models.families.gpt2 import GPT2
from sparseopt.models.families.gpt_neox import GPT_NEOX
from sparseopt.models.families.llama import LLAMA
from sparseopt.models.families.mistral import MISTRAL
from sparseopt.models.families.mixtures.mixtral import MIXTRAL
from sparseopt.models.families.mixtures.qwen3_moe import QWEN3_MOE
from sparseopt.models.families.olmo2 import OLMO2
from sparseopt.models.families.opt import OPT
from sparseopt.models.families.phi3 import PHI3
from sparseopt.models.families.qwen2 import QWEN2
from sparseopt.models.families.qwen3 import QWEN3
from sparseopt.models.families.smollm3 import SMOLLM3

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, GEMMA2, GEMMA3, GEMMA3_IMAGES, PHI3, OLMO2),
        *(OPT, GPT2, GPT_NEOX),
        *(MIXTRAL, QWEN3_MOE),
    )
}


def find_family(config: Mapping[str, Any], names: Collection[str] = ()) -> Family:
    """The family that a Hugging Face configuration names, with the names that a checkpoint's tensors have.

    Raises:
        ModelError: if its `model_type` is absent or unknown, naming those known.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelError(f"unknown model_type {repr(model_type)[:100]}; known are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type].fitting(names)

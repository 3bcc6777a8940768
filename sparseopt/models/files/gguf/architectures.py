"""The supported GGUF architectures, and the one as which a Hugging Face model is written.

Some constants are not in GGUF files, because the programs that run them know the architecture; they are in the same
file. A new architecture is two functions, one that reads a configuration and one that writes it, and one entry here.
"""

from sparseopt.models.base.errors import ModelError
from sparseopt.models.base.fields import shown
from sparseopt.models.files.gguf.architecture import Architecture
from sparseopt.models.files.gguf.fields import Config
from sparseopt.models.files.gguf.gemmas import GEMMA2, GEMMA3
from sparseopt.models.files.gguf.gpts import GPTNEOX
from sparseopt.models.files.gguf.llamas import LLAMA, OLMO2, PHI3, QWEN2, QWEN3, SMOLLM3, STARCODER2

ARCHITECTURES: dict[str, Architecture] = {
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "smollm3": SMOLLM3,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "phi3": PHI3,
    "olmo2": OLMO2,
    "starcoder2": STARCODER2,
    "gptneox": GPTNEOX,
}
# By `model_type`. Mistral has the tensors of Llama.
_WRITTEN_AS = {known.model_type: name for name, known in ARCHITECTURES.items()} | {"mistral": "llama"}


def architecture_of(config: Config) -> tuple[str, Architecture]:
    """The architecture as which a Hugging Face configuration is written, with its name in GGUF.

    Raises:
        ModelError: if its `model_type` has no name here, with a list of the known ones.
    """
    model_type = config.get("model_type")
    # In a list: a damaged file may give a value that cannot be hashed.
    if model_type not in list(_WRITTEN_AS):
        raise ModelError(
            f"the model_type {shown(model_type)} has no name in GGUF here; known are {', '.join(_WRITTEN_AS)}: write "
            "the model as a Hugging Face folder instead"
        )
    name = _WRITTEN_AS[str(model_type)]
    return name, ARCHITECTURES[name]

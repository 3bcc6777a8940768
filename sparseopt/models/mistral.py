"""Floor 5: the Mistral family: Llama with a sliding window."""

from collections.abc import Mapping
from typing import Any

from sparseopt.models.family import Family, read_decoder
from sparseopt.models.fields import refuse_unless, require
from sparseopt.models.rope import read_rope
from sparseopt.models.settings import BlockKind, DecoderConfig


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A Hugging Face Mistral configuration as a `DecoderConfig`.

    Raises:
        ModelError: naming the field that is missing, inconsistent or not supported.
    """
    refuse_unless(config, {"layer_types": (None,)})
    given = {"sliding_window": 4096, **config}
    window = None if given["sliding_window"] is None else require(given, "sliding_window")
    kinds = (BlockKind(read_rope(config), window),) * require(config, "num_hidden_layers")
    return read_decoder(config, kinds=kinds)


MISTRAL = Family("mistral", read_config)

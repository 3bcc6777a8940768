"""Floor 5: the text models of Gemma 3: Gemma 2 with norms on queries and keys and a rotary base for local blocks."""

from collections.abc import Mapping
from typing import Any

from sparseopt.models.family import Family, KeyTable, read_windows
from sparseopt.models.fields import require
from sparseopt.models.gemma2 import GEMMA_NORMS, read_gemma
from sparseopt.models.rope import Rope, read_rope
from sparseopt.models.settings import BlockKind, DecoderConfig


def read_kinds(config: Mapping[str, Any]) -> tuple[BlockKind, ...]:
    """Five local blocks, then a global one, or as the configuration says; local ones have a rope of their own."""
    pattern = require({"sliding_window_pattern": 6, **config}, "sliding_window_pattern")
    window = require({"sliding_window": 4096, **config}, "sliding_window")
    parts = config.get("rope_parameters") or {}
    everywhere = read_rope(config, 1e6, part="full_attention")
    if "sliding_attention" in parts:
        nearby = read_rope(config, 1e4, part="sliding_attention")
    else:
        nearby = Rope(require({"rope_local_base_freq": 1e4, **config}, "rope_local_base_freq", float))
    local = read_windows(config, lambda index: (index + 1) % pattern != 0)
    return tuple(BlockKind(nearby, window) if slides else BlockKind(everywhere) for slides in local)


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A Hugging Face Gemma 3 text configuration as a `DecoderConfig`.

    Raises:
        ModelError: naming the field that is missing, inconsistent or not supported.
    """
    return read_gemma(config, read_kinds(config), None, None, qk_norm="head")


GEMMA3 = Family("gemma3_text", read_config, KeyTable(block=GEMMA_NORMS))

"""Floor 5: the text models of Gemma 3: Gemma 2 with norms on queries and keys and a rotary base for local blocks."""

from sparseopt.models.family import Family, KeyTable, SizeFields, read_windows, refuses_undivided_width
from sparseopt.models.fields import Config, require
from sparseopt.models.gemma2 import GEMMA_NORMS, read_gemma
from sparseopt.models.rope import Rope, read_rope
from sparseopt.models.settings import BlockKind, DecoderConfig


def _read_kinds(config: Config) -> tuple[BlockKind, ...]:
    """Five local blocks, then a global one, or as the configuration says; local ones have their own rope."""
    pattern = require(config, "sliding_window_pattern", default=6)
    window = require(config, "sliding_window", default=4096)
    everywhere = read_rope(config, 1e6, part="full_attention")
    if "sliding_attention" in (config.get("rope_parameters") or {}):
        nearby = read_rope(config, 1e4, part="sliding_attention")
    else:
        nearby = Rope(require(config, "rope_local_base_freq", float, default=1e4))
    local = read_windows(config, lambda index: (index + 1) % pattern != 0)
    return tuple(BlockKind(nearby, window) if slides else BlockKind(everywhere) for slides in local)


def read_text_config(config: Config) -> DecoderConfig:
    """The configuration of a text model, also of one beside an image encoder."""
    return read_gemma(config, _read_kinds(config), None, None, qk_norm="head")


SIZES = SizeFields(by_block=("layer_types",))

GEMMA3 = Family("gemma3_text", read_text_config, KeyTable(block=GEMMA_NORMS), SIZES, refuses_undivided_width)

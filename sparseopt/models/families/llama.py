"""Llama and the families that are Llama with a switch or two: SmolLM3, Granite."""

from sparseopt.models.base.errors import ModelError
from sparseopt.models.base.fields import Config, optional, refuse_unless, require
from sparseopt.models.base.rope import read_rope, rope_table
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig
from sparseopt.models.families.family import Family, SizeFields, read_decoder, read_windows, refuses_undivided_width


def _read_llama(config: Config) -> DecoderConfig:
    """The Llama family (Llama 1 to 3, SmolLM, TinyLlama and others with model_type "llama")."""
    refuse_unless(config, {"sliding_window": (None,)})
    attention_bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    return read_decoder(config, (BlockKind(read_rope(config)),), attention_bias=attention_bias, mlp_bias=mlp_bias)


LLAMA = Family("llama", _read_llama, refuses=refuses_undivided_width)


def _read_kinds(config: Config) -> tuple[BlockKind, ...]:
    """The blocks: `no_rope_layers` holds 1 for blocks with positions; only blocks without them have a window."""
    count, given = require(config, "num_hidden_layers"), config.get("no_rope_layers")
    if given is None:
        interval = require(config, "no_rope_layer_interval", default=4)
        given = [int((index + 1) % interval != 0) for index in range(count)]
    if len(given) < count or not set(given) <= {0, 1}:
        raise ModelError(f"no_rope_layers must hold 0 or 1 for each of {count} blocks, given {given!r}")
    window = optional(config, "sliding_window") if config.get("use_sliding_window") else None
    rope = read_rope(config, theta=2000000.0)
    sliding = read_windows(config, lambda index: window is not None and not given[index])
    kinds = zip(given, sliding, strict=False)
    return tuple(BlockKind(rope if turns else None, window if slides else None) for turns, slides in kinds)


def _read_smollm3(config: Config) -> DecoderConfig:
    """The SmolLM3 family: Llama in which some blocks have no position embedding."""
    return read_decoder(
        {"num_key_value_heads": 4, "tie_word_embeddings": True, **config},
        _read_kinds(config),
        attention_bias=bool(config.get("attention_bias")),
        mlp_bias=bool(config.get("mlp_bias")),
    )


SMOLLM3 = Family("smollm3", _read_smollm3, sizes=SizeFields(by_block=("layer_types", "no_rope_layers")))


def _read_granite(config: Config) -> DecoderConfig:
    """The Granite family: Llama with factors on embeddings, scores, the outputs of each part, and logits."""
    # transformers rotates whole heads and ignores the field.
    refuse_unless(rope_table(config), {"partial_rotary_factor": (1.0,)})

    def factor(name: str) -> float:
        return require(config, name, float, default=1.0)

    return read_decoder(
        config,
        (BlockKind(read_rope(config)),),
        attention_bias=bool(config.get("attention_bias")),
        mlp_bias=bool(config.get("mlp_bias")),
        embedding_scale=factor("embedding_multiplier"),
        score_scale=factor("attention_multiplier"),
        residual_scale=factor("residual_multiplier"),
        logit_scale=1 / factor("logits_scaling"),
    )


GRANITE = Family("granite", _read_granite)

"""Model families: a configuration reader and a reversible table of checkpoint names.

A family is a `Family` in a file of its relatives; `read_decoder` here reads the fields that families share. All readers
raise a `ModelError` that names a field that is missing, inconsistent or not supported.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparseopt.models.base.errors import ModelError, guarded
from sparseopt.models.base.fields import Config, optional, refuse_unless, require, require_table
from sparseopt.models.base.rope import max_positions
from sparseopt.models.decoder.decoder import Block, Embedding, Head
from sparseopt.models.decoder.experts import unstacked_names
from sparseopt.models.decoder.layers import ACTIVATIONS
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig, ExpertsConfig

Shapes = dict[str, tuple[int, ...]]
Pairs = tuple[tuple[str, str], ...]

# Checkpoint names of most families.
OUTER_NAMES: Pairs = (
    ("model.embed_tokens", "embed_tokens"),
    ("model.layers", "layers"),
    ("model.norm", "head.norm"),
    ("lm_head", "head.lm_head"),
)
BLOCK_NAMES: Pairs = (("input_layernorm", "attention_norm"), ("post_attention_layernorm", "mlp_norm"))
STORED_FREQUENCIES = r".*\.rotary_emb\.inv_freq"


@dataclass(frozen=True)
class KeyTable:
    """Checkpoint names and module paths, one to one: `model.layers.3.x.weight <-> layers.3.y.weight`.

    Attributes:
        outer: pairs (checkpoint prefix, module prefix), without dots at the end.
        block: such pairs within a block, with `*` for a number; a name without an entry is the same on both sides.
        base: the first part of the names, with its dot, which some checkpoints omit.
        ignored: patterns of checkpoint names that hold no weight, such as stored rotary frequencies.
        transposed: patterns of module paths whose matrices are stored `[in, out]`.
    """

    outer: Pairs = OUTER_NAMES
    block: Pairs = BLOCK_NAMES
    base: str = "model."
    ignored: tuple[str, ...] = (STORED_FREQUENCIES,)
    transposed: tuple[str, ...] = ()

    @cached_property
    def pairs(self) -> Pairs:
        """All pairs of whole names; pairs within a block come first."""
        blocks = next(old for old, new in self.outer if new == "layers")
        return (*((f"{blocks}.*.{old}", f"layers.*.{new}") for old, new in self.block), *self.outer)

    @cached_property
    def _reversed(self) -> Pairs:
        return tuple((new, old) for old, new in self.pairs)

    def to_path(self, key: str) -> str:
        """The module path of a checkpoint name."""
        return _swapped(key, self.pairs)

    def to_key(self, path: str) -> str:
        """The checkpoint name of a module path."""
        return _swapped(path, self._reversed)

    def covers(self, key: str) -> bool:
        """Whether a checkpoint name lies in one of the decoder's parts."""
        return _swap(key, self.outer) is not None

    def ignores(self, key: str) -> bool:
        """Whether a checkpoint name holds no weight."""
        return any(re.fullmatch(pattern, key) for pattern in self.ignored)

    def transposes(self, path: str) -> bool:
        """Whether the matrix at a module path is stored `[in, out]`."""
        return any(re.fullmatch(pattern, path) for pattern in self.transposed)


def _swapped(name: str, pairs: Pairs) -> str:
    swapped = _swap(name, pairs)
    if swapped is None:
        raise KeyError(f"no entry of the key table begins {name!r}; it has {', '.join(old for old, _ in pairs)}")
    return swapped


def _swap(name: str, pairs: Pairs) -> str | None:
    """The name with the first matching prefix swapped, else None; `*` stands for a number that is carried over."""
    for old, new in pairs:
        if found := _prefix(old).match(name):
            return new.replace("*", "{}").format(*found.groups()) + name[found.end() :]
    return None


@cache
def _prefix(old: str) -> re.Pattern[str]:
    return re.compile(re.escape(old).replace(r"\*", r"(\d+)") + r"(?=\.|$)")


@dataclass(frozen=True)
class SizeFields:
    """The fields of a Hugging Face configuration that a smaller model changes.

    If a field has several names, the names in the configuration are written, otherwise the first one.
    `num_key_value_heads` and `head_dim` are the same in all families.

    Attributes:
        blocks: the number of blocks.
        channels: F of the MLP.
        heads: N, query heads.
        experts: E of each mixture.
        expert_channels: F of every expert.
        by_block: the fields that give the kind of each block.
        table: the name of the nested configuration that holds all of these; None for the top level.
    """

    blocks: tuple[str, ...] = ("num_hidden_layers",)
    channels: tuple[str, ...] = ("intermediate_size",)
    heads: tuple[str, ...] = ("num_attention_heads",)
    experts: tuple[str, ...] = ()
    expert_channels: tuple[str, ...] = ("intermediate_size",)
    by_block: tuple[str, ...] = ()
    table: str | None = None

    def fields(self, config: Config) -> Config:
        """The part of a configuration that holds them."""
        return config if self.table is None else require_table(config, self.table)


def refuses_undivided_width(config: DecoderConfig) -> str | None:
    """Reject, as transformers does for some families, a number of heads that does not divide the hidden size."""
    if config.hidden_size % config.num_heads == 0:
        return None
    return f"transformers requires that num_attention_heads={config.num_heads} divides hidden_size={config.hidden_size}"


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        model_type: its name in a Hugging Face configuration.
        read_config: turns a Hugging Face configuration into a `DecoderConfig`.
        keys: checkpoint names and module paths.
        sizes: the fields that a smaller model changes.
        refuses: why transformers does not load a model with this number of heads, which runs here; None if it does.
    """

    model_type: str
    read_config: Callable[[Config], DecoderConfig] = field(repr=False)
    keys: KeyTable = field(repr=False, default=KeyTable())
    sizes: SizeFields = field(repr=False, default=SizeFields())
    refuses: Callable[[DecoderConfig], str | None] = field(repr=False, default=lambda config: None)

    def configure(self, config: Config) -> DecoderConfig:
        """The result of `read_config`; values of unexpected types also raise a `ModelError`."""
        what = f"the model configuration has a value that a {self.model_type} model cannot have"
        return guarded(lambda: self.read_config(config), what, "; compare it with the published one")

    def fitting(self, names: Collection[str]) -> "Family":
        """This family with the names that a checkpoint uses: without `base` if all names lack it."""
        base = self.keys.base
        if not base or not names or any(name.startswith(base) for name in names):
            return self
        outer = tuple((old.removeprefix(base), new) for old, new in self.keys.outer)
        return replace(self, keys=replace(self.keys, outer=outer, base=""))

    def expected_shapes(self, config: DecoderConfig) -> Shapes:
        """The shape of every tensor that a checkpoint must hold, by its name there; a tied head has none."""
        shapes: Shapes = {}
        parts = {"embed_tokens": part_shapes(Embedding, config), "head": dict(part_shapes(Head, config))}
        if config.tied:
            del parts["head"]["lm_head.weight"]
        parts |= {f"layers.{i}": part_shapes(Block, config, kind) for i, kind in enumerate(config.kinds)}
        for part, found in parts.items():
            for path, shape in found.items():
                whole = f"{part}.{path}"
                stored = shape[::-1] if self.keys.transposes(whole) else shape
                shapes[self.keys.to_key(whole)] = stored
        return shapes

    def allows(self, key: str, config: DecoderConfig) -> bool:
        """Whether a checkpoint may hold this name besides the expected ones.

        Tensors of parts that the decoder does not have, such as an image encoder, are allowed and pass through.
        Unknown tensors within the decoder's parts are not: they would change what the model computes.
        """
        spare = config.tied and key == self.keys.to_key("head.lm_head.weight")
        return self.keys.ignores(key) or spare or not self.keys.covers(key)


@lru_cache(maxsize=256)
def part_template(
    part: type[nnx.Module], *arguments: DecoderConfig | BlockKind
) -> tuple[nnx.GraphDef, tuple[tuple[tuple, Any], ...]]:
    """A part's graph definition and flat abstract state, built once: all blocks of a kind share one definition."""
    abstract = nnx.eval_shape(lambda: part(*arguments, rngs=nnx.Rngs(0)))  # type: ignore[call-arg]
    graphdef, state = nnx.split(abstract)
    return graphdef, tuple(nnx.to_flat_state(state))


def build_part(part: type[nnx.Module], *arguments: DecoderConfig | BlockKind, read: Callable[[str], jax.Array]) -> Any:
    """Build a part with parameters from `read(path)`, by dotted module path in the part, experts one by one."""
    graphdef, flat = part_template(part, *arguments)

    def filled(path: str, shape: tuple[int, ...]) -> jax.Array:
        alone = unstacked_names(path, shape[0]) if shape else None
        return read(path) if alone is None else jnp.stack([read(name) for name in alone])

    state = [(path, variable.replace(filled(_dotted(path), tuple(variable.shape)))) for path, variable in flat]
    return nnx.merge(graphdef, nnx.from_flat_state(state))


def part_shapes(part: type[nnx.Module], *arguments: DecoderConfig | BlockKind) -> Shapes:
    """The shapes of a part's parameters by dotted module path, stacked experts one by one."""
    shapes: Shapes = {}
    for path, variable in part_template(part, *arguments)[1]:
        name, shape = _dotted(path), tuple(variable.shape)
        alone = unstacked_names(name, shape[0]) if shape else None
        shapes |= {name: shape} if alone is None else dict.fromkeys(alone, shape[1:])
    return shapes


@lru_cache(maxsize=256)
def block_linears(config: DecoderConfig, kind: BlockKind) -> dict[str, str]:
    """`Block.linears` of a block of that kind."""
    return nnx.eval_shape(lambda: Block(config, kind, rngs=nnx.Rngs(0))).linears


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))


def read_decoder(
    config: Config,
    kinds: tuple[BlockKind, ...],
    *,
    attention_bias: bool = False,
    activation: str = "hidden_act",
    **switches: Any,
) -> DecoderConfig:
    """The fields that most families share, under their usual names, as a `DecoderConfig`.

    Args:
        config: a Hugging Face configuration, with the family's own defaults for optional fields.
        kinds: the kind of each block, or one for all.
        attention_bias: `qkv_bias` and `output_bias`.
        activation: the field with the activation's name; "silu" if absent.
        switches: fields of `DecoderConfig`, which take precedence over the fields read here.
    """
    refuse_unless(
        config,
        {
            "quantization_config": (None,),
            "is_encoder_decoder": (False,),
            "add_cross_attention": (False,),
            "use_bidirectional_attention": (False, None),
            activation: tuple(ACTIVATIONS),
        },
    )
    hidden_size, num_heads = require(config, "hidden_size"), require(config, "num_attention_heads")
    num_kv_heads = optional(config, "num_key_value_heads") or num_heads
    given_size = optional(config, "head_dim")
    if num_heads % num_kv_heads:
        raise ModelError(f"num_key_value_heads={num_kv_heads} must divide num_attention_heads={num_heads}")
    count: int = require(config, "num_hidden_layers")
    kinds = kinds * count if len(kinds) == 1 else kinds
    if given_size is None and hidden_size % num_heads:
        raise ModelError(f"num_attention_heads={num_heads} must divide hidden_size={hidden_size}")
    size = given_size or hidden_size // num_heads
    for rope in {kind.rope for kind in kinds if kind.rope is not None}:
        rope.check(size)
    read = {
        "vocab_size": require(config, "vocab_size"),
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": size,
        "kinds": kinds,
        "tied": bool(config.get("tie_word_embeddings")),
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
        "activation": config.get(activation) or "silu",
        "max_positions": max_positions(config),
    }
    if "intermediate_size" not in switches:
        read["intermediate_size"] = require(config, "intermediate_size")
    if "norm_eps" not in switches:
        read["norm_eps"] = require(config, "rms_norm_eps", float, default=1e-6)
    return DecoderConfig(**(read | switches))


def read_experts(config: Config, count: str, size: str, *, normalise: bool) -> ExpertsConfig:
    """A mixture of experts, from the fields for number and width and from `num_experts_per_tok`."""
    found = ExpertsConfig(
        require(config, count), require(config, "num_experts_per_tok"), require(config, size), normalise
    )
    if found.chosen > found.count:
        raise ModelError(f"num_experts_per_tok={found.chosen} must be at most {count}={found.count}")
    return found


def ungrouped(config: Config) -> dict[str, Any]:
    """A configuration without the fields of grouped heads, which some families carry and do not use."""
    return {**config, "num_key_value_heads": None, "head_dim": None}


def read_windows(config: Config, default: Callable[[int], bool]) -> tuple[bool, ...]:
    """Which blocks attend within a sliding window, from `layer_types` or, without it, from `default(index)`."""
    count, types = require(config, "num_hidden_layers"), config.get("layer_types")
    if types is None:
        return tuple(default(index) for index in range(count))
    unknown = sorted({str(kind) for kind in types} - {"full_attention", "sliding_attention"})
    if unknown or len(types) < count:
        raise ModelError(
            f"the model configuration's layer_types must name full_attention or sliding_attention for each of "
            f"{count} blocks, given {len(types)} entries" + (f" with {', '.join(unknown)}" if unknown else "")
        )
    return tuple(kind == "sliding_attention" for kind in types[:count])

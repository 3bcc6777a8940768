"""Smaller dense models: an outline before the tensors exist, and what a block keeps.

A smaller model has fewer channels in every MLP, fewer KV groups in every attention (a group is a key-value head with
its query heads), fewer experts or fewer blocks. All blocks keep the same numbers, so it is a plain Hugging Face model.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from sparseopt.models.base.errors import ModelError
from sparseopt.models.decoder.decoder import Block
from sparseopt.models.decoder.experts import stacked_name
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig, ExpertsConfig
from sparseopt.models.families.family import part_shapes
from sparseopt.models.files.safetensors import TensorInfo
from sparseopt.models.files.source import Source
from sparseopt.models.reshape.reordered import Move, channel_moves, reordered_block
from sparseopt.models.streaming.streamed import StreamedModel

# The width of an expert is a multiple of this: transformers multiplies all experts at once, with torch's
# `grouped_mm`, which requires rows of a multiple of 16 bytes.
EXPERT_STEP = 8
# The configuration fields that give the kind of each block, as functions of the kinds.
_BY_BLOCK: dict[str, Callable[[tuple[BlockKind, ...]], Any]] = {
    "layer_types": lambda kinds: ["full_attention" if kind.window is None else "sliding_attention" for kind in kinds],
    "max_window_layers": lambda kinds: next((i for i, k in enumerate(kinds) if k.window is not None), len(kinds)),
    "no_rope_layers": lambda kinds: [int(kind.rope is not None) for kind in kinds],
    "mlp_only_layers": lambda kinds: [index for index, kind in enumerate(kinds) if not kind.experts],
    "decoder_sparse_step": lambda kinds: 1,
}


@dataclass(frozen=True)
class Sizes:
    """What a smaller model keeps.

    Attributes:
        channels: F of the MLP. In a mixture, F of each expert: the dense model's or a multiple of `EXPERT_STEP`; blocks
            without experts then keep their own width.
        kv_heads: KV groups, i.e. key-value heads, each with its query heads.
        blocks: the blocks of the dense model that stay, ascending.
        experts: number of experts of each mixture, at least as many as a token is sent to; None without a mixture.
    """

    channels: int
    kv_heads: int
    blocks: tuple[int, ...]
    experts: int | None = None


class Kept(NamedTuple):
    """What a smaller model keeps of one block: ascending indices.

    Attributes:
        channels: `[F']` of the MLP, or `[E', F']` by kept expert.
        groups: `[K']` KV groups.
        experts: `[E']`; None for all of them, and without a mixture.
    """

    channels: Int[np.ndarray, "..."]
    groups: Int[np.ndarray, "groups"]
    experts: Int[np.ndarray, "experts"] | None = None


class Outline:
    """A `Source` of a smaller model whose blocks are not written yet; tensors outside them are the dense model's."""

    def __init__(
        self, source: Source, config: dict[str, Any], outer: Mapping[str, TensorInfo], inner: Mapping[str, TensorInfo]
    ) -> None:
        self.path, self.name, self.revision = source.path, source.name, source.revision
        self.config, self.follow_links, self.stored_tokenizer = config, source.follow_links, source.stored_tokenizer
        self.tensors: dict[str, TensorInfo] = {**outer, **inner}
        self._source, self._inner = source, inner

    def read(self, name: str) -> np.ndarray:
        return self._source_of(name).read(name)

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        return self._source_of(name).pieces(name)

    def _source_of(self, name: str) -> Source:
        if name in self._inner:
            raise ModelError(f"{name} belongs to a block of a smaller model of {self.path} that is not written yet")
        return self._source

    def sidecars(self) -> dict[str, bytes]:
        return self._source.sidecars()


def sizes_of(model: StreamedModel) -> Sizes:
    """The sizes of a dense model, which keep everything."""
    dense = model.config
    mixture = _mixture(dense)
    channels, experts = (mixture.intermediate_size, mixture.count) if mixture else (dense.intermediate_size, None)
    return Sizes(channels, dense.num_kv_heads, tuple(range(dense.num_layers)), experts)


def possible_kv_heads(model: StreamedModel) -> tuple[int, ...]:
    """The numbers of KV groups that a smaller model may keep, ascending; the last is the dense model's number.

    Not every number is possible: the configuration of some families (GPT-2, OPT, GPT-NeoX, StableLM) has no field for
    the head size, a norm over all heads (OLMo 2) changes with their number, and transformers requires for some
    (Llama, Gemma) that the number of query heads divides the hidden size, and for Phi-3 derives LongRoPE's factors from
    this number.
    """
    every = sizes_of(model)
    *fewer, whole = range(1, every.kv_heads + 1)
    return (*(k for k in fewer if _objection(model, replace(every, kv_heads=k)) is None), whole)


def smaller_model(model: StreamedModel, sizes: Sizes) -> StreamedModel:
    """A smaller model without values in its blocks, only its configuration and its tensors' names, shapes and dtypes.

    Its source is an `Outline`, which a `ShardedWriter` accepts like any source: write the tensors outside the blocks
    unchanged, and `sliced_block` of each block that stays. Blocks and experts are renumbered. Parts that the decoder
    does not have, such as an image encoder, pass through; stored buffers that hold no weights are left out.

    Raises:
        ModelError: if the sizes keep nothing or more than exists, or the family's configuration cannot describe the
            result; says what is possible.
    """
    problems = _problems(model, sizes)
    if problems:
        raise ModelError(f"no smaller model of {model.source.path} has these sizes: {'; '.join(problems)}")
    objection = _objection(model, sizes)
    if objection is not None:
        possible = ", ".join(map(str, possible_kv_heads(model)))
        raise ModelError(
            f"{model.source.path} cannot become a smaller {model.family.model_type} model with "
            f"kv_heads={sizes.kv_heads}: {objection}; possible for kv_heads: {possible}"
        )
    dense, wanted = model.config, _wanted(model, sizes)
    keys, stored, shapes = model.family.keys, model.source.tensors, model.family.expected_shapes(wanted)
    inner = {
        keys.to_key(f"layers.{new}.{path}"): stored[keys.to_key(f"layers.{old}.{path}")].dtype
        for new, old in enumerate(sizes.blocks)
        for path in part_shapes(Block, wanted, dense.kinds[old])
    }
    outer = {
        key: stored[key]
        for key in model.exported_keys()
        if key not in inner and (key in shapes or not keys.covers(key))
    }
    new_tensors = {key: TensorInfo(shapes[key], dtype) for key, dtype in inner.items()}
    return StreamedModel(Outline(model.source, _written(model, wanted), outer, new_tensors))


def _mixture(config: DecoderConfig) -> ExpertsConfig | None:
    return config.experts if any(kind.experts for kind in config.kinds) else None


def _problems(model: StreamedModel, sizes: Sizes) -> list[str]:
    """Which sizes no model of this family can have."""
    whole, mixture = sizes_of(model), _mixture(model.config)
    ranges = {"channels": (1, whole.channels), "kv_heads": (1, whole.kv_heads)}
    if mixture:
        ranges["experts"] = (mixture.chosen, mixture.count)
    problems = [
        f"{name}={getattr(sizes, name)!r}, expected a whole number from {least} to {most}"
        for name, (least, most) in ranges.items()
        if type(value := getattr(sizes, name)) is not int or not least <= value <= most
    ]
    if mixture and not problems and sizes.channels % EXPERT_STEP and sizes.channels != whole.channels:
        problems.append(
            f"channels={sizes.channels}, expected a multiple of {EXPERT_STEP} in experts, which transformers requires"
        )
    if sizes.experts is not None and not mixture:
        problems.append(f"experts={sizes.experts!r}, expected None: the model has no mixture of experts")
    blocks = list(sizes.blocks)
    if not blocks or blocks != sorted(set(blocks) & set(whole.blocks)):
        problems.append(f"blocks={tuple(blocks)}, expected at least one, ascending, of 0 to {model.num_blocks - 1}")
    return problems


def _wanted(model: StreamedModel, sizes: Sizes) -> DecoderConfig:
    """The settings of the smaller model."""
    dense, names = model.config, model.family.sizes
    inner, mixture, experts = sizes.channels, _mixture(dense), dense.experts
    if mixture:
        assert sizes.experts is not None
        experts = replace(mixture, count=sizes.experts, intermediate_size=sizes.channels)
        # Mixtral has one field for the width of experts and of plain blocks, and no plain blocks.
        inner = sizes.channels if names.expert_channels == names.channels else dense.intermediate_size
    return replace(
        dense,
        intermediate_size=inner,
        num_heads=dense.num_heads // dense.num_kv_heads * sizes.kv_heads,
        num_kv_heads=sizes.kv_heads,
        kinds=tuple(dense.kinds[index] for index in sizes.blocks),
        experts=experts,
    )


def _written(model: StreamedModel, wanted: DecoderConfig) -> dict[str, Any]:
    """The Hugging Face configuration of the smaller model; other fields are as in the dense model."""
    dense, names, config = model.config, model.family.sizes, model.source.config
    text = names.fields(config)
    resized = [
        (names.blocks, dense.num_layers, wanted.num_layers),
        (names.channels, dense.intermediate_size, wanted.intermediate_size),
    ]
    if dense.experts and wanted.experts:
        resized += [
            (names.experts, dense.experts.count, wanted.experts.count),
            (names.expert_channels, dense.experts.intermediate_size, wanted.experts.intermediate_size),
        ]
    changes: dict[str, Any] = {}
    for known, old, new in resized:
        if new != old:
            changes |= dict.fromkeys([name for name in known if name in text] or known[:1], new)
    if wanted.num_kv_heads != dense.num_kv_heads:
        held = [name for name in names.heads if name in text] or names.heads[:1]
        changes |= dict.fromkeys(held, wanted.num_heads)
        # The head size is written even if it was derived: it is no longer hidden_size / heads.
        changes |= {"num_key_value_heads": wanted.num_kv_heads, "head_dim": wanted.head_dim}
    if wanted.num_layers != dense.num_layers:
        by_block = (name for name in _BY_BLOCK if name in names.by_block or name in text)
        changes |= {name: _BY_BLOCK[name](wanted.kinds) for name in by_block}
    return {**config, **changes} if names.table is None else {**config, names.table: {**text, **changes}}


def _objection(model: StreamedModel, sizes: Sizes) -> str | None:
    """Why the family's configuration cannot describe a smaller model; None if it can."""
    wanted = _wanted(model, sizes)
    fewer_heads = wanted.num_kv_heads != model.config.num_kv_heads
    if fewer_heads and wanted.qk_norm == "width":
        return "its norms of queries and keys run over all heads together"
    try:
        read = model.family.configure(_written(model, wanted))
    except ModelError as error:
        return f"its configuration cannot say so ({error})"
    wrong = [f.name for f in fields(wanted) if getattr(read, f.name) != getattr(wanted, f.name)]
    if wrong:
        shown = ", ".join(f"{name}={getattr(read, name)} for {getattr(wanted, name)}" for name in wrong)
        return f"its configuration cannot say so (it would be read with {shown})"
    return model.family.refuses(wanted) if fewer_heads else None


def sliced_block(
    config: DecoderConfig, kind: BlockKind, tensors: Mapping[str, np.ndarray], kept: Kept
) -> dict[str, np.ndarray]:
    """Cut the parameters of a smaller block out of a dense block.

    A channel comprises its rows of gate and up and its column of down, a KV group its rows of q, k and v (for all its
    query heads) and its columns of the output projection, an expert its row of the router. Biases follow their rows.
    Norms stay unchanged.

    Args:
        config: configuration of the dense model.
        kind: kind of the block.
        tensors: all parameters of the dense block by path in the block, layers as `[out, in]`, experts one by one
            (`mlp.experts.3.up_proj.weight`), in any dtype.
        kept: what to keep; for a block without experts in a model with experts, `channels` are all its own.

    Returns:
        The parameters by path in the smaller block, in their dtypes; experts are renumbered.

    Raises:
        ModelError: if indices are not ascending or out of range, or the channels do not match the kept experts.
    """
    groups = _checked("groups", kept.groups, config.num_kv_heads)
    moves = {} if len(groups) == config.num_kv_heads else _group_moves(config, groups)
    inner, experts, parts = config.intermediate_size, np.arange(0), {"mlp": kept.channels}
    if kind.experts:
        assert config.experts is not None
        inner, count = config.experts.intermediate_size, config.experts.count
        experts = _checked("experts", np.arange(count) if kept.experts is None else kept.experts, count)
        if len(kept.channels) != len(experts):
            raise ModelError(f"channels of {len(kept.channels)} experts were given for {len(experts)} that are kept")
        moves |= {} if len(experts) == count else {"mlp.router": Move(rows=experts)}
        parts = {f"mlp.experts.{e}": channels for e, channels in zip(experts, kept.channels, strict=True)}
    for part, given in parts.items():
        *_, expert = part.split(".")
        channels = _checked(f"channels of expert {expert}" if kind.experts else "channels", given, inner)
        # As many ascending numbers as channels must be all of them.
        moves |= {} if len(channels) == inner else channel_moves(part, channels, inner)
    sliced, places = {}, {old: new for new, old in enumerate(experts.tolist())}
    for path, value in reordered_block(tensors, moves).items():
        _, number = stacked_name(path)
        if number is None:
            sliced[path] = value
        elif number in places:
            sliced[path.replace(f".{number}.", f".{places[number]}.", 1)] = value
    return sliced


def _group_moves(config: DecoderConfig, groups: np.ndarray) -> dict[str, Move]:
    size, heads = config.head_dim, config.num_heads // config.num_kv_heads
    queries, pairs = _spans(groups, heads * size), _spans(groups, size)
    all_queries, all_pairs = config.num_heads * size, config.num_kv_heads * size
    # Interleaved heads each have their own key and value, so a group has one head.
    fused = np.concatenate([queries, all_queries + pairs, all_queries + all_pairs + pairs])
    rows = _spans(groups, 3 * size) if config.qkv == "interleaved" else fused
    names = {"q_proj": queries, "k_proj": pairs, "v_proj": pairs, "qkv_proj": rows}
    moves = {f"self_attn.{name}": Move(rows=own) for name, own in names.items()}
    return moves | {"self_attn.o_proj": Move(columns=queries)}


def _checked(what: str, indices: np.ndarray, count: int) -> np.ndarray:
    found = np.asarray(indices)
    numbers = found.ndim == 1 and found.size and np.issubdtype(found.dtype, np.integer)
    if not numbers or found[0] < 0 or found[-1] >= count or (np.diff(found) <= 0).any():
        raise ModelError(f"kept {what} must be ascending numbers from 0 to {count - 1}, at least one, given {found}")
    return found


def _spans(starts: np.ndarray, size: int) -> np.ndarray:
    """The rows of spans of `size` rows each, given the spans' numbers."""
    return (starts[:, None] * size + np.arange(size)).reshape(-1)

"""Floor 6: what a model is and what pruning it would take, from its headers alone: no tensor is read."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sparseopt.models import FAMILIES, Source, StreamedModel, TensorInfo, open_source
from sparseopt.models.settings import BlockKind, DecoderConfig
from sparseopt.pruning.cost import prune_cost
from sparseopt.pruning.memory_cost import PLACES
from sparseopt.pruning.patterns import pattern_count
from sparseopt.pruning.pipeline import layer_patterns
from sparseopt.pruning.recipe import Recipe

# A tensor of block 3 is called `model.layers.3.…`, `transformer.h.3.…`, ...
_IN_BLOCK = re.compile(r".*?\.(\d+)\.(.+)")


@dataclass(frozen=True)
class LinearKind:
    """Linears of one name and shape.

    Attributes:
        name: inside its block, `*` for the number of an expert.
        outputs: rows of the weight.
        inputs: its columns.
        count: over all blocks.
        dtype: as stored; float32 where stored quantised.
        zeros: that the prune would set in all of them; None where this package's decoder does not run the model.
    """

    name: str
    outputs: int
    inputs: int
    count: int
    dtype: str
    zeros: int | None

    @property
    def size(self) -> int:
        """Weights in all of them."""
        return self.count * self.outputs * self.inputs


@dataclass(frozen=True)
class Blocks:
    """Blocks of one kind.

    Attributes:
        description: what tells kinds apart.
        indices: which blocks are of this kind, counted from 0.
    """

    description: str
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Estimate:
    """What a prune would take, roughly: see `cost`.

    Attributes:
        memory: bytes by phase and by what they hold, device and host together.
        peak_memory_bytes: of the largest phase.
        peak_phase: its name.
        disk_peak_memory_bytes: the same with the activations on disk.
        scratch_bytes: which those take there.
        gflops: rate of matrix products that the time is for, 10⁹ operations a second; None without one.
        seconds_by_part: seconds by kind of work; None without a rate, or for a method of your own.
        seconds: all of them.
    """

    memory: dict[str, dict[str, int]]
    peak_memory_bytes: int
    peak_phase: str
    disk_peak_memory_bytes: int
    scratch_bytes: int
    gflops: float | None
    seconds_by_part: dict[str, float] | None
    seconds: float | None


@dataclass(frozen=True)
class Inspection:
    """What `inspect_model` finds.

    Attributes:
        source: as it was asked for: a path or a name on the hub.
        path: of the files.
        revision: the commit on the hub, a sha; None for files of your own.
        model_type: of the Hugging Face configuration.
        supported: whether this package's decoder has the family.
        num_blocks: how many blocks.
        kinds: of blocks; one where all are alike, none for a family that is not supported.
        linears: that a prune takes, in the order of the first block.
        dtypes: bytes of the tensors by dtype, as they read.
        file_bytes: of the files with the tensors.
        parameters: of the model in all, a tied head counted once.
        block_parameters: in blocks.
        prunable_parameters: in the linears of blocks.
        embedding_parameters: of the token embedding.
        head_parameters: of the projection to logits, 0 where it is the embedding.
        unused_parameters: of tensors that the decoder does not have, such as an image encoder's.
        tied: whether the head is the embedding.
        recipe: of the prune that is estimated, as plain values.
        zeros: that it would set; None for a family that is not supported, as the three below.
        dense_bytes: of its output.
        packed_bytes: of its output with the zeros stored as a bitmask.
        estimate: memory and time.
    """

    source: str
    path: str
    revision: str | None
    model_type: str
    supported: bool
    num_blocks: int
    kinds: tuple[Blocks, ...]
    linears: tuple[LinearKind, ...]
    dtypes: dict[str, int]
    file_bytes: int
    parameters: int
    block_parameters: int
    prunable_parameters: int
    embedding_parameters: int
    head_parameters: int
    unused_parameters: int
    tied: bool
    recipe: dict[str, Any]
    zeros: int | None
    dense_bytes: int | None
    packed_bytes: int | None
    estimate: Estimate | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` is the way back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Inspection":
        """The inspection that `as_dict` was made of, also by way of JSON."""
        fields = dict(values)
        fields["kinds"] = tuple(Blocks(kind["description"], tuple(kind["indices"])) for kind in fields["kinds"])
        fields["linears"] = tuple(LinearKind(**linear) for linear in fields["linears"])
        fields["estimate"] = None if fields["estimate"] is None else Estimate(**fields["estimate"])
        return cls(**fields)


def inspect_model(
    source: str | Path | Source, recipe: Recipe | None = None, *, gflops: float | None = None
) -> Inspection:
    """Say what a model is, and estimate what pruning it by a recipe would take.

    Args:
        source: a Hugging Face folder, a GGUF file or a name on the hub, or what `open_source` made of one.
        recipe: of the prune; default: that of `prune_model`. Its calibration text is not read.
        gflops: rate of float32 matrix products of the machine, 10⁹ operations a second, as `measure_gflops` gives;
            None for no estimate of the time.

    Raises:
        ValueError: for a model whose files are unusable, and for a recipe that cannot be used or whose pattern a linear
            cannot have. A family that this package does not have is no error.
    """
    recipe = recipe or Recipe()
    method = recipe.check()
    if gflops is not None and not 0 < gflops < math.inf:
        raise ValueError(f"gflops must be positive and finite, given {gflops}")
    opened = open_source(source) if isinstance(source, str | Path) else source
    if opened.config.get("model_type") not in FAMILIES:
        return _foreign(opened, recipe)
    model = StreamedModel(opened)
    patterns = layer_patterns(model, recipe, method)
    kept = {key: pattern_count(pattern, model.weight_shape(key)) for key, pattern in patterns.items()}
    cost, on_disk = (prune_cost(model, recipe, method, where) for where in PLACES)
    parts = None if gflops is None else cost.seconds(gflops)
    found = _facts(opened, recipe)
    tensors, keys = opened.tensors, model.family.keys
    inner = [tensors[key] for index in range(model.num_blocks) for key in model.block_keys(index).values()]
    expected = model.family.expected_shapes(model.config)
    head = 0 if model.config.tied else _size(tensors[keys.to_key("head.lm_head.weight")])
    written = model.exported_keys()
    sizes = {key: _size(tensors[key]) * _itemsize(tensors[key], recipe) for key in written}
    packed = {
        key: min(sizes[key], -(-_size(tensors[key]) // 8) + count * _itemsize(tensors[key], recipe))
        for key, count in kept.items()
    }
    return replace(
        found,
        supported=True,
        num_blocks=model.num_blocks,
        kinds=_kinds(model.config),
        linears=_linears(model, kept),
        parameters=sum(_size(tensors[key]) for key in expected),
        block_parameters=sum(map(_size, inner)),
        prunable_parameters=sum(_size(tensors[key]) for key in kept),
        embedding_parameters=_size(tensors[keys.to_key("embed_tokens.weight")]),
        head_parameters=head,
        unused_parameters=sum(_size(tensors[key]) for key in written if key not in expected),
        tied=model.config.tied,
        zeros=sum(_size(tensors[key]) - count for key, count in kept.items()),
        dense_bytes=sum(sizes.values()),
        packed_bytes=sum((sizes | packed).values()),
        estimate=Estimate(
            memory={phase.name: dict(phase.parts) for phase in cost.phases},
            peak_memory_bytes=cost.peak.nbytes,
            peak_phase=cost.peak.name,
            disk_peak_memory_bytes=on_disk.peak.nbytes,
            scratch_bytes=on_disk.scratch_bytes,
            gflops=gflops,
            seconds_by_part=parts,
            seconds=None if parts is None else sum(parts.values()),
        ),
    )


def _size(info: TensorInfo) -> int:
    return math.prod(info.shape)


def _itemsize(info: TensorInfo, recipe: Recipe) -> int:
    """Bytes a number of the output."""
    return {None: info.dtype.itemsize, "float32": 4}.get(recipe.dtype, 2)


def _facts(source: Source, recipe: Recipe) -> Inspection:
    """What any checkpoint tells, with nothing known of its family."""
    dtypes: Counter[str] = Counter()
    for info in source.tensors.values():
        dtypes[info.dtype.name] += _size(info) * info.dtype.itemsize
    files = sorted(source.path.glob("*.safetensors")) if source.path.is_dir() else [source.path]
    return Inspection(
        source=source.name,
        path=str(source.path),
        revision=source.revision,
        model_type=str(source.config.get("model_type")),
        supported=False,
        num_blocks=0,
        kinds=(),
        linears=(),
        dtypes=dict(dtypes),
        file_bytes=sum(file.stat().st_size for file in files),
        parameters=sum(map(_size, source.tensors.values())),
        block_parameters=0,
        prunable_parameters=0,
        embedding_parameters=0,
        head_parameters=0,
        unused_parameters=0,
        tied=bool(source.config.get("tie_word_embeddings", False)),
        recipe=recipe.as_dict(),
        zeros=None,
        dense_bytes=None,
        packed_bytes=None,
        estimate=None,
    )


def _foreign(source: Source, recipe: Recipe) -> Inspection:
    """A model of an unknown family, by the names of its tensors: matrices inside a numbered block count as linears."""
    inner: dict[str, TensorInfo] = {}
    linears: dict[tuple[str, int, int, str], int] = {}
    blocks: set[int] = set()
    for key, info in source.tensors.items():
        found = _IN_BLOCK.fullmatch(key)
        if not found:
            continue
        inner[key] = info
        blocks.add(int(found[1]))
        if len(info.shape) == 2 and key.endswith(".weight"):
            rows, columns = info.shape
            kind = (_without_expert(found[2].removesuffix(".weight")), rows, columns, info.dtype.name)
            linears[kind] = linears.get(kind, 0) + 1
    embeddings = [i for k, i in source.tensors.items() if k not in inner and re.search(r"embed|wte", k)]
    return replace(
        _facts(source, recipe),
        num_blocks=len(blocks),
        linears=tuple(LinearKind(*kind[:3], count, kind[3], None) for kind, count in linears.items()),
        block_parameters=sum(map(_size, inner.values())),
        prunable_parameters=sum(count * kind[1] * kind[2] for kind, count in linears.items()),
        embedding_parameters=sum(map(_size, embeddings)),
        head_parameters=sum(_size(i) for k, i in source.tensors.items() if k.startswith("lm_head.")),
    )


def _without_expert(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _linears(model: StreamedModel, kept: Mapping[str, int]) -> tuple[LinearKind, ...]:
    """The linears of all blocks, those alike together."""
    found: dict[tuple[str, int, int, str], list[int]] = {}
    for index in range(model.num_blocks):
        for name in model.block_linears(index):
            key = model.weight_key(index, name)
            kind = (_without_expert(name), *model.weight_shape(key), model.source.tensors[key].dtype.name)
            counts = found.setdefault(kind, [0, 0])
            counts[0] += 1
            counts[1] += kind[1] * kind[2] - kept[key]
    return tuple(LinearKind(*kind[:3], count, kind[3], zeros) for kind, (count, zeros) in found.items())


def _kinds(config: DecoderConfig) -> tuple[Blocks, ...]:
    return tuple(
        Blocks(_describe(kind, config), tuple(i for i, other in enumerate(config.kinds) if other == kind))
        for kind in dict.fromkeys(config.kinds)
    )


def _describe(kind: BlockKind, config: DecoderConfig) -> str:
    """What a block's kind says, in words."""
    seen = "full attention" if kind.window is None else f"attention to {kind.window:,} tokens"
    rope = "no rotary positions" if kind.rope is None else f"rotary base {kind.rope.theta:,.0f}"
    if kind.rope is not None and kind.rope.scaling is not None:
        rope += f" ({type(kind.rope.scaling).__name__.lower()} scaling)"
    experts = config.experts if kind.experts else None
    mlp = "one MLP" if experts is None else f"{experts.count} experts, {experts.chosen} a token"
    return f"{seen}, {rope}, {mlp}"

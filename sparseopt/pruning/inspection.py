"""What a model is and what pruning it would cost, from its headers alone; the time is measured on a few blocks."""

import copy
import math
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from sparseopt.layers.patterns import pattern_count
from sparseopt.layers.problem import LayerMethod
from sparseopt.models import (
    FAMILIES,
    ModelError,
    ModelSource,
    Source,
    StreamedModel,
    TensorInfo,
    sizes_of,
    smaller_model,
    source_of,
)
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig
from sparseopt.pruning.memory import LIBRARIES, PLACES, output_bytes, prune_memory
from sparseopt.pruning.pipeline import prune_model
from sparseopt.pruning.recipe.prune_recipe import Recipe
from sparseopt.pruning.recipe.targets import Targets, shares_in
from sparseopt.pruning.run.drawn import drawing_bytes
from sparseopt.pruning.run.layer_patterns import layer_patterns, layer_shares
from sparseopt.pruning.run.output_form import chosen_form, output_of, with_dtype
from sparseopt.pruning.run.plan import check_expert_tokens
from sparseopt.pruning.text.chats import is_text
from sparseopt.pruning.text.windows import default_windows
from sparseopt.system.machine import device_memory_left

# A tensor of block 3 is called `model.layers.3.…`, `transformer.h.3.…`, ...
_IN_BLOCK = re.compile(r".*?\.(\d+)\.(.+)")


@dataclass(frozen=True)
class LinearKind:
    """Linear layers with the same name, shape and sparsity.

    Attributes:
        name: name inside the block; `*` stands for the number of an expert.
        outputs: rows of the weight.
        inputs: columns of the weight.
        count: number of them in all blocks.
        dtype: as stored; float32 if stored quantised.
        zeros: zeros in all of them after pruning; None if they are not pruned, or if this package's decoder does not
            run the model.
        blocks: the blocks that hold them, counted from 0; empty if this package's decoder does not run the model.
    """

    name: str
    outputs: int
    inputs: int
    count: int
    dtype: str
    zeros: int | None
    blocks: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return self.count * self.outputs * self.inputs


@dataclass(frozen=True)
class Blocks:
    """Blocks of one kind: a description of the kind, and the numbers of its blocks, counted from 0."""

    description: str
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Estimate:
    """A rough estimate of the memory and disk that a pruning run needs; see `memory`.

    Attributes:
        memory: bytes by phase and by content, device and host together.
        disk_peak_memory_bytes: peak with the activations on disk.
        scratch_bytes: size of these activations.
        solve_blocks: the largest number of blocks of outputs into which a layer is split so that its solve fits the
            device.
    """

    memory: dict[str, dict[str, int]]
    peak_memory_bytes: int
    peak_phase: str
    disk_peak_memory_bytes: int
    scratch_bytes: int
    solve_blocks: int


@dataclass(frozen=True)
class Inspection:
    """What `inspect_model` finds.

    Attributes:
        source: the model as it was given: a path or a name on the hub.
        path: where its files are.
        revision: the commit on the hub, a sha; None for your own files.
        model_type: as in its Hugging Face configuration.
        supported: whether this package's decoder runs the family.
        linears: the linear layers of the blocks, in the order of the first block.
        dtypes: bytes of the tensors by dtype, as read.
        file_bytes: size of the files that hold the tensors.
        parameters: of the whole model, with a tied head counted once.
        block_parameters: in all blocks.
        prunable_parameters: in the linear layers of all blocks.
        head_parameters: of the projection to logits; 0 if it is tied to the embedding.
        recipe: the recipe of the estimated run, as plain values.
        kinds: the kinds of blocks; one if all are alike, none if the family is not supported.
        unused_parameters: in tensors that the decoder does not use, such as an image encoder.
        targeted_parameters: in layers that are pruned. This and what follows is None if the family is not supported.
        zeros: zeros that pruning makes in these layers, not counting further ones of the model or of `masks`.
        dense_bytes: size of the output.
        packed_bytes: size of the output with the zeros stored as a bitmask.
        seconds: time of the pruning run, see `measured_seconds`; None if not measured.
        no_text: why the tokenizer of a GGUF file cannot be used to read text; None if it can. A folder's tokenizer may
            need transformers and is not tried.
    """

    source: str
    path: str
    revision: str | None
    model_type: str
    supported: bool
    num_blocks: int
    linears: tuple[LinearKind, ...]
    dtypes: dict[str, int]
    file_bytes: int
    parameters: int
    block_parameters: int
    prunable_parameters: int
    embedding_parameters: int
    head_parameters: int
    tied: bool
    recipe: dict[str, Any]
    kinds: tuple[Blocks, ...] = ()
    unused_parameters: int = 0
    targeted_parameters: int | None = None
    zeros: int | None = None
    dense_bytes: int | None = None
    packed_bytes: int | None = None
    estimate: Estimate | None = None
    seconds: float | None = None
    no_text: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` is the way back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Inspection":
        return TypeAdapter(cls).validate_python(values)


def inspect_model(
    source: ModelSource,
    recipe: Recipe | None = None,
    *,
    measure: bool = False,
    device_memory: int | None = None,
) -> Inspection:
    """Describe a model and estimate what pruning it with a recipe would cost.

    Args:
        source: a Hugging Face folder, a GGUF file or a name on the hub, or a model in memory, as for `prune_model`.
        recipe: recipe of the pruning run; default: the default of `prune_model`. Its calibration text is not read.
        measure: also measure the time of a run, by reading and pruning two blocks of the model; see `measured_seconds`.
        device_memory: memory of the device in bytes; layers too large for it are solved in blocks of outputs. None uses
            what is free on this machine's device; if that is not known, as on a CPU, layers are solved whole.

    Raises:
        ValueError: if the model's files or the recipe cannot be used, if a layer cannot have the recipe's pattern, or
            if its names match no layer; with `measure`, also if this package does not have the model's family.
    """
    recipe = recipe or Recipe()
    method = recipe.layer_method
    opened = source_of(source)
    supported = opened.config.get("model_type") in FAMILIES
    model = StreamedModel(opened) if supported else None
    if measure and model is None:
        raise ModelError(
            f"the time of a run is measured for families that run in JAX, and {opened.config.get('model_type')!r} is "
            "none of them: leave measure out"
        )
    if not is_text(recipe.calibration):
        count, seqlen = np.shape(recipe.calibration)
        recipe = recipe.model_copy(update={"windows": count - recipe.heldout_windows, "seqlen": seqlen})
    recipe = with_dtype(opened, recipe)
    if model is not None:
        recipe = recipe.model_copy(update={"windows": recipe.windows or default_windows(model, recipe.seqlen)})
    dtypes: Counter[str] = Counter()
    for info in opened.tensors.values():
        dtypes[info.dtype.name] += _size(info) * info.dtype.itemsize
    files = sorted(opened.path.glob("*.safetensors")) if opened.path.is_dir() else [opened.path]
    return Inspection(
        source=opened.name,
        path=str(opened.path),
        revision=opened.revision,
        model_type=str(opened.config.get("model_type")),
        supported=supported,
        dtypes=dict(dtypes),
        file_bytes=sum(file.stat().st_size for file in files),
        recipe=recipe.as_dict(),
        no_text=_why_no_text(opened),
        seconds=measured_seconds(model, recipe) if measure and model is not None else None,
        **(_foreign(opened) if model is None else _known(model, recipe, method, device_memory)),
    )


def measured_seconds(model: StreamedModel, recipe: Recipe) -> float:
    """Estimate the seconds of a run on this machine from runs on the first two blocks and on the first block.

        two blocks, with all compilation  +  (blocks - 2) (two blocks again - one block again)

    The runs are complete, with survey, training and scores, and write into a temporary folder. Random tokens replace
    text that the model would draw; the time of drawing, once for a model, is not counted. A recipe for some of the
    blocks is measured as if every block had such layers.

    Raises:
        ValueError, RuntimeError: as `prune_model` does.
    """
    names = {name for index in range(model.num_blocks) for name in model.block_linears(index)}
    shares = layer_shares(model, recipe)
    by_name = {name: share for key, share in shares.items() for name in names if key.endswith(f".{name}.weight")}
    table = shares_in(recipe.targets) is not None
    if len(shares) < len(model.linear_keys()) or table:
        # The table leaves the others unchanged.
        named: Targets = (*by_name.items(), ("re:.*", 0.0)) if table else tuple(by_name)
        recipe = recipe.model_copy(update={"targets": named, "ignore": None})
    if recipe.draws:
        shape = recipe.window_count + recipe.heldout_windows, recipe.seqlen
        ids = np.random.default_rng(recipe.seed or 0).integers(0, model.config.vocab_size, shape)
        changed = {"calibration": ids, "bos": "auto", "seed": None, "score": recipe.score or "pydoc"}
        recipe = recipe.model_copy(update=changed)
    # Masks of another model cover all its blocks.
    chosen = {"allocation": recipe.allocation, "permute": recipe.permute, "masks": None}
    recipe = recipe.model_copy(update=chosen)
    seconds = []
    # Programs know the number of blocks, so each number compiles its own.
    for count in (2, 1, 2, 1):
        blocks = tuple(range(min(count, model.num_blocks)))
        few = smaller_model(model, replace(sizes_of(model), blocks=blocks)).source
        # Tensors, their names and the tokenizer are the same as in the whole model.
        source = copy.copy(model.source)
        vars(source).update(config=few.config, tensors={key: model.source.tensors[key] for key in few.tensors})
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            prune_model(source, output_of(recipe, Path(folder), "few"), recipe)
            seconds.append(time.perf_counter() - start)
    first, _, two, one = seconds
    return first + max(0, model.num_blocks - 2) * max(0.0, two - one)


def _why_no_text(source: Source) -> str | None:
    try:
        source.stored_tokenizer()
    except ModelError as error:
        return str(error)
    return None


def _known(model: StreamedModel, recipe: Recipe, method: LayerMethod, device_memory: int | None) -> dict[str, Any]:
    check_expert_tokens(model, recipe)
    tensors, keys = model.source.tensors, model.family.keys
    shares = layer_shares(model, recipe)
    patterns = layer_patterns(model, recipe, method, shares)
    kept = {key: pattern_count(pattern, model.weight_shape(key)) for key, pattern in patterns.items()}
    expected = model.family.expected_shapes(model.config)
    output = output_of(recipe, Path(), "output")
    form = chosen_form(model, model, range(model.num_blocks), recipe, output, shares)
    dense = output_bytes(model, recipe, form)
    # A bit for each weight, and the weights kept; what would not get smaller stays dense.
    packed = {k: min(dense[k], -(-_size(tensors[k]) // 8) + n * dense[k] // _size(tensors[k])) for k, n in kept.items()}
    zeros, saved = sum(_size(tensors[k]) - n for k, n in kept.items()), sum(dense[k] - n for k, n in packed.items())
    if recipe.chooses_linears:
        # As many layers have the pattern as the sparsity needs.
        share = recipe.sparsity * _total(tensors[k] for k in kept) / zeros
        zeros, saved = round(share * zeros), round(share * saved)
    room = device_memory_left() if device_memory is None else device_memory
    memory, on_disk = (prune_memory(model, recipe, method, where, room=room) for where in PLACES)
    if recipe.draws:
        drawing = {"drawing text": {"libraries": LIBRARIES, **drawing_bytes(model, recipe)}}
        memory, on_disk = (replace(each, phases={**drawing, **each.phases}) for each in (memory, on_disk))
    return {
        "num_blocks": model.num_blocks,
        "kinds": tuple(
            Blocks(_described(kind, model.config), tuple(i for i, k in enumerate(model.config.kinds) if k == kind))
            for kind in dict.fromkeys(model.config.kinds)
        ),
        "linears": _linears(model, shares, kept),
        "parameters": _total(tensors[key] for key in expected),
        "block_parameters": _total(
            tensors[key] for index in range(model.num_blocks) for key in model.block_keys(index).values()
        ),
        "prunable_parameters": _total(tensors[key] for key in model.linear_keys()),
        "targeted_parameters": _total(tensors[key] for key in kept),
        "embedding_parameters": _size(tensors[keys.to_key("embed_tokens.weight")]),
        "head_parameters": 0 if model.config.tied else _size(tensors[keys.to_key("head.lm_head.weight")]),
        "unused_parameters": _total(tensors[key] for key in dense if key not in expected),
        "tied": model.config.tied,
        "zeros": zeros,
        "dense_bytes": sum(dense.values()),
        "packed_bytes": sum(dense.values()) - saved,
        "estimate": Estimate(
            memory={phase: dict(parts) for phase, parts in memory.phases.items()},
            peak_memory_bytes=memory.peak_bytes,
            peak_phase=memory.peak_phase,
            disk_peak_memory_bytes=on_disk.peak_bytes,
            scratch_bytes=on_disk.scratch_bytes,
            solve_blocks=memory.solve_blocks,
        ),
    }


def _foreign(source: Source) -> dict[str, Any]:
    """An unknown family's model, by the names of its tensors: matrices in a numbered block count as linear layers."""
    inner: dict[str, TensorInfo] = {}
    linears: Counter[tuple[str, int, int, str]] = Counter()
    blocks: set[int] = set()
    for key, info in source.tensors.items():
        found = _IN_BLOCK.fullmatch(key)
        if not found:
            continue
        inner[key] = info
        blocks.add(int(found[1]))
        if len(info.shape) == 2 and key.endswith(".weight"):
            rows, columns = info.shape
            linears[_without_expert(found[2].removesuffix(".weight")), rows, columns, info.dtype.name] += 1
    return {
        "num_blocks": len(blocks),
        "linears": tuple(LinearKind(*kind[:3], count, kind[3], None) for kind, count in linears.items()),
        "parameters": _total(source.tensors.values()),
        "block_parameters": _total(inner.values()),
        "prunable_parameters": sum(count * kind[1] * kind[2] for kind, count in linears.items()),
        "embedding_parameters": _total(
            info for key, info in source.tensors.items() if key not in inner and re.search(r"embed|wte", key)
        ),
        "head_parameters": _total(info for key, info in source.tensors.items() if key.startswith("lm_head.")),
        "tied": bool(source.config.get("tie_word_embeddings", False)),
    }


def _size(info: TensorInfo) -> int:
    return math.prod(info.shape)


def _total(infos: Iterable[TensorInfo]) -> int:
    return sum(map(_size, infos))


def _without_expert(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _linears(model: StreamedModel, shares: Mapping[str, float], kept: Mapping[str, int]) -> tuple[LinearKind, ...]:
    # Each kind with its fraction of zeros, None for unpruned layers.
    found: dict[tuple[str, int, int, str, float | None], list[tuple[int, int]]] = {}
    for index in range(model.num_blocks):
        for name in model.block_linears(index):
            key = model.weight_key(index, name)
            info = model.source.tensors[key]
            kind = (_without_expert(name), *model.weight_shape(key), info.dtype.name, shares.get(key))
            found.setdefault(kind, []).append((index, _size(info) - kept.get(key, 0)))
    return tuple(
        LinearKind(
            name, outputs, inputs, len(each), dtype,
            zeros=None if share is None else sum(zeros for _, zeros in each),
            blocks=tuple(dict.fromkeys(index for index, _ in each)),
        )
        for (name, outputs, inputs, dtype, share), each in found.items()
    )  # fmt: skip


def _described(kind: BlockKind, config: DecoderConfig) -> str:
    seen = "full attention" if kind.window is None else f"attention to {kind.window:,} tokens"
    rope = "no rotary positions" if kind.rope is None else f"rotary base {kind.rope.theta:,.0f}"
    if kind.rope is not None and kind.rope.scaling is not None:
        rope += f" ({type(kind.rope.scaling).__name__.lower()} scaling)"
    experts = config.experts if kind.experts else None
    mlp = "one MLP" if experts is None else f"{experts.count} experts, {experts.chosen} a token"
    return f"{seen}, {rope}, {mlp}"

"""What a model is and what pruning it would take: from its headers alone, or for the time from runs on a few blocks."""

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
from sparseopt.pruning.run.calibration import default_windows
from sparseopt.pruning.run.drawn import drawing_bytes
from sparseopt.pruning.run.layer_patterns import layer_patterns, layer_shares
from sparseopt.pruning.run.output_form import chosen_form, output_of, with_dtype
from sparseopt.pruning.run.plan import check_expert_tokens
from sparseopt.pruning.text.chats import is_text
from sparseopt.system.machine import device_memory_left

# A tensor of block 3 is called `model.layers.3.…`, `transformer.h.3.…`, ...
_IN_BLOCK = re.compile(r".*?\.(\d+)\.(.+)")


@dataclass(frozen=True)
class LinearKind:
    """Linears of one name, shape and sparsity.

    Attributes:
        name: inside its block, `*` for the number of an expert.
        outputs: rows of the weight.
        inputs: its columns.
        count: over all blocks.
        dtype: as stored; float32 where stored quantised.
        zeros: in all of them after pruning; None for those that stay as they are, and where this package's decoder does
            not run the model.
        blocks: that hold them, counted from 0; empty where this package's decoder does not run the model.
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
    """Blocks of one kind: what distinguishes it, and which they are, counted from 0."""

    description: str
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Estimate:
    """What a pruning run needs of memory and disk, roughly: see `memory`.

    Attributes:
        memory: bytes by phase and by what they hold, device and host together.
        disk_peak_memory_bytes: peak with the activations on disk.
        scratch_bytes: what those take there.
        solve_blocks: by how many blocks of its outputs a layer is solved at most, so that it fits the device.
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
        path: of the files.
        revision: the commit on the hub, a sha; None for your own files.
        model_type: of the Hugging Face configuration.
        supported: whether this package's decoder has the family.
        linears: of the blocks, in the order of the first block.
        dtypes: bytes of the tensors by dtype, as they read.
        file_bytes: of the files with the tensors.
        parameters: of the model in all, a tied head counted once.
        block_parameters: in blocks.
        prunable_parameters: in the linears of blocks.
        head_parameters: of the projection to logits, 0 where it is the embedding.
        recipe: of the pruning run that is estimated, as plain values.
        kinds: of blocks; one where all are alike, none for a family that is not supported.
        unused_parameters: of tensors that the decoder does not have, such as an image encoder's.
        targeted_parameters: in linears that are pruned; None for a family that is not supported, as what follows.
        zeros: that pruning makes in these; those that the model or `masks` has may come on top of them.
        dense_bytes: of the output.
        packed_bytes: of the output with the zeros stored as a bitmask.
        seconds: of the pruning run, see `measured_seconds`; None where they were not measured.
        no_text: why a GGUF file's tokenizer cannot be used, so that no text can be read; None where it can. A folder's
            may need transformers and is not tried.
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
    """Say what a model is, and what pruning it by a recipe would take.

    Args:
        source: a Hugging Face folder, a GGUF file or a name on the hub, or a model in memory, as for `prune_model`.
        recipe: of the pruning run; default: that of `prune_model`. Its calibration text is not read.
        measure: also measure the time of a run, which reads and prunes two blocks of the model; see
            `measured_seconds`.
        device_memory: bytes of the device, for which large layers are solved by blocks of their outputs; None for what
            is left on this machine's, and where that is not known, as on a CPU, layers are taken whole.

    Raises:
        ValueError: for a model whose files are unusable, and for a recipe that cannot be used, whose pattern a linear
            cannot have, or whose names match no linear; to `measure`, for a model of a family that this package does
            not have, which is no error otherwise.
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
    """Seconds of a run on this machine, from runs on the model's first two blocks and on its first.

        two blocks, with all compilation  +  (blocks - 2) (two blocks again - one block again)

    The runs are whole ones, with survey, training and scores, and write into a temporary folder. A text that the model
    would draw is random tokens here: its time, once for a model, is not counted. A recipe for some of the linears is
    measured as if all blocks had theirs.

    Raises:
        ValueError, RuntimeError: as `prune_model` does.
    """
    names = {name for index in range(model.num_blocks) for name in model.block_linears(index)}
    shares = layer_shares(model, recipe)
    by_name = {name: share for key, share in shares.items() for name in names if key.endswith(f".{name}.weight")}
    table = shares_in(recipe.targets) is not None
    if len(shares) < len(model.linear_keys()) or table:
        # The table leaves the others as they are.
        named: Targets = (*by_name.items(), ("re:.*", 0.0)) if table else tuple(by_name)
        recipe = recipe.model_copy(update={"targets": named, "ignore": None})
    if recipe.draws:
        shape = recipe.window_count + recipe.heldout_windows, recipe.seqlen
        ids = np.random.default_rng(recipe.seed or 0).integers(0, model.config.vocab_size, shape)
        changed = {"calibration": ids, "bos": "auto", "seed": None, "score": recipe.score or "pydoc"}
        recipe = recipe.model_copy(update=changed)
    # The zeros of other models belong to all their blocks.
    chosen = {"allocation": recipe.allocation, "permute": recipe.permute, "masks": None}
    recipe = recipe.model_copy(update=chosen)
    seconds = []
    # Programs know the number of blocks, so each number compiles its own.
    for count in (2, 1, 2, 1):
        blocks = tuple(range(min(count, model.num_blocks)))
        few = smaller_model(model, replace(sizes_of(model), blocks=blocks)).source
        # Their tensors are those of the whole model, by the same names, and so is the tokenizer.
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
        # As many linears have the pattern as make the sparsity.
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
    """A model of an unknown family, by the names of its tensors: matrices inside a numbered block count as linears."""
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
    # Each kind with its share of zeros, None for those that stay as they are.
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

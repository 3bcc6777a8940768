"""A model opened in parts: the embedding, one block, the head, each read when needed.

Memory holds the parts in use, never the whole model. All blocks of a kind share one graph definition, so a jitted
function of a block is traced once.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial, reduce
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from sparseopt.core.base.mesh import allocate, on_device
from sparseopt.models.base.errors import ModelError, bulleted
from sparseopt.models.decoder.decoder import Block, Decoder, Embedding, Head
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig
from sparseopt.models.families import FAMILIES, find_family
from sparseopt.models.families.family import Family, Shapes, block_linears, build_part, part_shapes
from sparseopt.models.files.in_memory import MemorySource, TransformersModel, is_torch_module, transformers_source
from sparseopt.models.files.safetensors import UnreadTensor, picked_rows
from sparseopt.models.files.source import Source, open_source
from sparseopt.models.streaming.prunable import PrunableModel, check_count


class StreamedModel(PrunableModel):
    """A checked source with parts that are read as float32 modules; `family` has the names that the files use.

    Attributes:
        whole: the model before tokens were removed from it, see `reshape.vocabulary`; else the model itself.
    """

    packages = ("flax",)

    def __init__(self, source: Source, whole: "StreamedModel | None" = None) -> None:
        self.source, self.whole = source, whole or self
        self.family: Family = find_family(source.config, source.tensors)
        fields = self.family.sizes.fields(source.config)
        for name in self.family.sizes.blocks:
            if isinstance(count := fields.get(name), int):
                check_count(source, count, f"blocks ({name}) of several each")
        self.config: DecoderConfig = self.family.configure(source.config)
        if experts := self.config.experts:
            mixtures = sum(kind.experts for kind in self.config.kinds)
            check_count(source, mixtures * experts.count, "experts in all blocks")
        self._check_tensors()

    def _check_tensors(self) -> None:
        """Report missing, extra, misshapen and non-float tensors, all in one error."""
        tensors, expected = self.source.tensors, self._expected
        problems = [f"missing: {key} {list(shape)}" for key, shape in expected.items() if key not in tensors]
        for key, info in tensors.items():
            if key not in expected:
                if not self.family.allows(key, self.config):
                    problems.append(f"extra: {key} {list(info.shape)}")
            elif info.shape != expected[key]:
                problems.append(f"misshapen: {key} is {list(info.shape)}, expected {list(expected[key])}")
            elif not jnp.issubdtype(info.dtype, jnp.floating):
                problems.append(f"not a float: {key} is {info.dtype}")
        if problems:
            raise ModelError(
                f"{self.source.path} does not hold the {self.family.model_type} model that its configuration describes "
                f"({len(problems)} problems); check that configuration and weights belong together:"
                + bulleted(problems)
            )

    def embedding(self, rows: Int[np.ndarray, "rows"] | None = None) -> Embedding:
        """Read the embedding, which maps token ids `[B, T]` to the stream before the first block.

        With `rows`, ascending, ids are indices into these rows of the embedding matrix.
        """
        whole = self._reader("embed_tokens")
        if rows is None:
            return build_part(Embedding, self.config, read=whole)

        def read(path: str) -> jax.Array:
            return self._read_rows(f"embed_tokens.{path}", rows) if path == "weight" else whole(path)

        return build_part(Embedding, replace(self.config, vocab_size=len(rows)), read=read)

    def block(self, index: int) -> Block:
        return build_part(Block, self.config, self._kind(index), read=self._reader(f"layers.{index}"))

    def block_of(self, index: int, tensors: Mapping[str, np.ndarray]) -> Block:
        """Block `index` with these parameters, by path in the block, layers as `[out, in]`, experts one by one."""
        return build_part(
            Block, self.config, self._kind(index), read=lambda path: jnp.asarray(tensors[path], jnp.float32)
        )

    def head(self) -> Head:
        """Read the final norm and the projection to logits; a tied head reads the embedding's matrix."""
        self._check_tied_head()
        return build_part(Head, self.config, read=self._reader("head"))

    def block_keys(self, index: int) -> dict[str, str]:
        """The checkpoint name of every tensor of a block by path in the block (`mlp.up_proj.weight`)."""
        shapes = part_shapes(Block, self.config, self._kind(index))
        return {path: self.family.keys.to_key(f"layers.{index}.{path}") for path in shapes}

    def block_linears(self, index: int) -> dict[str, str]:
        """`linears` of a block, without reading it."""
        return block_linears(self.config, self._kind(index))

    def weight_key(self, index: int, name: str) -> str:
        """The checkpoint name of the weight of a block's layer."""
        return self.family.keys.to_key(f"layers.{index}.{name}.weight")

    def linear_keys(self) -> list[str]:
        return [self.weight_key(index, name) for index in range(self.num_blocks) for name in self.block_linears(index)]

    def outer_keys(self) -> list[str]:
        """The checkpoint names outside the blocks, including unused tensors."""
        inner = {key for index in range(self.num_blocks) for key in self.block_keys(index).values()}
        return [key for key in self.exported_keys() if key not in inner]

    def exported_keys(self) -> list[str]:
        """All checkpoint names except a second copy of a tied head and buffers, which hold no weight."""
        keys = self.family.keys
        spare = keys.to_key("head.lm_head.weight") if self.config.tied else None
        return [key for key in self.source.tensors if key != spare and not keys.ignores(key)]

    def is_transposed(self, key: str) -> bool:
        keys = self.family.keys
        return bool(keys.transposed) and key in self._expected and keys.transposes(keys.to_path(key))

    def decoder_bytes(self) -> int:
        """Size of the parameters of `decoder`, float32."""
        return 4 * sum(map(math.prod, self._expected.values()))

    def decoder(self) -> Decoder:
        """Read the whole model."""
        self._check_tied_head()
        embedding, stored = self.embedding(), self._reader("head")

        def read(path: str) -> jax.Array:
            # A tied head's matrix is in memory already.
            tied = self.config.tied and path == "lm_head.weight"
            return embedding.weight[...] if tied else stored(path)

        decoder = nnx.eval_shape(lambda: Decoder(self.config, rngs=nnx.Rngs(0)))
        decoder.embed_tokens = embedding
        decoder.layers = nnx.List([self.block(index) for index in range(self.num_blocks)])
        decoder.head = build_part(Head, self.config, read=read)
        if self.config.tied:
            decoder.head.lm_head.weight = embedding.weight
        _ORIGINS[decoder] = self.source
        return decoder

    def read(self, path: str) -> jax.Array:
        """The parameter at a module path, float32 on the device, checked to be finite."""
        if self.config.tied and path == "head.lm_head.weight":
            path = "embed_tokens.weight"
        key, transposed = self.family.keys.to_key(path), self.family.keys.transposes(path)
        shape, first = self.source.tensors[key].shape, 0
        value = allocate(shape[::-1] if transposed else shape)
        stored = value.T if transposed else value
        for piece in self.source.pieces(key):
            part = stored[first : first + len(piece)]
            part[...] = piece
            self._check_values(key, part)
            first += len(piece)
        return on_device(value)

    def _reader(self, part: str) -> Callable[[str], jax.Array]:
        return lambda path: self.read(f"{part}.{path}")

    def _read_rows(self, path: str, rows: Int[np.ndarray, "rows"]) -> jax.Array:
        key, first = self.family.keys.to_key(path), 0
        value = allocate((len(rows), *self.source.tensors[key].shape[1:]))
        for piece in picked_rows(self._checked_pieces(key), rows):
            value[first : first + len(piece)] = piece
            first += len(piece)
        return on_device(value)

    def check_finite(self) -> str:
        self._check_tied_head()
        return super().check_finite()

    def _check_tied_head(self) -> None:
        """Raise if a stored, tied head differs from the embedding: transformers would not tie it."""
        head, embedding = map(self.family.keys.to_key, ("head.lm_head.weight", "embed_tokens.weight"))
        if not self.config.tied or head not in self.source.tensors:
            return
        kinds = {(info.shape, info.dtype) for info in map(self.source.tensors.__getitem__, (head, embedding))}
        pairs = zip(self.source.pieces(head), self.source.pieces(embedding), strict=False)
        if len(kinds) > 1 or not all(one.tobytes() == other.tobytes() for one, other in pairs):
            raise ModelError(
                f"{self.source.path} stores {head} and {embedding}, which differ, but its configuration ties them: set "
                "tie_word_embeddings to false in config.json if the head was trained by itself, else remove the head"
            )

    def _keys_to_check(self) -> Collection[str]:
        return dict.fromkeys((*self._expected, *self.exported_keys()))

    @cached_property
    def _expected(self) -> Shapes:
        return self.family.expected_shapes(self.config)

    def _kind(self, index: int) -> BlockKind:
        if not 0 <= index < self.num_blocks:
            raise IndexError(f"block {index} asked for; the model has blocks 0 to {self.num_blocks - 1}")
        return self.config.kinds[index]


#: What a model is given as, such as a path, a name on the hub, an opened source, or a model in memory.
ModelSource = str | Path | Source | PrunableModel | Decoder | TransformersModel

# The source of each decoder. Not an attribute: programs compiled for one model would not serve another.
_ORIGINS: WeakKeyDictionary[Decoder, Source] = WeakKeyDictionary()


def source_of(model: ModelSource) -> Source:
    """The source of a model, see `open_model`; a model in memory becomes a source without a copy of its tensors.

    Raises:
        ModelError: if there is no usable model.
    """
    if isinstance(model, PrunableModel):
        return model.source
    if isinstance(model, str | Path):
        return open_source(model)
    if isinstance(model, Decoder):
        return _decoder_source(model)
    if is_torch_module(model):
        return transformers_source(model)
    if not hasattr(model, "stored_tokenizer"):
        raise ModelError(
            "a model is a path, a name on the hub, what open_source or load_decoder returned, or a transformers model "
            f"in torch, given {type(model).__name__}"
        )
    return cast(Source, model)


def is_known(source: Source) -> bool:
    """Whether the family of a source is known here; without a model type, opening it raises an error."""
    return source.config.get("model_type") in (None, *FAMILIES)


def open_model(source: ModelSource) -> StreamedModel:
    """Open and check a model of a family that is known here; no tensor is read.

    Args:
        source: a Hugging Face folder, a GGUF file or a name on the hub, as in `open_source`, or its result; a
            transformers model in torch, or a decoder from `load_decoder`, with the weights that it has when they are
            read; an open model is returned.

    Raises:
        ModelError: if the files are unusable, the model type is unknown, its configuration is not supported, or its
            tensors do not match the configuration.
    """
    if isinstance(source, StreamedModel):
        return source
    opened = source_of(source)
    if is_known(opened):
        return StreamedModel(opened)
    unknown = f"{opened.name} has the model_type {opened.config['model_type']!r}, whose family is not known here"
    if isinstance(opened, MemorySource):
        raise ModelError(f"{unknown}: prune it in torch with sparseopt.pruning.prune_module")
    raise ModelError(
        f"{unknown}; known are {', '.join(sorted(FAMILIES))}. It has no parts to open: `prune_model`, `perplexity` and "
        "`sparseopt prune` and `eval` load it whole through transformers (pip install 'sparseopt[torch]'), and "
        "sparseopt.pruning.prune_module prunes one that you hold; lm-eval itself runs its zero-shot tasks"
    )


def load_decoder(source: ModelSource) -> Decoder:
    """Read a whole model into memory, as float32; a `ModelError` also if its family is not known here.

    `open_model` accepts the decoder, with its current weights.
    """
    return open_model(source).decoder()


def _decoder_source(decoder: Decoder) -> MemorySource:
    """A decoder's weights by their names in the original model, whose other tensors and files stay."""
    origin = _ORIGINS.get(decoder)
    if origin is None:
        raise ModelError(
            "of this Decoder no configuration is known, since load_decoder did not return it: load the model again and "
            "put the weights into it, nnx.update(loaded, nnx.state(decoder))"
        )
    model = StreamedModel(origin)
    if _shapes(decoder) != _shapes(nnx.eval_shape(lambda: Decoder(model.config, rngs=nnx.Rngs(0)))):
        raise ModelError(
            f"the Decoder of {origin.name} has other parameters than it was loaded with; put its weights into one that "
            "has not been changed"
        )
    tensors: dict[str, UnreadTensor] = {}
    for key in model.exported_keys():
        info, dtype = origin.tensors[key], np.dtype(np.float32)
        if key in model._expected:
            path = model.family.keys.to_path(key)
            tensors[key] = UnreadTensor(info.shape, dtype, partial(_pieces, decoder, path, model.is_transposed(key)))
        else:
            tensors[key] = UnreadTensor(info.shape, info.dtype, partial(origin.pieces, key))
    return MemorySource(origin.name, origin.config, tensors, origin)


def _shapes(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    """Shapes by path, with tied parameters once."""
    return {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(decoder))}


def _pieces(decoder: Decoder, path: str, transposed: bool) -> Iterator[np.ndarray]:
    """The whole parameter at a path as a checkpoint stores it."""
    part, _, rest = path.partition(".")
    found: Any = getattr(decoder, part)
    if part == "layers":
        index, _, rest = rest.partition(".")
        value = found[int(index)].read(rest)
    else:
        value = reduce(getattr, rest.split("."), found)[...]
    yield np.asarray(value, np.float32).T if transposed else np.asarray(value, np.float32)

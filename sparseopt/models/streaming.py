"""Floor 5: a model opened in parts: the embedding, one block, the head, each read when asked for.

Memory holds the parts in use and never the model. All blocks share one graph definition, so that a jitted
function of a block is traced once.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from sparseopt.models.decoder import Block, Decoder, Embedding, Head
from sparseopt.models.digest import Digest
from sparseopt.models.errors import ModelError
from sparseopt.models.experts import unstacked_names
from sparseopt.models.families import FAMILIES, find_family
from sparseopt.models.family import Family, block_linears, build_part, decoder_of_parts, part_shapes
from sparseopt.models.prunable import PrunableModel
from sparseopt.models.safetensors_file import StoredTensor
from sparseopt.models.settings import BlockKind, DecoderConfig
from sparseopt.models.source import Source, open_source
from sparseopt.models.torch_model import TorchModel


class StreamedModel:
    """A checked source whose parts are read as float32 modules.

    Tensors go by their checkpoint names; `stored` and `weight_shape` see linears as `[out, in]`, whatever the files do.

    Attributes:
        source: the files.
        family: the model family, with the names that the files use.
        config: sizes and switches.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.family: Family = find_family(source.config, source.tensors)
        check_depth(source)
        self.config: DecoderConfig = self.family.configure(source.config)
        check_keys(source, self.family, self.config)

    @property
    def num_blocks(self) -> int:
        """How many blocks the model has."""
        return self.config.num_layers

    def embedding(self, rows: Int[np.ndarray, "rows"] | None = None) -> Embedding:
        """Read the token embedding, or of its matrix only some rows, ascending; token ids then count in these."""
        if rows is None:
            return build_part(Embedding, self.config, read=self._reader("embed_tokens"))
        whole = self._reader("embed_tokens")

        def read(path: str, shape: tuple[int, ...]) -> jax.Array:
            return self._read_rows(f"embed_tokens.{path}", rows) if path == "weight" else whole(path, shape)

        return build_part(Embedding, replace(self.config, vocab_size=len(rows)), read=read)

    def block(self, index: int) -> Block:
        """Read block `index`, 0 to `num_blocks - 1`."""
        return build_part(Block, self.config, self._kind(index), read=self._reader(f"layers.{index}"))

    def head(self) -> Head:
        """Read the final norm and the projection to logits; a tied head reads the embedding's matrix."""
        return build_part(Head, self.config, read=self._reader("head"))

    def block_keys(self, index: int) -> dict[str, str]:
        """The checkpoint name of every tensor of a block by path in the block (`mlp.up_proj.weight`)."""
        shapes = part_shapes(Block, self.config, self._kind(index))
        return {path: self.family.keys.to_key(f"layers.{index}.{path}") for path in shapes}

    def block_linears(self, index: int) -> dict[str, str]:
        """The tap that each linear of a block reads, by the linear's name (`mlp.up_proj`); as `Block.linears`."""
        return block_linears(self.config, self._kind(index))

    def weight_key(self, index: int, name: str) -> str:
        """The checkpoint name of the weight of a block's linear."""
        return self.family.keys.to_key(f"layers.{index}.{name}.weight")

    def outer_keys(self) -> list[str]:
        """The checkpoint names outside the blocks: embedding, head unless tied, and what the decoder does not use."""
        inner = {key for i in range(self.num_blocks) for key in self.block_keys(i).values()}
        return [key for key in self.exported_keys() if key not in inner]

    def exported_keys(self) -> list[str]:
        """The checkpoint names that an export holds: all but a second copy of a tied head."""
        spare = self.family.keys.to_key("head.lm_head.weight") if self.config.tied else None
        return [key for key in self.source.tensors if key != spare]

    def stored(self, key: str) -> np.ndarray:
        """A tensor in its stored dtype; a linear's weight as `[out, in]`, whatever the files do."""
        return self.as_stored(key, self.source.read(key))

    def as_stored(self, key: str, value: np.ndarray) -> np.ndarray:
        """From the layout `[out, in]` to that of the files, or back: the same."""
        return value.T if self._is_transposed(key) else value

    def weight_shape(self, key: str) -> tuple[int, int]:
        """`(out, in)` of a linear's weight."""
        rows, columns = self.source.tensors[key].shape
        return (columns, rows) if self._is_transposed(key) else (rows, columns)

    def _is_transposed(self, key: str) -> bool:
        keys = self.family.keys
        return bool(keys.transposed) and key in self._expected and keys.transposes(keys.to_path(key))

    def check_finite(self) -> str:
        """Read every tensor of an export once, one at a time, and return a digest of their bytes.

        Raises:
            ModelError: naming the first tensor that holds NaN or infinity.
        """
        digest = Digest(self.source.config)
        for key in dict.fromkeys((*self.family.expected_shapes(self.config), *self.exported_keys())):
            info = self.source.tensors[key]
            digest.add_pieces(key, info.shape, info.dtype, self._checked_slices(key))
        return digest.text

    def _checked_slices(self, key: str) -> Iterator[np.ndarray]:
        """A tensor in pieces along its first axis, in order; in one where it does not lie plainly in its file."""
        tensor = self.source.tensors[key]
        for piece in tensor.slices() if isinstance(tensor, StoredTensor) else [self.source.read(key)]:
            self._check_finite(key, piece)
            yield piece

    def _read_rows(self, path: str, rows: Int[np.ndarray, "rows"]) -> jax.Array:
        """Some rows of a matrix, ascending, float32 on the device."""
        key, start = self.family.keys.to_key(path), 0
        taken = []
        for piece in self._checked_slices(key):
            low, high = np.searchsorted(rows, [start, start + len(piece)])
            taken.append(piece[rows[low:high] - start].astype(np.float32))
            start += len(piece)
        return jnp.asarray(np.concatenate(taken))

    def decoder(self) -> Decoder:
        """Read the whole model."""
        embedding = self.embedding()
        blocks = [self.block(index) for index in range(self.num_blocks)]
        stored = self._reader("head")

        def read(path: str, shape: tuple[int, ...]) -> jax.Array:
            # A tied head's matrix is in memory already.
            tied = self.config.tied and path == "lm_head.weight"
            return embedding.weight[...] if tied else stored(path, shape)

        return decoder_of_parts(self.config, embedding, blocks, build_part(Head, self.config, read=read))

    def read(self, path: str) -> jax.Array:
        """The parameter at a module path, float32 on the device.

        Raises:
            ModelError: if it holds NaN or infinity, naming the tensor.
        """
        if self.config.tied and path == "head.lm_head.weight":
            path = "embed_tokens.weight"
        key = self.family.keys.to_key(path)
        value = self.source.read(key).astype(np.float32)
        self._check_finite(key, value)
        return jnp.asarray(value.T if self.family.keys.transposes(path) else value)

    def _check_finite(self, key: str, value: np.ndarray) -> None:
        bad = value.size - np.count_nonzero(np.isfinite(value))
        if bad:
            raise ModelError(f"{key} in {self.source.path} holds {bad} NaN or infinite values; download it again")

    def _reader(self, part: str) -> Callable[[str, tuple[int, ...]], jax.Array]:
        def read(path: str, shape: tuple[int, ...]) -> jax.Array:
            alone = unstacked_names(path, shape[0]) if shape else None
            if alone is None:
                return self.read(f"{part}.{path}")
            return jnp.stack([self.read(f"{part}.{name}") for name in alone])

        return read

    @cached_property
    def _expected(self) -> frozenset[str]:
        return frozenset(self.family.expected_shapes(self.config))

    def _kind(self, index: int) -> BlockKind:
        if not 0 <= index < self.num_blocks:
            raise IndexError(f"block {index} asked for; the model has blocks 0 to {self.num_blocks - 1}")
        return self.config.kinds[index]


def open_model(source: str | Path | Source) -> PrunableModel:
    """Open a model and check it; no tensor is read.

    A model whose family is not known here is opened through torch (extra `torch`), see `torch_model`.

    Args:
        source: a Hugging Face folder, a GGUF file or a name on the hub, as in `open_source`, or what that returned.

    Raises:
        ModelError: if the files are unusable, the model type unknown, its configuration not supported, or its
            tensors not those of the configuration.
    """
    opened = open_source(source) if isinstance(source, str | Path) else source
    model_type = opened.config.get("model_type")
    return StreamedModel(opened) if model_type is None or model_type in FAMILIES else TorchModel(opened)


def load_decoder(source: str | Path | Source) -> Decoder:
    """Read a whole model into memory, as float32.

    Raises:
        ModelError: as `open_model` does, and for a model whose family is not known here.
    """
    return open_model(source).decoder()


def check_depth(source: Source) -> None:
    """Refuse a number of blocks that the files cannot hold, before anything is made for each of them.

    Raises:
        ModelError: if there are more blocks than tensors.
    """
    text = source.config.get("text_config")
    fields = {**source.config, **(text if isinstance(text, dict) else {})}
    for name in ("num_hidden_layers", "n_layer"):
        count = fields.get(name)
        if isinstance(count, int) and count > len(source.tensors):
            raise ModelError(
                f"{source.path} holds {len(source.tensors)} tensors, its configuration asks for {count} "
                f"blocks ({name}) of several each; check that configuration and weights belong together"
            )


def check_keys(source: Source, family: Family, config: DecoderConfig) -> None:
    """Compare a source's tensors with those its configuration asks for.

    Raises:
        ModelError: listing every missing, extra, misshapen and non-float tensor at once.
    """
    experts = sum(kind.experts for kind in config.kinds) * (config.experts.count if config.experts else 0)
    if experts > len(source.tensors):
        raise ModelError(
            f"{source.path} holds {len(source.tensors)} tensors, its configuration asks for {experts} experts in all "
            "blocks; check that configuration and weights belong together"
        )
    expected = family.expected_shapes(config)
    problems = [f"missing: {key} {list(shape)}" for key, shape in expected.items() if key not in source.tensors]
    for key, info in source.tensors.items():
        if key not in expected:
            if not family.allows(key, config):
                problems.append(f"extra: {key} {list(info.shape)}")
        elif info.shape != expected[key]:
            problems.append(f"misshapen: {key} is {list(info.shape)}, expected {list(expected[key])}")
        elif not jnp.issubdtype(info.dtype, jnp.floating):
            problems.append(f"not a float: {key} is {info.dtype}")
    if problems:
        raise ModelError(
            f"{source.path} does not hold the {family.model_type} model that its configuration describes "
            f"({len(problems)} problems); check that configuration and weights belong together:\n  "
            + "\n  ".join(problems)
        )

"""Floor 5: a model opened in parts: the embedding, one block, the head, each read when asked for.

Memory holds the parts in use and never the model. All blocks share one graph definition, so that a jitted
function of a block is traced once.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.models.decoder import Block, Decoder, DecoderConfig, Embedding, Head
from sparseopt.models.errors import ModelError
from sparseopt.models.families import find_family
from sparseopt.models.family import Family, build_part, part_shapes
from sparseopt.models.source import Source, open_source


class StreamedModel:
    """A checked source whose parts are read as float32 modules.

    Attributes:
        source: the files.
        family: the model family.
        config: sizes and switches.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.family: Family = find_family(source.config)
        self.config: DecoderConfig = self.family.read_config(source.config)
        check_keys(source, self.family, self.config)

    @property
    def num_blocks(self) -> int:
        """How many blocks the model has."""
        return self.config.num_layers

    def embedding(self) -> Embedding:
        """Read the token embedding."""
        return build_part(Embedding, self.config, self._reader("embed_tokens"))

    def block(self, index: int) -> Block:
        """Read block `index`, 0 to `num_blocks - 1`."""
        self._check_index(index)
        return build_part(Block, self.config, self._reader(f"layers.{index}"))

    def head(self) -> Head:
        """Read the final norm and the projection to logits; a tied head reads the embedding's matrix."""
        return build_part(Head, self.config, self._reader("head"))

    def block_keys(self, index: int) -> dict[str, str]:
        """The checkpoint name of every tensor of a block by path in the block (`mlp.up_proj.weight`)."""
        self._check_index(index)
        return {path: self.family.keys.to_key(f"layers.{index}.{path}") for path in part_shapes(Block, self.config)}

    def outer_keys(self) -> list[str]:
        """The checkpoint names outside the blocks: embedding, final norm, and the head unless it is tied."""
        inner = {key for i in range(self.num_blocks) for key in self.block_keys(i).values()}
        return [key for key in self.family.expected_shapes(self.config) if key not in inner]

    def check_finite(self) -> None:
        """Read every tensor once, one at a time.

        Raises:
            ModelError: naming the first tensor that holds NaN or infinity.
        """
        for key in self.family.expected_shapes(self.config):
            self._check_finite(key, self.source.read(key))

    def decoder(self) -> Decoder:
        """Read the whole model."""
        return build_part(Decoder, self.config, self._reader(""))

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
        return jnp.asarray(value)

    def _check_finite(self, key: str, value: np.ndarray) -> None:
        bad = value.size - np.count_nonzero(np.isfinite(value))
        if bad:
            raise ModelError(f"{key} in {self.source.path} holds {bad} NaN or infinite values; download it again")

    def _reader(self, part: str) -> Callable[[str], jax.Array]:
        return lambda path: self.read(f"{part}.{path}" if part else path)

    def _check_index(self, index: int) -> None:
        if not 0 <= index < self.num_blocks:
            raise IndexError(f"block {index} asked for; the model has blocks 0 to {self.num_blocks - 1}")


def open_model(path: str | Path) -> StreamedModel:
    """Open a Hugging Face folder or a GGUF file and check it; no tensor is read.

    Raises:
        ModelError: if the files are unusable, the model type unknown, its configuration not supported, or its
            tensors not those of the configuration.
    """
    return StreamedModel(open_source(path))


def load_decoder(path: str | Path) -> Decoder:
    """Read a whole model into memory, as float32."""
    return open_model(path).decoder()


def check_keys(source: Source, family: Family, config: DecoderConfig) -> None:
    """Compare a source's tensors with those its configuration asks for.

    Raises:
        ModelError: listing every missing, extra, misshapen and non-float tensor at once.
    """
    if config.num_layers > len(source.tensors):
        raise ModelError(
            f"{source.path} holds {len(source.tensors)} tensors, its configuration asks for {config.num_layers} "
            "blocks of several each; check that configuration and weights belong together"
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

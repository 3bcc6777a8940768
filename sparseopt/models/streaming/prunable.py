"""What a model must offer to be pruned: its parts, read when asked for, and the names of its tensors.

`StreamedModel` has blocks that are Flax modules; the blocks of `TorchModel` run in torch.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparseopt.models.base.errors import ModelError, bulleted
from sparseopt.models.decoder.decoder import Decoder
from sparseopt.models.files.safetensors import TensorInfo
from sparseopt.models.files.source import Source


class PrunableBlock(Protocol):
    """One block: it runs, and its parameters go by a path such as `mlp.up_proj.weight`, linears as `[out, in]`."""

    def __call__(self, x: Float[Array, "B T D"], /) -> Float[Array, "B T D"]: ...

    @property
    def linears(self) -> dict[str, str]:
        """The tap that each linear reads, by the linear's name, in the order in which the block runs them."""

    @property
    def residual_taps(self) -> tuple[str, ...]:
        """The taps before the linears that write into the residual stream."""

    @property
    def num_experts(self) -> int:
        """Number of stacked experts, 0 without a mixture."""

    @property
    def attention_width(self) -> int:
        """Width of the attention's mixed values."""

    def weight_shape(self, name: str) -> tuple[int, int]:
        """`(out, in)` of a linear; an unknown one is a `KeyError`."""

    def read(self, path: str) -> Array:
        """The parameter at a path; an unknown one is a `KeyError`."""

    def write(self, values: Mapping[str, Array | np.ndarray]) -> None:
        """Set parameters by path, as float32; an unknown one is a `KeyError`. Earlier copies keep their values."""

    def copy(self) -> "PrunableBlock":
        """An independent block with the same parameters."""


class PrunableModel(ABC):
    """An opened model whose tensors go by their checkpoint names.

    `stored` and `weight_shape` see linears as `[out, in]`, whatever the layout of the files.

    Attributes:
        source: the files.
        config: sizes; `vocab_size`, `hidden_size`, `num_layers` and `max_positions` at least.
    """

    source: Source
    config: Any

    @property
    def num_blocks(self) -> int:
        return self.config.num_layers

    @abstractmethod
    def embedding(self, rows: Int[np.ndarray, "rows"] | None = None) -> Callable[[Array], Array]:
        """Read what maps token ids `[B, T]` to the stream before the first block.

        With `rows`, ascending, ids count in these rows of the embedding matrix.
        """

    @abstractmethod
    def block(self, index: int) -> Any:
        """Read block `index`, a `PrunableBlock`."""

    @abstractmethod
    def head(self) -> Any:
        """Read what maps the stream after the last block to logits."""

    @abstractmethod
    def block_keys(self, index: int) -> dict[str, str]:
        """The checkpoint name of every tensor of a block by path in the block (`mlp.up_proj.weight`)."""

    @abstractmethod
    def block_linears(self, index: int) -> dict[str, str]:
        """`linears` of a block that is not read."""

    @abstractmethod
    def weight_key(self, index: int, name: str) -> str:
        """The checkpoint name of the weight of a block's linear."""

    @abstractmethod
    def is_transposed(self, key: str) -> bool:
        """Whether a tensor is a linear's weight that the files store as `[in, out]`."""

    @abstractmethod
    def decoder(self) -> Decoder:
        """Read the whole model as a Flax module."""

    def linear_keys(self) -> list[str]:
        """The checkpoint names of the weights of all linears, in the model's order."""
        return [self.weight_key(index, name) for index in range(self.num_blocks) for name in self.block_linears(index)]

    def exported_keys(self) -> list[str]:
        """The checkpoint names that an export holds."""
        return list(self.source.tensors)

    def outer_keys(self) -> list[str]:
        """The checkpoint names outside the blocks, unused tensors included."""
        inner = {key for index in range(self.num_blocks) for key in self.block_keys(index).values()}
        return [key for key in self.exported_keys() if key not in inner]

    def weight_shape(self, key: str) -> tuple[int, int]:
        """`(out, in)` of a linear's weight."""
        rows, columns = self.source.tensors[key].shape
        return (columns, rows) if self.is_transposed(key) else (rows, columns)

    def stored(self, key: str) -> np.ndarray:
        """A tensor in its stored dtype."""
        return self.as_stored(key, self.source.read(key))

    def as_stored(self, key: str, value: np.ndarray) -> np.ndarray:
        """A tensor as `[out, in]` in the layout of the files, or the reverse, which is the same."""
        return value.T if self.is_transposed(key) else value

    def check_finite(self) -> str:
        """Read every tensor of an export once and return a digest of the bytes.

        Raises:
            ModelError: naming the first tensor that holds NaN or infinity.
        """
        tensors = self.source.tensors
        found = ((key, tensors[key], self._checked_pieces(key)) for key in self._keys_to_check())
        return digest(found, self.source.config)

    def _keys_to_check(self) -> Collection[str]:
        return self.exported_keys()

    def _checked_pieces(self, key: str) -> Iterator[np.ndarray]:
        """The `pieces` of a tensor in its source."""
        for piece in self.source.pieces(key):
            self._check_values(key, piece)
            yield piece

    def _check_values(self, key: str, value: np.ndarray) -> None:
        bad = value.size - np.count_nonzero(np.isfinite(value))
        if bad:
            raise ModelError(f"{key} in {self.source.path} holds {bad} NaN or infinite values; download it again")

    def _check_index(self, index: int) -> None:
        if not 0 <= index < self.num_blocks:
            raise IndexError(f"block {index} asked for; the model has blocks 0 to {self.num_blocks - 1}")


def digest(
    tensors: Iterable[tuple[str, TensorInfo | np.ndarray, Iterable[np.ndarray]]],
    config: Mapping[str, Any] | None = None,
) -> str:
    """32 hexadecimal digits of a configuration and of named tensors in pieces along their first axis."""
    state = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16)
    for name, info, pieces in tensors:
        state.update(f"{name} {info.dtype.name} {info.shape}".encode())
        for piece in pieces:
            state.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def check_count(source: Source, count: int, what: str) -> None:
    """Refuse more blocks or experts than the files have tensors, before memory is allocated for each of them."""
    if count > len(source.tensors):
        raise ModelError(
            f"{source.path} holds {len(source.tensors)} tensors, its configuration asks for {count} {what}; check that "
            "configuration and weights belong together"
        )


def check_tensors(
    source: Source,
    model: str,
    expected: Mapping[str, tuple[int, ...]],
    missing: list[str],
    ignores: Callable[[str], bool],
    any_dtype: Collection[str] = (),
) -> None:
    """Refuse missing, extra, misshapen and non-float tensors, all in one error.

    `missing` says which tensors the source lacks, `ignores` whether it may hold a name besides the expected ones; those
    of `any_dtype` need not be floats.
    """
    problems = [f"missing: {text}" for text in missing]
    for key, info in source.tensors.items():
        if key not in expected:
            if not ignores(key):
                problems.append(f"extra: {key} {list(info.shape)}")
        elif info.shape != expected[key]:
            problems.append(f"misshapen: {key} is {list(info.shape)}, expected {list(expected[key])}")
        elif not jnp.issubdtype(info.dtype, jnp.floating) and key not in any_dtype:
            problems.append(f"not a float: {key} is {info.dtype}")
    if problems:
        raise ModelError(
            f"{source.path} does not hold {model} ({len(problems)} problems); check that configuration and weights "
            "belong together:" + bulleted(problems)
        )

"""Floor 5: what a model must offer to be pruned: its parts, read when asked for, and the names of its tensors.

`StreamedModel` is one, whose blocks are Flax modules; `TorchModel` is another, whose blocks run in torch.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from jaxtyping import Array, Float, Int

from sparseopt.models.decoder import Decoder
from sparseopt.models.source import Source


class PrunableBlock(Protocol):
    """One block: it runs, and its parameters go by a path such as `mlp.up_proj.weight`, linears as `[out, in]`."""

    def __call__(self, x: Float[Array, "B T D"], /) -> Float[Array, "B T D"]:
        """Run the block."""

    @property
    def linears(self) -> dict[str, str]:
        """The tap that each linear reads, by the linear's name."""

    @property
    def residual_taps(self) -> tuple[str, ...]:
        """The taps in front of the linears that write into the residual stream."""

    @property
    def num_experts(self) -> int:
        """How many stacked experts there are."""

    @property
    def expert_share(self) -> float:
        """The share of tokens that reach an expert, in the mean."""

    @property
    def attention_width(self) -> int:
        """The width of the attention's mixed values."""

    def weight_shape(self, name: str) -> tuple[int, int]:
        """`(out, in)` of a linear."""

    def read(self, path: str) -> Array:
        """The parameter at a path."""

    def write(self, values: Mapping[str, Array | np.ndarray]) -> None:
        """Put other values there, by path."""

    def copy(self) -> "PrunableBlock":
        """A block of its own with the same parameters."""


class PrunableModel(Protocol):
    """An opened model whose tensors go by their checkpoint names; methods as in `StreamedModel`."""

    @property
    def source(self) -> Source:
        """The files."""

    @property
    def config(self) -> Any:
        """Sizes; `vocab_size`, `hidden_size`, `tied` and `max_positions` at least."""

    @property
    def num_blocks(self) -> int:
        """How many blocks the model has."""

    def embedding(self, rows: Int[np.ndarray, "rows"] | None = None) -> Callable[[Array], Array]:
        """Token ids `[B, T]` to the stream in front of the first block; with rows, ids count in these, ascending."""

    def block(self, index: int) -> Any:
        """Read a block, a `PrunableBlock`."""

    def head(self) -> Any:
        """The stream behind the last block to logits."""

    def block_keys(self, index: int) -> dict[str, str]:
        """The checkpoint name of every tensor of a block by path in the block."""

    def block_linears(self, index: int) -> dict[str, str]:
        """The tap that each linear of a block reads, by the linear's name."""

    def weight_key(self, index: int, name: str) -> str:
        """The checkpoint name of the weight of a block's linear."""

    def weight_shape(self, key: str) -> tuple[int, int]:
        """`(out, in)` of a linear's weight."""

    def outer_keys(self) -> list[str]:
        """The checkpoint names outside the blocks."""

    def exported_keys(self) -> list[str]:
        """The checkpoint names that an export holds."""

    def stored(self, key: str) -> np.ndarray:
        """A tensor in its stored dtype; a linear's weight as `[out, in]`."""

    def as_stored(self, key: str, value: np.ndarray) -> np.ndarray:
        """From the layout `[out, in]` to that of the files, or back: the same."""

    def check_finite(self) -> str:
        """Read every tensor once, refuse NaN and infinity, and return a digest of what was read."""

    def decoder(self) -> Decoder:
        """The whole model as a Flax module."""

"""Floor 5: a model of any architecture that transformers has, opened in parts; its blocks run in torch.

For those whose family is not among ours (extra `torch`). Tensors are read from the source block by block, as in
`streaming`; what transformers knows is how the parts are put together, and that is tried out before it is relied on,
see `torch_probe`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparseopt.models.decoder import Decoder
from sparseopt.models.digest import Digest
from sparseopt.models.errors import ModelError
from sparseopt.models.families import FAMILIES
from sparseopt.models.source import Source
from sparseopt.models.torch_block import TorchBlock, is_transposed, linears_of, unprunable_experts, with_stream
from sparseopt.models.torch_bridge import to_jax, to_tensor, to_torch
from sparseopt.models.torch_probe import Findings, probe, record_calls
from sparseopt.models.torch_skeleton import Call, Ended, Skeleton, Tensors, build_skeleton


@dataclass(frozen=True)
class TorchConfig:
    """What is read of the configuration here.

    Attributes:
        model_type: the architecture.
        vocab_size: V, rows of the embedding.
        hidden_size: D, width of the stream.
        num_layers: how many blocks there are.
        tied: the head uses the embedding matrix.
        max_positions: as in `DecoderConfig`.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    tied: bool
    max_positions: int | None


class TorchModel:
    """A checked source whose blocks run in torch; a `PrunableModel`.

    Attributes:
        source: the files.
        config: sizes.
    """

    def __init__(self, source: Source) -> None:
        """Build the model without weights and compare names and shapes; no tensor is read.

        Raises:
            ModelError: if packages are missing, the architecture is not one that can be pruned so, or the tensors are
                not those of the configuration.
        """
        self.source = source
        self._skeleton: Skeleton = build_skeleton(source.config, len(source.tensors))
        self._names = self._skeleton.names_of(source.tensors)
        self._keys = {name: key for key, name in self._names.items()}
        skeleton = self._skeleton
        self._linears = [linears_of(block) for block in skeleton.blocks]
        _refuse_experts(skeleton, self._linears)
        check_names(source, skeleton, self._names)
        self.config = TorchConfig(
            model_type=skeleton.model_type,
            vocab_size=skeleton.vocab_size,
            hidden_size=skeleton.hidden_size,
            num_layers=skeleton.num_blocks,
            tied=any(name not in self._keys for name in skeleton.tied),
            max_positions=skeleton.max_positions,
        )
        self._transposed = {
            self.weight_key(index, name)
            for index, linears in enumerate(self._linears)
            for name, linear in linears.items()
            if is_transposed(linear)
        }
        self._calls: dict[tuple[int, int], list[Call]] = {}

    @property
    def num_blocks(self) -> int:
        """How many blocks the model has."""
        return self.config.num_layers

    @property
    def attention_width(self) -> int:
        """The width of the attention's mixed values."""
        return self._skeleton.attention_width

    @property
    def writes_input(self) -> bool:
        """Whether blocks write into the stream that they get."""
        return self._findings.writes_input

    def embedding(self, rows: Int[np.ndarray, "rows"] | None = None) -> Callable[[Array], Array]:
        """Read what lies in front of the first block: token ids `[B, T]` to the stream `[B, T, D]`.

        With rows, ids count in these.
        """
        outer = self._outer()

        def embed(tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
            streams: list[Array] = []

            def stop(index: int, stream: Any, call: Call) -> Any:
                streams.append(to_jax(stream))
                raise Ended

            # One window at a time: a model may make masks of T times T for every window.
            ids_BT = tokens_BT if rows is None else jnp.asarray(rows[np.asarray(tokens_BT)], jnp.int32)
            for row in to_torch(ids_BT).long():
                self._skeleton.run(outer, row[None], stop)
            return jnp.concatenate(streams)

        return embed

    def block(self, index: int) -> TorchBlock:
        """Read block `index`, 0 to `num_blocks - 1`."""
        prefix = self._prefix(index)
        tensors = {name.removeprefix(prefix): to_tensor(self.source.read(key)) for name, key in self._inner(index)}
        return TorchBlock(self._skeleton.blocks[index], index, tensors, self)

    def head(self) -> Callable[[Array], Array]:
        """Read what lies behind the last block: its stream `[B, T, D]` to logits `[B, T, V]`."""
        outer, output, last = self._outer(), self._findings.output, self.num_blocks - 1

        def project(x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
            import torch

            final = to_torch(x_BTD)

            def visit(index: int, stream: Any, call: Call) -> Any:
                return with_stream(output, final if index == last else stream)

            tokens = torch.zeros(final.shape[:2], dtype=torch.long)
            return to_jax(self._skeleton.run(outer, tokens, visit))

        return project

    def call(self, index: int, batch: int, time: int) -> Call:
        """How the model calls a block on `batch` windows of `time` tokens."""
        if (batch, time) not in self._calls:
            self._calls[batch, time] = record_calls(self._skeleton, self._findings, self._frame, batch, time)
        return self._calls[batch, time][index]

    def block_keys(self, index: int) -> dict[str, str]:
        """The checkpoint name of every tensor of a block by path in the block."""
        return {name.removeprefix(self._prefix(index)): key for name, key in self._inner(index)}

    def block_linears(self, index: int) -> dict[str, str]:
        """The tap that each linear of a block reads, by the linear's name; as `TorchBlock.linears`."""
        self._prefix(index)
        return {name: name for name in self._linears[index]}

    def weight_key(self, index: int, name: str) -> str:
        """The checkpoint name of the weight of a block's linear."""
        return self._keys[f"{self._prefix(index)}{name}.weight"]

    def weight_shape(self, key: str) -> tuple[int, int]:
        """`(out, in)` of a linear's weight."""
        rows, columns = self.source.tensors[key].shape
        return (columns, rows) if key in self._transposed else (rows, columns)

    def stored(self, key: str) -> np.ndarray:
        """A tensor in its stored dtype; a linear's weight as `[out, in]`, whatever the files do."""
        return self.as_stored(key, self.source.read(key))

    def as_stored(self, key: str, value: np.ndarray) -> np.ndarray:
        """From the layout `[out, in]` to that of the files, or back: the same."""
        return value.T if key in self._transposed else value

    def outer_keys(self) -> list[str]:
        """The checkpoint names outside the blocks, with those that the model does not use."""
        inner = {key for index in range(self.num_blocks) for _, key in self._inner(index)}
        return [key for key in self.exported_keys() if key not in inner]

    def exported_keys(self) -> list[str]:
        """The checkpoint names that an export holds: all."""
        return list(self.source.tensors)

    def check_finite(self) -> str:
        """Read every tensor of an export once, try out how the parts go together, and return a digest of bytes.

        Raises:
            ModelError: naming the first tensor that holds NaN or infinity, or what about the model cannot be pruned.
        """
        digest = Digest(self.source.config)
        for key in self.exported_keys():
            value = self.source.read(key)
            digest.add(key, value)
            bad = 0 if value.dtype.kind in "iub" else value.size - np.count_nonzero(np.isfinite(value))
            if bad:
                raise ModelError(f"{key} in {self.source.path} holds {bad} NaN or infinite values; download it again")
        _ = self._findings
        return digest.text

    def decoder(self) -> Decoder:
        """There is none.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            f"a {self.config.model_type} model runs block by block in torch and cannot be loaded as a decoder; that "
            f"takes a family known here: {', '.join(sorted(FAMILIES))}"
        )

    @cached_property
    def _findings(self) -> Findings:
        """How the parts go together, tried out with the first block."""
        first = {name: to_tensor(self.source.read(key)) for name, key in self._inner(0)}
        return probe(self._skeleton, self._outer(), first)

    @cached_property
    def _frame(self) -> Tensors:
        """What is needed to see how blocks are called: all outer tensors but those as large as the vocabulary."""
        return self._outer(blank=True)

    def _outer(self, *, blank: bool = False) -> Tensors:
        """The tensors outside the blocks, those that are tied by all their names."""
        tensors: Tensors = {}
        for name in self._skeleton.shapes:
            if self._skeleton.is_inner(name) or name in tensors:
                continue
            group = self._skeleton.tied.get(name, (name,))
            held = [each for each in group if each in self._keys]
            if not held:  # a buffer that the model has computed
                continue
            if blank and self._skeleton.is_table(name):
                tensors |= dict.fromkeys(group, self._skeleton.blank(name))
                continue
            for each in held:
                tensors[each] = to_tensor(self.source.read(self._keys[each]))
            tensors |= {each: tensors[held[0]] for each in group if each not in held}
        return tensors

    def _inner(self, index: int) -> list[tuple[str, str]]:
        """Names and keys of a block's tensors."""
        prefix = self._prefix(index)
        return [(name, key) for key, name in self._names.items() if name.startswith(prefix)]

    def _prefix(self, index: int) -> str:
        if not 0 <= index < self.num_blocks:
            raise IndexError(f"block {index} asked for; the model has blocks 0 to {self.num_blocks - 1}")
        return self._skeleton.prefixes[index]


def check_names(source: Source, skeleton: Skeleton, names: dict[str, str]) -> None:
    """Compare a source's tensors with those its model asks for.

    Raises:
        ModelError: listing every missing, extra, misshapen and non-float tensor at once.
    """
    held, problems = set(names.values()), []
    for name, shape in skeleton.shapes.items():
        given = held.intersection(skeleton.tied.get(name, (name,)))
        if not given and name not in skeleton.optional:
            problems.append(f"missing: {name} {list(shape)}")
    for key, info in source.tensors.items():
        if key not in names:
            if not skeleton.ignores(key):
                problems.append(f"extra: {key} {list(info.shape)}")
            continue
        shape = skeleton.shapes[names[key]]
        if info.shape != shape:
            problems.append(f"misshapen: {key} is {list(info.shape)}, expected {list(shape)}")
        elif not jnp.issubdtype(info.dtype, jnp.floating) and names[key] not in skeleton.optional:
            problems.append(f"not a float: {key} is {info.dtype}")
    if problems:
        raise ModelError(
            f"{source.path} does not hold the {skeleton.model_type} model that transformers makes of its configuration "
            f"({len(problems)} problems); check that configuration and weights belong together:\n  "
            + "\n  ".join(problems)
        )


def _refuse_experts(skeleton: Skeleton, linears: list[dict[str, Any]]) -> None:
    fused = {
        f"{prefix}{name}": shape
        for prefix, block in zip(skeleton.prefixes, skeleton.blocks, strict=True)
        for name, shape in unprunable_experts(block).items()
    }
    if fused:
        name, shape = next(iter(fused.items()))
        raise ModelError(
            f"a {skeleton.model_type} model keeps experts in {len(fused)} stacked parameters, which are no linears and "
            f"are not pruned through torch: {name} {list(shape)} is the first"
        )
    empty = [index for index, each in enumerate(linears) if not each]
    if len(empty) == len(linears):
        raise ModelError(f"the blocks of a {skeleton.model_type} model have no linears, so there is nothing to prune")

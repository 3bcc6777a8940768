"""A model of any architecture that transformers has, opened in parts; its blocks run in torch.

For models whose family is not known here (extra `torch`). Tensors are read from the source block by block, as in
`streaming`. transformers knows how the parts are put together; `torch_probe` tests this before it is relied on.
"""

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparseopt.models.base.errors import ModelError
from sparseopt.models.decoder.decoder import Decoder
from sparseopt.models.families import FAMILIES
from sparseopt.models.files.source import Source
from sparseopt.models.streaming.prunable import PrunableModel, check_tensors
from sparseopt.models.streaming.torch_bridge import (
    Watch,
    is_transposed,
    linears_of,
    stream_of,
    to_jax,
    to_tensor,
    to_torch,
    torch_device,
    watched,
    with_stream,
)
from sparseopt.models.streaming.torch_probe import Findings, probe
from sparseopt.models.streaming.torch_skeleton import Call, Ended, Skeleton, Tensors, TorchConfig


class TorchBlock:
    """A block with its tensors, in the layout of its module; a `PrunableBlock`.

    The module holds no weights; tensors are passed to it for each run, and a copy is another dictionary of the same
    tensors. A linear is an `nn.Linear` or transformers' `Conv1D`, which stores `[in, out]`. Each has its own tap.
    """

    # Experts are never stacked here: those that are linears go by their own names.
    num_experts = 0
    residual_taps: tuple[str, ...] = ()

    def __init__(self, module: Any, index: int, tensors: Tensors, model: "TorchModel") -> None:
        self._module, self._index, self._tensors, self._model = module, index, tensors, model
        self._linears = linears_of(module)

    @property
    def linears(self) -> dict[str, str]:
        return {name: name for name in self._linears}

    @property
    def attention_width(self) -> int:
        return self._model.attention_width

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return to_jax(self.run(to_torch(x_BTD)))

    def run(self, x_BTD: Any, watch: Watch | None = None) -> Any:
        """Run the block on a torch tensor; `watch` sees the input of every linear before it is used."""
        import torch

        x_BTD = x_BTD.clone() if self._model.writes_input else x_BTD
        arguments, keywords = self._model.call(self._index, *x_BTD.shape[:2]).with_stream(x_BTD)
        with torch.no_grad(), watched(self._linears, self._index, watch):
            output = torch.func.functional_call(self._module, self._tensors, arguments, keywords, tie_weights=False)
        return stream_of(output)

    def read(self, path: str) -> Array:
        tensor = self._tensor(path)
        return to_jax(tensor.T if self._is_transposed(path) else tensor)

    def write(self, values: Mapping[str, Array | np.ndarray]) -> None:
        for path, value in values.items():
            self._tensor(path)
            given = to_torch(jnp.asarray(value, jnp.float32))
            self._tensors[path] = given.T.contiguous() if self._is_transposed(path) else given

    def weight_shape(self, name: str) -> tuple[int, int]:
        path = f"{name}.weight"
        rows, columns = self._tensor(path).shape
        return (columns, rows) if self._is_transposed(path) else (rows, columns)

    def copy(self) -> "TorchBlock":
        return TorchBlock(self._module, self._index, dict(self._tensors), self._model)

    def _tensor(self, path: str) -> Any:
        if path not in self._tensors:
            raise KeyError(f"no parameter {path!r} in a block; its linears are {', '.join(self._linears)}")
        return self._tensors[path]

    def _is_transposed(self, path: str) -> bool:
        name, _, kind = path.rpartition(".")
        return kind == "weight" and is_transposed(self._linears.get(name))


class TorchModel(PrunableModel):
    """A checked source whose blocks run in torch."""

    def __init__(self, source: Source) -> None:
        """Build the model without weights and compare names and shapes; no tensor is read."""
        self.source = source
        skeleton = self._skeleton = Skeleton(source)
        self.config: TorchConfig = skeleton.config
        self._linears = [linears_of(block) for block in skeleton.blocks]
        if not any(self._linears):
            raise ModelError(
                f"the blocks of a {skeleton.model_type} model have no linears, so there is nothing to prune"
            )
        held = set(skeleton.names_of(source.tensors, skeleton.shapes).values())
        # Experts that the checkpoint holds apart and the module does not.
        self._stacks = {name: parts for name in skeleton.stacked - held if any(parts := skeleton.parts_of(name))}
        shapes = {name: shape for name, shape in skeleton.shapes.items() if name not in self._stacks}
        for name, experts in self._stacks.items():
            shapes |= dict.fromkeys((part for parts in experts for part in parts), skeleton.part_shape(name))
        self._names = skeleton.names_of(source.tensors, shapes)
        self._keys = {name: key for key, name in self._names.items()}
        check_tensors(
            source,
            f"the {skeleton.model_type} model that transformers makes of its configuration",
            {key: shapes[name] for key, name in self._names.items()},
            [
                f"{name} {list(shape)}"
                for name, shape in shapes.items()
                if name not in skeleton.optional and self._keys.keys().isdisjoint(skeleton.tied.get(name, (name,)))
            ],
            skeleton.ignores,
            [key for key, name in self._names.items() if name in skeleton.optional],
        )
        self._transposed = {
            self.weight_key(index, name)
            for index, linears in enumerate(self._linears)
            for name, linear in linears.items()
            if is_transposed(linear)
        }
        self._calls: dict[tuple[int, int], list[Call]] = {}

    @property
    def attention_width(self) -> int:
        return self.config.attention_width

    @property
    def writes_input(self) -> bool:
        return self._findings.writes_input

    @property
    def stacked_weights(self) -> int:
        """The number of weights of experts that are stacked, which are no linears and stay as they are."""
        return sum(math.prod(self._skeleton.shapes[name]) for name in self._skeleton.stacked)

    def exported_keys(self) -> list[str]:
        """All checkpoint names but those of buffers, which hold no weight."""
        return [key for key in self.source.tensors if key in self._names or not self._skeleton.computes(key)]

    def embedding(self, rows: Int[np.ndarray, "rows"] | None = None) -> Callable[[Array], Array]:
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
        return TorchBlock(self._skeleton.blocks[index], index, self._block_tensors(index), self)

    def head(self) -> Callable[[Array], Array]:
        outer, output, last = self._outer(), self._findings.output, self._skeleton.last

        def project(x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
            import torch

            final = to_torch(x_BTD)

            def visit(index: int, stream: Any, call: Call) -> Any:
                return with_stream(output, final if index == last else stream)

            tokens = torch.zeros(final.shape[:2], dtype=torch.long, device=torch_device())
            return to_jax(self._skeleton.run(outer, tokens, visit))

        return project

    def call(self, index: int, batch: int, time: int) -> Call:
        """How the model calls a block on `batch` windows of `time` tokens."""
        if (batch, time) not in self._calls:
            self._calls[batch, time] = self._record_calls(batch, time)
        return self._calls[batch, time][index]

    def _record_calls(self, batch: int, time: int) -> list[Call]:
        import torch

        calls: list[Call] = []

        def visit(index: int, stream: Any, call: Call) -> Any:
            calls.append(call)
            if index == self._skeleton.last:
                raise Ended
            return with_stream(self._findings.output, stream)

        tokens = torch.zeros((batch, time), dtype=torch.long, device=torch_device())
        self._skeleton.run(self._frame, tokens, visit)
        return calls

    def block_keys(self, index: int) -> dict[str, str]:
        prefix = self._prefix(index)
        return {name.removeprefix(prefix): key for key, name in self._names.items() if name.startswith(prefix)}

    def block_linears(self, index: int) -> dict[str, str]:
        self._check_index(index)
        return {name: name for name in self._linears[index]}

    def weight_key(self, index: int, name: str) -> str:
        return self._keys[f"{self._prefix(index)}{name}.weight"]

    def is_transposed(self, key: str) -> bool:
        return key in self._transposed

    def check_finite(self) -> str:
        """As `PrunableModel.check_finite`, and test how the parts go together, see `probe`."""
        digest = super().check_finite()
        _ = self._findings
        return digest

    def decoder(self) -> Decoder:
        """Not available: raises a `ModelError`."""
        raise ModelError(
            f"a {self.config.model_type} model runs block by block in torch and cannot be loaded as a decoder; that "
            f"takes a family known here: {', '.join(sorted(FAMILIES))}"
        )

    @cached_property
    def _findings(self) -> Findings:
        first = {f"{self._prefix(0)}{path}": tensor for path, tensor in self._block_tensors(0).items()}
        return probe(self._skeleton, self._outer(), first)

    def _block_tensors(self, index: int) -> Tensors:
        """The tensors of a block by their names in its module."""
        import torch

        prefix = self._prefix(index)
        tensors = {path: to_tensor(self.source.read(key)) for path, key in self.block_keys(index).items()}
        for name, experts in self._stacks.items():
            if name.startswith(prefix):
                parts = [torch.cat([tensors.pop(part.removeprefix(prefix)) for part in each]) for each in experts]
                tensors[name.removeprefix(prefix)] = torch.stack(parts)
        return tensors

    @cached_property
    def _frame(self) -> Tensors:
        """The tensors that decide how blocks are called: all outer ones, those as large as the vocabulary blank."""
        return self._outer(blank=True)

    def _outer(self, *, blank: bool = False) -> Tensors:
        """The tensors outside the blocks, tied ones by all their names."""
        import torch

        tensors: Tensors = {}
        for name in self._skeleton.shapes:
            if self._skeleton.is_inner(name) or name in tensors:
                continue
            group = self._skeleton.tied.get(name, (name,))
            held = [each for each in group if each in self._keys]
            if not held:  # a buffer that the model has computed
                continue
            shape = self._skeleton.shapes[name]
            if blank and len(shape) == 2 and shape[0] == self.config.vocab_size:
                # Zeros that take no memory.
                tensors |= dict.fromkeys(group, torch.zeros((), device=torch_device()).expand(shape))
                continue
            for each in held:
                tensors[each] = to_tensor(self.source.read(self._keys[each]))
            tensors |= {each: tensors[held[0]] for each in group if each not in held}
        return tensors

    def _prefix(self, index: int) -> str:
        self._check_index(index)
        return self._skeleton.prefixes[index]

"""The Grams of blocks that run in torch, whose linears tell what they read only while they run."""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from sparseopt.core.base.dense import product
from sparseopt.layers.compiled import Compiled, Stopwatch
from sparseopt.models import PrunableModel, TorchModel
from sparseopt.models.streaming.torch_bridge import to_jax, to_torch
from sparseopt.models.streaming.torch_model import TorchBlock
from sparseopt.pruning.base.activations import Batches
from sparseopt.pruning.base.grams import BlockGrams, BlockRunner, ExpertTokens, Grams, Weighting

# Names of linears that read the very same torch tensor.
Readers = tuple[str, ...]

_gram_of_inputs = Compiled(lambda x: (product(x.T, x), jnp.sum(x, axis=0)))
_drift_of_inputs = Compiled(lambda x, dense_x: product(x.T, x - dense_x))


class _Seen(NamedTuple):
    """One distinct input of linears in one run of a block, and what was made of it."""

    tensor: Any  # kept, since identities are unique only among living objects
    version: int  # torch's count of writes to it
    readers: list[str]  # names of the linears that read it
    found: Any


class TorchRunner(BlockRunner):
    """A `BlockRunner` whose blocks run in torch. Linears that read the very same tensor share one Gram."""

    def grams(
        self,
        block: Any,
        batches: Batches,
        weighting: Weighting = "uniform",
        dense: Batches | None = None,
        expert_tokens: ExpertTokens = "routed",
    ) -> BlockGrams:
        """By the linear's name; a `ModelError` if the block uses a linear in a way that hides its input."""
        if weighting != "uniform":
            raise ValueError(f"weighting {weighting!r} is not for blocks that run in torch; say 'uniform'")
        if expert_tokens != "routed":
            raise ValueError(f"expert_tokens {expert_tokens!r} is not for blocks that run in torch; say 'routed'")
        watch, totals = Stopwatch(), dict[Readers, Grams]()
        for index, x in enumerate(batches):
            inputs = {} if dense is None else self._dense_inputs(block, dense[index])
            for seen in self._watch(block, x, partial(self._grams_of_input, x.shape[0] * x.shape[1], inputs)):
                readers = tuple(seen.readers)
                totals[readers] = seen.found if readers not in totals else _sum(totals[readers], seen.found)
        self.seconds += watch.read()[0]
        return BlockGrams({name: _of_linear(block, name, totals) for name in block.linears})

    def run(self, block: Any, x: Array, mesh: Mesh | None = None) -> Array:
        del mesh
        return block(x)

    def _watch(self, block: TorchBlock, x: Array, make: Callable[[str, Any], Any]) -> list[_Seen]:
        """Run a block and make something of each distinct input of its linears, before the model may write to it."""
        inputs: list[_Seen] = []

        def watch(name: str, value: Any) -> None:
            for seen in inputs:
                if seen.tensor is value and seen.version == value._version:
                    seen.readers.append(name)
                    return
            inputs.append(_Seen(value, value._version, [name], make(name, value)))

        block.run(to_torch(x), watch)
        return inputs

    def _dense_inputs(self, block: TorchBlock, x: Array) -> dict[str, Array]:
        """Inputs of the linears `[tokens, in]` on the dense stream, of those that are called once."""
        # Copied: they outlive the run, in which the model may write to them.
        seen = self._watch(block, x, lambda _, value: to_jax(_rows(value).clone()))
        times = Counter(name for each in seen for name in each.readers)
        return {name: each.found for each in seen for name in each.readers if times[name] == 1}

    def _grams_of_input(self, tokens: int, dense: Mapping[str, Array], name: str, value: Any) -> Grams:
        rows, other, drift = _rows(value), dense.get(name), None
        count = len(rows)
        if count != tokens:
            # An expert gets another number of tokens each time: few heights, so that few programs serve all.
            import torch

            rows = torch.nn.functional.pad(rows, (0, 0, 0, (1 << max(count - 1, 0).bit_length()) - count))
        gram, total = _gram_of_inputs(to_jax(rows))
        # Tokens of an expert are others in the dense model.
        if other is not None and count == tokens == len(other):
            drift = _drift_of_inputs(to_jax(rows), other)
        return Grams(gram, jnp.float32(count), jnp.int32(count), total, drift)


def _rows(value: Any) -> Any:
    return value.reshape(-1, value.shape[-1]).float()


def _sum(one: Grams, two: Grams) -> Grams:
    drift = None if one.drift is None or two.drift is None else one.drift + two.drift
    return Grams(one.gram + two.gram, one.mass + two.mass, one.tokens + two.tokens, one.total + two.total, drift)


def _of_linear(block: TorchBlock, name: str, totals: Mapping[Readers, Grams]) -> Grams:
    found = [grams for readers, grams in totals.items() if name in readers]
    if not found:
        # An expert that no token was sent to.
        width = block.weight_shape(name)[1]
        gram, total = jnp.zeros((width, width), jnp.float32), jnp.zeros(width, jnp.float32)
        return Grams(gram, jnp.float32(0), jnp.int32(0), total)
    return reduce(_sum, found)


def runner_of(model: PrunableModel) -> BlockRunner:
    """What runs the blocks of a model, in JAX or torch."""
    return TorchRunner() if isinstance(model, TorchModel) else BlockRunner()

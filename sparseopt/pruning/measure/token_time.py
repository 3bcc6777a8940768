"""The time that models take for one token, measured here on parts of their shapes.

Decoding reads every weight once a token, and that takes most of the time. In a whole model no weight stays in a cache
until the next token. So the time of a block is measured on several equal blocks in turn, which together do not fit in
a cache, or on as many as the model has.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sparseopt.models import Block, Head
from sparseopt.models.decoder.settings import DecoderConfig
from sparseopt.models.families.family import build_part, part_shapes

# More than the caches of processors hold.
CACHE_BYTES = 2**27
# The least time of each part in this many rounds counts: other programs only add to it.
ROUNDS = 25


def token_seconds(configs: Sequence[DecoderConfig]) -> list[float]:
    """Seconds a token of whole models that differ in their blocks only, in float32, without context.

    All blocks are taken to be of the first one's kind.
    """
    head, blocks = part_seconds(configs)
    return [config.num_layers * block + head for config, block in zip(configs, blocks, strict=True)]


def part_seconds(configs: Sequence[DecoderConfig]) -> tuple[float, list[float]]:
    """Seconds a token of the head that these models share (final norm and logits), and of a block of each."""
    calls = [_calls(Head, configs[0]), *(_calls(Block, config, config.kinds[0]) for config in configs)]
    least = [[math.inf] * len(own) for own in calls]
    # All take turns: what slows the machine for a while slows all of them.
    for _ in range(ROUNDS):
        for own, times in zip(calls, least, strict=True):
            for place, call in enumerate(own):
                start = time.perf_counter()
                jax.block_until_ready(call())
                times[place] = min(times[place], time.perf_counter() - start)
    head, *blocks = (sum(times) / len(times) for times in least)
    return head, blocks


def block_parameters(config: DecoderConfig) -> int:
    """The number of parameters of one block of the first one's kind."""
    return _parameters(Block, config, config.kinds[0])


def _parameters(part: Any, config: DecoderConfig, *kind: Any) -> int:
    return sum(math.prod(shape) for shape in part_shapes(part, config, *kind).values())


def _calls(part: Any, config: DecoderConfig, *kind: Any) -> list[Callable[[], Any]]:
    """Calls that each run a token through one of several equal parts."""
    count = min(config.num_layers, -(-CACHE_BYTES // (4 * _parameters(part, config, *kind))))
    # Not zeros, whose pages an operating system may share.
    parts = [
        build_part(part, config, *kind, read=lambda _, shape: jnp.full(shape, 0.01, jnp.float32)) for _ in range(count)
    ]
    structure = jax.tree.structure(parts[0])
    # A call with bare arrays costs little besides the reading.
    run = jax.jit(lambda leaves, x: jax.tree.unflatten(structure, leaves)(x))
    token = jnp.full((1, 1, config.hidden_size), 0.5, jnp.float32)
    calls: list[Callable[[], Any]] = [partial(run, jax.tree.leaves(each), token) for each in parts]
    jax.block_until_ready(calls[0]())
    return calls

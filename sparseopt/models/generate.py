"""Floor 5: text generated token by token. For samples, not for speed: each token runs the whole window."""

import math
from collections.abc import Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from sparseopt.models.decoder import Decoder
from sparseopt.models.settings import DecoderConfig, check_window

# Windows have multiples of this many tokens, so that few distinct lengths are compiled.
_WINDOW_STEP = 64


@partial(jax.jit, static_argnums=0)
def _run(graphdef: nnx.GraphDef, state: Any, x: Array) -> Array:
    return nnx.merge(graphdef, state)(x)


@jax.jit
def _choose(logits_V: Array, temperature: Array, key: Array) -> Array:
    drawn = jax.random.categorical(key, logits_V / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits_V))


def generate(
    decoder: Decoder,
    prompt_ids: Int[np.ndarray, " prompt"],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
) -> Int[np.ndarray, " new"]:
    """The ids of the tokens that follow a prompt, int32, without the prompt.

    Args:
        decoder: the model.
        prompt_ids: at least one token id.
        max_new_tokens: at most this many are added, 0 or more.
        temperature: 0 takes the likeliest token; otherwise tokens are drawn from softmax(logits / temperature).
        seed: of the draws.
        stop_ids: generation ends at one of these, which is not returned.

    Raises:
        ValueError: if the prompt is empty, a number is negative, or the model does not support a window of prompt and
            new tokens.
    """
    config, prompt = decoder.embed_tokens.config, np.asarray(prompt_ids).reshape(-1)
    vocabulary = config.vocab_size
    if prompt.size and (prompt.dtype.kind not in "iu" or prompt.min() < 0 or prompt.max() >= vocabulary):
        raise ValueError(
            f"token ids are whole numbers in 0..{vocabulary - 1}, given {prompt.dtype} {prompt[:8].tolist()}"
        )
    if not prompt.size or max_new_tokens < 0 or not 0 <= temperature < math.inf:
        raise ValueError(
            f"need a prompt of 1 token or more, max_new_tokens and temperature of 0 or more; given "
            f"{prompt.size} tokens, {max_new_tokens=}, {temperature=}"
        )
    whole = prompt.size + max_new_tokens
    check_window(whole, config.max_positions)
    parts = [nnx.split(part) for part in (decoder.embed_tokens, *decoder.layers)]
    head = nnx.split(decoder.head)
    tokens = np.zeros((1, _padded(whole, config)), np.int32)
    tokens[0, : prompt.size] = prompt
    keys = jax.random.split(jax.random.key(seed), max(max_new_tokens, 1))
    for length in range(prompt.size, whole):
        x: Array = jnp.asarray(tokens[:, : _window(length, whole, config)])
        for graphdef, state in parts:
            x = _run(graphdef, state, x)
        # Attention is causal: tokens from `length` on do not change the logits before them.
        logits_V = _run(*head, x[:, length - 1 : length])[0, 0]
        token = int(_choose(logits_V, jnp.float32(temperature), keys[length - prompt.size]))
        if token in stop_ids:
            return tokens[0, prompt.size : length].copy()
        tokens[0, length] = token
    return tokens[0, prompt.size : whole].copy()


def _padded(length: int, config: DecoderConfig) -> int:
    time = -(-length // _WINDOW_STEP) * _WINDOW_STEP
    return time if config.max_positions is None else min(time, config.max_positions)


def _window(length: int, whole: int, config: DecoderConfig) -> int:
    """The longest window whose rotations are those of the tokens so far; one window for nearly all models."""
    rotations = config.rotations(length)
    windows = (_padded(whole, config), _padded(length, config), length)
    return next(time for time in windows if config.rotations(time) == rotations)

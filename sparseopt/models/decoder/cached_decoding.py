"""Text generation token by token, with cached keys and values of earlier tokens.

    token_t  ~  softmax(logits_t / temperature_t)

Tokens, keys and values stay on the device; a whole batch of texts advances by one token at a time. Shape letters are as
in `attention`; S is the length of the generated window.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sparseopt.core.base.dense import activation_matmul
from sparseopt.core.base.types import Observer
from sparseopt.models.decoder.attention import Attention, causal_attention, rotate
from sparseopt.models.decoder.decoder import Decoder
from sparseopt.models.decoder.settings import DecoderConfig, check_window

# Windows are multiples of this many tokens, so that few distinct lengths are compiled.
_WINDOW_STEP = 64
# Probabilities are summed in parts of this many tokens.
_PART = 256
# The first token is drawn at this temperature, which falls to 1 over this many tokens, so that texts begin differently
# even if the model is sure of the first words.
HOTTEST, COOLING = 2.0, 8
# Tokens between two reports of progress.
_TOLD = 16

# A module in two parts: its static part and its parameters. These are flat, since a program is started for every block
# and token, and going through the structure of a state takes longer than the program of a small block.
Part = tuple[Any, list[Array]]


def _part(module: nnx.Module) -> Part:
    graphdef, state = nnx.split(module)
    leaves, structure = jax.tree.flatten(state)
    return (graphdef, structure), leaves


def _module(static: Any, leaves: list[Array]) -> Any:
    graphdef, structure = static
    return nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))


@partial(jax.jit, static_argnums=(0, 4))
def _embed(static: Any, leaves: list[Array], tokens_BS: Array, first: Array, time: int) -> Array:
    return _module(static, leaves)(jax.lax.dynamic_slice_in_dim(tokens_BS, first, time, axis=1), first)


@partial(jax.jit, static_argnums=(0, 5), donate_argnums=3)
def _advance(
    static: Any, leaves: list[Array], x_BTD: Array, pair: tuple[Array, Array], first: Array, window: int
) -> tuple[Array, tuple[Array, Array]]:
    """A block's outputs for the tokens from `first` on, its rotated keys `[B, K, H, S]` and its values `[B, K, S, H]`.

    Several tokens at once are the first ones. The rotary frequencies belong to a window of `window` tokens.
    """
    kept = pair

    def attend(attention: Attention, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array) -> Array:
        nonlocal kept
        config, kind = attention.config, attention.kind
        if kind.rope is not None:
            q_BTNH, k_BTKH = (rotate(each, kind.rope, first, window) for each in (q_BTNH, k_BTKH))
        keys_BKHS = jax.lax.dynamic_update_slice_in_dim(pair[0], k_BTKH.transpose(0, 2, 3, 1), first, axis=3)
        values_BKSH = jax.lax.dynamic_update_slice_in_dim(pair[1], v_BTKH.transpose(0, 2, 1, 3), first, axis=2)
        kept = keys_BKHS, values_BKSH
        if q_BTNH.shape[1] > 1:
            return causal_attention(q_BTNH, k_BTKH, v_BTKH, config.score_scale, kind.window, config.score_cap)
        return _mixed(attention, q_BTNH, *kept, first)

    return _module(static, leaves)(x_BTD, attend=attend), kept


def _mixed(attention: Attention, q_B1NH: Array, k_BKHS: Array, v_BKSH: Array, place: Array) -> Float[Array, "B 1 N H"]:
    """Like `causal_attention`, for the query at one place and the keys of all, laid out for plain products."""
    config = attention.config
    scale = 1 / math.sqrt(config.head_dim) if config.score_scale is None else config.score_scale
    q_BKGH = (q_B1NH * scale).reshape(len(q_B1NH), k_BKHS.shape[1], -1, config.head_dim)
    scores_BKGS = activation_matmul(q_BKGH, k_BKHS)
    if config.score_cap is not None:
        scores_BKGS = config.score_cap * jnp.tanh(scores_BKGS / config.score_cap)
    ahead_S = place - jnp.arange(k_BKHS.shape[-1])
    window = attention.kind.window
    seen_S = (ahead_S >= 0) if window is None else (ahead_S >= 0) & (ahead_S < window)
    weights_BKGS = jax.nn.softmax(jnp.where(seen_S, scores_BKGS, -jnp.inf), axis=-1)
    return activation_matmul(weights_BKGS, v_BKSH).reshape(q_B1NH.shape)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _choose(
    static: Any, leaves: list[Array], tokens_BS: Array, x_BTD: Array, place: Array, heat: Array, key: Array
) -> Array:
    """The tokens with the one at `place` chosen: drawn, or the most likely one at temperature 0.

    x belongs to the token before it, or to all tokens from the first one on.
    """
    row = place - 1 if x_BTD.shape[1] > 1 else 0
    logits_BV = _module(static, leaves)(jax.lax.dynamic_slice_in_dim(x_BTD, row, 1, axis=1))[:, 0]
    drawn_B = _drawn(logits_BV / jnp.maximum(heat, 1e-6), jax.random.fold_in(key, place))
    chosen_B = jnp.where(heat > 0, drawn_B, jnp.argmax(logits_BV, axis=-1)).astype(tokens_BS.dtype)
    return jax.lax.dynamic_update_slice_in_dim(tokens_BS, chosen_B[:, None], place, axis=1)


def _drawn(logits_BV: Array, key: Array) -> Int[Array, "B"]:
    """Draw a token for each row from its softmax: the one at which cumulative probabilities reach a random fraction.

    This needs one random number per row. Noise on every logit would take longer than computing the logits.
    """
    odds_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    # Sums of sums: a single running sum of a whole vocabulary is slow, and rounds.
    parts_BPR = jnp.pad(odds_BV, ((0, 0), (0, -odds_BV.shape[1] % _PART))).reshape(len(odds_BV), -1, _PART)
    ends_BP = jnp.cumsum(jnp.sum(parts_BPR, axis=-1), axis=-1)
    share_B1 = jax.random.uniform(key, (len(odds_BV), 1)) * ends_BP[:, -1:]
    part_B1 = jnp.minimum(jnp.sum(ends_BP <= share_B1, axis=-1, keepdims=True), ends_BP.shape[1] - 1)
    start_B1 = jnp.where(part_B1 > 0, jnp.take_along_axis(ends_BP, jnp.maximum(part_B1 - 1, 0), axis=1), 0)
    ends_BR = start_B1 + jnp.cumsum(jnp.take_along_axis(parts_BPR, part_B1[:, :, None], axis=1)[:, 0], axis=-1)
    # A fraction that rounding puts beyond the end of its part belongs to the last token with any probability.
    reached_B = jnp.sum(ends_BR <= jnp.minimum(share_B1, jnp.nextafter(ends_BR[:, -1:], 0)), axis=-1)
    return part_B1[:, 0] * _PART + reached_B


def _written(
    decoder: Decoder, prompts_BP: Int[np.ndarray, "B P"], length: int, heat: Callable[[int], float], seed: int
) -> Iterator[Int[Array, "B S"]]:
    """Yield the tokens after each new one, for prompts that are continued to `length` tokens; S is at least that.

    `heat` gives the temperature of the n-th new token.
    """
    config, (batch, known) = decoder.embed_tokens.config, prompts_BP.shape
    embedding, head = _part(decoder.embed_tokens), _part(decoder.head)
    blocks = [_part(block) for block in decoder.layers]
    # The last token is chosen and not read.
    most, key, window = max(length - 1, known), jax.random.key(seed), 0
    size = _padded(most, config)
    tokens = jnp.asarray(np.pad(prompts_BP, ((0, 0), (0, max(size, length) - known))), jnp.int32)
    pairs: list[tuple[Array, Array]] = []
    for place in range(known, length):
        first, time = place - 1, 1
        if not window or config.rotations(window) != config.rotations(place):
            # With other frequencies the earlier keys change too.
            window = _window(place, most, config)
            shape, (heads, width) = (batch, config.num_kv_heads), (size, config.head_dim)
            pairs = [(jnp.zeros((*shape, width, heads)), jnp.zeros((*shape, heads, width))) for _ in blocks]
            first, time = (0, _padded(place, config)) if place > 1 else (0, 1)
        x = _embed(*embedding, tokens, np.int32(first), time)
        for i, block in enumerate(blocks):
            x, pairs[i] = _advance(*block, x, pairs[i], np.int32(first), window)
        tokens = _choose(*head, tokens, x, np.int32(place), np.float32(heat(place - known)), key)
        yield tokens


def kept_bytes(config: DecoderConfig, count: int, length: int) -> int:
    """Bytes of the keys and values of this many texts, and of the logits of one token of each."""
    kept = 2 * config.num_layers * _padded(length, config) * config.num_kv_heads * config.head_dim
    return 4 * count * (kept + 3 * config.vocab_size)


def draw_texts(
    decoder: Decoder,
    count: int,
    length: int,
    start: int,
    *,
    seed: int = 0,
    observer: Observer | None = None,
) -> Int[np.ndarray, "count length"]:
    """Draw texts from the model, int32: `length` tokens each after the token `start`, which is left out.

    Tokens are drawn at temperature 1, the first few of a text hotter, so that texts differ. A model that ends a text
    continues with another one, as in the packed text that it was trained on.

    Source: Williams, Chrysostomou, Aletras, "Self-calibration for language model quantization and pruning", 2025.

    Args:
        decoder: the model.
        count: number of texts.
        length: tokens per text.
        start: id of the token before all others, BOS or the end token.
        seed: seed of the draws.
        observer: called with ("tokens of each text", tokens drawn, tokens in all).

    Raises:
        ModelError: if texts are longer than the model supports.
    """
    check_window(length, decoder.embed_tokens.config.max_positions)

    def heat(number: int) -> float:
        return 1 + (HOTTEST - 1) * max(0.0, 1 - number / COOLING)

    tokens = None
    for done, tokens in enumerate(_written(decoder, np.full((count, 1), start), length + 1, heat, seed), 1):
        if observer is not None and (done % _TOLD == 0 or done == length):
            jax.block_until_ready(tokens)
            observer("tokens of each text", done, length)
    return np.asarray(tokens)[:, 1 : length + 1]


def generate(
    decoder: Decoder,
    prompt_ids: Int[np.ndarray, " prompt"],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
) -> Int[np.ndarray, " new"]:
    """Generate tokens that follow a prompt; returns their ids, int32, without the prompt.

    Args:
        decoder: the model.
        prompt_ids: at least one token id.
        max_new_tokens: largest number of tokens to add, 0 or more.
        temperature: 0 chooses the most likely token; otherwise tokens are drawn from softmax(logits / temperature).
        seed: seed of the draws.
        stop_ids: generation ends at one of these, which is not returned.

    Raises:
        ValueError: if the prompt is empty, a number is negative, or the model does not support a window of prompt and
            new tokens.
    """
    tokens = next_tokens(decoder, prompt_ids, max_new_tokens, temperature, seed)
    return np.fromiter(itertools.takewhile(lambda token: token not in stop_ids, tokens), np.int32)


def next_tokens(
    decoder: Decoder,
    prompt_ids: Int[np.ndarray, " prompt"],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[int]:
    """The tokens that follow a prompt, each computed when requested; see `generate`."""
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
    written = _written(decoder, prompt[None], whole, lambda _: temperature, seed)
    for place, tokens in enumerate(written, prompt.size):
        yield int(tokens[0, place])


def _padded(length: int, config: DecoderConfig) -> int:
    time = -(-length // _WINDOW_STEP) * _WINDOW_STEP
    return time if config.max_positions is None else min(time, config.max_positions)


def _window(length: int, whole: int, config: DecoderConfig) -> int:
    """The longest window with the same rotations as the tokens so far; one window for nearly all models."""
    rotations = config.rotations(length)
    windows = (_padded(whole, config), _padded(length, config), length)
    return next(time for time in windows if config.rotations(time) == rotations)

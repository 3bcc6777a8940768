"""Causal self-attention: grouped queries, rotary positions, windows, capped scores.

Shape letters: B batch, T time, D model, N heads, K key-value heads, G = N / K, H head dim; also C queries of a chunk,
S keys seen, R = G C.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sparseopt.core.base.dense import activation_einsum
from sparseopt.models.base.rope import Rope
from sparseopt.models.decoder.layers import Linear, Tap, make_norm, no_tap
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig

# Queries per chunk: a chunk never scores the keys after its end, and its scores stay in cache. On CPU this is
# several times faster than one [T, T] product per head.
QUERY_CHUNK = 128


# Computes the mixed values of all heads from queries, keys and values before rotation; see `Attention`.
Attend = Callable[["Attention", Array, Array, Array], Array]


def rotate(
    x_BTNH: Float[Array, "B T N H"], rope: Rope, first: Array | int = 0, window: int | None = None
) -> Float[Array, "B T N H"]:
    """Rotate the pairs (i, i + R/2) of every head by position times frequency; features from R on are unchanged.

    The pairs are (2i, 2i + 1) in an interleaved embedding. The positions are `first`, `first + 1`, ...; the frequencies
    belong to a window of `window` tokens, None for T.
    """
    time, head_dim = x_BTNH.shape[1], x_BTNH.shape[3]
    frequencies = rope.frequencies(head_dim, window or time)
    angles_T1F = ((first + np.arange(time)).astype(np.float32)[:, None] * frequencies)[:, None, :]
    cos, sin = jnp.cos(angles_T1F), jnp.sin(angles_T1F)
    if rope.magnitude != 1:
        cos, sin = cos * rope.magnitude, sin * rope.magnitude
    turned, kept = jnp.split(x_BTNH, [rope.size(head_dim)], axis=-1)
    first, second = (turned[..., ::2], turned[..., 1::2]) if rope.interleaved else jnp.split(turned, 2, axis=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    parts = (jnp.stack(pair, axis=-1).reshape(turned.shape),) if rope.interleaved else pair
    return jnp.concatenate([*parts, kept], axis=-1)


def causal_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    scale: float | None = None,
    window: int | None = None,
    cap: float | None = None,
) -> Float[Array, "B T N H"]:
    """`softmax(scale q kᵀ) v` over positions up to each query's own; G query heads share a key head.

    Args:
        q_BTNH: queries.
        k_BTKH: keys.
        v_BTKH: values.
        scale: default `1 / sqrt(H)`.
        window: a query sees itself and `window - 1` positions before it; None for all.
        cap: c in `c tanh(score / c)`; None for none.
    """
    batch, time, heads, head_dim = q_BTNH.shape
    kv_heads = k_BTKH.shape[2]
    q_BTNH = q_BTNH / math.sqrt(head_dim) if scale is None else q_BTNH * scale
    q_BKGTH = q_BTNH.reshape(batch, time, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    k_BKTH, v_BKTH = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
    chunks = []
    for start in range(0, time, QUERY_CHUNK):
        end = min(start + QUERY_CHUNK, time)
        begin = 0 if window is None else max(0, start - window + 1)
        q_BKGCH = q_BKGTH[:, :, :, start:end]
        group = q_BKGCH.shape[:4]
        # The query heads of a group are folded into the rows, so that each product is one [G C, H] by [H, S].
        q_BKRH = q_BKGCH.reshape(batch, kv_heads, -1, head_dim)
        scores_BKRS = activation_einsum("bkrh,bksh->bkrs", q_BKRH, k_BKTH[:, :, begin:end])
        scores_BKGCS = scores_BKRS.reshape(*group, end - begin)
        if cap is not None:
            scores_BKGCS = cap * jnp.tanh(scores_BKGCS / cap)
        ahead_CS = np.arange(start, end)[:, None] - np.arange(begin, end)
        seen_CS = (ahead_CS >= 0) if window is None else (ahead_CS >= 0) & (ahead_CS < window)
        scores_BKGCS = jnp.where(seen_CS, scores_BKGCS, -jnp.inf)
        # The shift cancels in the quotient, so it needs no gradient.
        largest_BKGC1 = jax.lax.stop_gradient(jnp.max(scores_BKGCS, axis=-1, keepdims=True))
        weights_BKGCS = jnp.exp(scores_BKGCS - largest_BKGC1)
        totals_BKGC1 = jnp.sum(weights_BKGCS, axis=-1, keepdims=True)
        weights_BKRS = weights_BKGCS.reshape(batch, kv_heads, -1, end - begin)
        mixed_BKRH = activation_einsum("bkrs,bksh->bkrh", weights_BKRS, v_BKTH[:, :, begin:end])
        chunks.append(mixed_BKRH.reshape(*group, head_dim) / totals_BKGC1)
    mixed_BKGTH = jnp.concatenate(chunks, axis=3)
    return mixed_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, head_dim)


class Attention(nnx.Module):
    """Projections to queries, keys and values, attention, and the output projection.

    A caller that caches earlier keys and values mixes the values itself, with `attend`.
    """

    def __init__(self, config: DecoderConfig, kind: BlockKind, *, rngs: nnx.Rngs) -> None:
        c = config
        query_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        if c.qkv == "separate":
            self.q_proj = Linear(c.hidden_size, query_size, use_bias=c.qkv_bias, rngs=rngs)
            self.k_proj = Linear(c.hidden_size, kv_size, use_bias=c.qkv_bias, rngs=rngs)
            self.v_proj = Linear(c.hidden_size, kv_size, use_bias=c.qkv_bias, rngs=rngs)
        else:
            self.qkv_proj = Linear(c.hidden_size, query_size + 2 * kv_size, use_bias=c.qkv_bias, rngs=rngs)
        self.o_proj = Linear(query_size, c.hidden_size, use_bias=c.output_bias, rngs=rngs)
        if c.qk_norm is not None:
            alone = c.qk_norm == "head"
            self.q_norm = make_norm(c.norm, c.head_dim if alone else query_size, c.norm_eps)
            self.k_norm = make_norm(c.norm, c.head_dim if alone else kv_size, c.norm_eps)
        self.config, self.kind = config, kind

    @property
    def linears(self) -> dict[str, str]:
        names = ("q_proj", "k_proj", "v_proj") if self.config.qkv == "separate" else ("qkv_proj",)
        return {f"self_attn.{name}": "attention_input" for name in names} | {"self_attn.o_proj": "attention_output"}

    def __call__(
        self, x_BTD: Float[Array, "B T D"], tap: Tap = no_tap, attend: Attend | None = None
    ) -> Float[Array, "B T D"]:
        projected = self._queries_keys_values(tap("attention_input", x_BTD), tap)
        mixed_BTNH = (attend or Attention._attend)(self, *projected)
        mixed_BTD = tap("attention_output", mixed_BTNH.reshape(*x_BTD.shape[:2], -1))
        return tap("self_attn.o_proj", self.o_proj(mixed_BTD))

    def _attend(self, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array) -> Array:
        c, kind = self.config, self.kind
        if kind.rope is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, kind.rope), rotate(k_BTKH, kind.rope)
        return causal_attention(q_BTNH, k_BTKH, v_BTKH, c.score_scale, kind.window, c.score_cap)

    def _queries_keys_values(self, x_BTD: Array, tap: Tap) -> tuple[Array, Array, Array]:
        c = self.config

        def heads(y: Array) -> Array:
            return y.reshape(*y.shape[:2], -1, c.head_dim)

        if c.qkv == "separate":
            q = tap("self_attn.q_proj", self.q_proj(x_BTD))
            k = tap("self_attn.k_proj", self.k_proj(x_BTD))
            v = tap("self_attn.v_proj", self.v_proj(x_BTD))
        else:
            qkv: Any = tap("self_attn.qkv_proj", self.qkv_proj(x_BTD))
            if c.qkv == "interleaved":
                q, k, v = jnp.split(qkv.reshape(*qkv.shape[:2], c.num_heads, 3 * c.head_dim), 3, axis=-1)
                return q, k, v
            query_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
            q, k, v = jnp.split(qkv, [query_size, query_size + kv_size], axis=-1)
        if c.qk_norm == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = heads(q), heads(k), heads(v)
        if c.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

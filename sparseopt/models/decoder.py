"""Floor 5: a decoder-only language model of the Llama family as Flax NNX modules, whole and readable.

    x      = embedding(tokens)
    x     += attention(norm(x)) ;  x += mlp(norm(x))        for each block
    logits = lm_head(norm(x))

Shape letters: B batch, T time, D model, N heads, K key-value heads, G = N / K, H head dim, F feed-forward,
V vocabulary; in attention also C queries of a chunk, S keys seen, R = G C.
Parameters and activations are float32 and products run at the highest precision, whatever the checkpoint
holds. Attributes are named as in Hugging Face checkpoints and weights keep their layout `[out, in]`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sparseopt.core.losses import HIGHEST

Tap = Callable[[str, Array], Array]

# Queries a chunk: a chunk never scores the keys after its end, and its scores stay in cache. On CPU this is
# several times faster than one [T, T] product a head.
QUERY_CHUNK = 128


def no_tap(name: str, x: Array) -> Array:
    """The tap that changes and records nothing."""
    del name
    return x


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: frequencies `theta^(-2i/H)`, i = 0 .. H/2 - 1, radians a token.

    Attributes:
        theta: the base.
        factor: divides all frequencies ("linear") or the low ones ("llama3", where `original_length` is set).
        low: wavelengths above `original_length / low` are slowed by the whole factor (llama3).
        high: wavelengths below `original_length / high` are kept; those between are interpolated (llama3).
        original_length: the context length before scaling, in tokens; None for "linear" and plain.
    """

    theta: float
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original_length: int | None = None

    def frequencies(self, head_dim: int) -> np.ndarray:
        """The `[H/2]` float32 frequencies."""
        # float32 throughout, as the reference rounds: at position 8000 the rounding turns by 1e-3 radians.
        plain = (1.0 / self.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)).astype(np.float32)
        slow = plain / np.float32(self.factor)
        if self.original_length is None:
            return slow
        turns = self.original_length * plain / (2 * math.pi)
        keep = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return ((1 - keep) * slow + keep * plain).astype(np.float32)


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes and switches of a decoder; hashable, so that it can be static under jit.

    Attributes:
        vocab_size: V, rows of the embedding.
        hidden_size: D, width of the residual stream.
        intermediate_size: F, width inside the MLP.
        num_layers: blocks.
        num_heads: N, query heads.
        num_kv_heads: K, key and value heads; divides N.
        head_dim: H, even.
        norm_eps: added to the mean square in RMSNorm.
        rope: the position embedding.
        tied: the head uses the embedding matrix.
        qkv_bias: q, k and v projections have a bias.
        output_bias: the attention's output projection has one.
        mlp_bias: gate, up and down projections have one.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: Rope
    tied: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False


class Linear(nnx.Module):
    """`x weightᵀ + bias` with `weight [out, in]`, the layout of checkpoints."""

    def __init__(self, in_size: int, out_size: int, *, use_bias: bool = False, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(0.02 * jax.random.normal(rngs.params(), (out_size, in_size)))
        self.bias = nnx.Param(jnp.zeros((out_size,))) if use_bias else None

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """Apply to the last axis."""
        # One flat product: XLA's CPU matmul is faster on two axes than on three.
        flat = jnp.matmul(x.reshape(-1, x.shape[-1]), self.weight[...].T, precision=HIGHEST)
        y = flat.reshape(*x.shape[:-1], flat.shape[-1])
        return y if self.bias is None else y + self.bias[...]


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x²) + eps) * weight`, over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        self.weight = nnx.Param(jnp.ones((size,)))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalise the last axis."""
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps) * self.weight[...]


def rotate(x_BTNH: Float[Array, "B T N H"], rope: Rope) -> Float[Array, "B T N H"]:
    """Turn the pairs (i, i + H/2) of every head by position times frequency: the half-rotation convention."""
    time, head_dim = x_BTNH.shape[1], x_BTNH.shape[3]
    angles_T1F = np.outer(np.arange(time, dtype=np.float32), rope.frequencies(head_dim))[:, None, :]
    cos, sin = jnp.cos(angles_T1F), jnp.sin(angles_T1F)
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def causal_attention(
    q_BTNH: Float[Array, "B T N H"], k_BTKH: Float[Array, "B T K H"], v_BTKH: Float[Array, "B T K H"]
) -> Float[Array, "B T N H"]:
    """`softmax(q kᵀ / sqrt(H)) v` over positions up to each query's own; G query heads share a key head."""
    batch, time, heads, head_dim = q_BTNH.shape
    kv_heads = k_BTKH.shape[2]
    q_BKGTH = (q_BTNH / math.sqrt(head_dim)).reshape(batch, time, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    k_BKTH, v_BKTH = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
    chunks = []
    for start in range(0, time, QUERY_CHUNK):
        end = min(start + QUERY_CHUNK, time)
        q_BKGCH = q_BKGTH[:, :, :, start:end]
        group = q_BKGCH.shape[:4]
        # The query heads of a group are folded into the rows, so that each product is one [G C, H] by [H, S].
        q_BKRH = q_BKGCH.reshape(batch, kv_heads, -1, head_dim)
        scores_BKRS = jnp.einsum("bkrh,bksh->bkrs", q_BKRH, k_BKTH[:, :, :end], precision=HIGHEST)
        scores_BKGCS = scores_BKRS.reshape(*group, end)
        seen_CS = np.arange(start, end)[:, None] >= np.arange(end)
        scores_BKGCS = jnp.where(seen_CS, scores_BKGCS, -jnp.inf)
        # The shift cancels in the quotient: no gradient has to pass through it.
        largest_BKGC1 = jax.lax.stop_gradient(jnp.max(scores_BKGCS, axis=-1, keepdims=True))
        weights_BKGCS = jnp.exp(scores_BKGCS - largest_BKGC1)
        totals_BKGC1 = jnp.sum(weights_BKGCS, axis=-1, keepdims=True)
        weights_BKRS = weights_BKGCS.reshape(batch, kv_heads, -1, end)
        mixed_BKRH = jnp.einsum("bkrs,bksh->bkrh", weights_BKRS, v_BKTH[:, :, :end], precision=HIGHEST)
        chunks.append(mixed_BKRH.reshape(*group, head_dim) / totals_BKGC1)
    mixed_BKGTH = jnp.concatenate(chunks, axis=3)
    return mixed_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, head_dim)


class Attention(nnx.Module):
    """Grouped-query causal self-attention with rotary positions."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        c = config
        query_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, query_size, use_bias=c.qkv_bias, rngs=rngs)
        self.k_proj = Linear(c.hidden_size, kv_size, use_bias=c.qkv_bias, rngs=rngs)
        self.v_proj = Linear(c.hidden_size, kv_size, use_bias=c.qkv_bias, rngs=rngs)
        self.o_proj = Linear(query_size, c.hidden_size, use_bias=c.output_bias, rngs=rngs)
        self.head_dim = c.head_dim
        self.rope = c.rope

    def __call__(self, x_BTD: Float[Array, "B T D"], tap: Tap = no_tap) -> Float[Array, "B T D"]:
        """Mix values over time."""

        def heads(y: Array) -> Array:
            return y.reshape(*y.shape[:2], -1, self.head_dim)

        x_BTD = tap("attention_input", x_BTD)
        q_BTNH = rotate(heads(tap("self_attn.q_proj", self.q_proj(x_BTD))), self.rope)
        k_BTKH = rotate(heads(tap("self_attn.k_proj", self.k_proj(x_BTD))), self.rope)
        v_BTKH = heads(tap("self_attn.v_proj", self.v_proj(x_BTD)))
        mixed_BTNH = causal_attention(q_BTNH, k_BTKH, v_BTKH)
        mixed_BTD = tap("attention_output", mixed_BTNH.reshape(*x_BTD.shape[:2], -1))
        return tap("self_attn.o_proj", self.o_proj(mixed_BTD))


class MLP(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        sizes = (config.hidden_size, config.intermediate_size)
        self.gate_proj = Linear(*sizes, use_bias=config.mlp_bias, rngs=rngs)
        self.up_proj = Linear(*sizes, use_bias=config.mlp_bias, rngs=rngs)
        self.down_proj = Linear(*reversed(sizes), use_bias=config.mlp_bias, rngs=rngs)

    def __call__(self, x_BTD: Float[Array, "B T D"], tap: Tap = no_tap) -> Float[Array, "B T D"]:
        """Act on every position alone."""
        x_BTD = tap("mlp_input", x_BTD)
        gate_BTF = tap("mlp.gate_proj", self.gate_proj(x_BTD))
        hidden_BTF = jax.nn.silu(gate_BTF) * tap("mlp.up_proj", self.up_proj(x_BTD))
        return tap("mlp.down_proj", self.down_proj(tap("mlp_hidden", hidden_BTF)))


class Block(nnx.Module):
    """Attention, then MLP, each behind a norm and added to the residual stream.

    `tap(name, x) -> x` is called once on each distinct input of the linears, by the tap's name, and on the output
    of each linear, by the linear's name; `linears` says which linear reads which tap, in the order in which the
    block runs them. The linears behind `residual_taps` write into the residual stream.
    """

    residual_taps: ClassVar[tuple[str, ...]] = ("attention_output", "mlp_hidden")
    linears: ClassVar[dict[str, str]] = {
        "self_attn.q_proj": "attention_input",
        "self_attn.k_proj": "attention_input",
        "self_attn.v_proj": "attention_input",
        "self_attn.o_proj": "attention_output",
        "mlp.gate_proj": "mlp_input",
        "mlp.up_proj": "mlp_input",
        "mlp.down_proj": "mlp_hidden",
    }

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x_BTD: Float[Array, "B T D"], tap: Tap = no_tap) -> Float[Array, "B T D"]:
        """Run the block."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), tap)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD), tap)

    def linear(self, name: str) -> Linear:
        """The linear of that suffix, one of `linears`.

        Raises:
            KeyError: if the block has no such linear.
        """
        if name not in self.linears:
            raise KeyError(f"no linear {name!r} in a block; it has {', '.join(self.linears)}")
        part, attribute = name.split(".")
        return getattr(getattr(self, part), attribute)

    @property
    def attention_width(self) -> int:
        """N H, the width of the attention's mixed values."""
        return self.self_attn.o_proj.weight.shape[1]


class Embedding(nnx.Module):
    """Token ids to rows of `weight [V, D]`. Ids outside 0 .. V-1 give NaN rows."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        shape = (config.vocab_size, config.hidden_size)
        self.weight = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Look the rows up."""
        return jnp.take(self.weight[...], tokens_BT, axis=0, mode="fill", fill_value=jnp.nan)


class Head(nnx.Module):
    """Final norm, then the projection to logits; a tied head holds the embedding's matrix."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, rngs=rngs)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits of the token after each position."""
        return self.lm_head(self.norm(x_BTD))


class Decoder(nnx.Module):
    """The whole model: token ids `[B, T]` to next-token logits `[B, T, V]`."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.embed_tokens = Embedding(config, rngs=rngs)
        self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.head = Head(config, rngs=rngs)
        if config.tied:
            self.head.lm_head.weight = self.embed_tokens.weight

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits of the token after each position."""
        x_BTD = self.embed_tokens(tokens_BT)
        for block in self.layers:
            x_BTD = block(x_BTD)
        return self.head(x_BTD)

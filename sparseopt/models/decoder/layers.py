"""The small parts of a decoder: linear layers, norms, activations, and the tap.

Parameters and activations are float32, whatever the checkpoint holds; for products see `core.dense`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparseopt.core.base.dense import activation_matmul

# Called with a name and a value, which it may record or change; for experts the value is a `Routed`.
Tap = Callable[[str, Any], Any]

# By name in Hugging Face configurations. The default of `jax.nn.gelu` is the tanh approximation.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_fast": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
}

NormKind = Literal["rms", "rms_plus_one", "layer", "layer_without_bias"]


def no_tap(name: str, x: Any) -> Any:
    """The tap that changes and records nothing."""
    del name
    return x


class Linear(nnx.Module):
    """`x weightᵀ + bias` with `weight [out, in]`."""

    def __init__(self, in_size: int, out_size: int, *, use_bias: bool = False, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(0.02 * jax.random.normal(rngs.params(), (out_size, in_size)))
        self.bias = nnx.Param(jnp.zeros((out_size,))) if use_bias else None

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        # One flat product: XLA's CPU matmul is faster on two axes than on three.
        flat = activation_matmul(x.reshape(-1, x.shape[-1]), self.weight[...].T)
        y = flat.reshape(*x.shape[:-1], flat.shape[-1])
        return y if self.bias is None else y + self.bias[...]


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x²) + eps) * (weight + offset)`, over the last axis; Gemma's offset is 1."""

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        self.weight = nnx.Param(jnp.full((size,), 1 - offset))
        self.eps, self.offset = eps, offset

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        weight = self.weight[...] + self.offset if self.offset else self.weight[...]
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps) * weight


class LayerNorm(nnx.Module):
    """`(x - mean) / sqrt(var + eps) * weight + bias`, over the last axis; Cohere's has no bias."""

    def __init__(self, size: int, eps: float, *, use_bias: bool = True) -> None:
        self.weight = nnx.Param(jnp.ones((size,)))
        self.bias = nnx.Param(jnp.zeros((size,))) if use_bias else None
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        spread = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        y = centred * spread * self.weight[...]
        return y if self.bias is None else y + self.bias[...]


def make_norm(kind: NormKind, size: int, eps: float) -> RMSNorm | LayerNorm:
    """A norm of the given kind."""
    if kind in ("layer", "layer_without_bias"):
        return LayerNorm(size, eps, use_bias=kind == "layer")
    return RMSNorm(size, eps, offset=1.0 if kind == "rms_plus_one" else 0.0)

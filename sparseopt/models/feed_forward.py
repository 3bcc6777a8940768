"""Floor 5: the MLP of a block: `down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparseopt.models.layers import ACTIVATIONS, Linear, Tap, no_tap
from sparseopt.models.settings import DecoderConfig


class MLP(nnx.Module):
    """Acts on each position independently; F features inside."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        inner, outer, bias = config.intermediate_size, config.hidden_size, config.mlp_bias
        if config.gate == "fused":
            self.gate_up_proj = Linear(outer, 2 * inner, use_bias=bias, rngs=rngs)
        else:
            if config.gate == "separate":
                self.gate_proj = Linear(outer, inner, use_bias=bias, rngs=rngs)
            self.up_proj = Linear(outer, inner, use_bias=bias, rngs=rngs)
        self.down_proj = Linear(inner, outer, use_bias=bias, rngs=rngs)
        self.gate, self.activation = config.gate, config.activation

    @property
    def linears(self) -> dict[str, str]:
        names = {"separate": ("gate_proj", "up_proj"), "fused": ("gate_up_proj",), None: ("up_proj",)}[self.gate]
        return {f"mlp.{name}": "mlp_input" for name in names} | {"mlp.down_proj": "mlp_hidden"}

    def __call__(self, x_BTD: Float[Array, "B T D"], tap: Tap = no_tap) -> Float[Array, "B T D"]:
        x_BTD = tap("mlp_input", x_BTD)
        act = ACTIVATIONS[self.activation]
        if self.gate == "fused":
            gate_BTF, up_BTF = jnp.split(tap("mlp.gate_up_proj", self.gate_up_proj(x_BTD)), 2, axis=-1)
            hidden_BTF = act(gate_BTF) * up_BTF
        elif self.gate == "separate":
            gate_BTF = tap("mlp.gate_proj", self.gate_proj(x_BTD))
            hidden_BTF = act(gate_BTF) * tap("mlp.up_proj", self.up_proj(x_BTD))
        else:
            hidden_BTF = act(tap("mlp.up_proj", self.up_proj(x_BTD)))
        return tap("mlp.down_proj", self.down_proj(tap("mlp_hidden", hidden_BTF)))

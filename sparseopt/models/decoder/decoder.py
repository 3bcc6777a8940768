"""A decoder-only language model as Flax NNX modules, whole and readable.

    x      = embedding(tokens)
    x     += attention(norm(x)) ;  x += mlp(norm(x))        for each block
    logits = lm_head(norm(x))

Its other parts are in `attention`, `experts` and `layers`. A family (`llama` and others) sets the switches in
`settings`. Shape letters: B batch, T time, D model, F inside the MLP, V vocabulary.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sparseopt.models.decoder.attention import Attend, Attention
from sparseopt.models.decoder.experts import MixtureOfExperts, stacked_name
from sparseopt.models.decoder.layers import ACTIVATIONS, Linear, Tap, make_norm, no_tap
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig, check_window


class MLP(nnx.Module):
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate."""

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


class Block(nnx.Module):
    """Attention and MLP, each between the norms of the family, added to the residual stream.

    `tap(name, x) -> x` is called once on each distinct input of the linear layers, with the tap's name, and on the
    output of each layer, with the layer's name. Experts are tapped together, under the name without their number, as a
    `Routed`.
    """

    def __init__(self, config: DecoderConfig, kind: BlockKind, *, rngs: nnx.Rngs) -> None:
        for name in config.norms:
            setattr(self, name, make_norm(config.norm, config.hidden_size, config.norm_eps))
        self.self_attn = Attention(config, kind, rngs=rngs)
        self.mlp = MixtureOfExperts(config, rngs=rngs) if kind.experts else MLP(config, rngs=rngs)
        self.config, self.experts = config, config.experts if kind.experts else None

    @property
    def linears(self) -> dict[str, str]:
        return self.self_attn.linears | self.mlp.linears

    def __call__(
        self, x_BTD: Float[Array, "B T D"], tap: Tap = no_tap, attend: Attend | None = None
    ) -> Float[Array, "B T D"]:
        parallel, scale = self.config.parallel, self.config.residual_scale
        read_BTD = self._norm("attention_norm")(x_BTD)
        mixed_BTD = self._norm("attention_post_norm")(self.self_attn(read_BTD, tap, attend))
        mixed_BTD = mixed_BTD if scale == 1 else mixed_BTD * scale
        # A parallel MLP without its own norm shares the norm of attention.
        if not parallel or "mlp_norm" in self.config.norms:
            read_BTD = self._norm("mlp_norm")(x_BTD if parallel else x_BTD + mixed_BTD)
        acted_BTD = self._norm("mlp_post_norm")(self.mlp(read_BTD, tap))
        acted_BTD = acted_BTD if scale == 1 else acted_BTD * scale
        return x_BTD + mixed_BTD + acted_BTD

    def read(self, path: str) -> Array:
        """The parameter at a path such as `mlp.up_proj.weight` or `mlp.experts.3.up_proj.weight`."""
        parameter, expert = self._parameter(path)
        return parameter[...] if expert is None else parameter[expert]

    def write(self, values: Mapping[str, Array | np.ndarray]) -> None:
        """Set parameters by path, as float32; a stack of experts is copied once for all of them."""
        stacks: dict[str, tuple[nnx.Param, np.ndarray]] = {}
        for path, value in values.items():
            parameter, expert = self._parameter(path)
            if expert is None:
                parameter[...] = jnp.asarray(value, jnp.float32)
                continue
            name, _ = stacked_name(path)
            stacks.setdefault(name, (parameter, np.array(parameter[...])))[1][expert] = value
        for parameter, stack in stacks.values():
            parameter[...] = jnp.asarray(stack)

    def weight_shape(self, name: str) -> tuple[int, int]:
        parameter, _ = self._parameter(f"{name}.weight")
        return parameter.shape[-2], parameter.shape[-1]

    @property
    def residual_taps(self) -> tuple[str, str]:
        return "attention_output", "mlp.experts.hidden" if self.experts else "mlp_hidden"

    @property
    def num_experts(self) -> int:
        return self.experts.count if self.experts else 0

    def copy(self) -> "Block":
        return nnx.clone(self)

    def _norm(self, name: str) -> Callable[[Array], Array]:
        return getattr(self, name) if name in self.config.norms else lambda x: x

    def _parameter(self, path: str) -> tuple[nnx.Param, int | None]:
        stacked, expert = stacked_name(path)
        found: object = self
        for part in stacked.split("."):
            found = getattr(found, part, None)
        if not isinstance(found, nnx.Param) or (expert is not None and expert >= found.shape[0]):
            raise KeyError(f"no parameter {path!r} in a block; its linear layers are {', '.join(self.linears)}")
        return found, expert


class Embedding(nnx.Module):
    """Token ids to rows of `weight [V, D]`, plus learned positions if there are any. Invalid ids give NaN rows."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        shape = (config.vocab_size, config.hidden_size)
        self.weight = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))
        if config.learned_positions:
            assert config.max_positions is not None
            places = (config.position_offset + config.max_positions, config.hidden_size)
            self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), places))
        self.config = config

    def __call__(self, tokens_BT: Int[Array, "B T"], first: Array | int = 0) -> Float[Array, "B T D"]:
        """Embed tokens at the positions `first`, `first + 1`, ..."""
        c = self.config
        check_window(tokens_BT.shape[1], c.max_positions)
        x_BTD = jnp.take(self.weight[...], tokens_BT, axis=0, mode="fill", fill_value=jnp.nan)
        if c.embedding_scale != 1:
            x_BTD = x_BTD * c.embedding_scale
        if not c.learned_positions:
            return x_BTD
        start = c.position_offset + first
        return x_BTD + jax.lax.dynamic_slice_in_dim(self.positions[...], start, tokens_BT.shape[1])


class Head(nnx.Module):
    """Final norm, then the projection to logits; a tied head holds the embedding's matrix."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.norm = make_norm(config.norm, config.hidden_size, config.norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, rngs=rngs)
        self.scale, self.cap = config.logit_scale, config.logit_cap

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        logits_BTV = self.lm_head(self.norm(x_BTD))
        logits_BTV = logits_BTV if self.scale == 1 else logits_BTV * self.scale
        return logits_BTV if self.cap is None else self.cap * jnp.tanh(logits_BTV / self.cap)


class Decoder(nnx.Module):
    """The whole model: token ids `[B, T]` to next-token logits `[B, T, V]`."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.embed_tokens = Embedding(config, rngs=rngs)
        self.layers = nnx.List([Block(config, kind, rngs=rngs) for kind in config.kinds])
        self.head = Head(config, rngs=rngs)
        if config.tied:
            self.head.lm_head.weight = self.embed_tokens.weight

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        x_BTD = self.embed_tokens(tokens_BT)
        for block in self.layers:
            x_BTD = block(x_BTD)
        return self.head(x_BTD)

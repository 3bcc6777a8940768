"""A mixture of experts: a router sends every token to a few of E MLPs, whose outputs are added with weights.

    shares = softmax(router(x)) ;  y = sum over the k experts with the largest shares of  share_e * expert_e(x)

Tokens are sorted into tiles of equal height, each for one expert, with one product per tile. Only the chosen experts
are computed, and no token is dropped. Shape letters: M tokens, k chosen, E experts, P tiles of R rows, D model, F
inside an expert.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparseopt.core.base.dense import activation_matmul
from sparseopt.models.decoder.layers import ACTIVATIONS, Linear, Tap, no_tap
from sparseopt.models.decoder.settings import DecoderConfig, ExpertsConfig

# Most rows of a tile: enough for an efficient product, few enough that the half-empty last tile of an expert costs
# little.
TILE_ROWS = 128


class Routed(NamedTuple):
    """Inputs or outputs of experts, sorted into tiles; empty rows are zero.

    Attributes:
        rows: `[P, R, features]`.
        expert: the expert of every tile, `[P]`.
        token: the token of every row, `[P, R]`; the number of tokens if the row is empty.
    """

    rows: Array
    expert: Array
    token: Array


class Routing(NamedTuple):
    """Where tokens go, as in `Routed`; `share` `[P, R]` multiplies an expert's output."""

    expert: Int[Array, "P"]
    token: Int[Array, "P R"]
    share: Float[Array, "P R"]


def route(logits_ME: Float[Array, "M E"], config: ExpertsConfig) -> Routing:
    """Choose experts and sort the choices into tiles."""
    tokens, experts = logits_ME.shape
    chosen_Mk: Array
    shares_Mk, chosen_Mk = jax.lax.top_k(jax.nn.softmax(logits_ME, axis=-1), config.chosen)
    if config.normalise:
        shares_Mk = shares_Mk / jnp.sum(shares_Mk, axis=-1, keepdims=True)
    rows = min(TILE_ROWS, max(8, chosen_Mk.size // experts))
    order = jnp.argsort(chosen_Mk.reshape(-1), stable=True)
    expert_of_choice = chosen_Mk.reshape(-1)[order]
    counts_E = jnp.bincount(expert_of_choice, length=experts)
    tiles_E = -(-counts_E // rows)
    first_tile_E = jnp.cumsum(tiles_E) - tiles_E
    first_choice_E = jnp.cumsum(counts_E) - counts_E
    rank = jnp.arange(order.size) - first_choice_E[expert_of_choice]
    place = first_tile_E[expert_of_choice] * rows + rank
    # Every expert leaves less than one tile empty.
    tiles = chosen_Mk.size // rows + experts
    token = jnp.full(tiles * rows, tokens).at[place].set(order // config.chosen)
    share = jnp.zeros(tiles * rows, shares_Mk.dtype).at[place].set(shares_Mk.reshape(-1)[order])
    expert_P = jnp.searchsorted(jnp.cumsum(tiles_E), jnp.arange(tiles), side="right")
    expert_P = jnp.minimum(expert_P, experts - 1)
    return Routing(expert_P, token.reshape(tiles, rows), share.reshape(tiles, rows))


def rows_of_tokens(values: Float[Array, "M features"], token: Int[Array, "P R"]) -> Float[Array, "P R features"]:
    """The row of every token; zero where the tile is empty."""
    return jnp.take(values, token, axis=0, mode="fill", fill_value=0)


class StackedLinear(nnx.Module):
    """The same linear layer of all experts, `weight [E, out, in]`, without bias."""

    def __init__(self, experts: int, in_size: int, out_size: int, *, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(0.02 * jax.random.normal(rngs.params(), (experts, out_size, in_size)))

    def __call__(self, x: Routed) -> Routed:
        weight = self.weight[...]

        def tile(_: None, given: tuple[Array, Array]) -> tuple[None, Array]:
            rows, expert = given
            return None, activation_matmul(rows, weight[expert].T)

        return x._replace(rows=jax.lax.scan(tile, None, (x.rows, x.expert))[1])


class Experts(nnx.Module):
    """The stacked MLPs."""

    def __init__(self, config: ExpertsConfig, outer: int, *, rngs: nnx.Rngs) -> None:
        count, inner = config.count, config.intermediate_size
        self.gate_proj = StackedLinear(count, outer, inner, rngs=rngs)
        self.up_proj = StackedLinear(count, outer, inner, rngs=rngs)
        self.down_proj = StackedLinear(count, inner, outer, rngs=rngs)


class MixtureOfExperts(nnx.Module):
    """Router and experts; their taps accept and return a `Routed`."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        if config.experts is None:
            raise ValueError("a block's kind has experts and the configuration has none")
        self.experts = Experts(config.experts, config.hidden_size, rngs=rngs)
        self.router = Linear(config.hidden_size, config.experts.count, rngs=rngs)
        self.settings, self.activation = config.experts, config.activation

    @property
    def linears(self) -> dict[str, str]:
        """The layers of each expert; each tap is an entry of the stacked tap with the same name without the number."""
        taps = {"gate_proj": "input", "up_proj": "input", "down_proj": "hidden"}
        return {
            f"mlp.experts.{e}.{name}": f"mlp.experts.{e}.{tap}"
            for e in range(self.settings.count)
            for name, tap in taps.items()
        }

    def __call__(self, x_BTD: Float[Array, "B T D"], tap: Tap = no_tap) -> Float[Array, "B T D"]:
        x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
        routing = route(self.router(x_MD), self.settings)
        given: Routed = Routed(rows_of_tokens(x_MD, routing.token), routing.expert, routing.token)
        given = tap("mlp.experts.input", given)
        hidden = tap("mlp.experts.hidden", self.hidden(given, tap))
        answers: Routed = tap("mlp.experts.down_proj", self.experts.down_proj(hidden))
        shares = tap("mlp.experts.added", answers._replace(rows=answers.rows * routing.share[..., None])).rows
        return jnp.zeros_like(x_MD).at[routing.token].add(shares, mode="drop").reshape(x_BTD.shape)

    def hidden(self, given: Routed, tap: Tap = no_tap) -> Routed:
        """The inputs of the experts' `down_proj`."""
        gate = tap("mlp.experts.gate_proj", self.experts.gate_proj(given))
        up = tap("mlp.experts.up_proj", self.experts.up_proj(given))
        return given._replace(rows=ACTIVATIONS[self.activation](gate.rows) * up.rows)


def stacked_name(name: str) -> tuple[str, int | None]:
    """The name without its expert's number, and the number: `mlp.experts.3.up_proj` is 3 of `mlp.experts.up_proj`."""
    parts = name.split(".")
    if "experts" in parts[:-1] and parts[(at := parts.index("experts") + 1)].isdigit():
        return ".".join(parts[:at] + parts[at + 1 :]), int(parts[at])
    return name, None


def unstacked_names(name: str, count: int) -> list[str] | None:
    """The names of all experts' entries of a stacked parameter or tap; None if it is not stacked."""
    parts = name.split(".")
    if "experts" not in parts[:-1] or parts[(at := parts.index("experts") + 1)].isdigit():
        return None
    return [".".join([*parts[:at], str(e), *parts[at:]]) for e in range(count)]

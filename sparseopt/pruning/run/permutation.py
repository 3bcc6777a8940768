"""The order of a layer's inputs that lets an n:m pattern keep the most.

    maximise over orders of the inputs    sum over rows and groups of m inputs of the n largest scores of the group

with the score `W_ij² ||X_j||²`, the loss from pruning the weight if inputs are uncorrelated. An order costs nothing if
the outputs before it can follow, see `models.reshape.reordered`: MLP channels, and values within a head.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.optimize import linear_sum_assignment

from sparseopt.core.penalties.patterns import NM
from sparseopt.models import DecoderConfig

# Rounds of exchanges; they end after this many without a gain of at least this fraction.
ROUNDS, PATIENCE, LEAST_GAIN = 200, 16, 1e-4
# Groups that exchange inputs in one assignment, whose time grows with the square of their number.
GROUPS = 512
# Rows that are scored; from more rows, evenly spaced ones are used.
ROWS = 4096


def best_order(score: Float[np.ndarray, "in rows"], pattern: NM) -> Int[np.ndarray, "in"]:
    """Which input to move to each place so that the pattern keeps a large sum of scores, never less than now.

    First the inputs with the largest sums are dealt out over the groups. Then, repeatedly, one input is taken out of
    every group, and a linear assignment puts these back where they add most.

    Args:
        score: non-negative, in solver layout.
        pattern: n:m along the inputs.

    Source: channel allocation and assignment as in Zhang, Bai, Lin, Zhao, Hou, Cannistraci, "Plug-and-play: an
    efficient post-training pruning method for large language models", ICLR 2024 (RIA); the objective is from Pool and
    Yu, "Channel permutations for N:M sparsity", NeurIPS 2021.
    """
    inputs, m = len(score), pattern.m
    rows = score[:, np.linspace(0, score.shape[1] - 1, min(ROWS, score.shape[1])).astype(int)]
    scores = jnp.asarray(rows, jnp.float32)
    unmoved = np.arange(inputs)
    dealt = np.argsort(-rows.sum(axis=1), kind="stable").reshape(m, -1).T.reshape(-1)
    kept, order = max(((_kept(scores, each, pattern), each) for each in (dealt, unmoved)), key=lambda pair: pair[0])
    groups, rng, idle = order.reshape(-1, m).copy(), np.random.default_rng(0), 0
    for _ in range(ROUNDS):
        gain = 0.0
        for part in np.array_split(rng.permutation(len(groups)), -(-len(groups) // GROUPS)):
            places = rng.integers(m, size=len(part))
            taken = groups[part, places]
            rest = groups[part][np.arange(m) != places[:, None]].reshape(len(part), m - 1)
            gains = np.asarray(_gains(scores, rest, taken, pattern.n), np.float64)
            _, moved = linear_sum_assignment(gains, maximize=True)
            gain += gains[np.arange(len(part)), moved].sum() - gains.trace()
            groups[part, places] = taken[moved]
        idle = 0 if gain > LEAST_GAIN * kept else idle + 1
        kept += gain
        if idle == PATIENCE:
            break
    return groups.reshape(-1)


def _kept(scores: Array, order: Int[np.ndarray, "in"], pattern: NM) -> float:
    moved = scores[order]
    return float(jnp.sum(jnp.where(pattern.mask(moved), moved, 0)))


@partial(jax.jit, static_argnums=3)
def _gains(
    scores: Float[Array, "in rows"], rest: Int[Array, "groups others"], taken: Int[Array, "groups"], n: int
) -> Float[Array, "groups groups"]:
    """How much more each group of m - 1 inputs would keep with each of the inputs taken out."""
    candidates = scores[taken]

    def of_group(others: Array) -> Array:
        # A newcomer displaces the n-th largest of the others if it is larger.
        displaced = jnp.sort(scores[others], axis=0)[-n]
        return jnp.sum(jnp.maximum(candidates - displaced, 0), axis=1)

    return jax.lax.map(of_group, rest)


def block_orders(
    config: DecoderConfig,
    losses: Mapping[str, Float[np.ndarray, "out in"]],
    patterns: Mapping[str, NM],
) -> dict[str, Int[np.ndarray, "in"]]:
    """Orders of the inputs of a block's layers that may move, by layer, for `block_moves`.

    Args:
        config: configuration of the model.
        losses: `W_ij² ||X_j||²` times the weight of output i, for the block's pruned layers, by name.
        patterns: patterns of these layers.
    """
    orders = {}
    for name, loss in losses.items():
        score = loss.T
        if name.endswith("down_proj"):
            orders[name] = best_order(score, patterns[name])
        elif name.endswith("o_proj") and config.head_dim % patterns[name].m == 0:
            # Values stay in their head, so a group of m must not reach into the next one; all heads of a KV group read
            # the same values.
            groups, size = config.num_kv_heads, config.head_dim
            of_group = score.reshape(groups, -1, size, score.shape[1])
            pooled = (np.concatenate(list(heads), axis=1) for heads in of_group)
            inside = np.stack([best_order(each, patterns[name]) for each in pooled])
            starts = size * np.arange(config.num_heads).reshape(groups, -1, 1)
            orders[name] = (starts + inside[:, None]).reshape(-1)
    return orders

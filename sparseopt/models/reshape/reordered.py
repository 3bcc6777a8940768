"""A block with its inner channels in another order, which computes the same function.

    down(act(gate(x)) * up(x))     columns of down, and rows of gate and up
    o(attention(q, k, v))          columns of o, and rows of v, within each head

Queries and keys stay as they are: rotary positions pair their features.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from sparseopt.models.base.errors import ModelError
from sparseopt.models.decoder.settings import DecoderConfig


class Move(NamedTuple):
    """Which row `[out]` and column `[in]` of a linear's weight moves to each place; None where all stay."""

    rows: np.ndarray | None = None
    columns: np.ndarray | None = None


def block_moves(
    config: DecoderConfig, linears: Collection[str], orders: Mapping[str, Int[np.ndarray, "in"]]
) -> dict[str, Move]:
    """What moves in a block, by linear, if the inputs of some have another order: their columns, and rows before them.

    Args:
        config: of the model.
        linears: all of the block, by name.
        orders: of `self_attn.o_proj`, `mlp.down_proj` or `mlp.experts.3.down_proj`: which input moves to each place.
            Inputs of the output projection move within their head, alike in all heads of a KV group.

    Raises:
        ModelError: for an order that is no permutation, or moves inputs of the output projection in another way.
    """
    moves = {}
    for name, order in orders.items():
        if not np.array_equal(np.sort(order), np.arange(len(order))):
            raise ModelError(f"the order of the inputs of {name} must name each of them once, given {order}")
        moves[name] = Move(columns=order)
        part, _, last = name.rpartition(".")
        rows = _value_rows(config, order) if last == "o_proj" else _channel_rows(order)
        moves |= {f"{part}.{own}": Move(rows=each) for own, each in rows.items() if f"{part}.{own}" in linears}
    return moves


def reordered_block(tensors: Mapping[str, np.ndarray], moves: Mapping[str, Move]) -> dict[str, np.ndarray]:
    """The parameters of a block by path, linears as `[out, in]`, experts one by one, after `block_moves`."""
    moved = {}
    for path, value in tensors.items():
        linear, _, leaf = path.rpartition(".")
        move = moves.get(linear, Move())
        value = value if move.rows is None else np.take(value, move.rows, axis=0)
        moved[path] = value if move.columns is None or leaf != "weight" else np.take(value, move.columns, axis=1)
    return moved


def _channel_rows(order: np.ndarray) -> dict[str, np.ndarray]:
    return {"gate_proj": order, "up_proj": order, "gate_up_proj": np.concatenate([order, len(order) + order])}


def _value_rows(config: DecoderConfig, order: np.ndarray) -> dict[str, np.ndarray]:
    size, heads, groups = config.head_dim, config.num_heads, config.num_kv_heads
    inside = order.reshape(groups, -1, size) - size * np.arange(heads).reshape(groups, -1, 1)
    if (inside != inside[:, :1]).any() or inside.min() < 0 or inside.max() >= size:
        raise ModelError("the inputs of an output projection move within their head, alike in all heads of a KV group")
    values = (size * np.arange(groups)[:, None] + inside[:, 0]).reshape(-1)
    if config.qkv == "interleaved":
        # Rows are q, k, v of each head, and each head is a group.
        rows = np.arange(3 * size * heads).reshape(heads, 3, size)
        rows[:, 2] = np.take_along_axis(rows[:, 2], inside[:, 0], axis=1)
    else:
        first = (heads + groups) * size
        rows = np.concatenate([np.arange(first), first + values])
    return {"v_proj": values, "qkv_proj": rows.reshape(-1)}

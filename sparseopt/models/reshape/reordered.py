"""Reordering the inner channels of a block without changing the function that it computes.

    down(act(gate(x)) * up(x))     columns of down, and rows of gate and up
    o(attention(q, k, v))          columns of o, and rows of v, within each head

Queries and keys stay unchanged, because rotary positions pair their features.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from sparseopt.models.base.errors import ModelError
from sparseopt.models.decoder.settings import DecoderConfig


class Move(NamedTuple):
    """Which rows `[out]` and columns `[in]` of a layer's weight move to each place; None if all stay."""

    rows: np.ndarray | None = None
    columns: np.ndarray | None = None


def block_moves(config: DecoderConfig, orders: Mapping[str, Int[np.ndarray, "in"]]) -> dict[str, Move]:
    """What moves in a block, by layer, if inputs of some layers are reordered: their columns, and rows before them.

    Args:
        config: configuration of the model.
        orders: for `self_attn.o_proj`, `mlp.down_proj` or `mlp.experts.3.down_proj`, which input moves to each place.
            Inputs of the output projection move within their head, in the same way in all heads of a KV group.

    Raises:
        ModelError: if an order is no permutation, or moves inputs of the output projection in another way.
    """
    moves: dict[str, Move] = {}
    for name, order in orders.items():
        if not np.array_equal(np.sort(order), np.arange(len(order))):
            raise ModelError(f"the order of the inputs of {name} must name each of them once, given {order}")
        part, _, last = name.rpartition(".")
        moves |= _value_moves(config, order) if last == "o_proj" else channel_moves(part, order, len(order))
    return moves


def reordered_block(tensors: Mapping[str, np.ndarray], moves: Mapping[str, Move]) -> dict[str, np.ndarray]:
    """The parameters of a block after these moves, by path, with layers as `[out, in]` and experts one by one."""
    moved = {}
    for path, value in tensors.items():
        linear, _, leaf = path.rpartition(".")
        move = moves.get(linear, Move())
        value = value if move.rows is None else np.take(value, move.rows, axis=0)
        moved[path] = value if move.columns is None or leaf != "weight" else np.take(value, move.columns, axis=1)
    return moved


def channel_moves(part: str, channels: np.ndarray, count: int) -> dict[str, Move]:
    """The moves, by layer, that bring these of the `count` channels of an MLP or an expert into place."""
    rows, fused = Move(rows=channels), Move(rows=np.concatenate([channels, count + channels]))
    names = {"gate_proj": rows, "up_proj": rows, "gate_up_proj": fused, "down_proj": Move(columns=channels)}
    return {f"{part}.{name}": move for name, move in names.items()}


def _value_moves(config: DecoderConfig, order: np.ndarray) -> dict[str, Move]:
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
    names = {"v_proj": Move(values), "qkv_proj": Move(rows.reshape(-1)), "o_proj": Move(columns=order)}
    return {f"self_attn.{name}": move for name, move in names.items()}

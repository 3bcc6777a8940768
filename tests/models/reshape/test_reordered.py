"""A block whose inner channels stand in another order computes the same function; other orders are refused."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.models import DecoderConfig, ModelError, block_moves, reordered_block
from tests.jitted import run
from tests.models.reshape.test_shrunk import ONE_EACH, block_tensors, opened
from tests.tiers import often


def random_orders(config: DecoderConfig, linears: dict[str, str], widths: dict[str, int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    values = np.stack([rng.permutation(config.head_dim) for _ in range(config.num_kv_heads)])
    heads = np.arange(config.num_heads)
    of_heads = values[heads * config.num_kv_heads // config.num_heads] + config.head_dim * heads[:, None]
    orders = {name: rng.permutation(widths[name]) for name in linears if name.endswith("down_proj")}
    return orders | {"self_attn.o_proj": of_heads.reshape(-1)}


@pytest.mark.parametrize(
    "name", often(ONE_EACH, *(name for name in ONE_EACH if name not in ("yarn_rope", "qwen3", "qwen3_moe")))
)
def test_a_reordered_block_computes_the_same(name: str, tmp_path: Path) -> None:
    model = opened(name, tmp_path)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 16, model.config.hidden_size)), jnp.float32)
    block, tensors = model.block(0), block_tensors(model, 0)
    widths = {linear: block.weight_shape(linear)[1] for linear in block.linears}
    orders = random_orders(model.config, block.linears, widths)
    moved = reordered_block(tensors, block_moves(model.config, orders))
    changed = {path for path, value in tensors.items() if not np.array_equal(value, moved[path])}
    assert {f"{linear}.weight" for linear in orders} < changed
    # Biases follow their rows.
    assert all(path in changed for path in tensors if path.endswith(("v_proj.bias", "up_proj.bias", "qkv_proj.bias")))
    np.testing.assert_allclose(run(model.block_of(0, moved), x), run(block, x), rtol=1e-4, atol=1e-5)


def test_an_order_that_changes_the_function_is_refused(tmp_path: Path) -> None:
    model = opened(ONE_EACH[0], tmp_path)
    config = model.config
    twice = np.zeros(config.intermediate_size, int)
    with pytest.raises(ModelError, match="must name each of them once"):
        block_moves(config, {"mlp.down_proj": twice})
    across = np.roll(np.arange(config.num_heads * config.head_dim), 1)
    with pytest.raises(ModelError, match="move within their head, alike in all heads of a KV group"):
        block_moves(config, {"self_attn.o_proj": across})

"""The decoder: attention against a simple formula, taps, one trace for all blocks; `test_families` has its logits."""

from operator import attrgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseopt.models import Block, BlockKind, DecoderConfig, Embedding, Rope
from sparseopt.models.decoder.attention import QUERY_CHUNK, causal_attention

SMALL = DecoderConfig(
    vocab_size=19,
    hidden_size=12,
    intermediate_size=20,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    norm_eps=1e-5,
    kinds=(BlockKind(Rope(10000.0)),) * 3,
    tied=False,
)


@pytest.mark.parametrize("time", [1, QUERY_CHUNK, 2 * QUERY_CHUNK + 44])
def test_attention_equals_the_plain_formula(time, rng):
    q, k, v = (rng.normal(size=(2, time, heads, 8)) for heads in (6, 2, 2))
    k_full, v_full = np.repeat(k, 3, axis=2), np.repeat(v, 3, axis=2)
    scores = np.einsum("btnh,bsnh->bnts", q, k_full) / np.sqrt(8)
    scores = np.where(np.tri(time, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v_full)
    got = jax.jit(causal_attention)(*(a.astype(np.float32) for a in (q, k, v)))
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_a_token_out_of_range_gives_nan_and_not_another_row():
    assert bool(jnp.isnan(Embedding(SMALL, rngs=nnx.Rngs(0))(np.array([[19]]))).all())


def recording(seen):
    """A tap that changes nothing and keeps what it sees by name."""

    def record(name, value):
        assert name not in seen, f"{name} was tapped twice"
        seen[name] = value
        return value

    return record


def test_taps_see_input_and_output_of_each_linear_by_name_and_may_change_them(rng):
    block = Block(SMALL, SMALL.kinds[0], rngs=nnx.Rngs(3))
    with pytest.raises(KeyError, match=r"self_attn.x_proj.*self_attn.q_proj"):
        block.read("self_attn.x_proj.weight")

    @jax.jit
    def tapped(block, x):
        seen = {}
        pairs = {"output": (block(x, tap=recording(seen)), block(x))}
        for linear, tap in block.linears.items():
            pairs[linear] = (seen[linear], attrgetter(linear)(block)(seen[tap]))
        pairs["attention_input"] = (seen["attention_input"], block.attention_norm(x))
        gate, up = (part(seen["mlp_input"]) for part in (block.mlp.gate_proj, block.mlp.up_proj))
        pairs["mlp_hidden"] = (seen["mlp_hidden"], jax.nn.silu(gate) * up)
        # With its last input replaced by zeros the MLP adds nothing to what attention gave.
        silenced = block(x, tap=lambda name, value: 0 * value if name == "mlp_hidden" else value)
        return seen, pairs, (silenced, x + block.self_attn(block.attention_norm(x)))

    seen, pairs, (silenced, attended) = tapped(block, jnp.asarray(rng.normal(size=(2, 7, 12)), jnp.float32))
    assert set(seen) == {*block.linears, *block.linears.values()}
    for name, (found, expected) in pairs.items():
        np.testing.assert_array_equal(found, expected, err_msg=name)
    for linear, tap in block.linears.items():
        assert seen[tap].shape == (2, 7, block.weight_shape(linear)[1]), linear
    np.testing.assert_allclose(silenced, attended, atol=1e-6)


def test_all_blocks_share_one_trace_and_a_tied_head_is_the_embedding(golden):
    model = golden("tied_grouped").model
    decoder = model.decoder()
    assert decoder.head.lm_head.weight is decoder.embed_tokens.weight
    np.testing.assert_array_equal(model.head().lm_head.weight[...], decoder.embed_tokens.weight[...])
    traces = []

    @jax.jit
    def output(block, x):
        traces.append(1)
        return block(x)

    one, other, _ = (output(model.block(i), jnp.ones((1, 6, 16))) for i in range(3))
    assert len(traces) == 1
    assert float(jnp.abs(one - other).max()) > 1e-3

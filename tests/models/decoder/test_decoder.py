"""The decoder: attention and experts against simple formulas, generation, taps; `test_families` has its logits."""

from dataclasses import replace
from operator import attrgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import softmax

from sparseopt.models import (
    Block,
    BlockKind,
    DecoderConfig,
    Embedding,
    ExpertsConfig,
    Rope,
    Routed,
    generate,
    load_decoder,
)
from sparseopt.models.decoder.attention import QUERY_CHUNK, causal_attention
from sparseopt.models.decoder.cached_decoding import _drawn
from sparseopt.models.decoder.experts import MixtureOfExperts, stacked_name
from tests.fuzz.damage import refused
from tests.jitted import run
from tests.models.tiny import random_tensors, tiny_config, write_folder

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


EXPERTS = ExpertsConfig(count=5, chosen=2, intermediate_size=6, normalise=True)
SIZES = {"hidden_size": 8, "num_heads": 2, "num_kv_heads": 2, "experts": EXPERTS}
CONFIG = replace(SMALL, **SIZES, kinds=(BlockKind(None, experts=True),))


@pytest.fixture
def mixture():
    module = MixtureOfExperts(CONFIG, rngs=nnx.Rngs(0))
    for _, parameter in nnx.to_flat_state(nnx.state(module)):
        parameter[...] = 30 * parameter[...]
    return module


def plain_mixture(module, x, normalise):
    """All experts for all tokens in float64, weighted by zero where they are not chosen."""
    parts = (module.router, module.experts.gate_proj, module.experts.up_proj, module.experts.down_proj)
    router, gate, up, down = (np.asarray(part.weight[...], np.float64) for part in parts)
    shares = softmax(x.astype(np.float64) @ router.T, axis=-1)
    shares[shares < np.sort(shares, axis=-1)[..., [-EXPERTS.chosen]]] = 0
    if normalise:
        shares /= shares.sum(-1, keepdims=True)
    inner, above = (np.einsum("btd,efd->btef", x, part) for part in (gate, up))
    return np.einsum("bte,btef,edf->btd", shares, inner / (1 + np.exp(-inner)) * above, down)


@pytest.mark.parametrize(("time", "normalise"), [(3, False), (300, True)])
def test_the_mixture_equals_the_plain_formula(mixture, rng, time, normalise):
    mixture.settings = ExpertsConfig(**(vars(EXPERTS) | {"normalise": normalise}))
    x = rng.normal(size=(2, time, 8)).astype(np.float32)
    # The first expert is chosen by nearly all tokens, the last by none.
    mixture.router.weight[...] = mixture.router.weight[...].at[:, 0].set(jnp.array([4.0, 0, 0, 0, -40]))
    x[..., 0] = 1
    np.testing.assert_allclose(run(mixture, x), plain_mixture(mixture, x, normalise), rtol=1e-4, atol=1e-4)


def test_taps_on_experts_see_their_tokens_and_may_change_them(rng):
    block = Block(CONFIG, CONFIG.kinds[0], rngs=nnx.Rngs(1))

    def silence(name, value):
        return value._replace(rows=0 * value.rows) if name == "mlp.experts.hidden" else value

    @jax.jit
    def tapped(block, x):
        seen = {}
        attended = x + block.self_attn(block.attention_norm(x))
        outputs = block(x, tap=recording(seen)), block(x)
        return seen, outputs, (block(x, tap=silence), attended), block.mlp_norm(attended)

    x = jnp.asarray(rng.normal(size=(2, 9, 8)), jnp.float32)
    seen, outputs, silenced, normed = tapped(block, x)
    np.testing.assert_array_equal(*outputs)
    np.testing.assert_allclose(*silenced, atol=1e-6)
    names = {stacked_name(name)[0] for pair in block.linears.items() for name in pair}
    assert set(seen) == names | {"mlp.experts.added"}
    assert all(isinstance(seen[name], Routed) == (".experts." in name) for name in names)
    given = seen["mlp.experts.input"]
    rows = np.vstack([np.asarray(normed).reshape(-1, 8), np.zeros(8)])[np.asarray(given.token)]
    np.testing.assert_allclose(given.rows, rows, atol=1e-5)
    for e in range(5):
        weight = block.read(f"mlp.experts.{e}.up_proj.weight")
        tiles = np.flatnonzero(np.asarray(given.expert) == e)
        got = np.asarray(seen["mlp.experts.up_proj"].rows)[tiles]
        np.testing.assert_allclose(got, np.asarray(given.rows)[tiles] @ np.asarray(weight).T, atol=1e-5)


def test_a_gradient_passes_through_the_mixture(mixture, rng):
    x = jnp.asarray(rng.normal(size=(1, 6, 8)), jnp.float32)
    graph, state = nnx.split(mixture)

    def loss(state, x):
        return jnp.sum(nnx.merge(graph, state)(x) ** 2)

    gradient, loss = jax.jit(jax.grad(loss))(state, x), jax.jit(loss)
    direction = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), state)
    step = 1e-3
    moved = [jax.tree.map(lambda p, d, s=s: p + s * d, state, direction) for s in (step, -step)]
    slope = (loss(moved[0], x) - loss(moved[1], x)) / (2 * step)
    inner = sum(jnp.sum(g * d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    assert float(inner) == pytest.approx(float(slope), rel=2e-2)


def test_one_expert_is_read_and_written_alone():
    block = Block(CONFIG, CONFIG.kinds[0], rngs=nnx.Rngs(1))
    before = np.asarray(block.mlp.experts.down_proj.weight[...])
    block.write({"mlp.experts.3.down_proj.weight": jnp.zeros((8, 6))})
    after = np.asarray(block.mlp.experts.down_proj.weight[...])
    assert not after[3].any()
    np.testing.assert_array_equal(np.delete(after, 3, 0), np.delete(before, 3, 0))
    assert block.weight_shape("mlp.experts.3.down_proj") == (8, 6)
    with pytest.raises(KeyError, match=r"mlp.experts.5.down_proj.weight"):
        block.read("mlp.experts.5.down_proj.weight")


PROMPT = np.array([5, 9, 30])


@pytest.fixture
def decoder(golden):
    return golden("gpt2").model.decoder()


@pytest.mark.parametrize(
    ("longest", "rope"),
    [
        (32, {"rope_type": "dynamic", "factor": 4.0}),
        (128, {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [0.1] * 4}),
    ],
    ids=["dynamic", "longrope"],
)
def test_rotations_are_those_of_the_tokens_so_far(longest, rope, tmp_path, rng):
    # Frequencies change beyond 32 tokens: in the middle of what is generated, and within one padded window.
    lengths = {"max_position_embeddings": longest, "original_max_position_embeddings": 32}
    config = tiny_config(num_hidden_layers=1, **lengths, rope_parameters={"rope_theta": 100.0, **rope})
    decoder = load_decoder(write_folder(tmp_path, config, random_tensors(config, rng)))
    text = list(rng.integers(0, 40, 31))
    for token in generate(decoder, np.array(text), 3):
        assert token == np.argmax(run(decoder, np.array([text]))[0, -1])
        text.append(token)


def test_draws_have_the_frequencies_of_the_softmax():
    # More tokens than one part of the sums, and tokens of probability 0 at the ends of parts.
    odds = np.zeros(600)
    odds[[0, 254, 256, 511, 590]] = 1, 2, 3, 4, 10
    with np.errstate(divide="ignore"):
        logits = np.log(odds, dtype=np.float32)[None]
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = jax.jit(jax.vmap(lambda key: _drawn(logits, key)[0]))(keys)
    counts = np.bincount(drawn, minlength=600)
    assert set(np.flatnonzero(counts)) == set(np.flatnonzero(odds))
    np.testing.assert_allclose(counts / 20_000, odds / 20, atol=4 * np.sqrt(0.25 / 20_000))


def test_a_stop_token_ends_it_and_draws_follow_the_seed_and_the_temperature(decoder):
    new = generate(decoder, PROMPT, 8)
    stop = new[3]
    np.testing.assert_array_equal(generate(decoder, PROMPT, 8, stop_ids=(stop,)), new[: list(new).index(stop)])
    assert generate(decoder, PROMPT, 0).shape == (0,)
    draws = [generate(decoder, PROMPT, 8, temperature=3.0, seed=seed) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])
    np.testing.assert_array_equal(generate(decoder, PROMPT, 8, temperature=1e-4, seed=3), new)


def test_requests_that_cannot_be_are_refused(decoder):
    for prompt, count in (([], 3), (PROMPT, -1)):
        refused(ValueError, "need a prompt of 1 token or more", generate, decoder, prompt, count)
    for prompt in ([5, 9999], [5, -3], [5.7, 3.2]):
        refused(ValueError, r"token ids are whole numbers in 0\.\.", generate, decoder, np.array(prompt), 3)

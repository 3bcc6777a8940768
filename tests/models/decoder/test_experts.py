"""Mixtures of experts: routing, the mixture against a simple formula, taps, gradients."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import softmax

from sparseopt.models import Block, BlockKind, ExpertsConfig, Routed
from sparseopt.models.decoder.experts import MixtureOfExperts, route, stacked_name
from tests.jitted import run
from tests.models.decoder.test_decoder import SMALL, recording

EXPERTS = ExpertsConfig(count=5, chosen=2, intermediate_size=6, normalise=True)
SIZES = {"hidden_size": 8, "num_heads": 2, "num_kv_heads": 2, "experts": EXPERTS}
CONFIG = replace(SMALL, **SIZES, kinds=(BlockKind(None, experts=True),))


@pytest.fixture
def mixture():
    module = MixtureOfExperts(CONFIG, rngs=nnx.Rngs(0))
    for _, parameter in nnx.to_flat_state(nnx.state(module)):
        parameter[...] = 30 * parameter[...]
    return module


def plain_mixture(module: MixtureOfExperts, x: np.ndarray, normalise: bool) -> np.ndarray:
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
    np.testing.assert_allclose(run(mixture, x), plain_mixture(mixture, x, normalise), rtol=1e-4, atol=1e-4)


def test_every_choice_has_one_row_in_a_tile_of_its_expert(rng):
    tokens = 400
    logits = jnp.asarray(rng.normal(size=(tokens, 5)) + np.array([4, 0, 0, 0, -9]), jnp.float32)
    routing = jax.jit(route, static_argnums=1)(logits, EXPERTS)
    found = {
        (int(token), int(expert))
        for row, expert in zip(np.asarray(routing.token), np.asarray(routing.expert), strict=True)
        for token in row[row < tokens]
    }
    chosen = np.argsort(-np.asarray(logits), axis=1)[:, :2]
    assert found == {(token, int(expert)) for token in range(tokens) for expert in chosen[token]}
    filled = np.asarray(routing.token) < tokens
    assert filled.sum() == 2 * tokens
    shares = np.zeros(tokens + 1)
    np.add.at(shares, np.asarray(routing.token), np.asarray(routing.share))
    np.testing.assert_allclose(shares[:-1], 1, atol=1e-6)
    assert not np.asarray(routing.share)[~filled].any()


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

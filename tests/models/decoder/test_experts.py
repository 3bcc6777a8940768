"""Mixtures of experts: routing, the mixture against a simple formula, taps, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseopt.models import Block, BlockKind, DecoderConfig, ExpertsConfig, Routed
from sparseopt.models.decoder.experts import MixtureOfExperts, route, stacked_name, unstacked_names
from tests.jitted import run
from tests.models.decoder.test_decoder import recording
from tests.tiers import often

EXPERTS = ExpertsConfig(count=5, chosen=2, intermediate_size=6, normalise=True)
CONFIG = DecoderConfig(
    vocab_size=19,
    hidden_size=8,
    intermediate_size=20,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    norm_eps=1e-5,
    kinds=(BlockKind(None, experts=True),),
    tied=False,
    experts=EXPERTS,
)


@pytest.fixture
def mixture():
    module = MixtureOfExperts(CONFIG, rngs=nnx.Rngs(0))
    for _, parameter in nnx.to_flat_state(nnx.state(module)):
        parameter[...] = 30 * parameter[...]
    return module


def plain_mixture(module: MixtureOfExperts, x: np.ndarray, normalise: bool = True) -> np.ndarray:
    """Token by token, expert by expert, float64."""
    router, gate, up, down = (
        np.asarray(part.weight[...], np.float64)
        for part in (module.router, module.experts.gate_proj, module.experts.up_proj, module.experts.down_proj)
    )
    answers = []
    for token in x.reshape(-1, x.shape[-1]).astype(np.float64):
        logits = router @ token
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        chosen = np.argsort(-shares)[: EXPERTS.chosen]
        total = shares[chosen].sum() if normalise else 1.0
        answer = 0
        for e in chosen:
            inner = gate[e] @ token
            answer = answer + shares[e] / total * (down[e] @ (inner / (1 + np.exp(-inner)) * (up[e] @ token)))
        answers.append(answer)
    return np.reshape(answers, x.shape)


@pytest.mark.parametrize("time", often([1, 3, 40, 300], 3, 300))
@pytest.mark.parametrize("normalise", [True, False])
def test_the_mixture_equals_the_plain_formula(mixture, rng, time, normalise):
    mixture.settings = ExpertsConfig(**(vars(EXPERTS) | {"normalise": normalise}))
    x = rng.normal(size=(2, time, 8)).astype(np.float32)
    np.testing.assert_allclose(run(mixture, x), plain_mixture(mixture, x, normalise), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 7, 400])
def test_every_choice_has_one_row_in_a_tile_of_its_expert(rng, tokens):
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
    assert set(seen) == names
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


def test_names_of_stacked_parameters():
    assert stacked_name("mlp.experts.12.up_proj.weight") == ("mlp.experts.up_proj.weight", 12)
    assert stacked_name("mlp.router.weight") == ("mlp.router.weight", None)
    assert unstacked_names("mlp.experts.up_proj", 2) == ["mlp.experts.0.up_proj", "mlp.experts.1.up_proj"]
    assert unstacked_names("mlp.up_proj", 2) is None

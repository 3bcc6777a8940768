"""Text generation: rotations while it grows, sampling by seed, stopping; `test_families` has greedy choices."""

from collections.abc import Callable

import jax
import numpy as np
import pytest

from sparseopt.models import Decoder, generate, load_decoder
from sparseopt.models.decoder.cached_decoding import _drawn
from tests.jitted import run
from tests.models.tiny import random_tensors, tiny_config, write_folder

PROMPT = np.array([5, 9, 30])


@pytest.fixture
def decoder(golden: Callable) -> Decoder:
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
        with pytest.raises(ValueError, match="need a prompt of 1 token or more"):
            generate(decoder, prompt, count)
    for prompt in ([5, 9999], [5, -3], [5.7, 3.2]):
        with pytest.raises(ValueError, match=r"token ids are whole numbers in 0\.\."):
            generate(decoder, np.array(prompt), 3)

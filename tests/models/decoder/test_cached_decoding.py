"""Text generation: greedy choice, sampling by seed, and stopping."""

from pathlib import Path

import jax
import numpy as np
import pytest

from sparseopt.models import Decoder, generate, load_decoder
from sparseopt.models.decoder.cached_decoding import _drawn
from tests.jitted import run
from tests.models.decoder.test_decoder import GOLDEN, write_golden
from tests.models.tiny import random_tensors, tiny_config, write_folder


@pytest.fixture
def decoder(tmp_path: Path, rng: np.random.Generator) -> Decoder:
    config = tiny_config(tie_word_embeddings=False)
    return load_decoder(write_folder(tmp_path, config, random_tensors(config, rng)))


PROMPT = np.array([5, 9, 30])


def test_greedy_tokens_are_the_likeliest_of_the_whole_text_so_far(decoder: Decoder) -> None:
    new = generate(decoder, PROMPT, 6)
    # Attention is causal, so that one pass over the whole text gives the choice at each of its tokens.
    choices = np.argmax(run(decoder, np.concatenate([PROMPT, new])[None])[0], axis=-1)
    np.testing.assert_array_equal(new, choices[len(PROMPT) - 1 : -1])
    assert new.shape == (6,)
    assert new.dtype == np.int32


@pytest.mark.parametrize(
    ("longest", "rope"),
    [
        (32, {"rope_type": "dynamic", "factor": 4.0}),
        (128, {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [0.1] * 4}),
    ],
    ids=["dynamic", "longrope"],
)
def test_rotations_are_those_of_the_tokens_so_far(
    longest: int, rope: dict, tmp_path: Path, rng: np.random.Generator
) -> None:
    # Frequencies change beyond 32 tokens: in the middle of what is generated, and within one padded window.
    lengths = {"max_position_embeddings": longest, "original_max_position_embeddings": 32}
    config = tiny_config(**lengths, rope_parameters={"rope_theta": 100.0, **rope})
    decoder = load_decoder(write_folder(tmp_path, config, random_tensors(config, rng)))
    text = list(rng.integers(0, 40, 30))
    for token in generate(decoder, np.array(text), 4):
        assert token == np.argmax(run(decoder, np.array([text]))[0, -1])
        text.append(token)


# Windows, capped scores, learned positions, experts; the others in `make test-thorough`.
QUICK = ("gemma2", "gpt2", "qwen3_moe")


@pytest.mark.parametrize(
    "file", [pytest.param(f, marks=[] if f.stem in QUICK else pytest.mark.thorough, id=f.stem) for f in GOLDEN]
)
def test_kept_keys_and_values_give_the_logits_of_the_whole_text(file: Path, tmp_path: Path) -> None:
    write_golden(file, tmp_path)
    decoder = load_decoder(tmp_path)
    # After one token, and after several at once.
    for prompt in (PROMPT[:1], PROMPT):
        new = generate(decoder, prompt, 12 - len(prompt))
        choices = np.argmax(run(decoder, np.concatenate([prompt, new])[None])[0], axis=-1)
        np.testing.assert_array_equal(new, choices[len(prompt) - 1 : -1])


def test_draws_have_the_frequencies_of_the_softmax() -> None:
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


def test_a_stop_token_ends_it(decoder: Decoder) -> None:
    new = generate(decoder, PROMPT, 6)
    stop = new[3]
    first = list(new).index(stop)
    np.testing.assert_array_equal(generate(decoder, PROMPT, 6, stop_ids=(stop,)), new[:first])
    assert generate(decoder, PROMPT, 0).shape == (0,)


def test_draws_follow_the_seed_and_the_temperature(decoder: Decoder) -> None:
    draws = [generate(decoder, PROMPT, 8, temperature=3.0, seed=seed) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])
    cold = generate(decoder, PROMPT, 8, temperature=1e-4, seed=3)
    np.testing.assert_array_equal(cold, generate(decoder, PROMPT, 8))


@pytest.mark.parametrize("arguments", [([], 3), (PROMPT, -1)])
def test_bad_requests(decoder: Decoder, arguments: tuple) -> None:
    with pytest.raises(ValueError, match="need a prompt of 1 token or more"):
        generate(decoder, *arguments)


@pytest.mark.parametrize("prompt", [[5, 9999], [5, -3], [5.7, 3.2]])
def test_ids_that_are_no_tokens_are_refused(decoder: Decoder, prompt: list) -> None:
    with pytest.raises(ValueError, match=r"token ids are whole numbers in 0\.\."):
        generate(decoder, np.array(prompt), 3)

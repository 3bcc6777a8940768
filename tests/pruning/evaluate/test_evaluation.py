"""Perplexity with BOS, in bounded memory, and without compiling twice."""

import jax
import numpy as np
import pytest

from sparseopt.models import load_decoder, open_model
from sparseopt.pruning import perplexity
from sparseopt.pruning.base import activations
from sparseopt.pruning.evaluate import perplexity as evaluation
from tests.jitted import run
from tests.models.tiny import VOCAB, random_tensors, tiny_config, write_folder


@pytest.fixture
def folder(tmp_path, rng):
    return write_folder(tmp_path / "model", tiny_config(), random_tensors(tiny_config(), rng))


@pytest.fixture
def tokens(rng):
    return rng.integers(0, len(VOCAB), (5, 30))


def test_bos_stands_in_front_of_every_window_and_is_no_context_that_counts(folder, tokens):
    bos = 1
    begun = np.concatenate([np.full((5, 1), bos), tokens[:, :-1]], axis=1)
    logits = np.asarray(run(load_decoder(folder), begun), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    counted = np.take_along_axis(log_p[:, 1:-1], begun[:, 2:, None], axis=2)
    assert counted.shape == (5, 28, 1)  # of 30 places BOS and the token after it are not counted
    expected = pytest.approx(np.exp(-counted.mean()), rel=1e-4)
    assert perplexity(folder, tokens, bos=bos) == expected
    assert perplexity(folder, tokens.ravel(), seqlen=30, bos=bos) == expected
    assert perplexity(load_decoder(folder), tokens, bos=bos) == expected


def test_windows_that_predict_nothing_are_refused(folder):
    for ids, bos in [(np.zeros((3, 1), int), None), (np.zeros((3, 2), int), 1), (np.zeros((0, 9), int), None)]:
        with pytest.raises(ValueError, match="predict nothing"):
            perplexity(folder, ids, bos=bos)
    with pytest.raises(ValueError, match=r"token ids must lie in 0\.\.48, given 0\.\.49"):
        perplexity(folder, np.zeros((3, 9), int), bos=49)


def test_no_more_is_held_than_one_pass_needs(folder, tokens, monkeypatch):
    whole = perplexity(folder, tokens)
    model = open_model(folder)
    rows, steps, read = [], [], model.embedding
    monkeypatch.setattr(model, "embedding", lambda wanted: rows.append(len(wanted)) or read(wanted))
    monkeypatch.setattr(activations, "BATCH_TOKENS", 30)
    monkeypatch.setattr(evaluation, "PASS_BYTES", 2 * 30 * 32 * 4)
    by_twos = perplexity(model, tokens, observer=lambda _, *step: steps.append(step))
    assert by_twos == pytest.approx(whole, rel=1e-5)
    assert steps == [(done, 9) for done in range(1, 10)]  # three blocks for windows 1 and 2, 3 and 4, 5
    assert rows == [len(VOCAB), len(VOCAB), 30]


def test_a_second_call_compiles_nothing(folder, tokens, rng):
    compiled = []

    def count(event, seconds, **_):
        compiled.extend([event] * event.endswith("backend_compile_duration"))

    perplexity(folder, tokens)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        other = write_folder(folder.parent / "other", tiny_config(), random_tensors(tiny_config(), rng))
        perplexity(other, rng.integers(0, 20, tokens.shape), bos=1)
        assert compiled == []
        jax.jit(lambda x: x + len(compiled))(1.0)
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(count)

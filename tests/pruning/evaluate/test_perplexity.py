"""Perplexity: against the whole model's logits, with BOS, in bounded memory, without compiling twice."""

import numpy as np
import pytest

from sparseopt.layers.compiled import Compiled
from sparseopt.models import load_decoder, open_model
from sparseopt.pruning import perplexity
from sparseopt.pruning.base import activations
from sparseopt.pruning.evaluate import perplexity as evaluation
from tests.jitted import run
from tests.models.tiny import VOCAB
from tests.pruning.whole_runs import tensors_of, write_model

BOS = 1


@pytest.fixture
def ids(rng):
    return rng.integers(0, len(VOCAB), (5, 30))


@pytest.mark.parametrize("bos", [None, BOS])
def test_it_is_that_of_the_whole_models_logits(source, ids, bos):
    """BOS stands in front of every window, and is no context that counts."""
    begun = ids if bos is None else np.concatenate([np.full((5, 1), bos), ids[:, :-1]], axis=1)
    logits = np.asarray(run(load_decoder(source), begun), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    first = 0 if bos is None else 1  # of 30 places neither BOS nor the token after it is counted
    counted = np.take_along_axis(log_p[:, first:-1], begun[:, first + 1 :, None], axis=2)
    expected = pytest.approx(np.exp(-counted.mean()), rel=1e-4)
    assert perplexity(source, ids, bos=bos) == expected
    assert perplexity(load_decoder(source), ids, bos=bos) == expected
    # A rest that is no window is left out.
    assert perplexity(source, np.concatenate([ids.ravel(), ids[0, :7]]), seqlen=30, bos=bos) == expected


@pytest.mark.parametrize(
    ("given", "how", "words"),
    [
        (np.arange(10), {"seqlen": 16}, "10 tokens are fewer than one window of 16"),
        (np.arange(10), {"seqlen": 1}, "given seqlen 1"),
        ([[0, 9999]], {}, f"0..{len(VOCAB) - 1}, given 0..9999"),
        (np.zeros((3, 9), int), {"bos": 49}, r"0\.\.48, given 0\.\.49"),
        (np.ones((2, 8)), {}, "must be integers"),
        ([[1, 2, 3], [1, 2]], {}, "same number of tokens"),
        (np.zeros((3, 1), int), {}, "predict nothing"),
        (np.zeros((3, 2), int), {"bos": BOS}, "predict nothing"),
        (np.zeros((0, 9), int), {}, "predict nothing"),
    ],
)
def test_tokens_that_it_cannot_be_of_are_refused(source, given, how, words):
    with pytest.raises(ValueError, match=words):
        perplexity(source, given, **how)


def test_no_more_is_held_than_one_pass_needs(source, ids, monkeypatch):
    whole = perplexity(source, ids)
    model = open_model(source)
    rows, steps, read = [], [], model.embedding
    monkeypatch.setattr(model, "embedding", lambda wanted: rows.append(len(wanted)) or read(wanted))
    monkeypatch.setattr(activations, "BATCH_TOKENS", 30)
    monkeypatch.setattr(evaluation, "PASS_BYTES", 2 * 30 * 32 * 4)
    by_twos = perplexity(model, ids, observer=lambda _, *step: steps.append(step))
    assert by_twos == pytest.approx(whole, rel=1e-5)
    assert steps == [(done, 9) for done in range(1, 10)]  # three blocks for windows 1 and 2, 3 and 4, 5
    assert rows == [len(VOCAB), len(VOCAB), 30]


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity_and_compiles_nothing(tmp_path, source, ids):
    tensors = tensors_of("square")
    tensors["model.norm.weight"][:] = 0
    perplexity(source, ids)
    assert Compiled.seconds > 0
    compiling = Compiled.seconds
    found = perplexity(write_model(tmp_path / "other", "square", tensors), np.roll(ids, 1), bos=BOS)
    assert found == pytest.approx(len(VOCAB), rel=1e-5)
    assert Compiled.seconds == compiling

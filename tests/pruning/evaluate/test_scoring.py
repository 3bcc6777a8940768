"""Log-likelihoods of continuations: against the whole decoder, independent of batches, order and passes."""

import numpy as np
import pytest

from sparseopt.models import load_decoder, open_model
from sparseopt.pruning import perplexity
from sparseopt.pruning.evaluate import perplexity as evaluation
from sparseopt.pruning.evaluate import scoring
from sparseopt.pruning.evaluate.scoring import score_continuations
from tests.jitted import run
from tests.models.tiny import VOCAB, random_tensors, tiny_config, write_folder


@pytest.fixture(scope="module")
def model(source):
    return open_model(source)


def log_likelihoods(model, pairs, **how):
    return np.array([score.log_likelihood for score in score_continuations(model, pairs, **how)])


def independent_scores(decoder, texts, starts):
    """The definition, on texts of one length: no padding."""
    logits = np.asarray(run(decoder, texts[:, :-1]), np.float64)
    log_p = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    for rows, text, start in zip(log_p, texts, starts, strict=True):
        places = range(start, len(text))
        yield sum(rows[t - 1, text[t]] for t in places), all(rows[t - 1].argmax() == text[t] for t in places)


def test_scores_are_sums_of_log_softmax_of_the_decoder(source, model, rng):
    decoder = load_decoder(source)
    texts = rng.integers(0, len(VOCAB), (10, 9))
    texts[:, -1] = np.asarray(run(decoder, texts))[:, -2].argmax(-1)  # the last token is the likeliest
    starts = [*rng.integers(1, 8, 7).tolist(), 1, 8, 8]
    pairs = [(text[:start].tolist(), text[start:].tolist()) for text, start in zip(texts, starts, strict=True)]
    found = score_continuations(model, pairs)
    expected, greedy = zip(*independent_scores(decoder, texts, starts), strict=True)
    np.testing.assert_allclose([s.log_likelihood for s in found], expected, rtol=1e-5)
    assert [s.greedy for s in found] == list(greedy)
    assert greedy[-1]
    assert not greedy[-3]


def test_probabilities_of_all_next_tokens_add_to_one_and_cost_one_input(model):
    seen = []
    pairs = [([5, 6, 7], [token]) for token in range(len(VOCAB))]
    scores = score_continuations(model, pairs, observer=lambda _, *step: seen.append(step))
    assert sum(np.exp(s.log_likelihood) for s in scores) == pytest.approx(1, abs=1e-5)
    assert sum(s.greedy for s in scores) == 1
    assert seen == [(1, 3), (2, 3), (3, 3)]  # one batch through three blocks


def test_batches_passes_and_order_change_nothing(model, rng, monkeypatch):
    lengths = zip(rng.integers(1, 40, 30), rng.integers(1, 6, 30), strict=True)
    pairs = [tuple(rng.integers(0, len(VOCAB), size).tolist() for size in each) for each in lengths]
    whole, order = log_likelihoods(model, pairs), rng.permutation(len(pairs))
    np.testing.assert_allclose(log_likelihoods(model, [pairs[i] for i in order]), whole[order], rtol=1e-5)
    for i in np.argsort([len(context) for context, _ in pairs])[:3]:
        np.testing.assert_allclose(log_likelihoods(model, [pairs[i]]), whole[i], rtol=1e-5)
    monkeypatch.setattr(scoring, "BATCH_TOKENS", 96)
    monkeypatch.setattr(evaluation, "PASS_BYTES", 2 * 96 * 32 * 4)
    steps = []
    split = log_likelihoods(model, pairs, observer=lambda _, *step: steps.append(step))
    np.testing.assert_allclose(split, whole, rtol=1e-5)
    assert [done for done, _ in steps] == list(range(1, steps[0][1] + 1))
    assert steps[0][1] >= 3 * 3


def test_lengths_that_change_the_rotations_are_scored_as_if_alone(tmp_path, rng):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    config = tiny_config(max_position_embeddings=16, rope_parameters=rope, num_hidden_layers=1)
    folder = write_folder(tmp_path / "dynamic", config, random_tensors(config, rng))
    context = rng.integers(0, len(VOCAB), 30).tolist()
    # The first has the rotations of up to 16 tokens; the others have nearly the same length.
    pairs = [(context[:8], context[8:10]), (context, [3]), (context[2:], [4])]
    decoder = load_decoder(folder)
    for (context, continuation), score in zip(pairs, score_continuations(open_model(folder), pairs), strict=True):
        text = np.array([[*context, *continuation]])
        expected, _ = next(independent_scores(decoder, text, [len(context)]))
        assert score.log_likelihood == pytest.approx(expected, rel=1e-5)


def test_a_text_scored_token_by_token_has_the_perplexity_of_its_window(source, model, rng):
    windows = rng.integers(0, len(VOCAB), (5, 30))
    scores = log_likelihoods(model, [([int(w[0])], w[1:].tolist()) for w in windows])
    assert np.exp(-scores.sum() / (5 * 29)) == pytest.approx(perplexity(source, windows), rel=1e-5)


def test_bad_pairs_are_refused(model):
    assert score_continuations(model, []) == []
    with pytest.raises(ValueError, match="pair 1 has an empty context or an empty continuation: 0 and 2 tokens"):
        score_continuations(model, [([1], [2]), ([], [2, 3])])
    with pytest.raises(ValueError, match="token ids must lie in 0"):
        score_continuations(model, [([1], [len(VOCAB)])])

"""Calibration by the model itself: what it draws, where the tokens are kept, and what is refused before any work."""

import json
from functools import partial

import numpy as np
import pytest

from sparseopt.models import ModelError, load_decoder, open_model
from sparseopt.models.decoder.cached_decoding import draw_texts, kept_bytes
from sparseopt.pruning import Recipe, pipeline, prune_model
from sparseopt.pruning.run import calibration, drawn
from sparseopt.pruning.text import windows
from sparseopt.pruning.text.chats import TextError
from sparseopt.pruning.text.documents import load_documents
from sparseopt.system.run_folder import DRAWN, FolderError, read_start
from tests.jitted import run
from tests.models.tiny import tiny_config
from tests.pruning.whole_runs import write_model

pytestmark = pytest.mark.usefixtures("several_batches")
RECIPE = Recipe(method="wanda", windows=5, seqlen=24, heldout_windows=2, score="none")


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_model(tmp_path / "source")


@pytest.fixture
def draws(monkeypatch):
    """A list that grows by one whenever a model draws."""
    seen = []
    monkeypatch.setattr(drawn, "draw_texts", lambda *given, **more: (seen.append(1), draw_texts(*given, **more))[1])
    return seen


def test_a_run_calibrates_on_windows_that_are_drawn_once_and_kept(tmp_path, source, draws):
    told = []
    report = prune_model(source, tmp_path / "a", RECIPE, observer=lambda event, done, total: told.append((event, done)))
    kept = np.array(json.loads((tmp_path / "a" / DRAWN).read_text()))
    assert kept.shape == (5 + 2 + 2, 24)
    assert 0 <= kept.min() < kept.max() < tiny_config()["vocab_size"]
    assert ("drawing text, token", 24) in told
    assert report.draw_seconds > 0
    assert read_start(tmp_path / "a")["fingerprint"]["tokens"] == report.calibration.digest
    # The same weights as from the same tokens, given.
    given = RECIPE.model_copy(update={"calibration": kept[:7], "windows": None, "seqlen": 512})
    prune_model(source, tmp_path / "given", given)
    shard = "model-block-0002.safetensors"
    assert (tmp_path / "a" / shard).read_bytes() == (tmp_path / "given" / shard).read_bytes()
    # Other runs by the same draw read it from the cache, a finished one from its folder.
    prune_model(source, tmp_path / "b", RECIPE.model_copy(update={"method": "magnitude"}))
    assert (tmp_path / "b" / DRAWN).read_text() == (tmp_path / "a" / DRAWN).read_text()
    # Another seed is another draw, and another run.
    other = RECIPE.model_copy(update={"seed": 1})
    with pytest.raises(FolderError, match=r"recipe\.seed: None there, 1 here"):
        prune_model(source, tmp_path / "a", other)
    assert len(draws) == 1
    prune_model(source, tmp_path / "c", other)
    assert (tmp_path / "c" / DRAWN).read_text() != (tmp_path / "a" / DRAWN).read_text()
    for entry in (tmp_path / "cache" / "sparseopt" / "drawn").iterdir():
        entry.unlink()
    assert prune_model(source, tmp_path / "a", RECIPE).kept
    assert len(draws) == 2


def test_a_stopped_run_resumes_on_the_tokens_in_its_folder(tmp_path, source, draws):
    recipe = RECIPE.model_copy(update={"bos": "yes"})
    with pytest.raises(pipeline.Stopped):
        prune_model(source, tmp_path / "a", recipe, stop=lambda: True)
    file, (entry,) = tmp_path / "a" / DRAWN, (tmp_path / "cache" / "sparseopt" / "drawn").iterdir()
    entry.unlink()
    digest = read_start(tmp_path / "a")["fingerprint"]["tokens"]
    assert prune_model(source, tmp_path / "a", recipe).calibration.digest == digest
    assert len(draws) == 1
    # Tokens that were changed are another run's.
    ids = json.loads(file.read_text())
    ids[0][0] = (ids[0][0] + 1) % 40
    file.write_text(json.dumps(ids))
    with pytest.raises(FolderError, match=r"these differ:\n  tokens: "):
        prune_model(source, tmp_path / "a", recipe)


def test_text_that_the_model_draws_is_likely_to_it(source):
    decoder = load_decoder(source)
    ids = draw_texts(decoder, 64, 48, 1, seed=3)
    assert ids.shape == (64, 48)
    np.testing.assert_array_equal(ids, draw_texts(decoder, 64, 48, 1, seed=3))
    assert not np.array_equal(ids, draw_texts(decoder, 64, 48, 1, seed=4))
    # After the first tokens, which are hotter: - mean log p is the entropy, as for text drawn by the model itself.
    logits = np.asarray(run(decoder, np.concatenate([np.full((64, 1), 1), ids], axis=1)), np.float64)[:, 8:-1]
    logp = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    surprise = -np.take_along_axis(logp, ids[:, 8:, None], axis=-1)[..., 0]
    spread = surprise - -np.sum(np.exp(logp) * logp, axis=-1)
    assert abs(spread.mean()) < 4 * spread.std() / np.sqrt(spread.size)


def test_what_cannot_draw_is_refused_before_any_work(tmp_path, source, draws):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"bos_token_id": None, "eos_token_id": None}))
    with pytest.raises(ModelError, match="neither a BOS nor an end token"):
        prune_model(source, tmp_path / "out", RECIPE)
    assert not (tmp_path / "out").exists()
    assert not draws


def test_a_text_that_is_too_short_to_score_is_found_before_the_drawing(tmp_path, source, draws, monkeypatch):
    (tmp_path / "short.txt").write_text("a\n\n" * 8)
    with pytest.raises(TextError, match="shorter seqlen"):
        prune_model(source, tmp_path / "out", RECIPE.model_copy(update={"score": f"file:{tmp_path}/short.txt"}))
    assert not draws
    # As pydoc is for long windows: nobody asked for it.
    reads = partial(load_documents, f"file:{tmp_path}/short.txt", "evaluation")
    monkeypatch.setattr(windows, "load_documents", lambda *_, **__: reads())
    report = prune_model(source, tmp_path / "out", RECIPE.model_copy(update={"score": None}))
    assert [score.text for score in report.scores] == [calibration.OWN]


def test_the_memory_that_drawing_takes_is_that_of_its_arrays(source):
    model = open_model(source)
    assert model.decoder_bytes() == 4 * sum(np.prod(info.shape) for info in model.source.tensors.values())
    # Keys and values of three blocks with two heads of width 8, for two windows of 64 tokens.
    assert kept_bytes(model.config, 2, 64) == 4 * 2 * (2 * 3 * 64 * 2 * 8 + 3 * model.config.vocab_size)

"""Real inputs in full: run by `make test-slow DATA=WikiText-2 folder TRUTH=certified problems`."""

import os
from pathlib import Path

import numpy as np
import pytest

import sparseopt as so
from sparseopt.models import bundled_model, encode_text, load_tokenizer, open_model
from sparseopt.pruning import Recipe, load_text, perplexity, prune_model, token_windows

pytestmark = pytest.mark.slow


def needed_folder(variable: str) -> Path:
    """The folder that an environment variable names; without it the test is skipped, and the summary says so."""
    named = os.environ.get(variable)
    if not named:
        pytest.skip(f"SKIPPED: set {variable} to a folder (make test-slow DATA=... TRUTH=...)")
    return Path(named)


def test_the_dense_model_has_the_reference_perplexity():
    data = f"wikitext2:{needed_folder('SPARSEOPT_WIKITEXT2')}"
    model = open_model(bundled_model())
    ids = token_windows(encode_text(load_tokenizer(model.source), load_text(data, "evaluation")), 8, 1024)
    assert perplexity(model, ids) == pytest.approx(29.197, rel=1e-3)


def test_on_a_real_model_maiht_leaves_a_lower_perplexity_than_wanda(tmp_path):
    model = open_model(bundled_model())
    ids = token_windows(encode_text(load_tokenizer(model.source), load_text("pydoc", "evaluation")), 4, 1024)
    scores = {}
    for method in ("maiht", "wanda"):
        prune_model(bundled_model(), tmp_path / method, Recipe(method=method, calibration="pydoc", windows=8))
        scores[method] = perplexity(tmp_path / method, ids)
    assert perplexity(model, ids) < scores["maiht"] < 0.8 * scores["wanda"]


def test_certified_problems_are_solved_to_tolerance_and_the_gap_is_a_bound():
    folder = needed_folder("SPARSEOPT_TRUTH")
    files = [f for k in (0, 1) for f in sorted(folder.glob(f"*_k{k}_*.npz"))]
    assert files
    for file in files:
        with np.load(file) as stored:
            y, edges, lam = stored["y"].reshape(-1), stored["edges"], float(stored["lam"])
            order, optimum = int(stored["k"]), float(stored["obj_opt"])
        graph = so.Graph.from_edges(edges, y.size)
        found = so.trend_filter(y, graph, so.L1(lam), order, tol=1e-5).check()
        b = np.asarray(found.value, np.float64)
        objective = 0.5 * np.sum((y - b) ** 2) + lam * np.abs(graph.matrix(order + 1) @ b).sum()
        true = objective / optimum - 1
        assert true <= 1e-5, file.name
        assert float(found.gap) >= true - 1e-9, file.name

"""The task of configs/papers/maiht_descent.py end to end on a tiny model."""

import json

import numpy as np
import pytest

from sparseopt.experiments.config import expand
from sparseopt.experiments.report import gather
from sparseopt.experiments.runs import execute
from tests.experiments.test_prune_tasks import quiet


def test_descent_is_monotone_and_acceleration_ends_lower(tmp_path, settings):
    layer = "model.layers.1.mlp.up_proj"
    (run,) = expand({**settings, "task": "maiht_descent.Descent", "layer": layer, "steps": 60}, allow_code=True)
    outcome = execute(run, tmp_path, quiet)
    assert outcome.error is None
    records = {r["solver"]: r for r in map(json.loads, (outcome.folder / "records.jsonl").read_text().splitlines())}
    assert records["maiht"]["objective"] <= records["iht"]["objective"]
    for solver in records.values():
        history = np.load(outcome.folder / f"history-{solver['unit']}.npz")["objective"]
        assert len(history) == 61
        # Rounding of the objective in float32.
        assert np.diff(history).max() <= 1e-5 * history[0]
    assert (outcome.folder / f"descent-{layer}.png").is_file()
    (section,) = gather([outcome.folder], allow_code=True)
    assert [row.labels for row in section.rows] == [{"solver": "maiht"}, {"solver": "iht"}]
    mistyped = {**settings, "task": "maiht_descent.Descent", "layer": "model.layers.1.mlp.up_pro"}
    (wrong,) = expand(mistyped, allow_code=True)
    with pytest.raises(ValueError, match=r"did you mean 'model.layers.1.mlp.up_proj'"):
        wrong.task.check()

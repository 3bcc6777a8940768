"""The tasks of the Doge-ADMM paper on tiny settings, from units to pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from doge_convergence import Convergence, look_steps
from doge_groups import Groups
from doge_race import Race
from tests.experiments.test_trend_tasks import TINY, finish


def race(**settings: Any) -> Race:
    return Race.model_validate({"name": "tiny", "task": "doge_race.Race", "picture": TINY, "order": 1, **settings})


def test_a_race_compares_methods_on_one_problem(tmp_path: Path) -> None:
    runs = [
        finish(race(method=method, repeats=2, tol=1e-5), tmp_path / method)
        for method in ("doge", "gtf_admm", "fast_admm")
    ]
    first = [run.records[0] for run in runs]
    for record in first:
        assert record["status"] == "CONVERGED"
        assert record["gap"] <= 1e-5
        assert record["psnr_after"] > record["psnr_before"]
        assert record["mse_after"] < record["mse_before"]
        assert record["seconds"] > 0
        assert set(Race.columns) <= record.keys()
    objectives = [record["objective"] for record in first]
    assert max(objectives) / min(objectives) - 1 <= 1e-5
    assert [record["algorithm"] for record in first] == ["doge", "admm", "fast_admm"]
    assert first[2]["inner_steps"] > first[2]["steps"]
    # Repeats have noise of their own, the same for every method.
    assert runs[0].records[1]["mse_before"] == runs[1].records[1]["mse_before"] != first[0]["mse_before"]
    pictures = Race.draw(runs)
    assert set(pictures) == {"pictures", "seconds"}
    assert np.shape(pictures["pictures"]) == (1, 3)
    (axis,) = pictures["seconds"]
    assert "(s)" in axis.get_xlabel()
    assert [text.get_text() for text in axis.get_yticklabels()] == ["Doge-ADMM", "GTF-ADMM", "fast ADMM"]
    assert set(Race.draw(runs[:1])) == {"pictures"}


def test_a_fit_that_stands_still_need_not_be_there(tmp_path: Path) -> None:
    changed = finish(race(method="doge", settings="published", stop="change", tol=1e-4), tmp_path / "change")
    assert changed.records[0]["status"] == "CONVERGED"
    assert changed.records[0]["gap"] > 1e-5


def test_convergence_records_losses_above_the_optimum(tmp_path: Path) -> None:
    task = Convergence.model_validate(
        {
            "name": "tiny", "task": "doge_convergence.Convergence", "picture": TINY, "order": 1, "passes": 1,
            "contenders": [{"method": "doge"}, {"method": "fast_admm", "settings": "published"}],
        }
    )  # fmt: skip
    run = finish(task, tmp_path)
    for record in run.records:
        with np.load(tmp_path / f"history-{record['unit']}.npz") as stored:
            loss, gap, looks, seconds = (stored[n] for n in ("loss", "gap", "look_steps", "look_seconds"))
        assert loss.size == record["steps"] + 1
        assert loss.min() >= -1e-9
        # The gap is an upper bound on the loss at every step.
        assert (gap[1:] >= loss[1:] - 2e-9).all()
        assert loss[record["steps_to_1e-4"]] <= 1e-4 < loss[record["steps_to_1e-4"] - 1]
        assert looks[0] == seconds[0] == 0
        assert looks[-1] == record["steps"]
        assert (np.diff(looks) > 0).all()
        assert (np.diff(seconds) > 0).all()
        assert 0 < record["seconds_to_1e-4"] <= record["seconds_to_1e-6"] <= record["seconds"]
    axes = Convergence.draw([run])["convergence"]
    assert [axis.get_xlabel() for axis in axes] == ["time (s)", "iteration"]
    assert all("optimum" in axis.get_ylabel() for axis in axes)
    assert len(axes[0].get_lines()) == 2


def test_convergence_needs_a_certificate() -> None:
    task = Convergence.model_validate(
        {
            "name": "tiny",
            "task": "doge_convergence.Convergence",
            "picture": TINY,
            "penalty": {"name": "l0", "weight": 10},
        }
    )
    with pytest.raises(ValueError, match="certified optimum"):
        task.check()


@pytest.mark.parametrize(("steps", "apart"), [(3, 5), (5, 5), (7, 5), (400, 5), (9, 1)])
def test_looks_end_at_the_last_step(steps: int, apart: int) -> None:
    looks = look_steps(steps, apart)
    assert looks[0] == 0
    assert looks[-1] == steps
    assert (np.diff(looks) > 0).all()
    assert (looks[:-1] % apart == 0).all()


def test_groups_are_those_of_the_paper(tmp_path: Path) -> None:
    run = finish(Groups.model_validate({"name": "groups", "task": "doge_groups.Groups", "shape": [8, 8]}), tmp_path)
    assert [record["groups"] for record in run.records] == [4, 5, 16]
    assert all(record["disjoint"] and record["complete"] for record in run.records)
    assert [record["rows"] for record in run.records] == [112, 64, 112]
    pictures = Groups.draw([run])
    assert [len(axes) for axes in pictures.values()] == [4, 5, 16]

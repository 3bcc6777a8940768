"""The trend-filtering tasks on tiny settings, from units to pictures, and every config of theirs as it is shipped."""

import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from sparseopt.experiments.config import load_config
from sparseopt.experiments.papers.convergence import Convergence, look_steps
from sparseopt.experiments.papers.groups import Groups
from sparseopt.experiments.papers.race import Race
from sparseopt.experiments.report import gather, write_report
from sparseopt.experiments.sweep import check_all, plan, run_all
from sparseopt.experiments.task import FinishedRun, Task
from sparseopt.experiments.task_denoise import Denoise
from sparseopt.experiments.task_graph import GraphSignal, count_levels
from sparseopt.trend.graph import Graph

matplotlib.use("Agg")
CONFIGS = Path(__file__).parents[2] / "configs"
TINY = {"name": "camera", "size": 16}


@pytest.fixture(autouse=True)
def _close_figures() -> Any:
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def finish(task: Task, folder: Path) -> FinishedRun:
    folder.mkdir(parents=True, exist_ok=True)
    task.check()
    assert (task.estimate().seconds or 0) > 0
    units = task.units()
    assert len(set(units)) == len(units)
    records = [{"unit": key, **task.run_unit(key, folder, lambda *_: None)} for key in units]
    return FinishedRun(folder, task, records)


def race(**settings: Any) -> Race:
    return Race.model_validate({"name": "tiny", "task": "race", "picture": TINY, "order": 1, **settings})


def test_denoise_recovers_a_picture_in_the_precision_asked_for(tmp_path: Path) -> None:
    given = {"name": "tiny", "task": "denoise", "picture": TINY, "order": 1, "method": "doge", "dtype": "float32"}
    run = finish(Denoise.model_validate(given), tmp_path)
    (record,) = run.records
    assert (record["status"], record["label"]) == ("CONVERGED", "doge")
    assert record["psnr_after"] > record["psnr_before"]
    assert set(Denoise.columns) <= record.keys()
    assert np.shape(Denoise.draw([run])["pictures"]) == (1, 3)


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
    axis = pictures["seconds"][0, 0]
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
            "name": "tiny", "task": "convergence", "picture": TINY, "order": 1, "passes": 1,
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
    assert [axis.get_xlabel() for axis in axes[0]] == ["time (s)", "iteration"]
    assert all("optimum" in axis.get_ylabel() for axis in axes.ravel())
    assert len(axes[0, 0].get_lines()) == 2


def test_convergence_needs_a_certificate() -> None:
    task = Convergence.model_validate(
        {"name": "tiny", "task": "convergence", "picture": TINY, "penalty": {"name": "l0", "weight": 10}}
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


def test_graph_signal_recovers_levels_and_hidden_rates(tmp_path: Path) -> None:
    roads = GraphSignal.model_validate(
        {
            "name": "roads", "task": "graph_signal", "graph": {"name": "minnesota"}, "signal": "plateaus",
            "penalty": {"name": "l1", "weight": 0.5},
        }
    )  # fmt: skip
    rates = GraphSignal.model_validate(
        {
            "name": "rates", "task": "graph_signal", "graph": {"name": "counties", "states": ["GA", "SC"]},
            "hidden": 0.1,
        }
    )  # fmt: skip
    runs = [finish(roads, tmp_path / "roads"), finish(rates, tmp_path / "rates")]
    found, measured = runs[0].records[0], runs[1].records[0]
    assert found["status"] == measured["status"] == "CONVERGED"
    assert found["rmse_after"] < 0.5 * found["rmse_before"]
    assert 3 <= found["levels"] < 400
    assert measured["nodes"] == 205
    with np.load(tmp_path / "rates" / "signal-fit.npz") as stored:
        spread = float(np.nanstd(stored["observed"]))
        assert np.isnan(stored["observed"]).sum() > 5
        assert np.isfinite(stored["fitted"]).all()
    assert measured["rmse_hidden"] < spread
    pictures = GraphSignal.draw(runs)
    assert len(pictures) == 2
    sizes = sorted(len(axes) for axes in pictures.values())
    assert sizes == [2, 3]
    for axes in pictures.values():
        assert all(axis.get_title() for axis in axes)


def test_levels_are_connected_parts_of_equal_value() -> None:
    assert count_levels(Graph.chain(6), np.array([1.0, 1.0, 2.0, 2.0, 1.0, 1.0])) == 3


def test_a_road_network_has_no_measured_signal() -> None:
    task = GraphSignal.model_validate({"name": "x", "task": "graph_signal", "graph": {"name": "minnesota"}})
    with pytest.raises(ValueError, match="plateaus"):
        task.check()


def test_groups_are_those_of_the_paper(tmp_path: Path) -> None:
    run = finish(Groups.model_validate({"name": "groups", "task": "groups", "shape": [8, 8]}), tmp_path)
    assert [record["groups"] for record in run.records] == [4, 5, 16]
    assert all(record["disjoint"] and record["complete"] for record in run.records)
    assert [record["rows"] for record in run.records] == [112, 64, 112]
    pictures = Groups.draw([run])
    assert [len(axes) for axes in pictures.values()] == [4, 5, 16]


# What makes an experiment small: settings that leave its kind and its comparison with the paper as they are.
SMALL = {
    "doge-table1-order0": ["picture.size=12", "repeats=1", "sweep.grid.method=[doge]", "sweep.grid.settings=[tuned]"],
    "doge-table1-order1": [
        "picture.size=12", "repeats=2", "sweep.list=[{settings: published, stop: change}]",
        "sweep.grid.method=[doge_groups]",
    ],
    "doge-figure5": ["picture.size=12", "tol=1e-3", "contenders=[{method: doge}]", "sweep.grid.order=[0]"],
    "doge-figure6": [
        "picture.size=12", "max_steps=5", "contenders=[{method: doge_groups, settings: published}]",
        "sweep.grid.order=[0]",
    ],
    "doge-groupings": [],
    "denoise-astronomy": ["picture.crop=[520, 330, 12, 12]", "sweep.list=[{order: 0}]"],
    "denoise-medical": ["sweep.list=[{picture: {name: shepp_logan_phantom, size: 12}}]"],
    "counties": ["graph.states=[DE]", "tol=1e-3", "sweep.list=[{order: 0}]"],
    "minnesota": ["tol=1e-3", "sweep.list=[{signal: waves, order: 0}]"],
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_shipped_configs_can_run(name: str) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert re.search(r"^# .*Time: \d+", text, re.MULTILINE)
    for run in load_config(CONFIGS / f"{name}.yaml"):
        assert run.task.name == name
        run.task.check()
        assert (run.task.estimate().seconds or 0) > 0


@pytest.mark.parametrize("name", SMALL)
def test_shipped_configs_run_to_a_report_when_cut_down(name: str, tmp_path: Path) -> None:
    planned = plan(load_config(CONFIGS / f"{name}.yaml", SMALL[name]), tmp_path / "runs")
    check_all(planned, again=False)
    outcomes = run_all(planned, tmp_path / "runs", lambda _: lambda *_: None)
    assert [outcome.error for outcome in outcomes] == [None] * len(planned)
    sections = gather([tmp_path / "runs"])
    written = {file.suffix for file in write_report(sections, tmp_path / "report")}
    assert written >= {".csv", ".md", ".html", ".png"}
    headings, cells = sections[0].table()
    assert len(cells) >= len(planned)
    paper = sections[0].paper
    published = [heading for heading in headings if heading.endswith("(paper)")]
    assert bool(published) == bool(paper and paper.figures)
    if name == "doge-table1-order1":
        assert cells[0][headings.index("seconds (paper)")] == "0.493"
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert all(sentence in text for sentence in (paper.differs if paper else ()))

"""The trend-filtering tasks on tiny settings, from units to pictures, and all of their configs."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseopt.core.penalties.entries import L1
from sparseopt.core.problem.iterate import iterate
from sparseopt.experiments.config import ConfigError, expand, load_config
from sparseopt.experiments.report import gather, write_report
from sparseopt.experiments.runs import check_all, plan, run_all
from sparseopt.experiments.task import FinishedRun, Task
from sparseopt.experiments.tasks.denoise import Denoise, timed_fit
from sparseopt.experiments.tasks.graph import GraphSignal, count_levels
from sparseopt.trend.base.graph import Graph
from sparseopt.trend.filter import trend_filter
from sparseopt.trend.methods import plan as plan_module
from tests.tiers import often

CONFIGS = Path(__file__).parents[2] / "configs"
PAPERS = CONFIGS / "papers"
TINY = {"name": "camera", "size": 16}


def finish(task: Task, folder: Path) -> FinishedRun:
    folder.mkdir(parents=True, exist_ok=True)
    task.check()
    units = task.units()
    assert len(set(units)) == len(units)
    records = [{"unit": key, **task.run_unit(key, folder, lambda *_: None)} for key in units]
    return FinishedRun(folder, task, records)


def test_what_runs_before_the_clock_has_the_program_of_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    y, graph, traces = np.random.default_rng(0).normal(size=(9, 11)), Graph.grid((9, 11)), []

    def traced(*arguments: Any, **options: Any) -> Any:
        traces.append(1)
        return iterate(*arguments, **options)

    monkeypatch.setattr(plan_module, "iterate", traced)
    timed_fit(
        lambda limit: trend_filter(y, graph, L1(1.0), 0, "doge", tol=1e-9, max_steps=limit), 500, lambda *_: None, "fit"
    )
    assert len(traces) == 1


def test_denoise_recovers_a_picture_in_the_precision_asked_for(tmp_path: Path) -> None:
    given = {"name": "tiny", "task": "denoise", "picture": TINY, "order": 1, "method": "doge", "dtype": "float32"}
    run = finish(Denoise.model_validate(given), tmp_path)
    (record,) = run.records
    assert (record["status"], record["label"]) == ("CONVERGED", "doge")
    assert record["psnr_after"] > record["psnr_before"]
    assert set(Denoise.columns) <= record.keys()
    assert np.shape(Denoise.draw([run])["pictures"]) == (1, 3)


def test_a_method_has_its_settings_in_a_config() -> None:
    given = {"name": "tiny", "task": "denoise", "picture": TINY, "order": 1, "method": {"name": "doge", "B": 1}}
    assert Denoise.model_validate(given).label == "doge(B=1)"
    for method, said in (
        ({"name": "doge", "b": 1}, "b: doge has no such argument"),
        ({"name": "doge", "relaxation": 3}, "given rho=None, relaxation=3"),
        ("dogs", "did you mean 'doge'"),
    ):
        with pytest.raises(ValueError, match=said):
            Denoise.model_validate(given | {"method": method})


@pytest.mark.thorough
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


@pytest.mark.thorough
def test_a_volume_is_denoised_in_three_dimensions_and_its_slice_drawn(tmp_path: Path) -> None:
    given = {
        "name": "tiny", "task": "denoise", "picture": {"name": "brain", "crop": [80, 80, 70, 12, 10, 4]},
        "penalty": {"name": "group_l2", "weight": 9, "axis": 0}, "dtype": "float32",
    }  # fmt: skip
    task = Denoise.model_validate(given)
    assert task.grid().shape == (12, 10, 4)
    run = finish(task, tmp_path)
    assert run.records[0]["psnr_after"] > run.records[0]["psnr_before"]
    (axes,) = Denoise.draw([run])["pictures"]
    assert axes[0].images[0].get_array().shape == (10, 12)


def test_counts_on_streets_get_rates_and_a_chosen_weight(tmp_path: Path) -> None:
    task = GraphSignal.model_validate(
        {
            "name": "deaths", "task": "graph_signal", "graph": {"name": "soho"}, "loss": "poisson", "choose": "bic",
            "levels": 3, "tol": 1e-3,
        }
    )  # fmt: skip
    run = finish(task, tmp_path)
    (record,) = run.records
    assert record["status"] == "CONVERGED"
    assert record["weight"] == pytest.approx(2.3, rel=0.1)  # the second of three; the penalty has another
    with np.load(tmp_path / "signal-fit.npz") as stored:
        # Rates, not their logarithms; their sum is that of the counts, since a constant is not penalised.
        assert stored["fitted"].min() > 0
        assert stored["fitted"].sum() == pytest.approx(392, rel=1e-2)
    (axes,) = GraphSignal.draw([run]).values()
    assert f"chosen weight {record['weight']:.3g}" in axes[1].get_title()
    assert len(axes[1].collections[0].get_segments()) == 699


def test_levels_are_connected_parts_of_equal_value() -> None:
    assert count_levels(Graph.chain(6), np.array([1.0, 1.0, 2.0, 2.0, 1.0, 1.0])) == 3


def test_a_road_network_has_no_measured_signal() -> None:
    task = GraphSignal.model_validate({"name": "x", "task": "graph_signal", "graph": {"name": "minnesota"}})
    with pytest.raises(ValueError, match="plateaus"):
        task.check()
    with pytest.raises(ValueError, match="take loss=square, not poisson"):
        task.model_copy(update={"signal": "waves", "loss": "poisson"}).check()
    with pytest.raises(ValueError, match="unknown loss 'poison'"):
        task.model_copy(update={"signal": "waves", "loss": "poison"}).check()


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
    "denoise-volume": ["picture.crop=[80, 80, 70, 12, 10, 4]", "sweep.list=[{penalty: {name: l1, weight: 7}}]"],
    "counties": ["graph.states=[DE]", "tol=1e-3", "sweep.list=[{order: 0}]"],
    "minnesota": ["tol=1e-3", "sweep.list=[{signal: waves, order: 0}]"],
    "street-counts": ["tol=1e-3", "choose=bic", "levels=3", "sweep.list=[{order: 0}]"],
}  # fmt: skip
ONE_OF_EACH_KIND = ["doge-table1-order1", "doge-groupings", "denoise-medical", "denoise-volume", "minnesota"]


def config_of(name: str) -> Path:
    (path,) = CONFIGS.rglob(f"{name}.yaml")
    return path


@pytest.mark.parametrize("name", sorted(path.stem for path in PAPERS.glob("*.yaml")))
def test_tasks_of_the_papers_are_imported_only_where_that_is_allowed(name: str) -> None:
    with pytest.raises(ConfigError, match="importing it runs whatever code its module holds"):
        load_config(PAPERS / f"{name}.yaml")


@pytest.mark.parametrize(("kind", "path"), [("race", "doge_race.Race"), ("descent", "maiht_descent.Descent")])
def test_a_task_that_left_the_package_is_named_with_its_place(kind: str, path: str) -> None:
    with pytest.raises(ConfigError, match=rf"the task '{kind}' has left the package: it is {path}, in configs/papers"):
        expand({"name": "x", "task": kind})


@pytest.mark.parametrize("name", SMALL)
def test_shipped_configs_can_run(name: str) -> None:
    path = config_of(name)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# Needs --allow-code" if path.parent == PAPERS else "# ")
    assert re.search(r"^# .*Time: \d+", text, re.MULTILINE)
    for run in load_config(path, allow_code=path.parent == PAPERS):
        assert run.task.name == name
        run.task.check()


@pytest.mark.parametrize("name", often(SMALL, *ONE_OF_EACH_KIND))
def test_shipped_configs_run_to_a_report_when_cut_down(name: str, tmp_path: Path) -> None:
    path = config_of(name)
    allowed = path.parent == PAPERS
    planned = plan(load_config(path, SMALL[name], allow_code=allowed), tmp_path / "runs")
    check_all(planned, again=False)
    outcomes = run_all(planned, tmp_path / "runs", lambda _: lambda *_: None)
    assert [outcome.error for outcome in outcomes] == [None] * len(planned)
    sections = gather([tmp_path / "runs"], allow_code=allowed)
    written = {file.suffix for file in write_report(sections, tmp_path / "report")}
    assert written >= {".csv", ".md", ".html", ".png"}
    table, paper = sections[0].table(), planned[0].run.task.paper
    assert len(table.rows) >= len(planned)
    published = [heading for heading in table.headings if heading.endswith("(paper)")]
    assert bool(published) == bool(paper and paper.figures)
    if name == "doge-table1-order1":
        assert table.rows[0][table.headings.index("seconds (paper)")] == "0.493"
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert all(sentence in text for sentence in (paper.differs if paper else ()))

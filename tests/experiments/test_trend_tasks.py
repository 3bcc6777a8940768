"""The trend-filtering tasks, ours and those of the Doge-ADMM paper, on tiny settings, and the shipped configs."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from doge_race import Race
from sparseopt.core.problem.iterate import iterate
from sparseopt.experiments.config import expand, load_config
from sparseopt.experiments.read.images import write_image
from sparseopt.experiments.report import gather, write_report
from sparseopt.experiments.runs import check_all, plan, run_all
from sparseopt.experiments.task import FinishedRun
from sparseopt.trend.base.graph import Graph
from sparseopt.trend.methods import split_plan as plan_module
from tests.experiments.inputs import quiet

CONFIGS = Path(__file__).parents[2] / "configs"
PAPERS = CONFIGS / "papers"
TINY = {"picture": {"name": "camera", "size": 16}, "order": 1}


def finish(folder: Path, task: str, **values: Any) -> FinishedRun:
    """All units of a task."""
    folder.mkdir(parents=True, exist_ok=True)
    (run,) = expand({"name": "tiny", "task": task, **values}, allow_code=True)
    run.task.check()
    units = run.task.units()
    assert len(set(units)) == len(units)
    records = [{"unit": key, **run.task.run_unit(key, folder, quiet)} for key in units]
    return FinishedRun(folder, run.task, records)


def pictures_of(*runs: FinishedRun) -> dict[str, Any]:
    return type(runs[0].task).draw(runs)


def test_what_runs_before_the_clock_has_the_program_of_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    y, graph, traces = np.random.default_rng(0).normal(size=(9, 11)), Graph.grid((9, 11)), []
    fields = {"picture": {"name": "camera", "size": 9}, "penalty": {"name": "l1", "weight": 1}, "max_steps": 500}
    (run,) = expand({"name": "tiny", "task": "doge_race.Race", "order": 0, "tol": 1e-9, **fields}, allow_code=True)

    def traced(*arguments: Any, **options: Any) -> Any:
        traces.append(1)
        return iterate(*arguments, **options)

    monkeypatch.setattr(plan_module, "iterate", traced)
    run.task.timed(y, graph, quiet)
    assert len(traces) == 1


def test_denoise_recovers_a_picture_in_the_precision_asked_for(tmp_path: Path) -> None:
    run = finish(tmp_path, "denoise", **TINY, method="doge", dtype="float32")
    (record,) = run.records
    assert (record["status"], record["label"]) == ("CONVERGED", "doge")
    assert set(type(run.task).columns) <= record.keys()
    with np.load(tmp_path / "picture-repeat-0.npz") as stored:
        clean, noisy, fitted = (stored[name].astype(float) for name in ("clean", "noisy", "fitted"))
    assert 15 < np.std(noisy - clean) < 25
    for name, image in (("before", noisy), ("after", fitted)):
        error = np.mean((image - clean) ** 2)
        assert record[f"mse_{name}"] == pytest.approx(error, rel=1e-3)
        assert record[f"psnr_{name}"] == pytest.approx(10 * np.log10(255**2 / error), rel=1e-3)
    assert record["psnr_after"] > record["psnr_before"]
    assert np.shape(pictures_of(run)["pictures"]) == (1, 3)


def test_a_config_finds_the_regions_of_a_coloured_picture_and_draws_them(tmp_path: Path) -> None:
    clean = np.full((12, 14, 4), [60, 120, 90, 255])
    clean[3:9, 4:10, :3] = 200, 40, 90
    noisy = clean + np.random.default_rng(0).normal(0, 5, clean.shape)
    write_image(tmp_path / "y.png", noisy.clip(0, 255).astype("u1"))
    run = finish(tmp_path / "run", "trend", signal=str(tmp_path / "y.png"))
    assert (run.records[0]["pieces"], run.records[0]["channels"]) == (2, ["red", "green", "blue"])
    head, row = (tmp_path / "run" / "regions.csv").read_text().splitlines()
    assert head == "first,second,edges,step red,step green,step blue"
    np.testing.assert_allclose(np.array(row.split(","), float), [0, 1, 24, 140, -80, 0], atol=5)
    before, after = pictures_of(run)["fit"]
    assert before.images[0].get_array().shape == (12, 14, 3)
    assert np.isfinite(after.lines[0].get_xdata()).sum() == 2 * 24


def test_the_task_trend_smooths_files_as_the_command_does(tmp_path: Path, done: Any) -> None:
    signal, output = tmp_path / "y.csv", tmp_path / "smooth.csv"
    days = np.datetime64("2020-01-01") + np.arange(30)
    steps = np.repeat([1.0, 5.0, 2.0], 10) + 0.3 * np.random.default_rng(1).standard_normal(30)
    signal.write_text("date,rain\n" + "\n".join(f"{day},{value}" for day, value in zip(days, steps, strict=True)))
    done("trend", "--signal", signal, "--output", output, "--weight", "bic")
    run = finish(tmp_path / "run", "trend", signal=str(signal), weight="bic")
    (record,) = run.records
    assert (tmp_path / "run" / "fit.csv").read_text() == output.read_text()
    summary = json.loads((tmp_path / "smooth-summary.json").read_text())
    assert record | {"seconds": 0} == summary | {"seconds": 0, "unit": "fit"}
    assert record["weight_rule"] == "bic"
    assert set(type(run.task).columns) <= record.keys()
    (axes,) = pictures_of(run).values()
    assert (axes[0].get_xlabel(), axes[0].get_ylabel()) == ("date", "rain")
    # Another content of the file is another run.
    before = run.task.inputs()
    signal.write_text(signal.read_text().replace("2020", "2021"))
    assert run.task.inputs() != before


def test_what_a_task_cannot_do_is_found_by_its_check() -> None:
    penalty = {"penalty": {"name": "l0", "weight": 10}}
    for task, values, words in (
        ("trend", {"signal": "absent.csv"}, "no file absent.csv"),
        ("doge_convergence.Convergence", TINY | penalty, "certified optimum"),
    ):
        (run,) = expand({"name": "x", "task": task, **values}, allow_code=True)
        with pytest.raises(ValueError, match=words):
            run.task.check()


def test_a_race_compares_methods_on_one_problem(tmp_path: Path) -> None:
    given, methods = {**TINY, "repeats": 2, "tol": 1e-5}, ("doge", "gtf_admm", "fast_admm")
    runs = [finish(tmp_path / method, "doge_race.Race", **given, method=method) for method in methods]
    first = [run.records[0] for run in runs]
    for record in first:
        assert record["status"] == "CONVERGED"
        assert record["gap"] <= 1e-5
        assert record["mse_after"] < record["mse_before"]
        assert record["seconds"] > 0
        assert set(Race.columns) <= record.keys()
    objectives = [record["objective"] for record in first]
    assert max(objectives) / min(objectives) - 1 <= 1e-5
    assert [record["algorithm"] for record in first] == ["doge", "admm", "fast_admm"]
    assert first[2]["inner_steps"] > first[2]["steps"]
    # Repeats have noise of their own, the same for every method.
    assert runs[0].records[1]["mse_before"] == runs[1].records[1]["mse_before"] != first[0]["mse_before"]
    # A fit that stands still need not be there.
    still = {"method": "doge", "settings": "published", "stop": "change", "tol": 1e-4}
    (record,) = finish(tmp_path / "still", "doge_race.Race", **TINY, **still, repeats=1).records
    assert (record["status"], record["gap"] > 1e-5) == ("CONVERGED", True)
    pictures = pictures_of(*runs)
    assert pictures.keys() == {"pictures", "seconds"}
    assert np.shape(pictures["pictures"]) == (1, 3)
    (axis,) = pictures["seconds"]
    assert "(s)" in axis.get_xlabel()
    assert [text.get_text() for text in axis.get_yticklabels()] == ["Doge-ADMM", "GTF-ADMM", "fast ADMM"]
    assert Race.draw(runs[:1]).keys() == {"pictures"}


def test_convergence_records_losses_above_the_optimum(tmp_path: Path) -> None:
    contenders = [{"method": "doge"}, {"method": "fast_admm", "settings": "published"}]
    run = finish(tmp_path, "doge_convergence.Convergence", **TINY, passes=1, contenders=contenders)
    for record in run.records:
        with np.load(tmp_path / f"history-{record['unit']}.npz") as stored:
            loss, gap, looks, seconds = (stored[n] for n in ("loss", "gap", "look_steps", "look_seconds"))
        assert loss.size == record["steps"] + 1
        assert loss.min() >= -1e-9
        # The gap is an upper bound on the loss at every step.
        assert (gap[1:] >= loss[1:] - 2e-9).all()
        assert loss[record["steps_to_1e-4"]] <= 1e-4 < loss[record["steps_to_1e-4"] - 1]
        assert (looks[0], seconds[0], looks[-1]) == (0, 0, record["steps"])
        assert (np.diff([looks, seconds]) > 0).all()
        assert 0 < record["seconds_to_1e-4"] <= record["seconds_to_1e-6"] <= record["seconds"]
    axes = pictures_of(run)["convergence"]
    assert [axis.get_xlabel() for axis in axes] == ["time (s)", "iteration"]
    assert all("optimum" in axis.get_ylabel() for axis in axes)
    assert len(axes[0].get_lines()) == 2


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_config_is_one_of_this_version_and_those_of_trends_can_run(file: Path) -> None:
    runs = load_config(file, allow_code=True)
    assert runs
    if not hasattr(runs[0].task, "source"):  # of a model, which need not be there
        text = file.read_text(encoding="utf-8")
        assert text.startswith("# Needs --allow-code" if file.parent == PAPERS else "# ")
        assert re.search(r"^# .*Time: \d+", text, re.MULTILINE)
        for run in runs:
            assert run.task.name == file.stem
            run.task.check()


# What makes an experiment small: settings that leave its kind and its comparison with the paper as they are.
SMALL = {
    "doge-table1-order1": [
        "picture.size=12", "repeats=2", "sweep.list=[{settings: published, stop: change}]",
        "sweep.grid.method=[doge_groups]",
    ],
    "doge-groupings": ["shape=[6]"],
    "denoise-medical": ["sweep.list=[{picture: {name: shepp_logan_phantom, size: 12}}]"],
    "denoise-volume": ["picture.crop=[80, 80, 70, 12, 10, 4]"],
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_shipped_configs_run_to_a_report_when_cut_down(name: str, tmp_path: Path) -> None:
    (path,) = CONFIGS.rglob(f"{name}.yaml")
    allowed = path.parent == PAPERS
    planned = plan(load_config(path, SMALL[name], allow_code=allowed), tmp_path / "runs")
    check_all(planned, again=False)
    outcomes = run_all(planned, tmp_path / "runs", lambda _: quiet)
    assert [outcome.error for outcome in outcomes] == [None] * len(planned)
    sections = gather([tmp_path / "runs"], allow_code=allowed)
    written = {file.suffix for file in write_report(sections, tmp_path / "report")}
    assert written >= {".csv", ".md", ".html", ".png"}
    table, paper = sections[0].table(), planned[0].run.task.paper
    assert len(table.rows) >= len(planned)
    published = [heading for heading in table.headings if heading.endswith("(paper)")]
    assert bool(published) == bool(paper and paper.figures)
    for record in [record for run in sections[0].runs for record in run.records if "psnr_after" in record]:
        assert record["psnr_after"] > record["psnr_before"]
    if name == "doge-groupings":
        assert all(record["disjoint"] and record["complete"] for run in sections[0].runs for record in run.records)
    if name == "doge-table1-order1":
        assert table.rows[0][table.headings.index("seconds (paper)")] == "0.493"
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert all(sentence in text for sentence in (paper.differs if paper else ()))

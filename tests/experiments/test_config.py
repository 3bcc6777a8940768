"""Configs: all mistakes at once with their position; overrides, sweeps, names, and paths, imported where allowed."""

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError, model_validator

import sparseopt as so
from sparseopt.experiments.config import ConfigError, expand, find_config, load_config
from sparseopt.experiments.names import PenaltyConfig, TrendMethod, find_class, may_import
from sparseopt.experiments.report import gather
from sparseopt.experiments.runs import execute
from sparseopt.system.yaml_file import parse_yaml, write_yaml
from tests.experiments.inputs import TOY, quiet
from tests.experiments.toy import CappedL1, Toy

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
PAPERS = CONFIGS / "papers"


class Even(Toy):
    """A task with a rule over two settings."""

    @model_validator(mode="after")
    def _seed_divides_count(self):
        if self.count % (self.seed or 1):
            raise ValueError(f"count {self.count} is no multiple of the seed {self.seed}")
        return self


@pytest.fixture
def load(tmp_path):
    """The runs of a config with this text."""

    def load(text, overrides=(), name="x", task="denoise"):
        path = tmp_path / "experiment.yaml"
        head = f"name: {name}\ntask: {task}\n" if name else ""
        path.write_text(head + textwrap.dedent(text))
        return load_config(path, overrides, allow_code=True)

    return load


def test_five_mistakes_make_one_message_of_five_lines_each_with_its_place_and_a_suggestion(load, tmp_path):
    text = """\
        picture: {name: camera, size: 32}
        oder: 1
        penalty: {name: l1, wieght: 10}
        method: doga
        tol: -1
        """
    with pytest.raises(ConfigError) as caught:
        load(text, task="denoize")
    first, *lines = str(caught.value).splitlines()
    assert first == f"{tmp_path / 'experiment.yaml'} cannot be used, 5 mistakes:"
    expected = {
        "line 2: task": "did you mean 'denoise'?",
        "line 4: oder": "did you mean 'order'?",
        "line 5: penalty.wieght": "did you mean 'weight'?",
        "line 6: method": "did you mean 'doge'?",
        "line 7: tol": "greater than 0, given -1",
    }
    assert len(lines) == 5
    for place, suggestion in expected.items():
        (line,) = [line for line in lines if line.startswith(f"  {place}: ")]
        assert suggestion in line


def test_what_no_single_key_is_to_blame_for_is_a_mistake_of_the_run(load):
    with pytest.raises(ConfigError) as caught:
        load("count: 4\nseed: 3", task="tests.experiments.test_config.Even")
    assert str(caught.value).endswith(" cannot be used, 1 mistake:\n  the run: count 4 is no multiple of the seed 3")


TEXTS = [
    ("name: [", "line 1, column 8: not valid YAML"),
    ("- a\n- b", "must hold a mapping"),
    ("name: x\ntask: denoise\nname: y", "line 3: name is given twice"),
    ("name: x", "task: this key is missing; known tasks are denoise"),
    ("name: x\ntsk: trend", "line 2: tsk: no such key; did you mean 'task'?"),
    ("name: a/b\ntask: denoise", "name: string should match pattern"),
]


@pytest.mark.parametrize(("text", "words"), TEXTS)
def test_a_text_that_is_no_config_is_refused_with_the_place(load, text, words):
    with pytest.raises(ConfigError) as caught:
        load(text, name=None)
    assert words in str(caught.value)


ENDED = "has ended: `parameters` is the budget of a smaller model"
DESCENT, RACE = "maiht_descent.Descent", "doge_race.Race"
# The task and its settings, and what is said.
REFUSED = [
    ("denoise", {"sweep": {"gird": {"seed": [0]}}}, "sweep.gird: no such key; did you mean 'grid'?"),
    ("denoise", {"sweep": {"grid": {"seed": 0}}}, "sweep.grid.seed: input should be a valid list, given 0"),
    ("denoise", {"sweep": {"list": [{"seed": 1}, {"seed": 1}]}}, "the run seed=1 appears twice"),
    ("denoise", {"sweep": {"grid": {"seed": [1]}, "list": [{"seed": 2}]}}, "seed is varied by grid and by list"),
    ("denoise", {"sweep": {"grid": {"seed": [0, -1]}}}, "sweep.grid.seed: input should be greater"),
    ("tests.experiments.toy.Tyo", {}, "did you mean 'Toy'?"),
    ("tests.experiments.toy.CappedL1", {}, "is no subclass of"),
    ("no_such_package.Task", {}, "no module 'no_such_package'"),
    ("race", {}, f"the task 'race' has left the package: it is {RACE}, in configs/papers"),
    ("graph_signal", {}, "the task 'graph_signal' has ended: `trend` smooths a signal on a graph in your own files"),
    ("descent", {}, f"the task 'descent' has left the package: it is {DESCENT}, in configs/papers"),
    ("denoise", {"method": {"name": "doge", "b": 1}}, "b: doge has no such argument"),
    ("denoise", {"method": {"name": "doge", "relaxation": 3}}, "given rho=None, relaxation=3"),
    ("denoise", {"method": "dogs"}, "did you mean 'doge'"),
    ("denoise", {"penalty": {"name": "l11", "weight": 1}}, "did you mean 'l1'?"),
    ("denoise", {"penalty": {"name": "l1"}}, "weight: l1 needs this argument"),
    ("denoise", {"penalty": {"name": "sparseopt.Graph", "num_nodes": 3}}, "is no penalty: it has no method value"),
    ("denoise", {"penalty": {"name": "tests.experiments.toy.CapedL1", "weight": 1}}, "did you mean 'CappedL1'?"),
    ("prune", {"method": "wunda"}, "did you mean 'wanda'?"),
    ("prune", {"method": "sparseopt.pruning.Wonda"}, "did you mean 'Wanda'?"),
    ("prune", {"sparsity": 1.0}, "sparsity: input should be less than 1, given 1.0"),
    ("prune", {"pattern": "2:x"}, "  pattern: unknown pattern '2:x'; known are 'unstructured'"),
    ("prune", {"pattern": "1:4", "sparsity": 0.5}, "  pattern: pattern '1:4' has sparsity 0.75, which contradicts"),
    ("prune", {"preset": "pape"}, "did you mean 'paper'?"),
    ("prune", {"bos": "always"}, "bos"),
    ("prune", {"bounds": "low"}, "two fractions of zeros, 0 <= low <= high < 1, as in 0.3,0.8"),
    ("shrink", {}, "nothing would go"),
    ("shrink", {"channel": 0.5}, "did you mean 'channels'?"),
    ("shrink", {"channels": 1.5}, "channels: input should be less than or equal to 1, given 1.5"),
    ("shrink", {"channels": 0.5, "method": "wunda"}, "did you mean 'wanda'?"),
    ("shrink", {"latency": 0.8}, f"latency: {ENDED}"),
    ("shrink", {"layers": 0.9, "block_score": "cosine"}, "block_score: has ended: blocks are always removed by the"),
    ("prune", {"allocation": "owl"}, "allocation: owl has ended: `curves` distributes the sparsity"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "settings", "words"), REFUSED)
def test_a_config_that_cannot_be_used_is_refused_with_where_and_why(task, settings, words):
    with pytest.raises(ConfigError) as caught:
        expand({"name": "x", "task": task, **settings}, allow_code=True)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", sorted(path.stem for path in PAPERS.glob("*.yaml")))
def test_tasks_of_the_papers_are_imported_only_where_that_is_allowed(name):
    with pytest.raises(ConfigError, match="importing it runs whatever code its module holds"):
        load_config(PAPERS / f"{name}.yaml")


OVERRIDES = [
    ("", ["seed"], "expected key=value"),
    ("", ["seed=3", "seed.deep=1"], "cannot set seed.deep: seed is 3 and not a block"),
    ("sweep: {grid: {seed: [0, 1]}}", ["seed=3"], "the sweep sets seed for every run; change it there"),
    ("sweep: {list: [{penalty: {name: l1}}]}", ["penalty.weight=3"], "the sweep sets penalty for every run; change it"),
    ("sweep: {list: 5}", ["seed=3"], "sweep.list: input should be a valid list"),
]


@pytest.mark.parametrize(("text", "overrides", "words"), OVERRIDES)
def test_an_override_that_cannot_be_used_is_named(load, text, overrides, words):
    with pytest.raises(ConfigError) as caught:
        load(text, overrides)
    assert words in str(caught.value)


def test_a_name_is_a_file_or_else_a_config_of_the_package_and_an_unknown_one_gets_the_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        find_config(Path("denoise-volume"))
        == find_config(Path("denoise-volume.yaml"))
        == CONFIGS / "denoise-volume.yaml"
    )
    assert {run.task.name for run in load_config(Path("denoise-volume"))} == {"denoise-volume"}
    for path in (tmp_path / "denoise-volume", Path("../configs/denoise-volume"), Path("papers")):
        with pytest.raises(ConfigError, match=r"no config file .*; the configs that come with .* denoise-volume, mai"):
            find_config(path)
    Path("denoise-volume").touch()
    assert find_config(Path("denoise-volume")) == Path("denoise-volume")


def test_overrides_reach_blocks_and_read_yaml_values_and_give_way_to_an_item_of_a_sweep(load):
    (run,) = load("count: 2", ["count=5", "pause=1e-3", "title=a b"], task=TOY)
    assert (run.task.count, run.task.pause, run.task.title) == (5, 1e-3, "a b")
    (run,) = load("scale: 2e3", task=TOY)
    assert run.task.scale == 2000.0
    runs = load("sweep: {list: [{count: 2}, {count: 3, scale: 2.0}]}", ["scale=5.0"], task=TOY)
    assert [run.task.scale for run in runs] == [5.0, 2.0]


NUMBERS = {
    "2:4": "2:4", "010": "010", "0x10": 16, "1_000": 1000, "1e-6": 1e-6, ".5": 0.5, "-3": -3, "-.inf": -np.inf,
    "2026-11-29": "2026-11-29",
}  # fmt: skip


@pytest.mark.parametrize(("text", "value"), NUMBERS.items())
def test_numbers_are_those_of_yaml_1_2_and_what_is_written_is_read_again(text, value):
    assert parse_yaml(text, "a test") == value
    values = {"text": text, "value": value, "others": ["08", "1e3", "yes", "null", 8]}
    assert parse_yaml(write_yaml(values), "a test") == values


def test_a_grid_takes_all_combinations_and_a_list_those_given():
    sweep = {"grid": {"seed": [0, 1], "count": [2, 3]}, "list": [{"scale": 1.0}, {"scale": 0.5, "pause": 0.1}]}
    runs = expand({"name": "x", "task": TOY, "sweep": sweep}, allow_code=True)
    assert len(runs) == 8
    assert runs[0].id == "scale=1,seed=0,count=2"
    assert runs[-1].id == "scale=0.5,pause=0.1,seed=1,count=3"
    assert runs[-1].task.pause == 0.1
    assert len({run.subfolder for run in runs}) == 8
    assert all(len(run.subfolder.parts) == 2 for run in runs)


def test_a_block_is_set_before_what_is_set_inside_it():
    """In whatever order a sweep names them."""
    grid = {"penalty.weight": [1, 2], "penalty": [{"name": "mcp", "weight": 5}]}
    runs = expand({"name": "x", "task": "denoise", "sweep": {"grid": grid}})
    assert [run.task.penalty.build() for run in runs] == [so.MCP(1), so.MCP(2)]


def test_the_folder_of_a_run_names_what_its_sweep_varies():
    named = [{"penalty": {"name": name, "weight": weight}} for name, weight in (("l1", 1), ("l1", 10), ("l0", 1))]
    for sweep, folders in (
        ([], ["x"]),
        ([{}, {"seed": 1}], ["x/unchanged", "x/seed=1"]),
        (named, ["x/penalty=l1+weight_1", "x/penalty=l1+weight_10", "x/penalty=l0"]),
    ):
        varied = {"sweep": {"list": sweep}} if sweep else {}
        assert [str(run.subfolder) for run in expand({"name": "x", "task": "denoise", **varied})] == folders


def test_names_and_paths_build_the_same_kind_of_object():
    assert PenaltyConfig.model_validate({"name": "mcp", "weight": 2, "gamma": 4}).build() == so.MCP(2, 4)
    fields = {"name": "tests.experiments.toy.CappedL1", "weight": 2.0}
    own = PenaltyConfig.model_validate(fields, context={"allow_code": True})
    assert own.build() == CappedL1(2.0)
    assert own.label == "CappedL1(weight=2)"
    assert own.code_digest()
    with pytest.raises(ValidationError, match="outside sparseopt"):
        PenaltyConfig.model_validate(fields)
    assert TrendMethod.model_validate("doge").build() == so.trend.Doge()
    assert TrendMethod.model_validate({"name": "doge", "B": 2}).build() == so.trend.Doge(B=2)
    (run,) = expand({"name": "x", "task": "denoise", "method": {"name": "doge", "B": 1}})
    assert run.task.label == "doge(B=1)"


MODULE = "from pathlib import Path\n\nfrom tests.experiments.toy import Toy\n\nPath('imported').touch()\n\n\n"
CLASS = "class Mine(Toy):\n    pass\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A config beside a module that leaves a file when it is imported."""
    name = f"mine_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE + CLASS)
    (tmp_path / "mine.yaml").write_text(f"name: mine\ntask: {name}.Mine\ntitle: A toy\ncount: 2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def test_without_the_flag_nothing_is_imported_and_the_flag_is_named(folder, command):
    for arguments in (["run", "mine.yaml"], ["run", "mine.yaml", "--dry-run"]):
        status, _, err = command(*arguments, "--output", folder / "runs")
        assert status == 2
        assert f"line 2: task: 'mine_{folder.name}.Mine' is the path of a task outside sparseopt" in err
        assert "--allow-code" in err
        assert f"--allow-package mine_{folder.name}" in err
    status, _, err = command("compare", "nowhere", "--output", folder / "out", "--methods", f"mine_{folder.name}.Mine")
    assert (status, "is the path of a pruning method outside sparseopt" in err) == (2, True)
    assert not (folder / "imported").exists()
    assert str(folder) not in sys.path


def test_with_the_flag_it_runs_and_reports_need_it_too(folder, command):
    assert command("run", "mine.yaml", "--output", "runs", "--allow-code")[0] == 0
    assert (folder / "imported").exists()
    (folder / "imported").unlink()
    sys.modules.pop(f"mine_{folder.name}")
    status, _, err = command("report", "runs")
    assert (status, "outside sparseopt" in err) == (2, True)
    assert not (folder / "imported").exists()
    assert command("report", "runs", "--allow-code")[0] == 0


def test_a_package_alone_is_looked_up_among_the_installed_ones(folder, command):
    for package, said in ((f"mine_{folder.name}", f"no module 'mine_{folder.name}'"), ("mine", "outside sparseopt")):
        status, _, err = command("run", "mine.yaml", "--allow-package", package)
        assert (status, said in err) == (2, True), err
    sys.path.append(str(folder))
    assert command("run", "mine.yaml", "--output", "runs", "--allow-package", f"mine_{folder.name}")[0] == 0


@pytest.mark.processes
def test_in_processes_classes_beside_a_config_are_found_and_take_no_package_s_place(folder):
    """An optional package that is not installed must not come from the folder of a config."""
    (folder / "matplotlib_absent.py").write_text("raise SystemExit('hijacked')")
    main = "from sparseopt.shell.app import main\n"
    after = f"{main}try: main()\nexcept SystemExit: pass\nimport matplotlib_absent"

    def process(code, *arguments):
        call, environment = [sys.executable, "-P", "-c", code, *arguments], {"PYTHONPATH": str(ROOT)}
        return subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True, check=False)

    assert "No module named 'matplotlib_absent'" in process(after, "run", "mine.yaml").stderr
    for arguments in (["run", "mine.yaml", "--output", "runs"], ["report", "runs"]):
        done = process(f"{main}main()", *arguments, "--allow-code")
        assert done.returncode == 0, done.stderr
    assert "A toy" in done.stdout


def test_in_python_the_default_allows_nothing_and_a_list_its_packages(folder):
    sys.path.append(str(folder))
    with pytest.raises(ConfigError, match="outside sparseopt"):
        load_config(Path("mine.yaml"))
    with pytest.raises(ConfigError, match="outside sparseopt"):
        load_config(Path("mine.yaml"), allow_code=["tests"])
    assert not (folder / "imported").exists()
    (run,) = load_config(Path("mine.yaml"), allow_code=[f"mine_{folder.name}"])
    assert execute(run, folder / "runs", quiet).error is None
    with pytest.raises(ValueError, match="outside sparseopt"):
        gather([folder / "runs"])
    assert gather([folder / "runs"], allow_code=True)[0].name == "mine"


def test_which_paths_a_permission_covers():
    assert may_import("a.b", True)
    assert not may_import("a.b", False)
    assert may_import("a.b.c", ["a"])
    assert may_import("a.b.c", ["x", "a.b"])
    assert may_import("a.b", "a")
    assert not may_import("ab.c", ["a"])
    assert not may_import("a.b", [])


def test_classes_of_ours_always_go_by_their_path_and_nothing_else_of_ours_does():
    assert find_class("sparseopt.L1", {}, "penalty") is so.L1
    assert find_class("sparseopt.core.penalties.entries.L1", {}, "penalty") is so.L1
    for path in ("sparseopt.system.files.Path", "sparseopt.pruning.prune_model", "sparseopt.experiments.runs.execute"):
        with pytest.raises(ValueError, match="is no class of sparseopt"):
            find_class(path, {}, "penalty")
    with pytest.raises(ValueError, match="no module 'no_such'"):
        find_class("no_such.X", {}, "penalty", allow_code=True)


def test_what_was_validated_is_what_is_built(monkeypatch):
    fields = {"name": "tests.experiments.toy.CappedL1", "weight": 2.0}
    own = PenaltyConfig.model_validate(fields, context={"allow_code": True})
    monkeypatch.delitem(sys.modules, "tests.experiments.toy")
    assert type(own.build()).__name__ == "CappedL1"
    assert "tests.experiments.toy" not in sys.modules


def test_a_name_of_a_run_never_leaves_the_output_folder(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "name: a\ntask: denoise\npaper: {source: x, figures: [{values: {}}]}\n"
        "sweep: {list: [{'paper.source': '../../x'}, {'title': '..'}]}\n"
    )
    for run in load_config(tmp_path / "a.yaml"):
        assert (tmp_path / run.subfolder).resolve().parent == (tmp_path / "a").resolve()

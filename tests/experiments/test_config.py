"""Configs: all mistakes at once with their position; overrides, sweeps, names, and paths, imported where allowed."""

import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import sparseopt as so
from sparseopt.experiments.config import ConfigError, expand, find_config, load_config
from sparseopt.experiments.names import PenaltyConfig, TrendMethod, find_class
from sparseopt.system.yaml_file import parse_yaml, write_yaml
from tests.experiments.inputs import TOY
from tests.experiments.toy import CappedL1

CONFIGS = Path(__file__).parents[2] / "configs"
CAPPED = {"name": "tests.experiments.toy.CappedL1", "weight": 2.0}


@pytest.fixture
def load(tmp_path):
    """The runs of a config with this text."""

    def load(text, overrides=(), task=TOY):
        path = tmp_path / "experiment.yaml"
        path.write_text(f"name: x\ntask: {task}\n{textwrap.dedent(text)}")
        return load_config(path, overrides, allow_code=True)

    return load


def test_five_mistakes_make_one_message_of_five_lines_each_with_its_place_and_a_suggestion(load):
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
    assert first.endswith("experiment.yaml cannot be used, 5 mistakes:")
    expected = {
        "line 2: task": "'denoise'?", "line 4: oder": "'order'?", "line 5: penalty.wieght": "'weight'?",
        "line 6: method": "'doge'?", "line 7: tol": "greater than 0, given -1",
    }  # fmt: skip
    assert len(lines) == 5
    for place, words in expected.items():
        (line,) = [line for line in lines if line.startswith(f"  {place}: ")]
        assert words in line


# A text, or a task with its settings; what is said; overrides.
REFUSED = [
    ("name: [", "line 1, column 8: not valid YAML"),
    ("- a\n- b", "must hold a mapping"),
    ("name: x\ntask: denoise\nname: y", "line 3: name is given twice"),
    ("name: x", "task: this key is missing; known tasks are denoise"),
    ("name: x\ntsk: trend", "line 2: tsk: no such key; did you mean 'task'?"),
    ({"task": "denoise"}, "'seed': expected key=value", "seed"),
    ({"task": "denoise"}, "cannot set seed.deep: seed is 3", "seed=3", "seed.deep=1"),
    ({"task": "denoise", "sweep": {"grid": {"seed": [0, 1]}}}, "the sweep sets seed for every run", "seed=3"),
    ({"task": "denoise", "sweep": {"list": [{"penalty": {"name": "l1"}}]}}, "sweep sets penalty", "penalty.weight=3"),
    ({"task": "denoise", "sweep": {"list": 5}}, "sweep.list: input should be a valid list", "seed=3"),
    ({"task": "denoise", "sweep": {"gird": {"seed": [0]}}}, "sweep.gird: no such key; did you mean 'grid'?"),
    ({"task": "denoise", "sweep": {"grid": {"seed": 0}}}, "sweep.grid.seed: input should be a valid list, given 0"),
    ({"task": "denoise", "sweep": {"list": [{"seed": 1}, {"seed": 1}]}}, "the run seed=1 appears twice"),
    ({"task": "denoise", "sweep": {"grid": {"seed": [1]}, "list": [{"seed": 2}]}}, "seed is varied by grid and by"),
    ({"task": "denoise", "sweep": {"grid": {"seed": [0, -1]}}}, "sweep.grid.seed: input should be greater"),
    ({"task": "tests.experiments.toy.Tyo"}, "did you mean 'Toy'?"),
    ({"task": "tests.experiments.toy.CappedL1"}, "is no subclass of"),
    ({"task": "no_such_package.Task"}, "no module 'no_such_package'"),
    ({"task": "trend", "signal": "x.csv", "merge": True}, "  the run: merge belongs to the edges"),
    ({"task": "denoise", "method": {"name": "doge", "b": 1}}, "b: doge has no such argument"),
    ({"task": "denoise", "method": {"name": "doge", "relaxation": 3}}, "relaxation=3"),
    ({"task": "denoise", "penalty": {"name": "l11", "weight": 1}}, "did you mean 'l1'?"),
    ({"task": "denoise", "penalty": {"name": "l1"}}, "weight: l1 needs this argument"),
    ({"task": "denoise", "penalty": {"name": "sparseopt.Graph", "num_nodes": 3}}, "no penalty: it has no method value"),
    ({"task": "prune", "method": "sparseopt.pruning.Wonda"}, "did you mean 'Wanda'?"),
    ({"task": "prune", "sparsity": 1.0}, "sparsity: input should be less than 1, given 1.0"),
    ({"task": "prune", "pattern": "1:4", "sparsity": 0.5}, ": pattern: pattern '1:4' has sparsity 0.75"),
    ({"task": "prune", "bounds": "low"}, "two fractions of zeros"),
    ({"task": "prune", "allocation": "owl"}, "allocation: owl has ended: `curves`"),
    ({"task": "shrink"}, "nothing would go"),
    ({"task": "shrink", "latency": 0.8}, "latency: has ended: `parameters`"),
]


@pytest.mark.parametrize("row", REFUSED, ids=str)
def test_a_config_or_an_override_that_cannot_be_used_is_refused_with_where_and_why(tmp_path, row):
    given, words, *overrides = row
    path = tmp_path / "experiment.yaml"
    path.write_text(given if isinstance(given, str) else write_yaml({"name": "x", **given}))
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, allow_code=True)
    assert words in str(caught.value)


def test_a_name_is_a_file_or_else_a_config_of_the_package_and_an_unknown_one_gets_the_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("denoise-volume", "denoise-volume.yaml"):
        assert find_config(Path(name)) == CONFIGS / "denoise-volume.yaml"
    assert {run.task.name for run in load_config(Path("denoise-volume"))} == {"denoise-volume"}
    for path in (tmp_path / "denoise-volume", Path("../configs/denoise-volume"), Path("papers")):
        with pytest.raises(ConfigError, match=r"no config file .* denoise-volume, mai"):
            find_config(path)
    Path("denoise-volume").touch()
    assert find_config(Path("denoise-volume")) == Path("denoise-volume")


def test_overrides_reach_blocks_and_read_yaml_values_and_give_way_to_an_item_of_a_sweep(load):
    (run,) = load("count: 2\nscale: 2e3", ["count=5", "pause=1e-3", "title=a b"])
    assert (run.task.count, run.task.pause, run.task.title, run.task.scale) == (5, 1e-3, "a b", 2000.0)
    (run,) = load("penalty: {name: l1, weight: 1}", ["penalty.weight=3"], task="denoise")
    assert run.task.penalty.build() == so.L1(3)
    runs = load("sweep: {list: [{count: 2}, {count: 3, scale: 2.0}]}", ["scale=5.0"])
    assert [run.task.scale for run in runs] == [5.0, 2.0]


NUMBERS = {
    "2:4": "2:4", "010": "010", "0x10": 16, "1_000": 1000, "1e-6": 1e-6, ".5": 0.5, "-3": -3, "-.inf": -np.inf,
    "2026-11-29": "2026-11-29",
}  # fmt: skip


@pytest.mark.parametrize(("text", "value"), NUMBERS.items())
def test_numbers_are_those_of_yaml_1_2(text, value):
    assert parse_yaml(text, "a test") == value


# Ends of lines of Unicode too, which YAML folds unless they are quoted.
TEXT = st.text(st.characters(codec="utf-8") | st.sampled_from("\x85\u2028\u2029"), max_size=9)
PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXT
LIKE_NUMBERS = st.text("-+0123456789_:.e", min_size=1, max_size=8) | st.sampled_from([*NUMBERS, "yes", "null", "~"])


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(TEXT, st.lists(PLAIN | LIKE_NUMBERS, max_size=4), max_size=4))
def test_what_is_written_is_read_again(values):
    assert parse_yaml(write_yaml(values), "a test") == values


def test_a_grid_takes_all_combinations_and_a_list_those_given():
    sweep = {"grid": {"seed": [0, 1], "count": [2, 3]}, "list": [{"scale": 1.0}, {"scale": 0.5, "pause": 0.1}]}
    runs = expand({"name": "x", "task": TOY, "sweep": sweep}, allow_code=True)
    assert len(runs) == 8
    assert runs[0].id == "scale=1,seed=0,count=2"
    assert runs[-1].id == "scale=0.5,pause=0.1,seed=1,count=3"
    assert runs[-1].task.pause == 0.1
    assert len({run.subfolder for run in runs}) == 8
    # A block is set before what is set inside it, in whatever order a sweep names them.
    grid = {"penalty.weight": [1, 2], "penalty": [{"name": "mcp", "weight": 5}]}
    runs = expand({"name": "x", "task": "denoise", "sweep": {"grid": grid}})
    assert [run.task.penalty.build() for run in runs] == [so.MCP(1), so.MCP(2)]


def test_the_folder_of_a_run_names_what_its_sweep_varies_and_never_leaves_the_output_folder():
    named = [{"penalty": {"name": name, "weight": weight}} for name, weight in (("l1", 1), ("l1", 10), ("l0", 1))]
    for sweep, folders in (
        ([], ["x"]),
        ([{}, {"seed": 1}], ["x/unchanged", "x/seed=1"]),
        (named, ["x/penalty=l1+weight_1", "x/penalty=l1+weight_10", "x/penalty=l0"]),
        ([{"title": "../../x"}, {"title": ".."}], ["x/title=.._.._x", "x/title=.."]),
    ):
        varied = {"sweep": {"list": sweep}} if sweep else {}
        assert [str(run.subfolder) for run in expand({"name": "x", "task": "denoise", **varied})] == folders


def test_names_and_paths_build_the_same_kind_of_object(monkeypatch):
    assert PenaltyConfig.model_validate({"name": "mcp", "weight": 2, "gamma": 4}).build() == so.MCP(2, 4)
    own = PenaltyConfig.model_validate(CAPPED, context={"allow_code": True})
    assert own.build() == CappedL1(2.0)
    assert own.label == "CappedL1(weight=2)"
    assert len(own.code_digest()) == 64
    with pytest.raises(ValidationError, match="outside sparseopt"):
        PenaltyConfig.model_validate(CAPPED)
    assert TrendMethod.model_validate("doge").build() == so.trend.Doge()
    (run,) = expand({"name": "x", "task": "denoise", "method": {"name": "doge", "B": 1}})
    assert (run.task.label, run.task.method.build()) == ("doge(B=1)", so.trend.Doge(B=1))
    # What was validated is what is built.
    monkeypatch.delitem(sys.modules, "tests.experiments.toy")
    assert type(own.build()).__name__ == "CappedL1"
    assert "tests.experiments.toy" not in sys.modules


MODULE = "from pathlib import Path; from tests.experiments.toy import Toy as Mine; Path('imported').touch()"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A config beside a module that leaves a file when it is imported."""
    name = f"mine_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / "mine.yaml").write_text(f"name: mine\ntask: {name}.Mine\ntitle: A toy\ncount: 2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def test_without_the_flag_nothing_is_imported_and_the_flag_is_named(folder, command):
    package = f"mine_{folder.name}"
    for call in (
        ["run", "mine.yaml", "--dry-run"], ["run", "mine.yaml", "--allow-package", "mine"],
        ["compare", "nowhere", "--methods", f"{package}.Mine"],
    ):  # fmt: skip
        status, _, err = command(*call, "--output", folder / "runs")
        assert (status, f"'{package}.Mine' is the path of a" in err) == (2, True), err
        assert "--allow-code" in err
        assert f"--allow-package {package}" in err
    for config in (CONFIGS / "papers").glob("*.yaml"):
        with pytest.raises(ConfigError, match="outside sparseopt"):
            load_config(config, allow_code=["tests"])
    assert not (folder / "imported").exists()
    assert str(folder) not in sys.path


def test_with_the_flag_it_runs_and_reports_need_it_too_and_a_package_alone_has_to_be_installed(folder, command):
    package = f"mine_{folder.name}"
    status, _, err = command("run", "mine.yaml", "--allow-package", package)
    assert (status, f"no module '{package}'" in err) == (2, True), err
    assert command("run", "mine.yaml", "--output", "runs", "--allow-code")[0] == 0
    (folder / "imported").unlink()
    sys.modules.pop(package)
    status, _, err = command("report", "runs")
    assert (status, "outside sparseopt" in err) == (2, True)
    assert not (folder / "imported").exists()
    assert str(folder) in sys.path  # from now on, as an installed package
    assert command("report", "runs", "--allow-package", package)[0] == 0


def test_classes_of_ours_always_go_by_their_path_and_nothing_else_of_ours_does():
    for path in ("sparseopt.L1", "sparseopt.core.penalties.entries.L1"):
        assert find_class(path, {}, "penalty") is so.L1
    for path in ("sparseopt.system.files.Path", "sparseopt.pruning.prune_model", "sparseopt.experiments.runs.execute"):
        with pytest.raises(ValueError, match="is no class of sparseopt"):
            find_class(path, {}, "penalty")

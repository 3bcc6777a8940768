"""Configs: all mistakes reported at once with their position; overrides, sweeps, names and paths."""

import textwrap
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError, model_validator

import sparseopt as so
from sparseopt.experiments.config import ConfigError, expand, load_config
from sparseopt.experiments.names import PenaltyConfig, TrendMethod
from sparseopt.system.yaml_file import parse_yaml, write_yaml
from tests.experiments.toy import CappedL1, Toy

TOY = "tests.experiments.toy.Toy"


class Even(Toy):
    """A task with a rule over two settings."""

    @model_validator(mode="after")
    def _seed_divides_count(self):
        if self.count % (self.seed or 1):
            raise ValueError(f"count {self.count} is no multiple of the seed {self.seed}")
        return self


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "experiment.yaml"
        path.write_text(textwrap.dedent(text))
        return path

    return write


def test_five_mistakes_make_one_message_of_five_lines_each_with_its_place_and_a_suggestion(write):
    path = write("""\
        name: five
        task: denoize
        picture: {name: camera, size: 32}
        oder: 1
        penalty: {name: l1, wieght: 10}
        method: doga
        tol: -1
        """)
    with pytest.raises(ConfigError) as caught:
        load_config(path, allow_code=True)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{path} cannot be used, 5 mistakes:"
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: [", "line 1, column 8: not valid YAML"),
        ("- a\n- b", "must hold a mapping"),
        ("name: x\ntask: denoise\nname: y", "line 3: name is given twice"),
        ("name: x", "task: this key is missing; known tasks are denoise"),
        ("name: x\ntask: denoise\nsweep: {gird: {seed: [0]}}", "sweep.gird: no such key; did you mean 'grid'?"),
        ("name: x\ntask: denoise\nsweep: {grid: {seed: 0}}", "sweep.grid.seed: input should be a valid list, given 0"),
        ("name: x\ntask: denoise\nsweep: {list: [{seed: 1}, {seed: 1}]}", "the run seed=1 appears twice"),
        ("name: x\ntask: denoise\nsweep: {grid: {seed: [1]}, list: [{seed: 2}]}", "seed is varied by grid and by list"),
        ("name: x\ntask: denoise\nsweep: {grid: {seed: [0, -1]}}", "sweep.grid.seed: input should be greater"),
        ("name: a/b\ntask: denoise", "name: string should match pattern"),
        ("name: x\ntask: tests.experiments.toy.Tyo", "did you mean 'Toy'?"),
        ("name: x\ntask: tests.experiments.toy.CappedL1", "is no subclass of"),
        ("name: x\ntask: no_such_package.Task", "no module 'no_such_package'"),
    ],
)
def test_what_cannot_be_used_says_where_and_why(write, text, expected):
    with pytest.raises(ConfigError) as caught:
        load_config(write(text), allow_code=True)
    assert expected in str(caught.value)


def test_what_no_single_key_is_to_blame_for_is_a_mistake_of_the_run(write):
    path = write("name: x\ntask: tests.experiments.test_config.Even\ncount: 4\nseed: 3")
    with pytest.raises(ConfigError) as caught:
        load_config(path, allow_code=True)
    assert str(caught.value) == f"{path} cannot be used, 1 mistake:\n  the run: count 4 is no multiple of the seed 3"


def test_a_missing_file_and_a_broken_override_are_named(write, tmp_path):
    with pytest.raises(ConfigError, match="there is no config file"):
        load_config(tmp_path / "none.yaml")
    path = write("name: x\ntask: denoise")
    with pytest.raises(ConfigError, match="expected key=value"):
        load_config(path, ["seed"])
    with pytest.raises(ConfigError, match=r"cannot set seed\.deep: seed is 3 and not a block"):
        load_config(path, ["seed=3", "seed.deep=1"])
    for sweep, key in (("{grid: {seed: [0, 1]}}", "seed"), ("{list: [{penalty: {name: l1}}]}", "penalty.weight")):
        path = write(f"name: x\ntask: denoise\nsweep: {sweep}")
        with pytest.raises(ConfigError, match=r"the sweep sets .* for every run; change it there"):
            load_config(path, [f"{key}=3"])
    path = write(f"name: x\ntask: {TOY}\nsweep: {{list: [{{count: 2}}, {{count: 3, scale: 2.0}}]}}")
    assert [run.task.scale for run in load_config(path, ["scale=5.0"], allow_code=True)] == [5.0, 2.0]
    with pytest.raises(ConfigError, match=r"sweep\.list: input should be a valid list"):
        load_config(write("name: x\ntask: denoise\nsweep: {list: 5}"), ["seed=3"])


def test_overrides_reach_blocks_and_read_yaml_values(write):
    path = write(f"name: x\ntask: {TOY}\ncount: 2")
    (run,) = load_config(path, ["count=5", "pause=1e-3", "title=a b"], allow_code=True)
    assert (run.task.count, run.task.pause, run.task.title) == (5, 1e-3, "a b")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2:4", "2:4"),
        ("010", "010"),
        ("0x10", 16),
        ("1_000", 1000),
        ("1e-6", 1e-6),
        (".5", 0.5),
        ("-3", -3),
        ("2026-11-29", "2026-11-29"),
        ("-.inf", -np.inf),
    ],
)
def test_numbers_are_those_of_yaml_1_2(text, value):
    assert parse_yaml(text, "a test") == value


def test_what_is_written_is_read_again():
    values = {
        "texts": ["08", "2:4", "1e3", "0x10", "1_000", "yes", "null", "2026-11-29"],
        "numbers": [8, 1e-6, -np.inf],
    }
    assert parse_yaml(write_yaml(values), "a test") == values


def test_numbers_without_a_point_are_numbers(write):
    (run,) = load_config(write(f"name: x\ntask: {TOY}\nscale: 2e3"), allow_code=True)
    assert run.task.scale == 2000.0


def test_a_grid_takes_all_combinations_and_a_list_those_given(write):
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
    runs = expand({"name": "x", "task": "denoise", "picture": {"name": "camera", "size": 32}, "sweep": {"grid": grid}})
    assert [run.task.penalty.build() for run in runs] == [so.MCP(1), so.MCP(2)]


def test_runs_that_differ_only_inside_a_named_block_have_names_of_their_own():
    scales = [{"penalty": {"name": "l1", "weight": weight}} for weight in (1, 10)]
    config = {"name": "x", "task": "denoise", "sweep": {"list": [*scales, {"penalty": {"name": "l0", "weight": 1}}]}}
    runs = expand({**config, "picture": {"name": "camera", "size": 32}})
    assert [run.id for run in runs] == ["penalty=l1+weight_1", "penalty=l1+weight_10", "penalty=l0"]


def test_an_item_that_varies_nothing_has_a_folder_beside_the_others():
    runs = expand({"name": "x", "task": TOY, "sweep": {"list": [{}, {"seed": 1}]}}, allow_code=True)
    assert [str(run.subfolder) for run in runs] == ["x/unchanged", "x/seed=1"]


def test_a_sweep_without_lists_is_one_run_in_the_experiments_own_folder():
    (run,) = expand({"name": "x", "task": TOY}, allow_code=True)
    assert str(run.subfolder) == "x"


def test_names_and_paths_build_the_same_kind_of_object():
    assert PenaltyConfig.model_validate({"name": "mcp", "weight": 2, "gamma": 4}).build() == so.MCP(2, 4)
    fields = {"name": "tests.experiments.toy.CappedL1", "weight": 2.0}
    own = PenaltyConfig.model_validate(fields, context={"allow_code": True})
    assert own.build() == CappedL1(2.0)
    assert own.label == "CappedL1(weight=2)"
    assert own.code_digest()
    assert TrendMethod.model_validate("doge").build() == so.trend.Doge()
    assert TrendMethod.model_validate({"name": "doge", "B": 2}).build() == so.trend.Doge(B=2)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"name": "l11", "weight": 1}, "did you mean 'l1'?"),
        ({"name": "l1"}, "weight: l1 needs this argument"),
        ({"name": "sparseopt.Graph", "num_nodes": 3}, "is no penalty: it has no method value, prox"),
        ({"name": "tests.experiments.toy.CapedL1", "weight": 1}, "did you mean 'CappedL1'?"),
    ],
)
def test_a_penalty_that_does_not_exist_or_fit_is_an_error(fields, expected):
    with pytest.raises(ValidationError) as caught:
        PenaltyConfig.model_validate(fields, context={"allow_code": True})
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml")), ids=lambda file: file.stem
)
def test_every_shipped_config_is_one_of_this_version(file):
    assert load_config(file, allow_code=True)

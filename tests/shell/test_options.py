"""The fields of `Recipe` are the options of the commands, the settings of the task and the entries of the reference."""

import inspect
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

import sparseopt as so
from sparseopt.core.penalty_names import BY_WEIGHT, PENALTIES
from sparseopt.experiments.config import ConfigError, expand
from sparseopt.experiments.task_prune import Prune
from sparseopt.pruning import METHODS, Recipe
from sparseopt.pruning.recipe import OPTIONS
from sparseopt.shell.app import app
from sparseopt.shell.options import completed

FIELDS = [field.name for field in fields(Recipe)]
COMMANDS = {
    command.name or command.callback.__name__.replace("_", "-"): command.callback for command in app.registered_commands
}


@pytest.mark.parametrize("command", ["prune", "compare", "inspect"])
def test_every_field_of_a_recipe_is_an_option_of_the_command(command):
    found = set(inspect.signature(completed(COMMANDS[command])).parameters)
    # `compare` takes several methods, a preset after a colon.
    named = {"method": "methods", "preset": "methods"} if command == "compare" else {}
    assert [name for name in FIELDS if named.get(name, name) not in found] == []


def test_every_field_of_a_recipe_is_a_setting_of_the_task_and_reaches_its_recipe():
    assert [name for name in FIELDS if name not in Prune.model_fields] == []
    given = {
        "sparsity": 0.6, "pattern": "per-row", "method": "wanda", "preset": "paper", "penalty": "mcp", "ridge": 0.2,
        "weighting": "residual", "output_weights": "gradient", "allocation": "owl", "bounds": "0.3,0.8",
        "propagate": 0.5, "reconstruct": 2, "calibration": "file:x", "bos": "yes", "samples": 3, "seqlen": 7,
        "heldout_samples": 1, "windows": "random", "seed": 5, "dtype": "bfloat16", "pack": True,
        "min_expert_tokens": 9,
    }  # fmt: skip
    assert given.keys() <= set(FIELDS)
    (run,) = expand({"name": "x", "task": "prune", **given})
    assert run.task.recipe() == Recipe(**given | {"penalty": so.MCP(1.0), "bounds": (0.3, 0.8)})
    (plain,) = expand({"name": "x", "task": "prune"})
    assert plain.task.recipe() == Recipe()


def test_every_field_of_a_recipe_is_explained_in_the_reference():
    explained = re.findall(r"^        (\w+): [A-Z].*", Recipe.__doc__, re.MULTILINE)
    assert explained == FIELDS == list(OPTIONS)
    page = Path(__file__).parents[2] / "docs" / "reference" / "pruning.md"
    assert "automodule:: sparseopt.pruning.recipe" in page.read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_its_options_in_80_columns(name, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = command(name, "--help")
    assert status == 0, err
    options = inspect.signature(completed(COMMANDS[name])).parameters
    assert len(options) > 1
    for option in options.keys() - {"as_json"}:
        assert option in out or option.replace("_", "-") in out


def test_the_options_of_prune_stand_in_panels(command):
    _, out, _ = command("prune", "--help")
    panels = ("Output", "What to prune", "How to prune", "Calibration", "Machine")
    places = [out.index(f"─ {panel} ") for panel in panels]
    assert places == sorted(places)
    for option, panel in (("--output", 0), ("--sparsity", 1), ("--method", 2), ("--samples", 3), ("--memory", 4)):
        assert places[panel] < out.index(option) < [*places, len(out)][panel + 1]
    for word in (*METHODS, "paper or best", *BY_WEIGHT, "block:4x4"):
        assert word in out


@pytest.mark.processes
def test_the_other_commands_need_nothing_of_the_pruner():
    code = (
        "import sys; sys.modules['flax'] = None; sys.argv = ['sparseopt', 'denoise', '--help']"
        "; from sparseopt.shell.app import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weighting": "residul"},
            "unknown weighting 'residul'; known are uniform, residual; did you mean 'residual'?",
        ),
        ({"output_weights": "x"}, "unknown output_weights 'x'; known are uniform, gradient"),
        ({"method": "wunda"}, "unknown method 'wunda'; known are best, .*; did you mean 'wanda'?"),
        (
            {"method": "wanda", "preset": "paper"},
            "method 'wanda' has no presets, given preset 'paper'; leave the preset out",
        ),
        ({"dtype": "int8"}, "unknown dtype 'int8'; known are float32, float16, bfloat16"),
        ({"bos": None}, "unknown bos None; known are auto, yes, no"),
        ({"propagate": 1.5}, r"propagate must lie in \[0, 1\], given 1.5"),
        ({"sparsity": 1.0}, r"sparsity must lie in \[0, 1\), given 1.0"),
        ({"ridge": float("nan")}, "ridge must be at least 0, given nan"),
        ({"seqlen": 1}, "seqlen must be at least 2, given 1"),
        ({"seed": 3}, "seed is for windows 'random', and windows is 'first'; leave the seed out"),
        ({"windows": "spread", "calibration": np.ones((6, 8), int)}, "windows is for text"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_with_those_that_can(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(Recipe(), **changes).check()


def test_bounds_and_penalty_are_read_from_their_texts(tmp_path, command):
    for arguments, message in (
        (["--bounds", "low"], "bounds must be two numbers with a comma between, as in 0.3,0.8, given 'low'"),
        (["--penalty", "ridge"], "unknown penalty 'ridge'; known are l1, l0, mcp, scad, group_l2"),
        (["--penalty", "mcp", "--method", "wanda"], "only method 'maiht' takes a penalty"),
    ):
        status, _, err = command("prune", "nowhere", "--output", tmp_path / "out", *arguments)
        assert status == 2
        assert message in err
    with pytest.raises(ConfigError, match=r"bounds: .*two numbers with a comma between"):
        expand({"name": "x", "task": "prune", "bounds": "low"})


def test_only_methods_with_several_settings_have_presets():
    assert {name: tuple(method.presets) for name, method in METHODS.items() if method.presets} == {
        "maiht": ("paper", "best")
    }


def test_a_penalty_has_one_name():
    assert {PENALTIES[name] for name in BY_WEIGHT} == {so.L1, so.L0, so.MCP, so.SCAD, so.GroupL2}
    assert len(set(PENALTIES.values())) == len(PENALTIES)

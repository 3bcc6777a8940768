"""What has ended or got another name is an error that says what to use instead, and that exists."""

import re
from pathlib import Path

import pytest

import sparseopt as so
from sparseopt import models, pruning, trend
from sparseopt.experiments import task
from sparseopt.experiments.config import expand
from sparseopt.pruning.recipe import options
from sparseopt.shell import app

ROOT = Path(__file__).parents[1]
NAMES = [(module, name, instead) for module in (models, pruning, trend) for name, instead in module._ENDED.items()]


@pytest.mark.parametrize(("module", "name", "instead"), NAMES)
def test_a_name_of_python(module, name, instead):
    assert name not in dir(module)
    with pytest.raises(AttributeError, match=f"{module.__name__}.{name} has ended:.* {re.escape(instead)}"):
        getattr(module, name)
    for path in re.findall(r"\b(?:so|sparseopt)(?:\.\w+)+", instead):
        found = so
        for part in path.split(".")[1:]:
            found = getattr(found, part)


@pytest.mark.parametrize(("name", "instead"), app._ENDED.items())
def test_a_command(command, name, instead):
    assert command(name, "model") == (2, "", f"error: `sparseopt {name}` has ended: {instead} ")


@pytest.mark.parametrize(("name", "instead"), options._ENDED.items())
def test_an_option_of_a_recipe(command, name, instead):
    field, _, value = name.partition(" ")
    with pytest.raises(ValueError, match=f"(?s)cannot be used.*{re.escape(f'{name} {instead}')}"):
        pruning.Recipe(**{field: value or 1})
    call = ["prune", "model", "--output", "out", f"--{field.replace('_', '-')}", value or 1]
    assert command(*call) == (2, "", f"error: --{name.replace('_', '-')} {instead} ")
    known = {*pruning.Recipe.model_fields, *pruning.METHODS["maiht"].presets}
    assert known.issuperset(re.findall(r"(?:called|is|in) `(\w+)`", instead))


@pytest.mark.parametrize(("name", "instead"), task._ENDED.items())
def test_a_task(name, instead):
    with pytest.raises(ValueError, match=re.escape(f"the task {name!r} {instead}")):
        expand({"name": "x", "task": name})
    for module, kind in re.findall(r"it is (\w+)\.(\w+),", instead):
        assert f"class {kind}(" in (ROOT / "configs" / "papers" / f"{module}.py").read_text()

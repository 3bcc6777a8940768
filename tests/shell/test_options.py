"""The fields of a recipe are the options of the commands, the settings of its task and the entries of the reference."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest

import sparseopt as so
from sparseopt.core.penalties.names import BY_WEIGHT, PENALTIES
from sparseopt.experiments.config import expand
from sparseopt.experiments.task import find_task
from sparseopt.pruning import METHODS, Recipe, ShrinkRecipe
from sparseopt.pruning.recipe.shrink_recipe import CHOOSING
from sparseopt.shell.options import completed
from tests.shell.test_app import COMMANDS

TASKS = {"prune": Recipe, "shrink": ShrinkRecipe}
# Values that are not the defaults, in groups that go together.
COMMON = {
    "method": "best", "ridge": 0.2, "weighting": "residual", "output_weights": "gradient", "propagate": 0.5,
    "train_epochs": 2, "calibration": "hf:x", "bos": "yes", "windows": 3, "seqlen": 7, "heldout_windows": 1,
    "window_choice": "random", "seed": 5, "split": "train", "column": "body", "documents": "separate", "variants": 1,
    "dtype": "bfloat16", "min_expert_tokens": 9, "distil_epochs": 2, "precision": "high", "effort": "most",
    "bits": "q4_0", "head_bits": "q5_0",
}  # fmt: skip
GIVEN = {
    "prune": [
        COMMON | {
            "sparsity": 0.6, "allocation": "curves", "bounds": "0.3,0.8", "keep_zeros": True,
            "masks": "x", "targets": "re:.*[a,b],q_proj", "ignore": ["k_proj"], "expert_tokens": "all",
        },
        {"preset": "paper", "penalty": "mcp", "targets": {"q_proj": 0.4}, "ignore": ["k_proj"]},
        {"pattern": "2:4", "permute": True},
    ],
    "shrink": [
        COMMON | {"channels": 0.6, "heads": 0.5, "layers": 0.9, "multiple": 8},
        {"experts": 0.8},
        {"channels": 0.5, "expert_tokens": "all"},
        {"parameters": 0.9},
    ],
}  # fmt: skip


def names(recipe):
    return list(recipe.model_fields)


@pytest.mark.parametrize(("command", "recipe"), [("prune", Recipe), ("compare", Recipe), ("shrink", ShrinkRecipe)])
def test_every_field_of_a_recipe_is_an_option_of_the_command(command, recipe):
    found = set(inspect.signature(completed(COMMANDS[command])).parameters)
    # `compare` takes several methods, a preset after a colon.
    # and scores its cells itself.
    named = dict.fromkeys(("method", "preset", "effort", "score"), "methods") if command == "compare" else {}
    assert [name for name in names(recipe) if named.get(name, name) not in found] == []


@pytest.mark.parametrize("name", TASKS)
def test_every_field_of_a_recipe_is_a_setting_of_the_task_and_reaches_its_recipe(name):
    recipe, task = TASKS[name], find_task(name)
    # A task scores its models itself.
    assert [field for field in names(recipe) if field not in task.model_fields] == ["score"]
    assert set().union(*GIVEN[name]) == set(names(recipe)) - {"score"}
    for given in GIVEN[name]:
        (run,) = expand({"name": "x", "task": name, **given})
        objects = {"penalty": so.MCP(1.0), "bounds": (0.3, 0.8)}
        assert run.task.recipe() == recipe(
            **given | {key: objects[key] for key in objects.keys() & given}, score="none"
        )
        texts = {"targets": "q_proj=0.4"} if isinstance(given.get("targets"), dict) else {}
        typed = given | texts | ({"ignore": "k_proj"} if "ignore" in given else {})
        assert expand({"name": "x", "task": name, **typed})[0].task.recipe() == run.task.recipe()


@pytest.mark.parametrize("recipe", TASKS.values())
def test_every_field_of_a_recipe_is_explained_in_the_reference(recipe):
    explained = re.findall(r"^        (\w+): [A-Z].*", recipe.__doc__, re.MULTILINE)
    assert explained == names(recipe)
    page = Path(__file__).parents[2] / "docs" / "reference" / "pruning.md"
    assert f"   {recipe.__name__}\n" in page.read_text()


@pytest.mark.parametrize(
    ("name", "verb", "options", "words"),
    [
        ("prune", "prune", ("--output", "--sparsity", "--method", "--windows", "--memory"),
         (*METHODS, "paper or tuned", *BY_WEIGHT, "block:4x4", "group:1")),
        ("shrink", "keep", ("--dtype", "--channels", "--method", "--windows", "--devices"),
         (*CHOOSING, "make a model each")),
    ],
)  # fmt: skip
def test_the_options_of_a_recipe_stand_in_panels(name, verb, options, words, command):
    _, out, _ = command(name, "--help")
    panels = ("Output", f"What to {verb}", "How to prune", "Calibration", "Machine")
    places = [out.index(f"─ {panel} ") for panel in panels]
    assert places == sorted(places)
    for option, start, end in zip(options, places, [*places[1:], len(out)], strict=True):
        assert start < out.index(option) < end
    for word in words:
        assert word in out


def test_a_choice_of_windows_is_for_text():
    with pytest.raises(ValueError, match="window_choice is for text"):
        Recipe(window_choice="spread", calibration=np.ones((6, 8), int))


def test_only_methods_with_several_settings_have_presets():
    assert {name: tuple(method.presets) for name, method in METHODS.items() if method.presets} == {
        "maiht": ("paper", "tuned")
    }


def test_a_penalty_has_one_name():
    assert {PENALTIES[name] for name in BY_WEIGHT} == {so.L1, so.L0, so.MCP, so.SCAD, so.GroupL2}
    assert len(set(PENALTIES.values())) == len(PENALTIES)


PLAIN = {
    "method": "wanda", "ridge": None, "output_weights": "uniform", "propagate": 0.0, "train_epochs": 0, "variants": 0,
    "distil_epochs": 0, "allocation": "uniform", "permute": False,
}  # fmt: skip
GOOD = PLAIN | {"method": "best", "output_weights": "gradient", "propagate": 0.25}
BEST = GOOD | {"train_epochs": 4, "variants": 3}
MOST = BEST | {"distil_epochs": 4}


@pytest.mark.parametrize(
    ("given", "effort", "found"),
    [
        ({}, "good", GOOD),
        ({"effort": "fast"}, "fast", PLAIN | {"method": "admm", "ridge": 0.1}),
        ({"effort": "fast", "preset": "paper"}, "fast", PLAIN | {"method": "maiht", "ridge": None}),
        ({"effort": "fast", "method": "wanda"}, "fast", PLAIN | {"ridge": None}),
        ({"effort": "most"}, "most", MOST | {"allocation": "curves"}),
        ({"effort": "most", "pattern": "2:4"}, "most", MOST | {"permute": True}),
        # What fixes places of zeros, or the order of channels, keeps them.
        ({"effort": "most", "keep_zeros": True}, "most", MOST),
        ({"effort": "most", "train_epochs": 0, "permute": False, "pattern": "2:4"}, "most", MOST | {"train_epochs": 0}),
        # A method alone is that method alone, and best is what it was before there were efforts.
        ({"method": "wanda"}, None, PLAIN),
        ({"method": "best"}, None, BEST),
        ({"preset": "paper"}, None, PLAIN | {"method": "maiht"}),
        ({"method": "wanda", "effort": "good"}, "good", GOOD | {"method": "wanda"}),
        ({"propagate": 0.0}, "good", GOOD | {"propagate": 0.0}),
    ],
)
def test_an_effort_says_what_is_left_open_and_what_is_given_wins(given, effort, found):
    recipe = Recipe(**given)
    values = recipe.as_dict()
    assert values["effort"] == effort
    assert {name: values[name] for name in found} == found
    # What is used is what is recorded.
    assert (recipe.method, recipe.allocation, recipe.permute) == (
        found["method"], found["allocation"], found["permute"],
    )  # fmt: skip
    assert (recipe.output_weights, recipe.propagate) == (found["output_weights"], found["propagate"])
    trained = (recipe.reconstruction, recipe.distillation)
    assert [each.epochs if each else 0 for each in trained] == [found["train_epochs"], found["distil_epochs"]]


@pytest.mark.parametrize(
    ("given", "trained"), [({}, (4, 0)), ({"effort": "fast"}, (0, 0)), ({"effort": "most"}, (4, 4)),
                           ({"method": "best"}, (4, 0)), ({"method": "osscar"}, (0, 0))],
)  # fmt: skip
def test_efforts_of_shrinking_differ_in_what_they_train(given, trained):
    recipe = ShrinkRecipe(channels=0.5, **given)
    values = recipe.as_dict()
    assert (values["train_epochs"], values["distil_epochs"]) == trained
    assert (values["propagate"], values["variants"], values["output_weights"]) == (0.0, 0, "uniform")

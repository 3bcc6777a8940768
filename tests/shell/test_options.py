"""The fields of a recipe are the options of the commands, the settings of its task and the entries of the reference."""

import inspect
import re
from pathlib import Path

import pytest

import sparseopt as so
from sparseopt.experiments.config import expand
from sparseopt.experiments.task import find_task
from sparseopt.pruning import Recipe, ShrinkRecipe
from sparseopt.shell.options import completed
from tests.shell.test_app import COMMANDS

TASKS = {"prune": Recipe, "shrink": ShrinkRecipe}
# Values that are not the defaults, in groups that go together.
COMMON = {
    "method": "best", "ridge": 0.2, "weighting": "residual", "output_weights": "gradient", "propagate": 0.5,
    "train_epochs": 2, "calibration": "hf:x", "bos": "yes", "windows": 3, "seqlen": 7, "heldout_windows": 1,
    "window_choice": "random", "seed": 5, "split": "train", "column": "body", "documents": "separate",
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
        COMMON | {"channels": 0.6, "heads": 0.5, "layers": 0.9, "repair": False},
        {"channels": 0.6, "multiple": 8, "vocabulary": "text:hf:x"},
        {"experts": 0.8},
        {"channels": 0.5, "expert_tokens": "all"},
        {"parameters": 0.9},
    ],
}  # fmt: skip


@pytest.mark.parametrize("command", ["prune", "compare", "shrink"])
def test_every_field_of_a_recipe_is_an_option_of_the_command(command):
    found = inspect.signature(completed(COMMANDS[command])).parameters
    # `compare` takes several methods, a preset after a colon, and scores its cells itself.
    named = dict.fromkeys(("method", "preset", "effort", "score"), "methods") if command == "compare" else {}
    fields = TASKS.get(command, Recipe).model_fields
    assert [name for name in fields if named.get(name, name) not in found] == []


@pytest.mark.parametrize("name", TASKS)
def test_every_field_of_a_recipe_is_a_setting_of_the_task_and_reaches_its_recipe(name):
    recipe, task = TASKS[name], find_task(name)
    # A task scores its models itself.
    assert recipe.model_fields.keys() - task.model_fields.keys() == {"score"}
    assert set().union(*GIVEN[name]) == recipe.model_fields.keys() - {"score"}
    for given in GIVEN[name]:
        (run,) = expand({"name": "x", "task": name, **given})
        objects = {"penalty": so.MCP(1.0), "bounds": (0.3, 0.8)}
        meant = given | {key: objects[key] for key in objects.keys() & given}
        assert run.task.recipe() == recipe(**meant, score="none")
        texts = {"targets": "q_proj=0.4"} if isinstance(given.get("targets"), dict) else {}
        typed = given | texts | ({"ignore": "k_proj"} if "ignore" in given else {})
        assert expand({"name": "x", "task": name, **typed})[0].task.recipe() == run.task.recipe()


@pytest.mark.parametrize("recipe", TASKS.values())
def test_every_field_of_a_recipe_is_explained_in_the_reference(recipe):
    explained = re.findall(r"^        (\w+): [A-Z].*", recipe.__doc__, re.MULTILINE)
    assert explained == list(recipe.model_fields)
    page = Path(__file__).parents[2] / "docs" / "reference" / "pruning.md"
    assert f"   {recipe.__name__}\n" in page.read_text()

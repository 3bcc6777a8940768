"""An effort says what is left open, what is given wins, and what is used is what is recorded."""

import pytest

from sparseopt.pruning import Recipe, ShrinkRecipe

PLAIN = {
    "method": "wanda", "ridge": None, "output_weights": "uniform", "propagate": 0.0, "train_epochs": 0,
    "distil_epochs": 0, "allocation": "uniform", "permute": False,
}  # fmt: skip
GOOD = PLAIN | {"method": "best", "output_weights": "gradient", "propagate": 0.25}
BEST = GOOD | {"train_epochs": 4}
# Of the 64 windows that it reads by default.
MOST = GOOD | {"train_epochs": 1, "distil_epochs": 1}
CURVES = MOST | {"allocation": "curves"}


@pytest.mark.parametrize(
    ("given", "effort", "found"),
    [
        ({}, "good", GOOD),
        ({"effort": "fast"}, "fast", PLAIN | {"method": "admm", "ridge": 0.1}),
        ({"effort": "fast", "ridge": 0.0}, "fast", PLAIN | {"method": "admm", "ridge": 0.0}),
        ({"effort": "fast", "preset": "paper"}, "fast", PLAIN | {"method": "maiht", "ridge": None}),
        ({"effort": "fast", "method": "wanda"}, "fast", PLAIN | {"ridge": None}),
        ({"effort": "most"}, "most", CURVES),
        ({"effort": "most", "pattern": "2:4"}, "most", MOST | {"permute": True}),
        ({"effort": "most", "windows": 20}, "most", CURVES | {"train_epochs": 3, "distil_epochs": 3}),
        ({"effort": "most", "windows": 5}, "most", CURVES | {"train_epochs": 4, "distil_epochs": 4}),
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
def test_pruning(given, effort, found):
    recipe = Recipe(**given)
    values = recipe.as_dict()
    assert values["effort"] == effort
    assert {name: values[name] for name in found} == found
    for name in ("method", "allocation", "permute", "output_weights", "propagate"):
        assert getattr(recipe, name) == found[name]
    trained = (recipe.reconstruction, recipe.distillation)
    assert [each.epochs if each else 0 for each in trained] == [found["train_epochs"], found["distil_epochs"]]


@pytest.mark.parametrize(
    ("given", "trained"), [({}, (4, 0)), ({"effort": "fast"}, (0, 0)), ({"effort": "most"}, (4, 4)),
                           ({"method": "best"}, (4, 0)), ({"method": "osscar"}, (0, 0))],
)  # fmt: skip
def test_shrinking(given, trained):
    values = ShrinkRecipe(channels=0.5, **given).as_dict()
    assert (values["train_epochs"], values["distil_epochs"]) == trained
    assert (values["propagate"], values["output_weights"]) == (0.0, "uniform")

"""What makes two pruning runs different: fingerprints are compared, nothing runs."""

import importlib.util
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from sparseopt.core.base.types import pytree, static
from sparseopt.layers.methods import MaihtPruning, SplicePruning, Wanda
from sparseopt.models import LoadedModel, ModelError, open_model
from sparseopt.pruning import Recipe
from sparseopt.pruning.run import resumption
from sparseopt.pruning.run.resumption import Identity, recipe_identity
from sparseopt.pruning.text.windows import token_digest
from sparseopt.system.machine import PACKAGES
from tests.pruning.whole_runs import tensors_of, write_model


@pytree
class Mine:
    """A method with an array, a method before it and a choice."""

    scores: Any = 0.0
    first: Any = Wanda()
    choice: Any = static(default=None)
    weight: Any = 1.0

    def __call__(self, layer, pattern):
        """As a method."""

    def value(self, x):
        """As a penalty."""

    def prox(self, x, step):
        """As a penalty."""


def differing(one, other):
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def changed(array, index=1000):
    array = array.copy()
    array[index] += 1
    return array


LONG = np.arange(2000, dtype=np.float32)


@pytest.mark.parametrize(
    "other",
    [changed(LONG), LONG.astype(np.float64), LONG.reshape(2, -1), jax.numpy.asarray(changed(LONG))],
    ids=["an entry", "the dtype", "the shape", "on the device"],
)
@pytest.mark.parametrize("place", ["method", "method before it", "penalty"])
def test_every_array_of_a_method_counts_to_its_last_entry(place, other):
    make = {
        "method": lambda array: Recipe(method=Mine(array)),
        "method before it": lambda array: Recipe(method=SplicePruning(first=Mine(array))),
        "penalty": lambda array: Recipe(penalty=Mine(array)),
    }[place]
    first = recipe_identity(make(LONG))
    assert differing(first, recipe_identity(make(LONG.copy()))) == []
    assert "arrays" in differing(first, recipe_identity(make(other)))
    # The text of a long array leaves its middle out.
    assert make(LONG).as_dict() == make(changed(LONG)).as_dict()


def test_a_method_by_name_has_no_arrays_and_a_random_key_is_one():
    assert recipe_identity(Recipe())["arrays"] is None
    keys = [recipe_identity(Recipe(method=Mine(jax.random.key(seed))))["arrays"] for seed in (0, 1, 0)]
    assert keys[0] == keys[2] != keys[1]


SOURCE = """
from sparseopt.core.base.types import pytree, static
from typing import Any

def scored(x):
    return x * {factor}

@pytree
class Own:
    share: float = 0.5
    score: Any = static(default=scored)

    def __call__(self, layer, pattern):
        return self.share {operator} 2
"""


def own(folder, factor=1, operator="*"):
    """A module of a user's, read anew as another process would."""
    folder.mkdir()
    file = folder / "users_own_module.py"
    file.write_text(SOURCE.format(factor=factor, operator=operator))
    spec = importlib.util.spec_from_file_location("users_own_module", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda module: module.Own(),
        lambda module: SplicePruning(first=module.Own()),
        lambda module: Mine(choice=(partial(module.scored), module.Own)),
    ],
    ids=["the method", "inside another", "a choice"],
)
def test_the_code_of_a_method_of_ones_own_counts(tmp_path, monkeypatch, make):
    def of(name, **changes):
        module = own(tmp_path / name, **changes)
        monkeypatch.setitem(resumption.sys.modules, "users_own_module", module)
        return recipe_identity(Recipe(method=make(module)))

    first = of("first")
    # Another process has the same function at another address.
    assert differing(first, of("same")) == []
    assert {"users_own_module.Own", "users_own_module.scored"} <= first["code"].keys()
    assert differing(first, of("helper", factor=2)) == ["code"]
    assert differing(first, of("class", operator="+")) == ["code"]


def test_a_class_without_a_file_counts_by_its_functions():
    space = {"__name__": "__main__"}
    exec("class Typed:\n    def __call__(self, layer, pattern):\n        return 1\n", space)
    space["Typed"].borrowed = changed
    assert resumption._source(space["Typed"]) == resumption._source(changed)
    assert list(recipe_identity(Recipe(method=space["Typed"]()))["code"]) == ["__main__.Typed"]


def test_the_package_s_own_methods_count_by_its_version():
    assert recipe_identity(Recipe(method=SplicePruning(first=MaihtPruning())))["code"] == {}


IMAGES = "vision_tower.patch.weight"


def model_with(folder, value):
    return open_model(write_model(folder, tensors=tensors_of() | {IMAGES: np.full((4, 8), value, np.float32)}))


def test_tensors_that_are_only_copied_count_and_are_checked_before_any_work(tmp_path):
    digests = [model_with(tmp_path / str(i), value).check_finite() for i, value in enumerate((1.0, 2.0, 1.0))]
    assert digests[0] == digests[2] != digests[1]
    with pytest.raises(ModelError, match=rf"{IMAGES} in .* holds 32 NaN or infinite values"):
        model_with(tmp_path / "nan", np.nan).check_finite()


@pytest.fixture(scope="module")
def model(source):
    return open_model(source)


@pytest.mark.parametrize(
    ("route", "recipe", "decisive"),
    [
        ("flax", Recipe(), {"flax"}),
        ("flax", Recipe(train_epochs=1), {"flax", "optax"}),
        ("torch", Recipe(), {"torch", "transformers"}),
    ],
)
def test_the_versions_of_what_computes_count_and_no_others(model, tokens, monkeypatch, route, recipe, decisive):
    if route == "torch":
        monkeypatch.setattr(type(model), "packages", LoadedModel.packages)
    asked = Identity(model)
    found = dict.fromkeys((*PACKAGES, "python"), "1.0")
    counted = set()
    for name in found:
        monkeypatch.setattr(resumption, "versions", lambda: found)
        before = asked.of(recipe)
        monkeypatch.setattr(resumption, "versions", lambda name=name: found | {name: "2.0"})
        if asked.of(recipe) != before:
            counted.add(name)
    assert counted == {"sparseopt", "jax", "jaxlib", "numpy", "scipy"} | decisive


def test_the_kind_of_gpu_counts(model, tokens, monkeypatch):
    asked, kinds = Identity(model), ("NVIDIA A100", "NVIDIA H100", "NVIDIA A100")
    marks = []
    assert asked.of(Recipe())["device"].startswith("cpu ")
    for kind in kinds:
        monkeypatch.setattr(jax, "devices", lambda kind=kind: [SimpleNamespace(platform="gpu", device_kind=kind)])
        marks.append(asked.of(Recipe()))
    assert marks[0] == marks[2] != marks[1]
    assert marks[0]["device"].startswith("gpu NVIDIA A100 ")


def test_calibration_and_held_out_tokens_count(model, tokens):
    marks, asked = [], Identity(model)
    for heldout in (tokens[:2], tokens[1:3]):
        asked.tokens = token_digest(tokens, heldout)
        marks.append(asked.of(Recipe()))
    assert differing(*marks) == ["tokens"]
    # What is scored decides nothing.
    assert asked.of(Recipe(score="pydoc")) == asked.of(Recipe())
    # Two ways to say the same are the same run.
    assert asked.of(Recipe(effort="good", train_epochs=0)) == asked.of(Recipe())
    assert (
        Recipe().model_copy(update={"calibration": tokens.tolist()}).as_dict()["calibration"]
        == "token ids of shape [7, 24]"
    )

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
from sparseopt.models.files import safetensors
from sparseopt.pruning import Recipe
from sparseopt.pruning.run import resumption
from sparseopt.pruning.run.resumption import Identity, recipe_identity
from sparseopt.pruning.text.windows import token_digest
from sparseopt.system.machine import PACKAGES
from tests.pruning.whole_runs import tensors_of, write_model


@pytree
class Mine:
    """A method or a penalty with an array, a method before it and a choice."""

    scores: Any = 0.0
    first: Any = Wanda()
    choice: Any = static(default=None)
    weight: Any = 1.0

    def __call__(self, layer, pattern): ...

    def value(self, x): ...

    def prox(self, x, step): ...


def differing(one, other):
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def changed(array, index=1000):
    array = array.copy()
    array[index] += 1
    return array


@pytest.mark.parametrize(
    "make",
    [
        lambda array: Recipe(method=Mine(array)),
        lambda array: Recipe(method=SplicePruning(first=Mine(array))),
        lambda array: Recipe(penalty=Mine(array)),
    ],
    ids=["method", "method before it", "penalty"],
)
def test_every_array_of_a_method_counts_to_its_last_entry(make):
    long = np.arange(2000, dtype=np.float32)
    first = recipe_identity(make(long))
    assert differing(first, recipe_identity(make(long.copy()))) == []
    for other in (changed(long), long.astype(np.float64), long.reshape(2, -1), jax.numpy.asarray(changed(long))):
        assert "arrays" in differing(first, recipe_identity(make(other)))
    # The text of a long array leaves its middle out.
    assert make(long).as_dict() == make(changed(long)).as_dict()


def test_a_method_by_name_has_no_arrays_and_no_code_and_a_random_key_is_an_array():
    assert recipe_identity(Recipe())["arrays"] is None
    assert recipe_identity(Recipe(method=SplicePruning(first=MaihtPruning())))["code"] == {}
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


OWN = (
    lambda module: module.Own(),
    lambda module: SplicePruning(first=module.Own()),
    lambda module: Mine(choice=(partial(module.scored), module.Own)),
)


@pytest.mark.parametrize("make", OWN, ids=["the method", "inside another", "a choice"])
def test_the_code_of_a_method_of_ones_own_counts(tmp_path, monkeypatch, make):
    def of(name, factor=1, operator="*"):
        """With the module of a user's, read anew as another process would."""
        file = tmp_path / name
        file.write_text(SOURCE.format(factor=factor, operator=operator))
        spec = importlib.util.spec_from_file_location("users_own_module", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setitem(resumption.sys.modules, "users_own_module", module)
        return recipe_identity(Recipe(method=make(module)))

    first = of("first.py")
    # Another process has the same function at another address.
    assert differing(first, of("same.py")) == []
    assert {"users_own_module.Own", "users_own_module.scored"} <= first["code"].keys()
    assert differing(first, of("helper.py", factor=2)) == differing(first, of("class.py", operator="+")) == ["code"]


def test_a_class_without_a_file_counts_by_its_functions():
    space = {"__name__": "__main__"}
    exec("class Typed:\n    def __call__(self, layer, pattern):\n        return 1\n", space)
    space["Typed"].borrowed = changed
    assert resumption._source(space["Typed"]) == resumption._source(changed)
    assert list(recipe_identity(Recipe(method=space["Typed"]()))["code"]) == ["__main__.Typed"]


def test_tensors_that_are_only_copied_count_and_are_checked_before_any_work(tmp_path, monkeypatch):
    def digest(name, value):
        tensors = tensors_of() | {"vision_tower.patch.weight": np.full((4, 8), value, np.float32)}
        return open_model(write_model(tmp_path / name, tensors=tensors)).check_finite()

    first = digest("a", 1.0)
    assert first != digest("b", 2.0)
    # The pieces in which a file is read decide nothing.
    monkeypatch.setattr(safetensors, "SLICE", 300)
    assert first == digest("c", 1.0)
    with pytest.raises(ModelError, match=r"vision_tower\.patch\.weight in .* holds 32 NaN"):
        digest("nan", np.nan)


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
def test_the_versions_of_what_computes_count_and_no_others(model, monkeypatch, route, recipe, decisive):
    if route == "torch":
        monkeypatch.setattr(type(model), "packages", LoadedModel.packages)
    asked, found, counted = Identity(model), dict.fromkeys((*PACKAGES, "python"), "1.0"), set()
    monkeypatch.setattr(resumption, "versions", lambda: found)
    before = asked.of(recipe)
    for name in found:
        monkeypatch.setattr(resumption, "versions", lambda name=name: found | {name: "2.0"})
        counted |= {name} if asked.of(recipe) != before else set()
    assert counted == {"sparseopt", "jax", "jaxlib", "numpy", "scipy"} | decisive


def test_the_kind_of_gpu_and_the_tokens_count_and_what_is_scored_does_not(model, tokens, monkeypatch):
    asked, marks = Identity(model), []
    for heldout in (tokens[:2], tokens[1:3]):
        asked.tokens = token_digest(tokens, heldout)
        marks.append(asked.of(Recipe()))
    assert differing(*marks) == ["tokens"]
    assert asked.of(Recipe(score="pydoc")) == asked.of(Recipe())
    # Two ways to say the same are the same run.
    assert asked.of(Recipe(effort="good", train_epochs=0)) == asked.of(Recipe())
    assert asked.of(Recipe())["device"].startswith("cpu ")
    for kind in ("NVIDIA A100", "NVIDIA H100"):
        monkeypatch.setattr(jax, "devices", lambda kind=kind: [SimpleNamespace(platform="gpu", device_kind=kind)])
        assert asked.of(Recipe())["device"].startswith(f"gpu {kind} ")

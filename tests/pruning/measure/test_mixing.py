"""A budget of parameters: what goes is what costs least, and the curves are those of whole models."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.models import ModelError, Sizes, open_model, smaller_model
from sparseopt.pruning import ShrinkRecipe, perplexity, prune_layer, shrink_model
from sparseopt.pruning.base.grams import tapped
from sparseopt.pruning.measure import mixing
from sparseopt.pruning.measure.mixing import Costs, Search, _mix, best_mix, interpolated, parameter_costs
from sparseopt.pruning.recipe.shrink_recipe import parameters_of
from tests.models.tiny import tiny_config, write_folder
from tests.pruning.whole_runs import Broken, breaking_at, predicted, tensors_of, without

TINY = "llama"
BLOCKS, HELD, TENSORS = tuple(range(3)), 3, tensors_of()


@pytest.fixture(scope="module")
def model(source):
    return open_model(source)


def recipe_of(tokens, **budget):
    return ShrinkRecipe(calibration=tokens, heldout_windows=HELD, multiple=16, train_epochs=0, **budget)


@pytest.fixture(scope="module")
def ids(source, tokens):
    return predicted(source, tokens)


@pytest.fixture(scope="module")
def report(tmp_path_factory, source, ids):
    return shrink_model(source, tmp_path_factory.mktemp("mix") / "out", recipe_of(ids, parameters=0.8))


def test_the_budget_is_kept_by_the_folder_written(model, report):
    stored = parameters_of(open_model(report.output))
    assert stored == report.shape.parameters <= 0.8005 * parameters_of(model)
    assert report.shape.dense_parameters == parameters_of(model)


def test_costs_are_the_parameters_of_every_smaller_model(model):
    costs = parameter_costs(model, ShrinkRecipe(parameters=0.5, multiple=16))
    for channels, groups, blocks in itertools.product((1, 16, 64), (1, 2), ((1,), (0, 2), BLOCKS)):
        small = smaller_model(model, Sizes(channels, groups, blocks))
        assert costs.of(channels, groups, blocks) == parameters_of(small)


def test_curves_are_the_losses_of_whole_models(tmp_path, model, ids, report):
    """Of channels and groups, every linear pruned by itself on the dense model's inputs; of blocks, without them."""
    grams, x = {}, model.embedding()(jnp.asarray(ids[:-HELD]))
    for index in BLOCKS:
        inputs, x = jax.jit(tapped)(model.block(index), x)
        for name, tap in (("self_attn.o_proj", "attention_output"), ("mlp.down_proj", "mlp_hidden")):
            rows = np.asarray(inputs[tap]).reshape(-1, inputs[tap].shape[-1])
            grams[f"model.layers.{index}.{name}.weight"] = rows.T @ rows

    def loss(changed, blocks=3):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return np.log(perplexity(write_folder(folder, tiny_config(num_hidden_layers=blocks), changed), ids[-HELD:]))

    def pruned(name, group, count):
        changed = dict(TENSORS)
        for key, gram in grams.items():
            if name in key:
                solved = prune_layer(TENSORS[key], gram, 1 - count * group / len(gram), f"group:{group}", method="best")
                changed[key] = np.asarray(solved.weight)
        return loss(changed)

    dense, curves = loss(TENSORS), {name: dict(curve) for name, curve in report.shape.curves.items()}
    assert {name: sorted(curve) for name, curve in curves.items()} == {
        "channels": [32, 48, 64],
        "heads": [1, 2],
        "blocks": [2, 3],
    }
    assert [curves["channels"][64], curves["heads"][2], curves["blocks"][3]] == [0, 0, 0]
    for count in (32, 48):
        assert curves["channels"][count] == pytest.approx(pruned("down_proj", 1, count) - dense, abs=1e-4)
    assert curves["heads"][1] == pytest.approx(pruned("o_proj", 16, 1) - dense, abs=1e-4)
    least = min(loss(without(TENSORS, 3, [gone]), blocks=2) for gone in BLOCKS)
    assert curves["blocks"][2] == pytest.approx(least - dense, abs=1e-5)


# A quarter of the channels is 0.15652 of the parameters: a budget is kept to its third digit.
@pytest.mark.parametrize(("harmless", "share"), [("channels", 0.843), ("block", 0.7)])
def test_what_does_nothing_goes_first(tmp_path, tokens, harmless, share):
    changed = {key: value.copy() for key, value in TENSORS.items()}
    for index in BLOCKS if harmless == "channels" else [1]:
        down = changed[f"model.layers.{index}.mlp.down_proj.weight"]
        if harmless == "channels":
            down[:, ::4] = 0
        else:
            down[:] = 0
            changed[f"model.layers.{index}.self_attn.o_proj.weight"][:] = 0
    source = write_folder(tmp_path / "model", tiny_config(), changed)
    recipe = recipe_of(predicted(source, tokens), parameters=share)
    shape = shrink_model(source, tmp_path / "out", recipe).shape
    found = shape.channels, shape.kv_heads, shape.blocks
    assert found == ((48, 2, BLOCKS) if harmless == "channels" else (64, 2, (0, 2)))
    rises = shape.curves["channels" if harmless == "channels" else "blocks"]
    assert rises[0][1] == pytest.approx(0, abs=1e-4)


def test_the_best_mix_is_that_of_all_which_fit():
    rng = np.random.default_rng(5)
    for budget in (300.0, 420.0, 600.0):
        costs = Costs(50.0, rng.uniform(10, 20, 6), rng.uniform(0.5, 1, 6), rng.uniform(1, 5, 6))
        search = Search(costs, budget, [16, 32, 48, 64], [2, 3, 4], 4)
        curves = {
            name: [[n, rise] for n, rise in zip(numbers, np.sort(rng.uniform(0, 1, len(numbers)))[::-1], strict=True)]
            for name, numbers in (("channels", (16, 48, 64)), ("heads", (2, 3, 4)), ("blocks", (2, 3, 4, 5, 6)))
        }
        order, sums = [4, 0, 5, 2], {}
        for channels, groups, count in itertools.product(search.channels, search.groups, range(5)):
            kept = [block for block in range(6) if block not in order[:count]]
            if costs.of(channels, groups, kept) <= budget:
                at = (("channels", channels), ("heads", groups), ("blocks", len(kept)))
                sums[channels, groups, count] = sum(interpolated(curves[n], np.array([x]))[0] for n, x in at)
        found = best_mix(search, curves, order)
        assert tuple(found[1:]) == min(sums, key=sums.get)
        assert found.rise == pytest.approx(min(sums.values()))
    assert best_mix(dataclasses.replace(search, budget=10.0), curves, order).rise == np.inf


def test_a_budget_that_no_choice_meets_is_told(model):
    costs = Costs(50.0, np.full(3, 10.0), np.ones(3), np.ones(3))
    search = Search(costs, 10.0, [32, 64], [1, 2], 0)
    curves = {"channels": [[32, 1.0], [64, 0.0]], "heads": [[1, 1.0], [2, 0.0]], "blocks": [[3, 0.0]]}
    with pytest.raises(ModelError, match="no choice of channels, heads and blocks meets the budget"):
        _mix(model, search, curves, [])


def test_a_curve_passes_through_what_was_measured_and_falls_between():
    curve = [[16, 2.0], [32, 0.5], [48, 0.45], [64, 0.0]]
    values = interpolated(curve, np.arange(16, 65))
    np.testing.assert_allclose(values[::16], [rise for _, rise in curve], atol=1e-12)
    assert (np.diff(values) <= 0).all()
    assert interpolated([[3, 0.0]], np.array([3])) == 0


def test_an_interrupted_run_finds_what_was_chosen(tmp_path, source, ids, report, monkeypatch):
    recipe = recipe_of(ids, parameters=0.8)
    with pytest.raises(Broken):
        shrink_model(source, tmp_path / "out", recipe, observer=breaking_at(1))
    monkeypatch.setattr(mixing, "choose_mix", None)
    resumed = shrink_model(source, tmp_path / "out", recipe).shape
    assert dataclasses.replace(resumed, seconds=0) == dataclasses.replace(report.shape, seconds=0)


def test_a_loss_that_is_not_finite_is_told_by_its_cause(tmp_path, ids):
    """The activations before every block are finite, the logits are not."""
    norm = {"model.norm.weight": np.full_like(TENSORS["model.norm.weight"], 3e38)}
    source = write_folder(tmp_path / "model", tiny_config(), TENSORS | norm)
    with pytest.raises(RuntimeError, match=r"the loss of .* is not finite: activations overflow"):
        shrink_model(source, tmp_path / "out", recipe_of(ids, parameters=0.8))

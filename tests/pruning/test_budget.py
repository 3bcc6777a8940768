"""A memory budget: where activations are stored, what it counts and what is refused.

That activations on disk change no bit is a test of `test_whole_runs`.
"""

import errno
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.layers.methods import find_method, method_cost
from sparseopt.models import open_model
from sparseopt.pruning import Recipe, memory, prune_model
from sparseopt.pruning.base.activations import Batches, DiskBatches, make_batches
from sparseopt.pruning.memory import BudgetError, choose_footprint, phase_bytes
from sparseopt.pruning.run.plan import make_plan
from sparseopt.system import machine

TINY = "llama"


@pytest.fixture(scope="module")
def recipe(tokens):
    return Recipe(method="wanda", calibration=tokens, heldout_windows=2)


@pytest.fixture(scope="module")
def model(source):
    return open_model(source)


def cost_of(model, recipe, *given, **fields):
    """What `phase_bytes` estimates for five windows of 24 tokens: the phases, and the bytes on disk."""
    sized = recipe.model_copy(update={"windows": 5, "seqlen": 24} | fields)
    return phase_bytes(model, sized, sized.layer_method, *given)


def footprint_of(model, recipe, tokens, output, budget=None):
    return choose_footprint(model, make_plan(model, recipe, output), tokens[:5], tokens[5:], budget)


def test_what_does_not_fit_goes_to_disk_and_is_refused_only_on_a_device(tmp_path, model, recipe, tokens, monkeypatch):
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 2**20)
    monkeypatch.setattr(memory, "resident_bytes", lambda: 0)
    found = footprint_of(model, recipe, tokens, tmp_path / "out")
    assert (found.activations, found.budget_bytes) == ("disk", None)
    monkeypatch.setattr(memory, "resident_bytes", lambda: 800 * 2**20)
    held = footprint_of(model, recipe, tokens, tmp_path / "out")
    assert (held.memory_parts["held before the run"], held.memory_parts["libraries"]) == (500 * 2**20, 300 * 2**20)
    assert held.memory_bytes == found.memory_bytes + 500 * 2**20
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 2**24, "bytes_in_use": 2**23})
    monkeypatch.setattr(jax, "devices", lambda: [device])
    with pytest.raises(BudgetError, match=r"memory left on the device, 8\.0 MiB, is too little"):
        footprint_of(model, recipe, tokens, tmp_path / "out")
    assert footprint_of(model, recipe, tokens, tmp_path / "out", 2**30).activations == "memory"
    with pytest.raises(BudgetError, match=r"a budget of 1\.0 MiB is too little: .* phase Grams .*libraries 300\.0 MiB"):
        footprint_of(model, recipe, tokens, tmp_path / "out", 2**20)


def test_the_estimate_takes_a_layer_by_blocks_where_the_device_has_too_little_room(model, recipe):
    def workspace(pattern, room):
        phases, _ = cost_of(model, recipe, "memory", room, method="sparsegpt", pattern=pattern)
        return phases["layer solves"]["workspace"]

    square, wide = method_cost(find_method("sparsegpt")).workspace
    # The largest is that of the linear [32, 64], of which 16 blocks have two outputs each.
    whole, least = (4 * (square * 64**2 + wide * 64 * outputs) for outputs in (32, 2))
    assert workspace("unstructured", None) == workspace("unstructured", 2**40) == whole
    assert workspace("unstructured", 1) == least
    # Groups of inputs are chosen for all outputs together.
    assert workspace("group:1", 1) == workspace("group:1", None)


def test_the_estimate_counts_streams_and_masks(models, model, recipe):
    # Before a block and after it; those of the dense model too, where the run has them.
    stream = 4 * 7 * 24 * 32
    assert cost_of(model, recipe, "disk")[1] == 2 * stream
    assert cost_of(model, recipe, "disk", propagate=0.5)[1] == 4 * stream
    # Distillation has a byte for each weight; those of experts are also stacked.
    for name, times in (("llama", 1), ("experts", 2)):
        model = open_model(models(name))
        held = cost_of(model, recipe, distil_epochs=1)[0]["distillation"]
        weights = {key: int(np.prod(model.weight_shape(key))) for key in model.linear_keys()}
        assert held["masks"] == sum((times if ".experts." in key else 1) * size for key, size in weights.items())


def test_a_disk_with_too_little_room_is_refused_before_any_work(tmp_path, source, model, recipe, tokens, monkeypatch):
    usage, output = shutil.disk_usage(tmp_path), tmp_path / "out"
    whole = footprint_of(model, recipe, tokens, output).output_bytes
    assert whole == sum(info.dtype.itemsize * np.prod(info.shape) for info in model.source.tensors.values())
    least = max(sum(parts.values()) for parts in cost_of(model, recipe, "disk")[0].values())
    for free, budget, changes, words in (
        (whole - 1, None, {}, r"the disk of .* has .* free, the run needs"),
        (whole, least, {}, "KiB of it activations"),
        # What is trained at the end lies beside what it replaces.
        (whole, None, {"distil_epochs": 1}, "the run needs"),
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        with pytest.raises(BudgetError, match=words):
            prune_model(source, output, recipe.model_copy(update=changes), memory=budget)
    assert not list(tmp_path.iterdir())


def test_batches_on_disk_are_those_that_were_put_there(tmp_path, monkeypatch, rng):
    given = jnp.asarray(rng.standard_normal((5, 2, 3, 4)), jnp.float32)
    given = given.at[2, 0, 0, 0].set(-0.0).at[2, 1, 1, 1].set(jnp.nan)
    batches = DiskBatches(tmp_path)
    for batch in given:
        batches.append(batch)
    assert (len(batches), batches.windows) == (5, 10)
    assert batches.shapes == Batches(given).shapes == [[2, 3, 4]] * 5
    assert np.asarray(batches[3]).tobytes() == np.asarray(given[3]).tobytes()
    assert [np.asarray(found).tobytes() for found in batches] == [np.asarray(batch).tobytes() for batch in given]
    for kind in (batches, Batches(given)):
        for count in (5, 50):
            np.testing.assert_array_equal(np.concatenate(list(kind.first(count))), np.concatenate(given)[:count])
    assert not any(tmp_path.iterdir())
    # Batches are equal, so that one program serves all.
    assert {len(batch) for batch in make_batches(np.zeros((14, 1024, 2), np.float32))} == {2}
    with pytest.raises(IndexError, match="batch 5 of 5"):
        batches[5]
    with pytest.raises(ValueError, match=r"float32 \(1, 3, 4\) among those of float32 \(2, 3, 4\)"):
        batches.append(given[0][:1])
    with monkeypatch.context() as patch:
        patch.setattr(batches, "_file", Mock(write=Mock(side_effect=OSError(errno.ENOSPC, "No space left"))))
        with pytest.raises(OSError, match=r"No space left.* 96 bytes .* after 480"):
            batches.append(given[0])
    batches._file.truncate(40)
    with pytest.raises(OSError, match="became shorter"):
        batches[0]

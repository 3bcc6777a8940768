"""A memory budget: where activations are stored, what it counts, what is refused, and the messages.

That activations on disk change no bit is a test of `test_whole_runs`.
"""

import errno
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.layers.methods import find_method, method_cost
from sparseopt.models import open_model
from sparseopt.models.files import safetensors
from sparseopt.pruning import Recipe, memory, prune_model
from sparseopt.pruning.base.activations import Batches, DiskBatches, make_batches
from sparseopt.pruning.memory import BudgetError, choose_footprint, phase_bytes
from sparseopt.pruning.run.plan import make_plan
from sparseopt.system import machine
from tests.pruning.whole_runs import Broken, breaking_at, model_bytes, tensors_of, write_model


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


def least_of(model, recipe):
    """The least budget: the peak with activations on disk."""
    return max(sum(parts.values()) for parts in cost_of(model, recipe, "disk")[0].values())


def test_a_run_goes_on_with_another_budget(tmp_path, source, model, recipe):
    prune_model(source, tmp_path / "whole", recipe)
    tight = least_of(model, recipe)
    with pytest.raises(Broken):
        prune_model(source, tmp_path / "broken", recipe, observer=breaking_at(10), memory=tight)
    report = prune_model(source, tmp_path / "broken", recipe, memory="64GiB")
    assert report.resumed_blocks == 1
    assert report.footprint.activations == "memory"
    assert model_bytes(tmp_path / "broken") == model_bytes(tmp_path / "whole")


def test_without_a_budget_little_memory_is_no_error(tmp_path, source, recipe, monkeypatch):
    """Only where activations lie follows what is available."""
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 2**20)
    report = prune_model(source, tmp_path / "out", recipe)
    assert report.footprint.activations == "disk"
    assert report.footprint.budget_bytes is None


def test_too_little_memory_on_the_device_is_refused_unless_a_budget_is_given(
    tmp_path, model, recipe, tokens, monkeypatch
):
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 2**24, "bytes_in_use": 2**23})
    monkeypatch.setattr(jax, "devices", lambda: [device])
    plan = make_plan(model, recipe, tmp_path / "out")
    with pytest.raises(BudgetError, match=r"memory left on the device, 8\.0 MiB, is too little.*give memory=.*try"):
        choose_footprint(model, plan, tokens[:6], tokens[6:])
    assert choose_footprint(model, plan, tokens[:6], tokens[6:], 2**30).activations == "memory"


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


def test_a_run_has_a_stream_before_a_block_and_one_after_it(model, recipe):
    """And those of the dense model, where it has them."""
    stream = 4 * 7 * 24 * 32
    assert cost_of(model, recipe, "disk")[1] == 2 * stream
    assert cost_of(model, recipe, "disk", propagate=0.5)[1] == 4 * stream


def test_the_estimate_of_distillation_counts_its_masks(models, recipe):
    """A byte for each weight; the masks of experts are also stacked."""
    for name, times in (("llama", 1), ("experts", 2)):
        model = open_model(models(name))
        held = cost_of(model, recipe, distil_epochs=1)[0]["distillation"]
        weights = {key: int(np.prod(model.weight_shape(key))) for key in model.linear_keys()}
        assert held["masks"] == sum((times if ".experts." in key else 1) * size for key, size in weights.items())


def test_a_disk_with_too_little_room_is_refused_before_any_work(tmp_path, source, model, recipe, tokens, monkeypatch):
    usage, output = shutil.disk_usage(tmp_path), tmp_path / "out"
    whole = choose_footprint(model, make_plan(model, recipe, output), tokens[:5], tokens[5:])
    assert whole.output_bytes == sum(
        info.dtype.itemsize * np.prod(info.shape) for info in model.source.tensors.values()
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=whole.output_bytes - 1))
    with pytest.raises(BudgetError, match=r"the disk of .* has .* free, the run needs .*make room"):
        prune_model(source, output, recipe)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=whole.output_bytes))
    with pytest.raises(BudgetError, match="KiB of it activations"):
        prune_model(source, output, recipe, memory=least_of(model, recipe))
    # What is trained at the end lies beside what it replaces.
    with pytest.raises(BudgetError, match="the run needs"):
        prune_model(source, output, recipe.model_copy(update={"distil_epochs": 1}))
    assert not list(tmp_path.iterdir())


def test_batches_on_disk_are_those_that_were_put_there(tmp_path):
    rng = np.random.default_rng(0)
    given = [jnp.asarray(rng.standard_normal((2, 3, 4)), jnp.float32) for _ in range(5)]
    given[2] = given[2].at[0, 0, 0].set(-0.0).at[1, 1, 1].set(jnp.nan)
    batches = DiskBatches(tmp_path)
    assert (len(batches), batches.shapes) == (0, [])
    for batch in given:
        batches.append(batch)
    assert batches.shapes == Batches(given).shapes == [[2, 3, 4]] * 5
    assert batches.windows == 10
    for found, batch in zip(batches, given, strict=True):
        assert np.asarray(found).tobytes() == np.asarray(batch).tobytes()
    assert np.asarray(batches[3]).tobytes() == np.asarray(given[3]).tobytes()
    for kind in (batches, Batches(given)):
        np.testing.assert_array_equal(np.concatenate(list(kind.first(5))), np.concatenate(given)[:5])
        np.testing.assert_array_equal(np.concatenate(list(kind.first(50))), np.concatenate(given))
        assert type(kind.first(5)) is type(kind.empty()) is type(kind)
    with pytest.raises(IndexError, match="batch 5 of 5"):
        batches[5]
    with pytest.raises(ValueError, match=r"float32 \(1, 3, 4\) among those of float32 \(2, 3, 4\)"):
        batches.append(given[0][:1])
    assert not any(tmp_path.iterdir())


def test_a_full_disk_is_named_and_batches_that_became_shorter_are_an_error(tmp_path, monkeypatch):
    class Full:
        def seek(self, place):
            assert place == 96

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    batches = DiskBatches(tmp_path)
    batches.append(jnp.ones((2, 3, 4)))
    with monkeypatch.context() as patch:
        patch.setattr(batches, "_file", Full())
        with pytest.raises(OSError, match=r"No space left .* activations of 96 bytes .* after 96 .*make room") as found:
            batches.append(jnp.ones((2, 3, 4)))
    assert found.value.errno == errno.ENOSPC
    batches._file.truncate(40)
    with pytest.raises(OSError, match="became shorter"):
        batches[0]


def test_rows_of_an_embedding_are_the_embedding(model, tokens, monkeypatch):
    """Also where the matrix comes in many pieces."""
    monkeypatch.setattr(safetensors, "SLICE", 5 * 32 * 4)
    rows, ids = np.unique(tokens, return_inverse=True)
    whole = make_batches(model.embedding()(jnp.asarray(tokens)))
    some = Batches().embed(model.embedding(rows), ids.reshape(tokens.shape).astype(np.int32))
    assert model.embedding(rows).weight.shape == (len(rows), 32)
    for one, other in zip(whole, some, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_pieces_of_a_file_decide_neither_its_digest_nor_what_is_found(tmp_path, source, monkeypatch):
    whole = open_model(source).check_finite()
    tensors = tensors_of()
    tensors["model.layers.2.mlp.down_proj.weight"][-1, -1] = np.nan
    monkeypatch.setattr(safetensors, "SLICE", 300)
    assert open_model(source).check_finite() == whole
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.down_proj\.weight .* holds 1 NaN"):
        open_model(write_model(tmp_path / "m", tensors=tensors)).check_finite()


def test_the_command_tells_what_it_will_take_and_took(tmp_path, source, text, command, monkeypatch):
    options = ("--calibration", text, "--windows", 4, "--seqlen", 24, "--method", "wanda")
    status, out, err = command("prune", source, "--output", tmp_path / "a", *options, "--memory", "64GiB")
    assert status == 0, err
    assert "memory 510." in out or "memory 511." in out
    for said in (
        "of 64.00 GiB asked for, estimated, in phase",
        "libraries 300.0 MiB + compiled programs 210.0 MiB",
        "disk 115.0 KiB for the model ",
        ", estimated 51",
        "asked for 64.00 GiB",
    ):
        assert said in out
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 1)
    monkeypatch.setattr(memory, "resident_bytes", lambda: 800 * 2**20)
    status, out, err = command("prune", source, "--output", tmp_path / "b", *options)
    assert status == 0, err
    assert "estimated, in phase Grams: held before the run 500.0 MiB + libraries 300.0 MiB" in out
    assert "for activations, until the run ends" in out

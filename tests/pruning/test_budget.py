"""A memory budget: where activations are stored, identical results, what is refused, and the messages."""

import dataclasses
import errno
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.layers.methods import find_method, method_cost
from sparseopt.models import open_model
from sparseopt.models.files import safetensors
from sparseopt.pruning import Recipe, memory, prune_model, prune_models
from sparseopt.pruning.base.activations import Batches, DiskBatches, make_batches
from sparseopt.pruning.base.records import Footprint
from sparseopt.pruning.memory import BudgetError, choose_footprint, prune_memory
from sparseopt.pruning.run.plan import make_plan
from sparseopt.system import machine
from tests.models.tiny import random_tensors, tiny_config, write_folder
from tests.pruning.test_pipeline import TOKENIZER
from tests.pruning.test_resumption import Broken, breaking_at, model_bytes
from tests.tiers import often

RECIPES = {
    "paper": {"preset": "paper", "dtype": "bfloat16"},
    "trained": {"method": "wanda", "train_epochs": 2, "propagate": 0.5},
    "surveyed": {"method": "wanda", "allocation": "curves", "output_weights": "gradient"},
    "owl": {"method": "wanda", "allocation": "owl", "heldout_windows": 0},
}


def tight(source, recipe):
    """The least budget that is not refused: too little for activations in memory."""
    windows, seqlen = recipe.calibration.shape
    sizes = {"windows": windows - recipe.heldout_windows, "seqlen": seqlen}
    model, method = open_model(source), recipe.layer_method
    found = [prune_memory(model, recipe.model_copy(update=sizes), method, where) for where in ("memory", "disk")]
    assert found[1].peak_bytes < found[0].peak_bytes
    return found[1].peak_bytes


@pytest.mark.parametrize("name", often(RECIPES, "trained", "owl"))
def test_activations_on_disk_change_no_bit(tmp_path, source, tokens, name, monkeypatch):
    monkeypatch.setattr("sparseopt.pruning.base.activations.BATCH_TOKENS", 48)
    recipe = Recipe(calibration=tokens, **{"heldout_windows": 2, **RECIPES[name]})
    footprints, on_disk, append = [], [], DiskBatches.append
    monkeypatch.setattr(DiskBatches, "append", lambda *given: on_disk.append(len(footprints)) or append(*given))
    reports = [
        prune_model(
            source,
            tmp_path / place,
            recipe,
            memory=memory,
            observer=lambda event, *_: footprints.append(event) if isinstance(event, Footprint) else None,
        )
        for place, memory in (("memory", None), ("disk", tight(source, recipe)))
    ]
    assert [report.footprint for report in reports] == footprints
    assert [footprint.activations for footprint in footprints] == ["memory", "disk"]
    assert footprints[1].scratch_bytes > 0
    assert set(on_disk) == {2}
    assert model_bytes(tmp_path / "disk") == model_bytes(tmp_path / "memory")
    alike = [[dataclasses.replace(r, seconds=0, compile_seconds=0) for r in report.layers] for report in reports]
    assert alike[0] == alike[1]
    told = json.loads((tmp_path / "disk" / "summary.json").read_text())["footprint"]
    assert told == dataclasses.asdict(footprints[1])


def test_a_run_goes_on_with_another_budget(tmp_path, source, tokens):
    recipe = Recipe(method="wanda", calibration=tokens, heldout_windows=2)
    prune_model(source, tmp_path / "whole", recipe)
    with pytest.raises(Broken):
        prune_model(source, tmp_path / "broken", recipe, observer=breaking_at(10), memory=tight(source, recipe))
    report = prune_model(source, tmp_path / "broken", recipe, memory="64GiB")
    assert report.resumed_blocks == 1
    assert report.footprint.activations == "memory"
    assert model_bytes(tmp_path / "broken") == model_bytes(tmp_path / "whole")


def test_scratch_files_have_no_name(tmp_path, source, tokens):
    """Nothing is left behind by a run that is killed, since there is nothing with a name at any moment."""
    recipe = Recipe(method="wanda", calibration=tokens, heldout_windows=2)
    names = set()
    prune_model(
        source,
        tmp_path / "out",
        recipe,
        memory=tight(source, recipe),
        observer=lambda *_: names.update(entry.name for entry in (tmp_path / "out").iterdir()),
    )
    assert all(name.endswith((".safetensors", ".json", ".jsonl", ".lock")) for name in names), names


def test_a_budget_that_is_too_little_is_refused_before_any_work(tmp_path, source, tokens):
    recipe = Recipe(calibration=tokens, heldout_windows=2, preset="paper")
    with pytest.raises(BudgetError, match=r"a budget of 100\.0 MiB is too little: .*(libraries 300\.0 MiB).*at least"):
        prune_model(source, tmp_path / "out", recipe, memory="100MiB")
    with pytest.raises(BudgetError, match=r"in phase Grams .*less to do: heldout_windows=0 .* one set of Grams only"):
        prune_model(source, tmp_path / "out", recipe, memory="100MiB")
    with pytest.raises(ValueError, match="given '8'"):
        prune_model(source, tmp_path / "out", recipe, memory="8")
    assert not (tmp_path / "out").exists()


def test_without_a_budget_little_memory_is_no_error(tmp_path, source, tokens, monkeypatch):
    """Only where activations lie follows what is available."""
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 2**20)
    report = prune_model(source, tmp_path / "out", Recipe(method="wanda", calibration=tokens, heldout_windows=2))
    assert report.footprint.activations == "disk"
    assert report.footprint.budget_bytes is None


def test_too_little_memory_on_the_device_is_refused_unless_a_budget_is_given(tmp_path, source, tokens, monkeypatch):
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 2**24, "bytes_in_use": 2**23})
    monkeypatch.setattr(jax, "devices", lambda: [device])
    recipe = Recipe(method="wanda", calibration=tokens, heldout_windows=2)
    model = open_model(source)
    plans = [make_plan(model, recipe, tmp_path / "out")]
    with pytest.raises(BudgetError, match=r"memory left on the device, 8\.0 MiB, is too little.*give memory=.*try"):
        choose_footprint(model, plans, tokens[:6], tokens[6:])
    assert choose_footprint(model, plans, tokens[:6], tokens[6:], 2**30).activations == "memory"


def test_the_estimate_takes_a_layer_by_blocks_where_the_device_has_too_little_room(source, tokens):
    model = open_model(source)

    def workspace(pattern, room):
        recipe = Recipe(
            method="sparsegpt", calibration=tokens, windows=5, seqlen=24, heldout_windows=2, pattern=pattern
        )
        cost = prune_memory(model, recipe, recipe.layer_method, room=room)
        return cost.phases["layer solves"]["workspace"], cost.solve_blocks

    square, wide = method_cost(find_method("sparsegpt")).workspace
    # The largest is that of the linear [32, 64], of which 16 blocks have two outputs each.
    whole, least = (4 * (square * 64**2 + wide * 64 * outputs) for outputs in (32, 2))
    assert workspace("unstructured", None) == workspace("unstructured", 2**40) == (whole, 1)
    assert workspace("unstructured", 1) == (least, 64)
    # Groups of inputs are chosen for all outputs together.
    assert workspace("group:1", 1) == workspace("group:1", None)


def test_activations_of_blocks_in_torch_are_counted_with_their_variants(tmp_path, source, tokens):
    model = open_model(source)
    plans = [make_plan(model, Recipe(method="wanda", calibration=tokens, variants=3), tmp_path / "out")]
    foreign = SimpleNamespace(config=model.config)
    found = choose_footprint(foreign, plans, tokens[:5], tokens[5:], 2**30)
    streams = 1 + 3
    assert found.scratch_bytes == streams * 4 * (tokens[:5].size * (1 + 3) + tokens[5:].size) * model.config.hidden_size


def test_a_disk_with_too_little_room_is_refused_before_any_work(tmp_path, source, tokens, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    recipe = Recipe(method="wanda", calibration=tokens, heldout_windows=2)
    plans = [(recipe.model_copy(update={"sparsity": share}), tmp_path / str(share)) for share in (0.5, 0.6)]
    model = open_model(source)
    made = [make_plan(model, recipe, folder) for recipe, folder in plans]
    whole = choose_footprint(model, made, tokens[:5], tokens[5:])
    assert whole.output_bytes == 2 * sum(
        info.dtype.itemsize * np.prod(info.shape) for info in model.source.tensors.values()
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=whole.output_bytes - 1))
    with pytest.raises(BudgetError, match=r"the disk of .* has .* free, the run needs .*make room"):
        prune_models(source, plans)
    assert not any(folder.exists() for _, folder in plans)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=whole.output_bytes))
    with pytest.raises(BudgetError, match="KiB of it activations"):
        prune_models(source, plans, memory=tight(source, recipe))
    # What is trained at the end lies beside what it replaces: one such model takes as much as two, but for its ends.
    with pytest.raises(BudgetError, match="the run needs"):
        prune_models(source, [(recipe.model_copy(update={"distil_epochs": 1}), tmp_path / "trained"), plans[0]])


def test_plans_that_share_a_pass_have_a_stream_each(source, tokens):
    model, recipe = (
        open_model(source),
        Recipe(method="wanda", calibration=tokens, windows=5, seqlen=24, heldout_windows=2),
    )
    one, three = (prune_memory(model, recipe, recipe.layer_method, "disk", plans).scratch_bytes for plans in (1, 3))
    stream = 4 * 7 * 24 * 32
    assert (one, three) == (2 * stream, 4 * stream)
    dense = recipe.model_copy(update={"propagate": 0.5})
    assert prune_memory(model, dense, dense.layer_method, "disk").scratch_bytes == 4 * stream


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


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    batches = DiskBatches(tmp_path)
    batches.append(jnp.ones((2, 3, 4)))

    class Full:
        def seek(self, place):
            assert place == 96

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(batches, "_file", Full())
    with pytest.raises(OSError, match=r"No space left .* activations of 96 bytes .* after 96 .*make room") as found:
        batches.append(jnp.ones((2, 3, 4)))
    assert found.value.errno == errno.ENOSPC


def test_batches_that_became_shorter_are_an_error(tmp_path):
    batches = DiskBatches(tmp_path)
    batches.append(jnp.ones((2, 3, 4)))
    batches._file.truncate(40)
    with pytest.raises(OSError, match="became shorter"):
        batches[0]


def test_rows_of_an_embedding_are_the_embedding(source, tokens, monkeypatch):
    """Also where the matrix comes in many pieces."""
    monkeypatch.setattr(safetensors, "SLICE", 5 * 32 * 4)
    model = open_model(source)
    rows, ids = np.unique(tokens, return_inverse=True)
    whole = make_batches(model.embedding()(jnp.asarray(tokens)))
    some = Batches().embed(model.embedding(rows), ids.reshape(tokens.shape).astype(np.int32))
    assert model.embedding(rows).weight.shape == (len(rows), 32)
    for one, other in zip(whole, some, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_digest_does_not_depend_on_the_pieces(source, monkeypatch):
    whole = open_model(source).check_finite()
    monkeypatch.setattr(safetensors, "SLICE", 300)
    assert open_model(source).check_finite() == whole


def test_a_bad_value_in_a_late_piece_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "SLICE", 300)
    tensors = random_tensors(tiny_config(), np.random.default_rng(0))
    tensors["model.layers.2.mlp.down_proj.weight"][-1, -1] = np.nan
    write_folder(tmp_path / "m", tiny_config(), tensors)
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.down_proj\.weight .* holds 1 NaN"):
        open_model(tmp_path / "m").check_finite()


def test_the_command_tells_what_it_will_take_and_took(tmp_path, command, monkeypatch):
    source = write_folder(tmp_path / "m", tiny_config(), random_tensors(tiny_config(), np.random.default_rng(0)))
    (source / "tokenizer.json").write_text(TOKENIZER)
    (tmp_path / "t.txt").write_text("hello there, " * 300)
    options = ("--calibration", f"file:{tmp_path / 't.txt'}", "--windows", 4, "--seqlen", 24, "--method", "wanda")
    status, out, err = command("prune", source, "--output", tmp_path / "a", *options, "--memory", "64GiB")
    assert status == 0, err
    assert "memory 510." in out or "memory 511." in out
    assert "of 64.00 GiB asked for, estimated, in phase" in out
    assert "libraries 300.0 MiB + compiled programs 210.0 MiB" in out
    assert "disk 115.0 KiB for the model " in out
    assert ", estimated 51" in out
    assert "asked for 64.00 GiB" in out
    status, out, err = command("prune", source, "--output", tmp_path / "b", *options, "--memory", "1MiB")
    assert status == 2
    assert "a budget of 1.0 MiB is too little" in err
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 1)
    monkeypatch.setattr(memory, "resident_bytes", lambda: 800 * 2**20)
    status, out, err = command("prune", source, "--output", tmp_path / "b", *options)
    assert status == 0, err
    assert "estimated, in phase Grams: held before the run 500.0 MiB + libraries 300.0 MiB" in out
    assert "for activations, until the run ends" in out

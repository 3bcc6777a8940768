"""Pruning on several devices: the results of one device, and the amount of communication.

One process with eight virtual devices computes everything (`on_devices`); the tests check its results.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sparseopt.layers.patterns import check_cut, parse_pattern
from sparseopt.pruning import LayerRecord
from sparseopt.pruning.base.records import AllocationRecord, BlockRecord, DistillationRecord, ShapeRecord
from sparseopt.pruning.run.resumption import Progress
from sparseopt.system import run_folder
from tests.pruning.on_devices import LAYERS

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", "tests.pruning.on_devices", str(folder / "found.json"), str(folder)],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


@pytest.mark.processes
@pytest.mark.parametrize("name", list(LAYERS))
def test_a_layer_solved_on_many_devices_is_that_of_one(found, name):
    layer = found["layers"][name]
    assert layer["support"]
    assert layer["apart"] < 2e-4
    assert layer["many"] == pytest.approx(layer["one"], rel=1e-3)
    # Counts, steps and status are the same to the last one.
    assert layer["many"][2:] == layer["one"][2:]


@pytest.mark.processes
@pytest.mark.parametrize("name", list(LAYERS))
def test_no_solve_brings_a_layer_together(found, name):
    layer = found["layers"][name]
    for kind, nbytes, _ in layer["program"]:
        assert kind in ("all-reduce", "all-gather"), layer["program"]
        # A device's own part of the layer is an eighth or a third of it; what is gathered are counts, and of one
        # input the scores where a tie is broken. What is reduced is the sample, and totals of inputs.
        own = layer["bytes"] // LAYERS[name][4]
        assert nbytes <= (own // 4 if kind == "all-gather" else layer["bytes"]), layer["program"]


@pytest.mark.processes
def test_a_layer_that_does_not_fit_is_solved_by_blocks_over_all_devices(found):
    blocks = found["layers"]["by blocks"]
    assert blocks["solved"] == [24, 24]
    assert blocks["parts"] == 2
    assert blocks["support"]
    assert blocks["apart"] == 0


@pytest.mark.processes
@pytest.mark.parametrize(("name", "order", "cut"), [("side by side", "0123456", 0), ("no memory", "14", 1)])
def test_linears_side_by_side_are_those_of_one_device(found, name, order, cut):
    blocks = found["blocks"][name]
    assert blocks["order"] == list(order)
    # Rounding, which differs between processors, moves weights along directions that the Gram hardly sees.
    assert all(one["support"] and one["apart"] < 1e-3 for one in blocks["same"])
    assert all(ours == theirs for ours, theirs in blocks["steps"])
    assert len({ours for ours, _ in blocks["steps"]}) > 1
    for ours, theirs in blocks["errors"]:
        assert theirs == pytest.approx(ours, rel=1e-3)
    # A program a shape; where memory is too short for them, the linears are cut.
    assert len(blocks["programs"]) == 2
    assert blocks["cut"] == cut
    assert blocks["seconds"] > 0


@pytest.mark.processes
def test_linears_side_by_side_tell_each_other_nothing(found):
    assert all(program == [] for program in found["blocks"]["side by side"]["programs"])


@pytest.mark.processes
def test_a_pattern_of_blocks_that_a_cut_would_part_is_refused(found):
    text = "8 devices hold 6 outputs each of the layer [out=48, in=32], which splits the pattern's blocks of 4 outputs"
    assert found["layers"]["refused"].startswith(text)
    assert found["layers"]["refused"].endswith("1, 2, 3, 4, 6 devices do not")
    check_cut(parse_pattern("block:4x4", 0.5, (48, 32)), (48, 32), None)


@pytest.mark.processes
def test_ties_are_broken_as_on_one_device(found):
    assert all(found["ties"].values()), found["ties"]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "each", "once"),
    [
        # Ten int32 counts and two float32 losses; "always" compares the two points by two more counts and one more sum.
        ("maiht on_increase", 0, 10 * 4 + 2 * 4),
        ("maiht always", 0, 12 * 4 + 3 * 4),
        # Two counts, two losses, and three times a flag for whether a point lies in the pattern.
        ("maiht 2:4", 0, 2 * 4 + 2 * 4 + 3),
        # As 2:4, and two selections: a flag before every pass and one for ties.
        ("maiht per-row", 2, 2 * 4 + 2 * 4 + 3 + 2),
        # A selection: three counts a pass, and every 17th score of the 256 x 64 as the sample. Ties have their branch:
        # the totals of the inputs, and one input's scores.
        ("admm", 3 * 4, 4 * 964 + 4 * (64 + 1) + 4 * 256 // 8),
    ],
)
def test_an_iteration_exchanges_few_bytes_whatever_the_layer(found, name, each, once):
    """`each` pass of a selection, and `once` an iteration."""
    sent = found["loops"][name]
    assert sum(nbytes for _, nbytes, depth in sent if depth == 2) == each
    assert sum(nbytes for _, nbytes, depth in sent if depth == 1) == once


@pytest.mark.processes
def test_a_step_of_the_refit_exchanges_two_sums(found):
    assert sum(nbytes for _, nbytes, _ in found["loops"]["refit"]) == 2 * 4


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["plain", "experts"])
def test_grams_and_streams_over_devices_are_those_of_one(found, kind):
    calibration = found["calibration"][kind]
    assert max(calibration["grams"].values()) < 2e-5, calibration["grams"]
    assert any(name.endswith("tokens") for name in calibration["grams"])
    assert calibration["stream"] < 1e-4
    # Eleven windows, two a device in one batch of sixteen.
    assert calibration["windows"] == [11, 11, 1, 16]


@pytest.mark.processes
def test_the_grams_of_a_block_are_exchanged_once(found):
    for kind in ("plain", "experts"):
        assert found["calibration"][kind]["adding"] == []
    plain = found["calibration"]["plain"]
    assert {kind for kind, *_ in plain["summing"]} == {"all-reduce"}
    # Gram, drift and sum of every input in float32, the sum of the tokens' weights and their number.
    wanted = sum(2 * 4 * width**2 + 4 * width + 4 + 4 for width in plain["widths"])
    assert sum(nbytes for _, nbytes, _ in plain["summing"]) == wanted


@pytest.mark.processes
@pytest.mark.parametrize(("name", "programs"), [("paper", [1, 0]), ("wanda curves", [0, 1]), ("experts", [0, 5])])
def test_a_model_pruned_on_many_devices_is_that_of_one(found, name, programs):
    model = found["models"][name]
    assert model["programs"] == programs
    assert model["support"]
    assert model["apart"] < 1e-4
    assert model["steps"][0] == model["steps"][1]
    # Eleven windows of 24 tokens; "wanda curves" has a variant of each.
    assert model["tokens"] == [264 * (1 + (name == "wanda curves"))] * 2
    assert model["starved"][0] == model["starved"][1]
    assert any(model["starved"][0]) == (name == "experts")
    assert model["errors"][1] == pytest.approx(model["errors"][0], rel=1e-3)
    assert model["summary"] == {"devices": 8, "processes": 1, "platform": "cpu", "precision": "highest"}


@pytest.mark.processes
def test_a_run_is_gone_on_with_on_another_number_of_devices(found):
    assert found["models"]["gone on with"]["blocks"] == 1
    assert found["models"]["gone on with"]["apart"] < 1e-4


@pytest.mark.processes
def test_a_budget_is_for_one_device(found):
    assert found["models"]["refused"] == (
        "a budget of memory is for one device, given 8GiB and 8 devices: leave one of the two out"
    )


def test_what_one_process_knows_of_an_earlier_run_is_what_it_tells_the_others():
    trained = BlockRecord(0.2, 0.1, None, None, 4, "FINISHED", 1.0, 0.5, 3, 96, block=0)
    layer = LayerRecord(0, "a.q_proj", (4, 8), 32, 16, 0.1, None, 20, "CONVERGED", 1.0, 0.5, 0, 64, output_blocks=2)
    shape = ShapeRecord(4, 1, None, (0, 2), (1,), (0.2,), (8, 2, 3, None), 80, 160, 640, 0.5)
    distilled = DistillationRecord(0.2, 0.1, 0.3, 0.2, 4, "FINISHED", 1.0, 0.5, 3, 96)
    allocation = AllocationRecord({"a.q_proj.weight": 0.1 + 0.2})
    known = Progress(1, ["outer", "block-0000"], [allocation, shape, layer, trained, distilled])
    assert Progress.from_dict(json.loads(json.dumps(known.as_dict()))) == known
    assert (known.layers, known.trained) == ([layer], [trained])
    assert (known.allocation, known.shape, known.distilled) == (allocation, shape, distilled)
    lost = replace(trained, first_loss=math.nan, last_loss=math.inf, status="NONFINITE")
    read = BlockRecord.from_dict(run_folder.plain(lost.as_dict()))
    assert math.isnan(read.first_loss)
    assert math.isnan(read.last_loss)
    assert replace(read, first_loss=0.2, last_loss=0.1, status="FINISHED") == trained

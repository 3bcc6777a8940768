"""The trend filter on several devices: the results of one, and no more communication than the model says."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.processes
FITS = (
    "grid, float32, two channels, 8",
    "grid, missing, 3",
    "chain, weight a row, 8",
    "cube, MCP, 8",
    "cube, isotropic, 8",
    "graph, 8",
    "graph, the means are the fit, 3",
)
REFUSALS = {
    "more": 'devices must be a number from 1 to 8, what JAX sees here, or "all"; given 9',
    "method": 'several devices work with method="doge", given method="admm"',
    "B": "several devices need B = order + 1 = 3, which needs no solve over the whole graph, given B=1",
    "loss": "several devices fit the square loss, given Huber",
    "several": "several devices fit one penalty, given penalties of several orders",
    "rows": "the gamma of MCP is one number on a grid, given the shape (5,)",
    "axes": 'the mesh must have one axis, "devices"',
    "warm start": "start was found by 2 devices, and its state lies on them: give devices=2",
    "other warm start": "start was found by 2 devices, and its state lies on them: give devices=2",
    "short": "the one of (5, 5) has 5 nodes for 8 devices",
    "few": "3 nodes are too few for 8 devices",
}


@pytest.fixture(scope="module")
def found():
    done = subprocess.run(
        [sys.executable, "-m", "tests.trend.over_devices"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_product_is_that_of_one_device_bit_by_bit_on_grids_and_to_rounding_on_graphs(found):
    assert len(found["products"]) == 5
    for name, case in found["products"].items():
        rounding = 1e-12 * case["size"] if name.startswith("graph") else 0
        assert case["apart"] <= rounding, name
        assert case["apart_back"] <= rounding, name


def test_the_product_back_is_the_transpose(found):
    for name, case in found["products"].items():
        assert abs(case["adjoint"]) <= 1e-12 * case["size"], name


@pytest.mark.parametrize("name", FITS)
def test_several_devices_end_as_one_with_the_same_answer(found, name):
    case = found["fits"][name]
    one, several, eps = case["one"], case["several"], case["eps"]
    assert case["shape"]
    assert case["history"]
    assert several["status"] == one["status"]
    assert several["steps"] == one["steps"]
    assert several["objective"] == pytest.approx(one["objective"], rel=100 * eps)
    assert several["gap"] == pytest.approx(one["gap"], abs=1000 * eps, nan_ok=True)
    assert case["apart"] <= 1000 * eps


@pytest.mark.parametrize("name", FITS)
def test_an_iteration_sends_to_neighbours_what_the_model_says_and_a_check_sums_a_few_numbers(found, name):
    case = found["fits"][name]
    assert case["kinds"] == ["all-reduce", "collective-permute"]
    assert case["messages"][0] == case["messages"][1]
    assert case["bytes"][0] == case["bytes"][1]
    # One of a check and one of a change of rho, each of a few sums.
    assert len(case["reduced"]) == 2
    assert max(case["reduced"]) <= 64


@pytest.mark.parametrize("name", REFUSALS)
def test_what_several_devices_cannot_do_is_refused_with_what_was_given(found, name):
    assert REFUSALS[name] in found["refusals"][name]


def test_a_start_from_an_earlier_fit_saves_steps_whoever_found_it(found):
    cold, from_one, from_two = found["warm"]
    assert from_one == from_two < cold

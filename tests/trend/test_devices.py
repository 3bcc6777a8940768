"""The trend filter on several devices: the results of one, and no more communication than the model says."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.processes
REFUSALS = {
    "more": "devices must be a number from 1 to 8",
    "method": 'given method="admm"',
    "B": "several devices need B = order + 1 = 3",
    "loss": "several devices fit the square loss, given Huber",
    "several": "given penalties of several orders",
    "bounds": "bounds and monotone fits work on one device",
    "box": "given penalties of several orders",
    "rows": "the gamma of MCP is one number on a grid, given the shape (5,)",
    "axes": 'the mesh must have one axis, "devices"',
    "warm start": "start was found by 2 devices",
    "short": "the one of (5, 5) has 5 nodes for 8 devices",
    "few": "3 nodes are too few for 8 devices",
    "free ends": "several devices need the ends of the graph",
    "free chain": "several devices need",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    programs = tmp_path_factory.mktemp("programs")
    flags = f"--xla_force_host_platform_device_count=8 --xla_dump_to={programs} --xla_dump_hlo_as_text"
    # A program that is taken from the folder of the tests is not written.
    changed = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    call = [sys.executable, "-m", "tests.trend.over_devices", programs]
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=os.environ | changed)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_several_devices_end_as_one_with_the_same_answer(found):
    assert len(found["fits"]) == 7
    for name, case in found["fits"].items():
        one, several, eps = case["one"], case["several"], case["eps"]
        assert (case["shape"], case["history"]) == (True, True), name
        assert (several["status"], several["steps"]) == (one["status"], one["steps"]), name
        assert several["objective"] == pytest.approx(one["objective"], rel=100 * eps), name
        assert several["gap"] == pytest.approx(one["gap"], abs=1000 * eps, nan_ok=True), name
        assert case["apart"] <= 1000 * eps, name


def test_an_iteration_sends_to_neighbours_what_the_model_says_and_a_check_sums_a_few_numbers(found):
    for name, case in found["fits"].items():
        assert case["kinds"] == ["all-reduce", "collective-permute"], name
        if not name.startswith("graph"):
            assert case["messages"][0] == case["messages"][1], name
            assert case["bytes"][0] == case["bytes"][1], name
        # One of a check and one of a change of rho, each of a few sums.
        assert len(case["reduced"]) == 2, name
        assert max(case["reduced"]) <= 64, name


@pytest.mark.parametrize("name", REFUSALS)
def test_what_several_devices_cannot_do_is_refused_with_what_was_given(found, name):
    assert REFUSALS[name] in found["refusals"][name]


def test_a_start_from_an_earlier_fit_saves_steps_whoever_found_it(found):
    cold, from_one, from_two = found["warm"]
    assert from_one == from_two < cold

"""The trend filter on several devices: the results of one, and no more communication than the model says."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.processes


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


def test_what_several_devices_cannot_do_is_refused_with_what_was_given(found):
    assert len(found["refusals"]) == 14
    assert [said for words, said in found["refusals"] if words not in said] == []


def test_a_start_from_an_earlier_fit_saves_steps_whoever_found_it(found):
    cold, from_one, from_two = found["warm"]
    assert from_one == from_two < cold

"""Cooperating processes end together: real ones, joined by gloo, that fail or are killed during an exchange.

Each process runs this file as a script: it joins the others, compares, and ends as requested.
"""

import os
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.core.base.mesh import device_line, over, put, whole
from sparseopt.system import processes
from tests.processes import free_port, start, wait

# From the death of one to the end of all, imports of the others included.
PATIENCE = 30
LOST = "another process has ended or was lost"


def begun(folder, how, who, count):
    return start([[sys.executable, __file__, how, str(who)]] * count, folder, free_port())


@pytest.mark.processes
def test_processes_agree_hear_the_first_and_share_arrays(tmp_path):
    said = "[{'from': 0}, True, False, [[0.0, 2.0], [4.0, 6.0], [8.0, 10.0], [12.0, 14.0], [16.0, 18.0], [20.0, 22.0]]]"
    for process in wait(begun(tmp_path, "well", 1, 2), tmp_path):
        assert (process.status, process.err) == (0, "")
        assert process.out.endswith(f"{said}\nended\n")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("how", "who", "count", "status", "said"),
    [
        ("raises", 2, 3, 1, "error: process 2 of 3: the disk is full\n"),
        ("stopped", 1, 2, 130, "process 1 of 2: stopped\n"),
    ],
)
def test_one_that_fails_or_is_stopped_says_so_and_ends_all(tmp_path, how, who, count, status, said):
    found = wait(begun(tmp_path, how, who, count), tmp_path)
    assert not any("ended\n" in process.out or "Traceback" in process.err for process in found)
    failed = found.pop(who)
    assert (failed.status, failed.err) == (status, said)
    for index, other in enumerate(found):
        assert (other.status, f"error: process {index} of {count}: {LOST}" in other.err) == (1, True)


@pytest.mark.processes
@pytest.mark.parametrize(("how", "who"), [("killed", 1), ("killed", 0), ("killed alone", 1)])
def test_where_one_is_killed_the_others_end_within_half_a_minute_and_say_so(tmp_path, how, who):
    """The others of an exchange themselves; those at work of their own are ended by JAX, with a log of its own."""
    running = begun(tmp_path, how, who, 3)
    running[who].wait(timeout=120)
    began = time.monotonic()
    found = wait(running, tmp_path)
    assert time.monotonic() - began < PATIENCE
    assert found.pop(who).status == -signal.SIGKILL
    for other in found:
        if (how, who) == ("killed", 1):
            assert (other.status, other.err.count(LOST)) == (1, 1)
        else:  # with process 0, the service of JAX is lost too
            assert other.status in (1, -signal.SIGABRT)
            assert LOST in other.err or "another task died" in other.err
        assert "Traceback" not in other.err


@pytest.mark.parametrize(
    ("given", "environment", "words"),
    [
        ({"coordinator": "node1"}, {}, "coordinator's address .* given 'node1'"),
        ({"coordinator": "node1:65536"}, {}, "given 'node1:65536'"),
        ({"coordinator": "a:1", "processes": 4, "index": 4}, {}, "process ids .* 0 to 3 for 4 processes, given 4"),
        ({"coordinator": "a:1", "index": 0}, {"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES .* given 'four'"),
        ({}, {}, "needs --coordinator HOST:PORT, --processes N and --process-id I"),
    ],
)
def test_what_cannot_be_joined_is_said_at_once(monkeypatch, given, environment, words):
    for name in processes.ENVIRONMENT:
        monkeypatch.setenv(name, environment.get(name, ""))
    with pytest.raises(ValueError, match=words):
        processes.join(**given)


if __name__ == "__main__":
    how, who = sys.argv[1], int(sys.argv[2])
    processes.join(timeout=120)
    index = jax.process_index()
    with processes.together():
        processes.agree({"config": 1})
        said = [processes.told({"from": index}), processes.any_of(index == who), processes.any_of(False)]
        mesh = device_line("all")
        values = put(np.arange(12, dtype=np.float32).reshape(6, 2), over(mesh))
        said.append(whole(values * 2).tolist())
        print(said, flush=True)
        total = jax.jit(lambda x: jnp.sum(x * x))
        until = time.monotonic() + (0 if how == "well" else 60)
        while time.monotonic() < until:
            # In the middle of exchanges, as a solve is; or each at work of its own.
            time.sleep(0.1) if how == "killed alone" else float(total(values))
            if index == who and how.startswith("killed"):
                os.kill(os.getpid(), signal.SIGKILL)
            if index == who and how == "stopped":
                os.kill(os.getpid(), signal.SIGINT)
            if index == who and how == "raises":
                raise OSError("the disk is full")
    print("ended", flush=True)

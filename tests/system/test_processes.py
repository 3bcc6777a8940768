"""Cooperating processes end together: real ones, joined by gloo, that fail or are killed during an exchange."""

import signal
import sys
import time
from pathlib import Path

import pytest

from sparseopt.system import processes
from tests.processes import free_port, start, wait

SCRIPT = Path(__file__).parent / "ending_together.py"
# From the death of one to the end of all, imports of the others included.
PATIENCE = 30
LOST = "another process has ended or was lost"


def begun(folder, how, who, count):
    return start([[sys.executable, str(SCRIPT), how, str(who)]] * count, folder, free_port())


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


def test_one_process_alone_agrees_with_itself():
    processes.agree({"config": 1})
    processes.barrier("here")
    assert processes.told([1, "a"]) == [1, "a"]
    assert [processes.any_of(flag) for flag in (True, False)] == [True, False]
    with pytest.raises(OSError, match="as it is"), processes.together():
        raise OSError("as it is")

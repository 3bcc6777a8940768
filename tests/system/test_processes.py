"""Cooperating processes end together: real ones, joined by gloo, that fail or are killed during an exchange."""

import re
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


def ended(folder, how, who, count):
    command = [sys.executable, str(SCRIPT), how, str(who)]
    return wait(start([command] * count, folder, free_port()), folder)


@pytest.mark.processes
def test_processes_agree_hear_the_first_and_share_arrays(tmp_path):
    found = ended(tmp_path, "well", 1, 2)
    said = "[{'from': 0}, True, False, [[0.0, 2.0], [4.0, 6.0], [8.0, 10.0], [12.0, 14.0], [16.0, 18.0], [20.0, 22.0]]]"
    for process in found:
        assert process.status == 0, process.err
        assert process.out.endswith(f"{said}\nended\n")
        assert process.err == ""


LOST = "another process has ended or was lost, and its own message, if any, says why. Finished work is kept: the same"


@pytest.mark.processes
def test_one_that_fails_says_why_and_ends_all(tmp_path):
    found = ended(tmp_path, "raises", 2, 3)
    assert [process.status for process in found] == [1] * 3
    assert found[2].err == "error: process 2 of 3: the disk is full\n"
    assert [f"error: process {i} of 3: {LOST}" in found[i].err for i in (0, 1)] == [True] * 2
    assert not any("ended" in process.out or "Traceback" in process.err for process in found)


@pytest.mark.processes
def test_ctrl_c_in_one_is_no_error_there_and_ends_the_other(tmp_path):
    found = ended(tmp_path, "stopped", 1, 2)
    assert (found[1].status, found[1].err) == (130, "process 1 of 2: stopped\n")
    assert (found[0].status, LOST in found[0].err) == (1, True)


@pytest.mark.processes
@pytest.mark.parametrize(("how", "who"), [("killed", 1), ("killed", 0), ("killed alone", 1)])
def test_where_one_is_killed_the_others_end_within_half_a_minute_and_say_so(tmp_path, how, who):
    """The others of an exchange themselves; those at work of their own are ended by JAX, with a log of its own."""
    running = start([[sys.executable, str(SCRIPT), how, str(who)]] * 3, tmp_path, free_port())
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
    ("given", "text"),
    [
        ({"coordinator": "node1"}, "the coordinator's address must be HOST:PORT, as in node1:1234, given 'node1'"),
        ({"coordinator": "a:1", "processes": 4, "index": 4}, "process ids run from 0 to 3 for 4 processes, given 4"),
        ({}, "--distributed needs --coordinator HOST:PORT, --processes N and --process-id I"),
    ],
)
def test_what_cannot_be_joined_is_said_at_once(monkeypatch, given, text):
    for name in processes.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        processes.join(**given)


def test_numbers_in_the_environment_are_checked(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "four")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES must be a whole number, given 'four'"):
        processes.join("a:1", None, 0)


def test_one_process_alone_agrees_with_itself():
    processes.agree({"config": 1})
    processes.barrier("here")
    assert processes.told([1, "a"]) == [1, "a"]
    assert processes.any_of(True)
    assert not processes.any_of(False)
    with pytest.raises(OSError, match="as it is"), processes.together():
        raise OSError("as it is")

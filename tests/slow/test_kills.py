"""A run killed thirty times at random moments, of a folder and of a GGUF file: run by `make test-slow`."""

import pytest
from bench_reliability import killed_runs

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("converted", [False, True])
def test_thirty_kills_lose_no_finished_block_and_change_no_bit(tmp_path, converted):
    found = killed_runs(tmp_path, kills=30, converted=converted)
    assert found["kills"] == 30
    # Else the kills came too early, and nothing was tried.
    assert found["within_the_pass"] >= 10
    assert (found["lost_finished_blocks"], found["refused"], found["identical"]) == (0, 0, True)

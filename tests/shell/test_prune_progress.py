"""The progress of a run that is told line by line: the time left, by a clock of the test."""

from types import SimpleNamespace

import pytest

from sparseopt.pruning import LayerRecord
from sparseopt.pruning.base.records import Passed, Replay
from sparseopt.shell import prune_progress
from sparseopt.shell.prune_progress import PruneProgress


@pytest.fixture
def clock(monkeypatch):
    """Seconds, in a list."""
    now = [0.0]
    monkeypatch.setattr(prune_progress, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def linear(block, name):
    return LayerRecord(block, f"layers.{block}.{name}", (2, 2), 4, 2, 0.1, None, 1, "CONVERGED", 1.0, 0.0, 0, 9)


def test_neither_compiling_nor_what_came_before_the_blocks_counts_as_their_work(clock, monkeypatch, capsys):
    monkeypatch.setattr(prune_progress, "Compiled", SimpleNamespace(seconds=0.0))
    with PruneProgress("whole") as progress:
        for done in range(1, 31):
            # The first step of the survey compiles for a minute, the first block for four.
            clock[0] += 62 if done == 2 else 2
            prune_progress.Compiled.seconds += 60 * (done == 2)
            progress("survey, pass", done, 30)
        for block in range(2):
            clock[0] += 250 if block == 0 else 10
            prune_progress.Compiled.seconds += 240 * (block == 0)
            progress(linear(block, "up"), block + 1, 4)
            progress(Passed(block, 4), block + 1, 4)
    said = capsys.readouterr().out.splitlines()[1:]
    passes = [line.removeprefix("whole: survey, pass ") for line in said[:-2]]
    assert passes == ["1/30, 2 s", "3/30, 66 s, 54 s left", *passes[2:]]
    assert passes[-1] == "30/30, 2 min"
    assert len(passes) == 11
    assert [line.rpartition(", ")[2] for line in said[-2:]] == ["30 s left", "20 s left"]


def test_the_time_left_of_a_resumed_run_counts_the_blocks_that_it_finishes_itself(clock, monkeypatch, capsys):
    records = [linear(block, part) for block in range(4) for part in ("up", "down")]
    done = 0
    monkeypatch.setattr(prune_progress, "LONG", 60)
    with PruneProgress("half", faster=True) as progress:
        for block in range(6):
            events = [*([Replay(2)] if block < 2 else []), *records[2 * block : 2 * block + 2], Passed(block, 6)]
            for event in events:
                clock[0] += 10 if event in records[4:] else 1
                done += event in records
                progress(event, done, len(records))
    # Two blocks come again in 8 s, the next two take 21 s each; the last two are not pruned, and take a second each.
    assert capsys.readouterr().out.splitlines()[1:] == [
        "half: layer 2/8, block 0, mean relative error 0.10000, 4 s",
        "half: layer 4/8, block 1, mean relative error 0.10000, 8 s",
        "half: layer 6/8, block 2, mean relative error 0.10000, 29 s, 63 s left",
        "half: about 63 s left; --effort fast takes less",
        "half: layer 8/8, block 3, mean relative error 0.10000, 50 s, 42 s left",
        "half: block 4 has no layer to prune, 51 s, 14 s left",
        "half: block 5 has no layer to prune, 52 s, 0 s left",
    ]

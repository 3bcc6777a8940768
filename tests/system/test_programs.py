"""The cache of compiled programs: reused by the next process, and never a reason for a run to fail."""

import os
import subprocess
import sys

import pytest

from sparseopt.system.programs import SWITCH, keep_programs, trim

FIT = """
import jax, numpy as np, sparseopt as so
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
folder = {keep}
so.trend_filter(np.arange(12.0), so.Graph.chain(12), so.L1(1.0), tol=1e-4)
print(folder, hits.count("/jax/compilation_cache/cache_hits"), jax.config.jax_compilation_cache_dir)
"""


def fit(home, keep="so.keep_programs()", **variables):
    """What a process said that fitted a signal: its folder of programs, how many it found there, JAX's own folder."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XDG_"))}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")} | variables
    code = FIT.format(keep=keep)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout.split()


@pytest.mark.processes
def test_a_second_process_finds_the_programs_of_the_first(tmp_path):
    kept = tmp_path / "cache" / "sparseopt" / "programs"
    folder, hits, told = fit(tmp_path)
    assert folder == told
    assert folder.startswith(f"{kept}/jax")
    again, more, _ = fit(tmp_path)
    assert again == folder
    assert int(more) > int(hits)
    before = (kept / "checked").stat().st_mtime_ns
    fit(tmp_path)
    assert (kept / "checked").stat().st_mtime_ns == before  # no new programs: the folder was not looked through again


@pytest.mark.processes
def test_nothing_is_kept_unasked_or_where_nothing_can_be_written(tmp_path):
    assert fit(tmp_path, keep="None") == ["None", "0", "None"]  # the library alone changes no setting
    assert fit(tmp_path, **{SWITCH: "0"}) == ["None", "0", "None"]
    assert not (tmp_path / "cache").exists()
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert fit(tmp_path) == ["None", "0", "None"]


def test_a_folder_that_jax_was_told_of_stays():
    assert keep_programs() is None  # the tests have a folder of their own


def test_the_least_recently_used_programs_go_first(tmp_path):
    for age, name in enumerate(["new", "old", "oldest"]):
        file = tmp_path / "folder" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"x" * 100)
        os.utime(file, (1e9 - age, 1e9 - age))
    for limit, left in ((300, ["new", "old", "oldest"]), (250, ["new", "old"]), (99, [])):
        trim(tmp_path, limit)
        assert sorted(file.name for file in tmp_path.rglob("*") if file.is_file()) == left

"""Run folders where a run of an experiment does not reach: locks, and figures that are not finite."""

import errno
import fcntl
import json
import math
import os

import numpy as np
import pytest

from sparseopt.system import run_folder
from sparseopt.system.run_folder import LOCK, RECORDS, SUMMARY, FolderError, claimed, contents, locked


@pytest.mark.parametrize(("link", "words"), [(os.symlink, "symbolic links"), (os.link, "lock has a second name")])
def test_a_link_that_comes_between_looking_and_locking_is_not_written_through(tmp_path, link, words):
    target = tmp_path / "thesis.tex"
    target.write_text("years")
    link(target, tmp_path / "lock")
    with pytest.raises(OSError, match=words), locked(tmp_path / "lock"):
        pass
    assert target.read_text() == "years"


def test_a_file_system_without_locks_is_not_called_another_process(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    words = rf"{LOCK} cannot be locked \({os.strerror(errno.ENOLCK)}"
    with pytest.raises(FolderError, match=words) as caught, claimed(tmp_path):
        pass
    assert "in use" not in str(caught.value)


def test_a_folder_is_removed_if_nothing_was_written_and_a_place_that_is_none_is_refused(tmp_path):
    folder = tmp_path / "new" / "out"
    with claimed(folder):
        assert contents(folder) == set()
    assert not (tmp_path / "new").exists()
    with claimed(folder):
        run_folder.write_start(folder, {"seed": 1})
    assert contents(folder) == {"run.json"}
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(FolderError, match=f"cannot use {file} as output folder"):
        contents(file)
    with pytest.raises(FolderError, match=f"cannot use {file}/inside as output folder"), claimed(file / "inside"):
        pass


def test_every_file_of_a_run_is_json_where_figures_are_not_finite(tmp_path):
    inner = {"score": np.float32("inf"), "count": np.int64(3)}
    figures = {"loss": math.nan, "errors": (1.5, -math.inf), "inner": inner}
    found = {"loss": None, "errors": [1.5, None], "inner": {"score": None, "count": 3}}
    run_folder.write_start(tmp_path, {}, figures=figures)
    run_folder.write_summary(tmp_path, figures)
    run_folder.append_record(tmp_path, figures)
    texts = [(tmp_path / name).read_text() for name in (SUMMARY, RECORDS)]
    run_folder.write_records(tmp_path, [figures])
    texts.append((tmp_path / RECORDS).read_text())
    assert [json.loads(text, parse_constant=pytest.fail) for text in texts] == [found] * 3
    assert run_folder.read_start(tmp_path)["figures"] == found

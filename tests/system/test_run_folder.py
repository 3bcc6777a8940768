"""Run folders where a run of an experiment does not reach: locks, and figures that are not finite."""

import errno
import fcntl
import json
import math
import os

import numpy as np
import pytest

from sparseopt.system.run_folder import (
    LOCK,
    RECORDS,
    SUMMARY,
    FolderError,
    append_record,
    claimed,
    contents,
    locked,
    read_start,
    write_records,
    write_start,
    write_summary,
)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_that_comes_between_looking_and_locking_is_not_written_through(tmp_path, link):
    target = tmp_path / "thesis.tex"
    target.write_text("years")
    link(target, tmp_path / "lock")
    with pytest.raises(OSError, match=r"symbolic links|lock has a second name"), locked(tmp_path / "lock"):
        pass
    assert target.read_text() == "years"


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_not_called_another_process(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(FolderError, match=f"{LOCK} cannot be locked") as caught, claimed(tmp_path):
        pass
    assert os.strerror(code) in str(caught.value)
    assert "in use" not in str(caught.value)


def test_a_folder_is_removed_if_nothing_was_written_and_a_place_that_is_none_is_refused(tmp_path):
    folder = tmp_path / "new" / "out"
    with claimed(folder):
        assert contents(folder) == set()
    assert not (tmp_path / "new").exists()
    with claimed(folder):
        write_start(folder, {"seed": 1})
    assert contents(folder) == {"run.json"}
    (tmp_path / "file").write_text("x")
    with pytest.raises(FolderError, match=r"cannot use .*file as output folder: .*; choose another"):
        contents(tmp_path / "file")
    inside = tmp_path / "file" / "inside"
    with pytest.raises(FolderError, match=f"cannot use {inside} as output folder"), claimed(inside):
        pass


def test_every_file_of_a_run_is_json_where_figures_are_not_finite(tmp_path):
    figures = {
        "loss": math.nan,
        "errors": (1.5, -math.inf),
        "inner": {"score": np.float32("inf"), "count": np.int64(3)},
    }
    found = {"loss": None, "errors": [1.5, None], "inner": {"score": None, "count": 3}}
    write_start(tmp_path, {}, figures=figures)
    write_summary(tmp_path, figures)
    append_record(tmp_path, figures)
    texts = [(tmp_path / name).read_text() for name in (SUMMARY, RECORDS)]
    write_records(tmp_path, [figures])
    texts.append((tmp_path / RECORDS).read_text())
    assert [json.loads(text, parse_constant=pytest.fail) for text in texts] == [found] * 3
    assert read_start(tmp_path)["figures"] == found

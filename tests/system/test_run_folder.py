"""Run folders: one writer, no links, complete records, no other format."""

import errno
import fcntl
import json
import math
import os

import numpy as np
import pytest

from sparseopt.system.run_folder import (
    FORMAT,
    LOCK,
    RECORDS,
    SUMMARY,
    FolderError,
    FolderInUse,
    State,
    append_record,
    claimed,
    contents,
    differences,
    locked,
    read_records,
    read_start,
    state_of,
    write_records,
    write_start,
    write_summary,
)


@pytest.mark.parametrize("exists", [True, False])
def test_a_lock_file_that_is_a_link_is_refused_and_its_target_left(tmp_path, exists):
    folder, target = tmp_path / "out", tmp_path / "thesis.tex"
    folder.mkdir()
    if exists:
        target.write_text("years")
    (folder / LOCK).symlink_to(target)
    with (
        pytest.raises(FolderError, match=rf"has links to other places \({LOCK}\), which no run creates"),
        claimed(folder),
    ):
        pass
    assert target.exists() == exists
    assert not exists or target.read_text() == "years"


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


def test_a_folder_has_one_writer_and_is_removed_if_nothing_was_written(tmp_path):
    folder = tmp_path / "new" / "out"
    with claimed(folder):
        assert contents(folder) == set()
        with pytest.raises(FolderInUse, match=f"in use by process {os.getpid()} on .*; wait for it"), claimed(folder):
            pass
    assert not (tmp_path / "new").exists()
    with claimed(folder):
        write_start(folder, {"seed": 1})
    assert contents(folder) == {"run.json"}


def test_a_place_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FolderError, match=r"cannot use .*file as output folder: .*; choose another"):
        contents(tmp_path / "file")
    inside = tmp_path / "file" / "inside"
    with pytest.raises(FolderError, match=f"cannot use {inside} as output folder"), claimed(inside):
        pass


def test_the_start_is_read_again_and_differences_are_named_by_dotted_names(tmp_path):
    write_start(tmp_path, {"recipe": {"sparsity": 0.5, "method": "wanda"}, "code": "a"}, seed=3)
    start = read_start(tmp_path)
    assert (start["format"], start["seed"]) == (FORMAT, 3)
    wanted = {"recipe": {"sparsity": 0.6, "method": "wanda"}, "code": "a", "texts": "b"}
    assert differences(start["fingerprint"], wanted) == [
        "recipe.sparsity: 0.5 there, 0.6 here",
        "texts: None there, 'b' here",
    ]


def test_a_folder_is_new_unfinished_finished_or_of_another_run(tmp_path):
    wanted, folder = {"seed": 1}, tmp_path / "out"
    assert state_of(folder, wanted) == (State.NEW, [])
    folder.mkdir()
    write_start(folder, wanted)
    assert state_of(folder, wanted) == (State.UNFINISHED, [])
    write_summary(folder, {})
    assert state_of(folder, wanted) == (State.FINISHED, [])
    assert state_of(folder, {"seed": 2}) == (State.OTHER, ["seed: 1 there, 2 here"])
    (folder / "run.json").unlink()
    with pytest.raises(FolderError, match="holds no run"):
        state_of(folder, wanted)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "holds no run: it has no run.json"),
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "holds no JSON object"),
        ('{"fingerprint": "abc"}', "has the format of sparseopt 0.1.0, and this version reads only format 3"),
        ('{"format": 2, "fingerprint": {}}', "has format 2, and this version reads only format 3"),
        ('{"format": 3}', "has format 3"),
    ],
)
def test_a_start_that_cannot_be_used_says_what_to_do(tmp_path, content, text):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(FolderError, match=text):
        read_start(tmp_path)


def test_torn_lines_are_numbered_and_the_records_around_them_kept(tmp_path):
    def unit(values):
        return values["unit"]

    assert read_records(tmp_path, unit) == ([], [])
    for name in "abc":
        append_record(tmp_path, {"unit": name})
    lines = (tmp_path / RECORDS).read_text().splitlines()
    for torn in (lines[1][:4], "", '{"value": 3}', "[" * 100_000, "\x00\x85{"):
        (tmp_path / RECORDS).write_text("\n".join([lines[0], torn, lines[2], lines[0]]))
        assert read_records(tmp_path, unit) == (["a", "c"], [2, 4])
    write_records(tmp_path, map(json.loads, lines[:2]))
    assert read_records(tmp_path, unit) == (["a", "b"], [])


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

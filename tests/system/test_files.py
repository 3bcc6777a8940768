"""Locks on folders: a link is never written through, and only another process's lock is called one."""

import errno
import fcntl
import os

import pytest

from sparseopt.experiments import runs
from sparseopt.pruning import run_folder
from sparseopt.system.files import InUse, locked

# How each kind of run folder is taken, the name of its lock, and what it raises.
FOLDERS = {
    "experiment": (runs._locked, runs.LOCK, ValueError),
    "pruning": (run_folder._locked, run_folder.LOCK, run_folder.FolderError),
}


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("exists", [True, False])
def test_a_lock_file_that_is_a_link_is_refused_and_its_target_left(tmp_path, kind, exists):
    take, name, error = FOLDERS[kind]
    folder, target = tmp_path / "out", tmp_path / "thesis.tex"
    folder.mkdir()
    if exists:
        target.write_text("years")
    (folder / name).symlink_to(target)
    with (
        pytest.raises(error, match=rf"has links to other places \({name}\), no run makes any; remove them"),
        take(folder),
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
@pytest.mark.parametrize("kind", FOLDERS)
def test_a_file_system_without_locks_is_not_called_another_process(tmp_path, monkeypatch, kind, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    take, name, _ = FOLDERS[kind]
    with pytest.raises((OSError, run_folder.FolderError)) as caught, take(tmp_path):
        pass
    assert f"{name} cannot be locked ({os.strerror(code)})" in str(caught.value)
    assert "in use" not in str(caught.value)


def test_a_lock_that_is_held_names_its_owner(tmp_path):
    with (
        locked(tmp_path / "lock"),
        pytest.raises(InUse, match=f"process {os.getpid()} on "),
        locked(tmp_path / "lock"),
    ):
        pass

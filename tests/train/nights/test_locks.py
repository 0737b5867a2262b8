"""A run's folder belongs to one process: by locks that NFS takes, on what can be written to and on what cannot."""

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest

import train.results.run_folder
from prepare import InputError
from tests.helpers.stopped_run import interrupt, main
from tests.helpers.tiny_run import run_main
from train.resilience import durable
from train.resilience.durable import LOCK, lock
from train.resilience.resume import is_free
from train.results.run_folder import RunFolder


@pytest.fixture(scope="module")
def stopped_once(corpus, tmp_path_factory):
    return interrupt(corpus, tmp_path_factory.mktemp("runs") / "stopped")


@pytest.fixture
def stopped(stopped_once, tmp_path):
    return Path(shutil.copytree(stopped_once, tmp_path / "stopped"))


@pytest.fixture
def nfs(monkeypatch):
    """Locks exclusively what is open for writing, and nothing else."""
    flock = fcntl.flock

    def locked(descriptor, how):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return flock(descriptor, how)

    monkeypatch.setattr(durable.fcntl, "flock", locked)


@pytest.mark.usefixtures("nfs")
def test_two_processes_never_have_one_folder(corpus, stopped, tmp_path, capsys):
    holder = RunFolder.reopen(stopped)
    assert not is_free(stopped)
    assert main("--resume", str(stopped)) == 2
    assert "is in use by another process: wait for it, or stop it" in capsys.readouterr().err
    holder.close()
    assert is_free(stopped)
    assert (stopped / LOCK).exists()  # the next that waits for it has the same file
    assert run_main(corpus, tmp_path / "new", "--steps", "2") == 0
    assert "has no locks" not in capsys.readouterr().err


def test_a_finished_run_has_no_lock_any_more(corpus, tmp_path):
    assert run_main(corpus, tmp_path / "run", "--steps", "2") == 0
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_run_that_was_finished_while_its_lock_was_asked_for(stopped, monkeypatch):
    """Between the question whether it is finished, and the lock, whoever had it ended."""

    def late(folder):
        (stopped / "summary.json").write_text("{}")
        return lock(folder)

    monkeypatch.setattr(train.results.run_folder, "lock", late)
    with pytest.raises(InputError, match="is finished: there is nothing to resume"):
        RunFolder.reopen(stopped)
    assert not (stopped / LOCK).exists()


def test_a_lock_alone_makes_no_folder_one_of_a_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).touch()  # of a process that ended before it wrote anything
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(InputError, match="in use by another process"):
        RunFolder(tmp_path / "run")
    folder.close()


def test_asking_whether_a_run_is_free_writes_nothing(stopped):
    (stopped / LOCK).unlink()
    before = stopped.stat().st_mtime_ns
    assert is_free(stopped)
    assert stopped.stat().st_mtime_ns == before


def test_a_run_on_a_medium_that_cannot_be_written_to(stopped, monkeypatch, capsys):
    """As root sees it too, whom no permission keeps from anything."""
    opened, access = os.open, os.access

    def read_only(path, flags, *mode, **more):
        if Path(path).is_relative_to(stopped) and flags & (os.O_RDWR | os.O_WRONLY):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *mode, **more)

    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    assert not is_free(stopped)
    monkeypatch.setenv("TIMEBOX_RUNS", str(stopped.parent))
    assert main("--resume", "auto") == 2
    assert "there is no interrupted run with a checkpoint below" in capsys.readouterr().err
    assert main("--resume", str(stopped)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "Read-only file system" in line

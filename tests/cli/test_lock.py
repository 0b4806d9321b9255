"""One run folder, one process: also on file systems without locks, and after a holder is gone."""

import errno
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from ldm.cli import lock
from ldm.cli.errors import UserError
from ldm.cli.lock import locked

GONE = 2**22 + 1  # more than Linux's largest process number


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that knows no locks."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)


def hold(folder: Path, process: int, host: str) -> None:
    (folder / ".lock").write_text(json.dumps({"process": process, "host": host, "since": "2026-01-01T00:00:00"}))


def test_the_holder_is_named_while_it_holds_and_forgotten_after(tmp_path: Path) -> None:
    with locked(tmp_path):
        held = json.loads((tmp_path / ".lock").read_text())
        assert (held["process"], held["host"]) == (os.getpid(), socket.gethostname())
    assert (tmp_path / ".lock").read_text() == ""


def test_what_a_dead_process_left_stops_nobody(tmp_path: Path, without_locks: None) -> None:
    hold(tmp_path, GONE, socket.gethostname())
    with locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()


def test_a_living_process_is_respected_without_locks_too(tmp_path: Path, without_locks: None) -> None:
    hold(tmp_path, os.getppid(), socket.gethostname())
    with pytest.raises(UserError, match=f"process {os.getppid()} is at work .* since 2026-01-01"), locked(tmp_path):
        pass


def test_another_machine_cannot_be_asked_so_the_file_to_remove_is_named(tmp_path: Path, without_locks: None) -> None:
    hold(tmp_path, GONE, "node17")
    with pytest.raises(UserError, match=r"on node17 is at work .*; if it is gone, remove .*\.lock"), locked(tmp_path):
        pass


def test_another_machines_lock_that_the_file_system_has_let_go_stops_nobody(tmp_path: Path) -> None:
    hold(tmp_path, GONE, "node17")
    with locked(tmp_path):
        pass


def test_the_former_format_is_read(tmp_path: Path, without_locks: None) -> None:
    (tmp_path / ".lock").write_text(f"{os.getppid()}\n")
    with pytest.raises(UserError, match=f"process {os.getppid()} is at work"), locked(tmp_path):
        pass

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.files import replacing, write_bytes, write_text


def test_content_lands_in_a_folder_that_was_not_there(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder" / "file.txt"
    write_text(path, "naïve\n")
    assert path.read_bytes() == "naïve\n".encode()
    write_bytes(path, b"other")
    assert path.read_bytes() == b"other"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="in the middle"), replacing(path) as temporary:
        temporary.write_bytes(b"ne")
        raise RuntimeError("in the middle")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_process_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = """
import os, signal, sys
from ldm.files import replacing
with replacing(sys.argv[1]) as temporary:
    temporary.write_bytes(b"ne")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    (left,) = set(tmp_path.iterdir()) - {path}
    assert left.name.startswith(".file.") and left.name.endswith(".tmp")


def test_a_file_that_a_library_made_for_its_owner_alone_gets_the_mode_of_any_new_one(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with replacing(tmp_path / "file") as temporary:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode

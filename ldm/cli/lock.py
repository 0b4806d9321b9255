"""One run folder, one process: the lock that a second start meets."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from ldm.cli.errors import UserError

# What a file system answers that has no locks; any other refusal means that somebody holds it.
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds `folder/.lock` until the end or this process's death; unlike flock, no forked worker keeps it alive.

    Where the file system has no locks, the process that the file names counts: it holds the folder while it lives, and
    on another machine until somebody removes the file, because nobody can tell from here.

    Raises:
        UserError: another process holds it.
    """
    path = folder / ".lock"
    with path.open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(file)
            if error.errno not in _WITHOUT_LOCKS or _lives(holder):
                raise UserError(_refusal(folder, holder, without_locks=error.errno in _WITHOUT_LOCKS)) from None
        file.truncate(0)
        file.write(json.dumps(_myself()) + "\n")
        file.flush()
        try:
            yield
        finally:
            # Whoever reads it later must not take a process of the same number for the holder.
            file.truncate(0)


def _myself() -> dict[str, Any]:
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"process": os.getpid(), "host": socket.gethostname(), "since": since}


def _holder(file: IO[str]) -> dict[str, Any]:
    """Who wrote the lock; empty where that is not known."""
    file.seek(0)
    text = file.read().strip()
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {"process": found}


def _lives(holder: dict[str, Any]) -> bool:
    """Whether the holder may still be at work; asked only where no lock of the file system says so."""
    if not holder:
        return False
    if holder.get("host") not in (None, socket.gethostname()):
        return True
    try:
        os.kill(int(holder["process"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _refusal(folder: Path, holder: dict[str, Any], *, without_locks: bool) -> str:
    host, since = holder.get("host"), holder.get("since")
    where = f" on {host}" if host not in (None, socket.gethostname()) else ""
    when = f" since {since}" if since else ""
    remedy = f"; if it is gone, remove {folder / '.lock'}" if without_locks and where else ""
    return (
        f"{folder}: process {holder.get('process', 'unknown')}{where} is at work in this run folder{when}; wait for "
        f"it, or give run_id=NAME{remedy}"
    )

"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

# What `replacing` may leave behind, as a pattern.
REMAINS = ".*.tmp"


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A new file beside `path` to fill, which is flushed to the disk and moved there at the end.

    An error removes it. A killed process leaves the old file, the new one or none at `path`, never a part, and perhaps
    a `.NAME.*.tmp` beside it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        # safetensors makes files that only their owner can read: the mode is that of any new file instead.
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with suppress(OSError):  # why it failed, where it did, is what to raise
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path | str, content: bytes) -> None:
    """Puts content at a path in one step."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path | str, text: str) -> None:
    """Puts a text at a path in one step, as UTF-8."""
    write_bytes(path, text.encode())

"""One reader of shards for every thread, since a reader is not to be shared by threads."""

import threading
from typing import Any

from ldm.data.shards import Opener, ShardReader

# Copies of remote shards that a thread keeps open, as many as a block has: an open one never makes room for another.
OPEN_COPIES = 16


class ThreadReaders(threading.local):
    """Holds a `reader` of the thread that asks; copies in other processes start with new ones."""

    def __init__(self, remote: Opener | None = None) -> None:
        self.remote = remote
        self.reader = ShardReader() if remote is None else ShardReader(OPEN_COPIES, remote=remote)

    def __reduce__(self) -> tuple[Any, ...]:
        return ThreadReaders, (self.remote,)

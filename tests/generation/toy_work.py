"""Work whose tasks write a file each, for executors; importable by the processes that they start."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Squares:
    """Task i writes i * i into folder/i, and appends its process and number to folder/log."""

    folder: Path
    num_tasks: int = 7
    fails_at: int | None = None

    def is_done(self, task: int) -> bool:
        return (self.folder / str(task)).is_file()

    def do(self, task: int) -> None:
        if task == self.fails_at:
            raise ValueError(f"task {task} fails")
        with (self.folder / "log").open("a") as log:
            log.write(f"{os.getpid()} {task}\n")
        (self.folder / str(task)).write_text(str(task * task))

    def results(self) -> list[int]:
        """What the tasks wrote."""
        return [int((self.folder / str(task)).read_text()) for task in range(self.num_tasks)]

    def log(self) -> list[tuple[int, int]]:
        """(process, task) of everything that was done, in order."""
        path = self.folder / "log"
        rows = path.read_text().splitlines() if path.is_file() else []
        return [(int(row.split()[0]), int(row.split()[1])) for row in rows]

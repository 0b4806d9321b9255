"""Row 22: shards on a server that stalls, refuses or sends too little."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.faults.bench_child import Child, Setting, in_time
from tests.faults.bench_row import Result, row
from tests.faults.rows_data import sample, shard


class Server(ThreadingHTTPServer):
    """Serves a folder's shards, each in its own wrong way by its name: stall, forbidden, short, flaky, good."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Wrong)
        self.folder, self.asked = folder, dict[str, int]()


class Wrong(BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        way, _, name = self.path.strip("/").partition("/")
        path = self.server.folder / name
        if way == "forbidden":
            self.send_error(403)
            return
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        if body:
            self.server.asked[way] = self.server.asked.get(way, 0) + 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not body:
            return
        short = way == "short" or (way == "flaky" and self.server.asked[way] == 1)
        self.wfile.write(content[: len(content) // 2] if short or way == "stall" else content)
        if way == "stall":
            time.sleep(60)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving(setting: Setting, folder: Path) -> Iterator[int]:
    """The port of a server in a process of its own: this one is forked, and must have no threads."""
    place = setting.folder / "port"

    def serve() -> None:
        server = Server(folder)
        place.with_suffix(".tmp").write_text(str(server.server_address[1]))
        place.with_suffix(".tmp").rename(place)
        server.serve_forever()

    child = Child(serve, setting.folder, {})
    try:
        if not child.until(place.exists):
            raise RuntimeError("the server did not start")
        yield int(place.read_text())
    finally:
        child.signal(signal.SIGKILL)
        child.wait()


@row(
    22,
    "a server stalls, refuses, sends half a shard, sends half once",
    must_hold="a bounded time, then one line with the URL; what works the second time is used",
    stock="a stall hangs for ever; others IOError or a warning",
)
def far_away(setting: Setting) -> Result:
    folder, outcomes = shard(setting.folder / "served", [sample(f"s{i:02d}") for i in range(24)]), {}
    with serving(setting, folder) as port:
        base = f"http://127.0.0.1:{port}"
        for way in ("good", "flaky", "stall", "forbidden", "short"):
            words = [f"data.train={base}/{way}/00000.tar", f"data.remote.folder={setting.folder}/cache-{way}"]
            words += ["data.remote.stall=1", "data.remote.attempts=2", "data.remote.timeout=20", f"run_id={way}"]
            outcomes[way] = setting.train(*words, "trainer.max_steps=4")
    right = {way: outcomes[way].code == 0 for way in ("good", "flaky")}
    for way in ("stall", "forbidden", "short"):
        one = outcomes[way]
        right[way] = one.code in (1, 2, 4) and len(one.errors) == 1 and f"/{way}/00000.tar" in one.errors[0]
    prompt, within = in_time(max(one.seconds for one in outcomes.values()), 30)
    seconds = {way: round(one.seconds, 1) for way, one in outcomes.items()}
    codes = {way: one.code for way, one in outcomes.items()}
    said = {way: one.errors or one.text[-500:] for way, one in outcomes.items() if not right[way]}
    return Result(
        all(right.values()) and prompt, f"exits {codes}, at most {within}", {"said": said, "seconds": seconds}
    )

"""Shards named by URL: fetched whole or not at all, hash-checked, kept in a bounded cache that processes share."""

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from test_datamodule import fit, make_data, resume

from ldm.data import Record, ShardCache, ShardDataset, write_shards
from ldm.data.decoding import UnreachableError
from ldm.data.download import Patience, download
from ldm.data.manifest import index_shards
from ldm.data.prefetch import Prefetch
from ldm.data.remote import names_urls

WriteNoise = Callable[..., Path]
QUICK = {"timeout": 30.0, "stall": 10.0, "attempts": 2, "backoff": 0.0}
PIECE = 2**16


class Server(ThreadingHTTPServer):
    """Serves a folder, and does to a request what `faults` says of its name: stall, forbid, cut, fail or spoil."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.faults: dict[str, list[str]] = {}
        self.asked: Counter[str] = Counter()
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def _answer(self, *, has_body: bool) -> None:
        name = self.path.strip("/")
        path = self.server.folder / name
        if has_body:
            self.server.asked[name] += 1
        faults = self.server.faults.get(name, [])
        fault = (faults.pop(0) if len(faults) > 1 else faults[0]) if faults and has_body else ""
        if fault == "stall":
            self.server.released.wait(20)
            return
        if not path.is_file() or fault in ("forbid", "fail"):
            self.send_error({"forbid": 403, "fail": 500}.get(fault, 404))
            return
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) + 10 * (fault == "trickle")))
        self.end_headers()
        if has_body:
            content = content[: len(content) // 2] if fault == "cut" else content
            self.wfile.write(content.replace(b"noise", b"NOISE") if fault == "spoil" else content)
            if fault == "trickle":
                self.server.released.wait(20)


@pytest.fixture
def server(write_noise: WriteNoise) -> Iterator[Server]:
    pytest.importorskip("aiohttp")
    running = Server(write_noise(23))
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    yield running
    running.released.set()
    running.shutdown()
    running.server_close()


@pytest.fixture
def bucket(write_noise: WriteNoise, request: pytest.FixtureRequest) -> Iterator[str]:
    """The same shards in fsspec's memory."""
    memory = fsspec.filesystem("memory")
    folder, url = write_noise(23), f"memory://{request.node.name.partition('[')[0]}"
    for path in folder.iterdir():
        memory.pipe(f"{url}/{path.name}", path.read_bytes())
    yield url
    memory.rm(url, recursive=True)


def cache(tmp_path: Path, **changed: Any) -> ShardCache:
    return ShardCache(tmp_path / "cache", **(QUICK | changed))


def copies(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").glob("*/*.tar"))


def test_a_remote_set_is_read_as_the_local_one(bucket: str, tmp_path: Path) -> None:
    local = fit(tmp_path / "set", max_steps=9).seen
    for number, url in enumerate((bucket, f"{bucket}/*.tar", f"{bucket}/{{00000..00003}}.tar")):
        remote = {"remote": cache(tmp_path / str(number))}
        assert fit(url, max_steps=9, data=remote).seen == local  # type: ignore[arg-type]
    assert resume(bucket, tmp_path, after=4, max_steps=9, data=remote) == local[4:]  # type: ignore[arg-type]


@pytest.mark.slow
def test_workers_share_the_cache(bucket: str, tmp_path: Path) -> None:
    data = {"remote": cache(tmp_path), "num_workers": 2}
    local = fit(tmp_path / "set", max_steps=9).seen
    assert fit(bucket, max_steps=9, data=data).seen == local  # type: ignore[arg-type]


def test_a_manifest_says_the_hash_and_spoilt_bytes_are_fetched_again(server: Server, tmp_path: Path) -> None:
    server.faults["00001.tar"] = ["spoil", "cut", ""]
    dataset = ShardDataset(server.url, resolution=8, remote=cache(tmp_path, attempts=3))
    assert [dataset[i, i, 0]["caption"] for i in (0, 7, 13)] == ["noise 0", "noise 7", "noise 13"]
    assert server.asked["00001.tar"] == 3
    assert dataset.located(7) == (f"{server.url}/00001.tar", "000010000")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("stall", r"got 0 bytes in 0\.5 s"),
        ("trickle", r"got \d+ bytes in 0\.5 s"),
        ("cut", "bytes|payload|Payload"),
        ("spoil", "got sha256 [0-9a-f]{12} where [0-9a-f]{12} is stated"),
        ("fail", "500"),
    ],
)
def test_what_cannot_be_fetched_fails_with_its_url_within_the_time(
    server: Server, tmp_path: Path, fault: str, message: str
) -> None:
    server.faults["00002.tar"] = [fault]
    started = time.monotonic()
    with pytest.raises(UnreachableError, match=rf"^{server.url}/00002\.tar: .*{message}.*, in 2 attempts; expected"):
        ShardDataset(server.url + "/{00000..00003}.tar", resolution=8, remote=cache(tmp_path, stall=0.5))
    assert time.monotonic() - started < 15
    assert "00002.tar" not in copies(tmp_path)
    assert not list((tmp_path / "cache").glob("*/.*.part"))


def test_what_may_not_be_read_or_is_not_there_is_not_tried_again(server: Server, tmp_path: Path) -> None:
    server.faults["00002.tar"] = ["forbid"]
    with pytest.raises(PermissionError, match=r"00002\.tar"):
        ShardDataset(server.url, resolution=8, remote=cache(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.tar"):
        ShardDataset(f"{server.url}/nowhere.tar", resolution=8, remote=cache(tmp_path))
    assert server.asked["00002.tar"] == 1


def test_a_shard_that_changed_since_it_was_first_fetched_is_refused(server: Server, tmp_path: Path) -> None:
    (server.folder / "manifest.json").unlink()
    url = f"{server.url}/00001.tar"
    path = cache(tmp_path).locate(url)[0]
    os.close(cache(tmp_path).open(path))
    path.unlink()
    server.faults["00001.tar"] = ["spoil"]
    with pytest.raises(UnreachableError, match="got sha256"):
        cache(tmp_path).open(path)


def test_the_least_recently_used_make_room_and_never_one_that_is_open(bucket: str, tmp_path: Path) -> None:
    size = (tmp_path / "set" / "00000.tar").stat().st_size
    small = cache(tmp_path, gigabytes=2.5 * size / 1e9)
    first, second, third, fourth = small.locate(bucket)
    held = small.open(first)
    for path in (second, third):
        os.close(small.open(path))
    assert copies(tmp_path) == ["00000.tar", "00002.tar"]
    other = small.open(third)
    with pytest.raises(ValueError, match=r"data\.remote\.gigabytes: got .*all of it in use"):
        small.open(second)
    os.close(other)
    assert not small.fetch(second, keep={third})
    os.close(held)
    os.close(small.open(second))
    assert copies(tmp_path) == ["00001.tar", "00002.tar"]
    os.close(small.open(fourth))
    assert copies(tmp_path)[-1] == "00003.tar"


def test_room_is_made_while_others_put_their_copies_in_place(bucket: str, tmp_path: Path) -> None:
    shard = cache(tmp_path).locate(bucket)[0]
    # What was listed and has moved by the time that it is looked at.
    shard.with_name(".00003.tar.1-0.part").symlink_to("moved")
    os.close(cache(tmp_path).open(shard))
    assert copies(tmp_path) == ["00000.tar"]


def test_indices_outlive_their_shards_and_are_taken_from_beside_them(server: Server, tmp_path: Path) -> None:
    ShardDataset(server.url, resolution=8, remote=cache(tmp_path))
    for path in (tmp_path / "cache").glob("*/*.tar"):
        path.unlink()
    before = Counter(server.asked)
    ShardDataset(server.url, resolution=8, remote=cache(tmp_path))
    assert not [name for name in server.asked - before if name.endswith(".tar")]
    index_shards(server.folder)
    fresh = cache(tmp_path / "fresh")
    before = Counter(server.asked)
    dataset = ShardDataset(server.url, resolution=8, remote=fresh)
    assert len(dataset) == 23
    assert not [name for name in server.asked - before if name.endswith(".tar")]


def test_whoever_wants_the_same_shard_waits_for_the_one_that_fetches_it(server: Server, tmp_path: Path) -> None:
    remote = cache(tmp_path)
    path = remote.locate(f"{server.url}/00000.tar")[0]
    # Threads stand for processes: what they wait for is a lock on a file that each opens for itself.
    with ThreadPoolExecutor(4) as pool:
        for descriptor in pool.map(remote.open, [path] * 4):
            os.close(descriptor)
    assert server.asked["00000.tar"] == 1


def test_the_next_block_is_fetched_while_this_one_is_read(bucket: str, tmp_path: Path) -> None:
    remote = cache(tmp_path)
    data = make_data(bucket, remote=remote, block_size=1)  # type: ignore[arg-type]
    dataset = data.dataset("train")
    for path in (tmp_path / "cache").glob("*/*.tar"):
        path.unlink()
    from ldm.data import ShardOrder

    prefetch = Prefetch(dataset, ShardOrder(dataset.shard_sizes, seed=3, block_size=1), 1)
    prefetch.advance(0)
    deadline = time.monotonic() + 60
    while len(copies(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    prefetch.close()
    assert 2 <= len(copies(tmp_path)) <= 3  # two spans of a block's mean size touch three shards at most


@pytest.mark.parametrize("url", ["ftp://host/0.tar", "gopher://x/0.tar"])
def test_other_schemes_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^shards: got .*, expected a file or one of s3, gs, http"):
        cache(tmp_path).locate(url)


def test_pipes_are_never_opened_and_urls_need_a_cache(tmp_path: Path) -> None:
    assert not names_urls("pipe:touch marker")
    with pytest.raises(ValueError, match=r"got pipe:touch marker, expected local tar files"):
        make_data("pipe:touch marker", remote=cache(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got memory://x/0\.tar, expected local tar files"):
        make_data("memory://x/0.tar")  # type: ignore[arg-type]


def test_numbers_out_of_range_are_refused(tmp_path: Path) -> None:
    for wrong in ({"gigabytes": 0}, {"attempts": 0}, {"timeout": 0.0}):
        with pytest.raises(ValueError, match=r"^data\.remote\.\w+: got"):
            ShardCache(tmp_path, **wrong)


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    # Not s3fs, whose class fsspec remembers where another test has read from s3.
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r"needs the package gcsfs: pip install 'ldm\[remote\]'"):
        download("gs://bucket/0.tar", tmp_path / "out", patience=Patience(attempts=1))


def test_the_list_beside_shards_is_all_that_a_folder_needs(server: Server, tmp_path: Path) -> None:
    names = [entry["name"] for entry in json.loads((server.folder / "manifest.json").read_text())["shards"]]
    assert [path.name for path in cache(tmp_path).locate(server.url)] == names


def test_a_broken_list_beside_remote_shards_is_told_by_its_url(bucket: str, tmp_path: Path) -> None:
    for content in (b"<html>", b"[]", b'{"shards": [{}]}'):
        fsspec.filesystem("memory").pipe(f"{bucket}/manifest.json", content)
        with pytest.raises(ValueError, match=rf"^{bucket}/manifest\.json: got no list of shards .*put it there again"):
            make_data(bucket, remote=cache(tmp_path))  # type: ignore[arg-type]


def test_shards_that_were_written_anew_are_fetched_anew_where_their_manifest_says_so(
    bucket: str, tmp_path: Path
) -> None:
    memory = fsspec.filesystem("memory")
    assert ShardDataset(bucket, resolution=8, remote=cache(tmp_path))[0, 0, 0]["caption"] == "noise 0"
    write_shards(tmp_path / "new", [Record(np.zeros((8, 8, 3), np.uint8), f"other {i}") for i in range(9)])
    for path in (tmp_path / "new").iterdir():
        memory.pipe(f"{bucket}/{path.name}", path.read_bytes())
    dataset = ShardDataset(bucket, resolution=8, remote=cache(tmp_path))
    assert [dataset[i, i, 0]["caption"] for i in range(len(dataset))] == [f"other {i}" for i in range(9)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NoCredentialsError", PermissionError),
        ("PermissionError", PermissionError),
        ("EndpointError", UnreachableError),
    ],
)
def test_a_folder_that_cannot_be_listed_is_told_by_its_url(
    name: str, expected: type[OSError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = PermissionError if name == "PermissionError" else type(name, (Exception,), {})

    def glob(*_: Any) -> list[str]:
        raise error("none of yours")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "glob", glob)
    with pytest.raises(expected, match=r"^memory://nothing/\*\.tar: .*none of yours"):
        make_data("memory://nothing", remote=cache(tmp_path))  # type: ignore[arg-type]

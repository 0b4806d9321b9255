"""Shards in a bucket, on a server of S3 in this process: needs s3fs and moto[server]."""

from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from test_datamodule import fit, make_data, resume

from ldm.data import ShardCache

s3fs = pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")
WriteNoise = Callable[..., Path]


@pytest.fixture
def bucket(write_noise: WriteNoise, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of 23 samples in a bucket."""
    server = moto_server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "anybody")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    filesystem, name = s3fs.S3FileSystem(), uuid4().hex  # moto keeps its buckets from server to server
    filesystem.mkdir(name)
    for path in write_noise(23).iterdir():
        filesystem.pipe(f"{name}/set/{path.name}", path.read_bytes())
    yield f"s3://{name}/set"
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def cache(folder: Path) -> ShardCache:
    return ShardCache(folder, attempts=2, backoff=0.0, stall=10.0)


def test_a_bucket_is_read_as_the_folder_is_and_a_run_goes_on_as_if_never_stopped(bucket: str, tmp_path: Path) -> None:
    local = fit(tmp_path / "set", max_steps=9).seen
    for number, url in enumerate((bucket, f"{bucket}/*.tar")):
        remote = {"remote": cache(tmp_path / str(number))}
        assert fit(url, max_steps=9, data=remote).seen == local  # type: ignore[arg-type]
    assert resume(bucket, tmp_path, after=4, max_steps=9, data=remote) == local[4:]  # type: ignore[arg-type]


def test_what_is_not_to_be_had_is_named_by_its_url(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match=rf"^{bucket}/nowhere\.tar: got no such file"):
        make_data(f"{bucket}/nowhere.tar", remote=cache(tmp_path)).dataset("train")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"^shards: got s3://other/set, where there is no tar file"):
        make_data("s3://other/set", remote=cache(tmp_path))  # type: ignore[arg-type]
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(PermissionError, match=rf"^{bucket}/\*\.tar: got .*credentials"):
        make_data(bucket, remote=cache(tmp_path / "anew"))  # type: ignore[arg-type]

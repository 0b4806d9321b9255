"""`ldm data encode`, as it is typed, training on what it wrote, and sampling from that."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_helpers import environment, only, read_json

from ldm.autoencoders import KLAutoencoder
from ldm.cli.data_encode import LoadEncoders
from ldm.cli.main import main
from ldm.conditioners import CLIPText
from ldm.data import Record, write_shards
from ldm.nn.fingerprint import weights_sha256
from ldm.nn.weights import save_weights

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "projection_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GEOMETRY = {"base_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4}
ENCODE = [
    *("data", "encode", "~experiment", "name=encoded", "autoencoder=trained", "autoencoder.path=ae.safetensors"),
    *("data=shards", "data.train=set/train", "data.validation=set/validation", "data.resolution=16", "batch_size=3"),
]
CLIP = ["conditioner=clip_l", "conditioner.path=clip", "+conditioner.pooled=true"]
TRAIN = [
    *("train", "experiment=quickstart", "name=fast", "requires=[]", "evaluation=null", "next_step=null"),
    *("autoencoder.path=ae.safetensors", "data=shards", "data.resolution=null", "data.batch_size=4", "data.flip=true"),
    *("conditioner=precomputed_text", "conditioner.encoder.path=clip", "+conditioner.encoder.pooled=true"),
    *("network.model_channels=16", "network.context_dim=32", "network.vector_dim=24", "model.sampling.image_size=16"),
    *("trainer.max_steps=2", "logger=csv", "model.sampling.num_steps=2"),
]


@pytest.fixture
def files(folder: Path) -> Path:
    """Shards of 22 and 3 pictures, and an autoencoder."""
    pixels = np.random.default_rng(0).integers(0, 256, (22, 16, 20, 3), dtype=np.uint8)
    for split, count in (("train", 22), ("validation", 3)):
        records = (Record(image, f"picture {i}", {"number": i}) for i, image in enumerate(pixels[:count]))
        write_shards(folder / "set" / split, records, samples_per_shard=5)
    torch.manual_seed(0)
    autoencoder = KLAutoencoder(**GEOMETRY)
    target = "ldm.autoencoders.KLAutoencoder"
    save_weights(folder / "ae.safetensors", autoencoder.state_dict(), target=target, config=GEOMETRY)
    return folder


def outputs(run: Path) -> dict[str, bytes]:
    """The shards, manifests and null condition of a run."""
    files = [path for pattern in ("*.tar", "manifest.json", "*.safetensors") for path in run.rglob(pattern)]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def in_processes(words: list[str], *, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, "-m", "ldm.cli.main", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=environment(), text=True, start_new_session=True, **pipes)  # type: ignore[call-overload, no-any-return]


def test_it_encodes_once_whatever_executor_is_asked_for_next(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ENCODE, "+targets.large.resolution=18", "flips=true", "dtype=float16"]) == 0
    run = only(files, "runs/encoded/*")
    assert f"encoded shards: {run.relative_to(files)}" in capsys.readouterr().out
    summary = read_json(run / "result.json")["summary"]
    assert (summary["train"], summary["validation"], summary["bad"]) == (22, 3, 0)
    assert summary["targets"]["large"]["resolution"] == 18
    again = [*ENCODE, "+targets.large.resolution=18", "flips=true", "dtype=float16", "readers=0"]
    assert main([*again, "executor=submitit", "executor.cluster=debug"]) == 0
    assert "finished before, nothing to do" in capsys.readouterr().out
    assert main(["data", "validate", f"shards={run}/large/train"]) == 0


def test_mistakes_are_one_line(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for code, words, told in (
        (2, ["data.resolution=15"], "resolution: got 15, expected a multiple of 2"),
        (2, ["data.resolution=null"], "data.resolution: got null, expected the pixels to encode at"),
        (2, ["+targets.large.size=18"], "targets.large: got size, expected some of autoencoder, resolution, flips"),
        (2, ["executor=torchrun"], "executor: got torchrun without a launcher"),
        (2, ["autoencoder.path=nowhere.safetensors"], "got no weights at nowhere.safetensors"),
        (2, ["data.flip=true"], "data.flip: got a setting of training"),
        (2, ["data.buckets={_target_: ldm.data.buckets.Buckets, sizes: [[16, 8]]}"], "data.buckets: got a setting of"),
        (2, ["executor.workers=-1"], "executor.workers: got -1"),
    ):
        assert main([*ENCODE, *words]) == code
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and told in lines[0], lines
    assert list(files.glob("runs/*")) == []


def test_an_encoder_without_weights_of_its_own_is_the_same_in_every_process() -> None:
    nodes = {"autoencoder": {"_target_": "ldm.autoencoders.KLAutoencoder", **GEOMETRY}, "conditioner": None}
    load = LoadEncoders({**nodes, "targets": {}, "resolution": 8, "flips": False, "seed": 1}, "cpu")
    hashes = {weights_sha256(load().targets[""].autoencoder) for _ in range(2)}
    assert len(hashes) == 1


def test_too_many_unreadable_pictures_fail_and_the_rest_is_not_encoded_again(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = files / "set/train/00002.tar"
    shard.write_bytes(shard.read_bytes().replace(b"IDAT", b"IXXT", 2))
    assert main(ENCODE) == 1
    told = capsys.readouterr().err
    assert "2 of 25 samples cannot be read" in told and "left_out.jsonl names them" in told
    run = only(files, "runs/encoded/*")
    assert [json.loads(line)["kind"] for line in (run / "left_out.jsonl").read_text().splitlines()] == [
        "broken_image",
        "broken_image",
    ]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.tar")}
    assert main([*ENCODE, "data.max_bad_fraction=0.1"]) == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.tar")} == before
    assert read_json(run / "result.json")["summary"]["bad"] == 2


def test_a_diffusion_model_trains_on_a_stream_of_pictures(files: Path) -> None:
    stream = ["data=stream", "data.stream.epoch_samples=8", "data.resolution=16", "data.batch_size=4"]
    words = ["requires=[]", "evaluation=null", "next_step=null", "autoencoder.path=ae.safetensors", "logger=csv"]
    steps = ["trainer.max_steps=1", "model.sampling.num_steps=2", "model.sampling.image_size=16"]
    data = ["data.train=set/train", "data.validation=set/validation"]
    assert main(["train", "experiment=quickstart", *words, *stream, *steps, *data, "network.model_channels=16"]) == 0


@pytest.mark.slow
def test_a_model_trained_on_latents_and_embeddings_reads_prompts_when_the_shards_are_gone(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(1)
    CLIPText(TINY, pooled=True).transformer.save_pretrained(files / "clip")
    assert main([*ENCODE, *CLIP, "flips=true"]) == 0
    run = only(files, "runs/encoded/*")
    shards = [f"data.train={run}/train", f"data.validation={run}/validation"]
    assert main([*TRAIN, *shards, f"conditioner.path={run}/text.safetensors"]) == 0
    trained = only(files, "runs/fast/*")
    run.rename(files / "gone")
    assert main(["sample", f"checkpoint={trained}", "prompt=a cat", "steps=2", "out=pictures"]) == 0
    assert list((files / "pictures").rglob("*.png"))
    capsys.readouterr()
    torch.manual_seed(2)
    CLIPText(TINY, pooled=True).transformer.save_pretrained(files / "clip")
    assert main(["sample", f"checkpoint={trained}", "prompt=a cat", "steps=2"]) == 2
    assert "conditioner.encoder: got the text encoder" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_at_any_moment_and_started_under_torchrun_it_writes_the_same_bytes(files: Path) -> None:
    assert main([*ENCODE, "paths.runs=whole"]) == 0
    whole = outputs(only(files, "whole/encoded/*"))
    first = in_processes([*ENCODE, "device=cpu"])
    while first.poll() is None and len(list(files.glob("runs/encoded/*/*/*.tar"))) < 2:
        time.sleep(0.002)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    left = {path: path.stat().st_ino for path in files.glob("runs/encoded/*/*/*.tar")}
    assert left
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    ranks = in_processes([*ENCODE, "executor=torchrun", "device=cpu"], launcher=launcher)
    printed, _ = ranks.communicate(timeout=200)
    assert ranks.returncode == 0, printed
    run = only(files, "runs/encoded/*")
    assert outputs(run) == whole
    # Only the shard that was under way may have been done again: its tar is there before its note.
    assert sum(path.stat().st_ino != number for path, number in left.items()) <= 1

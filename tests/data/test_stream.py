"""`data.mode=stream`: endless, equal steps on all ranks, safe, and honest about what resuming means."""

import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from fault_shards import Touches, good, sample_faults, write_shard_faults, write_tar
from test_datamodule import BATCH_SIZE, fit, make_data, resume

from ldm.data import BadDataError, ShardCache, StreamSettings
from ldm.data.decoding import UnreachableError
from ldm.data.stream import secure_webdataset

WriteNoise = Callable[..., Path]
pytestmark = [
    pytest.mark.filterwarnings("ignore:data. .* bad samples"),
    pytest.mark.filterwarnings("ignore:data.mode=stream goes on"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]


def stream(**changed: Any) -> dict[str, Any]:
    settings = StreamSettings(**({"epoch_samples": 20, "shuffle_buffer": 8} | changed))
    return {"mode": "stream", "stream": settings}


def test_a_stream_trains_for_ever_in_an_order_of_its_seed(write_noise: WriteNoise) -> None:
    folder = write_noise(23)
    model = fit(folder, max_steps=30, data={**stream(), "columns": ["number"]})
    assert [place for places, _, _ in model.seen for place in places] == list(range(30 * BATCH_SIZE))
    found = Counter(index for _, indices, _ in model.seen for index in indices)
    assert len(found) > 15
    assert fit(folder, max_steps=5, data=stream()).seen == model.seen[:5]
    assert fit(folder, max_steps=5, data=stream() | {"seed": 8}).seen != model.seen[:5]


def test_a_resumed_stream_says_so_and_reads_on_with_other_samples(write_noise: WriteNoise, tmp_path: Path) -> None:
    folder = write_noise(23)
    whole = fit(folder, max_steps=12, data=stream()).seen
    with pytest.warns(UserWarning, match=r"data\.mode=stream goes on with other samples"):
        later = resume(folder, tmp_path, after=6, max_steps=12, data=stream())
    assert [seen[0] for seen in later] == [seen[0] for seen in whole[6:]]
    assert later != whole[6:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_epoch_of_a_stream_draws_anew(write_noise: WriteNoise, num_workers: int) -> None:
    data = make_data(write_noise(1), **stream(epoch_samples=8), flip=True)
    batches = data.dataset("train").batches(0, batch_size=8, rank=0, world_size=1, num_workers=num_workers)
    epochs = [next(batches).batch["image"] for _ in range(8)]
    assert all(images.eq(images[:1]).all() for images in epochs)  # of one sample, which is mirrored or not
    assert len({tuple(images[0].flatten().tolist()) for images in epochs}) == 2


def test_ranks_have_as_many_steps_and_read_different_samples(write_noise: WriteNoise) -> None:
    data = make_data(write_noise(23), **stream())
    ranks = [data.dataset("train").batches(40, batch_size=8, rank=rank, world_size=2, num_workers=0) for rank in (0, 1)]
    first, second = ([next(rank).batch for _ in range(4)] for rank in ranks)
    assert [batch["position"].tolist() for batch in first] == [list(range(s, s + 4)) for s in range(40, 72, 8)]
    assert [batch["position"].tolist() for batch in second] == [list(range(s, s + 4)) for s in range(44, 76, 8)]
    assert all(not torch.equal(a["index"], b["index"]) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
def test_workers_read_streams_of_their_own(write_noise: WriteNoise) -> None:
    folder = write_noise(23)
    seen = fit(folder, max_steps=6, data=stream() | {"num_workers": 2}).seen
    assert seen == fit(folder, max_steps=6, data=stream() | {"num_workers": 2}).seen
    assert seen[0][1] != seen[1][1]


def test_bad_samples_and_shards_are_noted_and_read_past(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    members = [member for i in range(8) for member in good(f"good{i}")]
    for kind, sample in sample_faults(tmp_path / "marker"):
        members += sample if kind != "broken_array" else []
    write_tar(tmp_path / "set" / "00000.tar", members)
    write_shard_faults(tmp_path / "set")
    data = stream() | {"max_bad_fraction": 1.0, "run_folder": tmp_path, "columns": ["aesthetic"]}
    data["stream"] = StreamSettings(epoch_samples=400, shuffle_buffer=4)
    with pytest.raises(BadDataError, match=r"tar: \w+ \(got .*; write the shard again, or set data\.bad_shards=skip"):
        fit(tmp_path / "set", max_steps=60, data=data)
    model = fit(tmp_path / "set", max_steps=60, data=data | {"bad_shards": "skip"})
    assert len(model.seen) == 60
    kinds = {json.loads(line)["kind"] for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()}
    assert {"broken_image", "image_bomb", "oversized_member", "no_image", "not_a_tar", "truncated_tar"} <= kinds
    assert not (tmp_path / "marker").exists()


def test_a_pipe_runs_only_where_it_is_allowed(write_noise: WriteNoise, tmp_path: Path) -> None:
    folder, marker = write_noise(23), tmp_path / "marker"
    command = f"pipe:touch {marker}; cat {folder}//00000.tar"
    for data in ({}, stream()):
        with pytest.raises(ValueError, match=r"^shards: got pipe:"):
            make_data(command, **data)  # type: ignore[arg-type]
    assert not marker.exists()
    model = fit(command, max_steps=5, data=stream(allow_pipe=True))  # type: ignore[arg-type]
    assert len({index for _, indices, _ in model.seen for index in indices}) == 7
    assert marker.exists()


def test_a_pipe_that_breaks_off_loses_the_sample_inside_which_it_does(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [member for i in range(4) for member in good(f"{i}")])
    whole = path.read_bytes()
    for cut, left in ((whole.index(b"3.txt") - 100, 3), (whole.index(b"3.jpg") + 600, 3)):
        command = f"pipe:head -c {cut} {path}"
        data = make_data(command, **stream(allow_pipe=True))  # type: ignore[arg-type]
        raws = [raw.key for raw in data.dataset("train")._samples(command, lambda fault: None)]
        assert raws == [str(i) for i in range(left)]


def test_a_pipe_that_fails_or_is_silent_ends_with_its_command(tmp_path: Path) -> None:
    for command, message in (("pipe:sleep 20", "got nothing for 0.2 s"), ("pipe:exit 3", "got exit code 3")):
        with pytest.raises(UnreachableError, match=f"^{command}: {message}"):
            make_data(command, **stream(allow_pipe=True, stall=0.2)).dataset("train")  # type: ignore[arg-type]


def test_webdataset_itself_is_kept_from_running_anything(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [*good("a"), ("a.pyd", pickle.dumps(Touches(tmp_path / "marker")))])
    wds = secure_webdataset()
    assert wds is webdataset
    with pytest.raises(ValueError, match=r"secur|unsafe"):
        list(webdataset.WebDataset(f"pipe:cat {tmp_path}/0.tar", shardshuffle=False).decode())
    fit(tmp_path, max_steps=3, data=stream())
    assert not (tmp_path / "marker").exists()
    webdataset.utils.enforce_security = False


def test_remote_shards_are_streamed_through_the_cache(write_noise: WriteNoise, tmp_path: Path) -> None:
    import fsspec

    memory, folder = fsspec.filesystem("memory"), write_noise(23)
    for path in folder.iterdir():
        memory.pipe(f"memory://streamed/{path.name}", path.read_bytes())
    remote = ShardCache(tmp_path / "cache")
    seen = fit("memory://streamed", max_steps=5, data=stream() | {"remote": remote}).seen  # type: ignore[arg-type]
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stream": None}, r"data\.stream: got null"),
        ({"cache": True}, r"data\.cache: got a setting that needs an index"),
        ({"mode": "streamed"}, r"data\.mode: got 'streamed'"),
    ],
)
def test_settings_that_cannot_be_are_refused(write_noise: WriteNoise, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make_data(write_noise(3), **(stream() | wrong))
    with pytest.raises(ValueError, match=r"^data\.stream: got"):
        StreamSettings(epoch_samples=0)

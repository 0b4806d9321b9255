import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fault_shards import good, write_tar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_datamodule import fit, resume

from ldm.data import RankBatches, Record, ShardDataset, ShardOrder, index_shard, write_shards
from ldm.data.filtering import filter_shards
from ldm.data.filters import Filter
from ldm.data.kept import KEPT, KeptSamples, judge_shard

WriteNoise = Callable[..., Path]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def numbers(folder: Path, **options: Any) -> list[int]:
    dataset = ShardDataset(folder, resolution=8, columns=["number"], **options)
    return [int(dataset[i, i, 0]["number"]) for i in range(len(dataset))]


def test_the_reader_sees_the_kept_samples_alone_in_order(write_noise: WriteNoise, tmp_path: Path) -> None:
    folder = write_noise(23)
    summary = filter_shards(folder, Filter("number >= 3 and not number in [7, 8]"), tmp_path / "kept")
    expected = [n for n in range(3, 23) if n not in (7, 8)]
    assert numbers(folder, kept=tmp_path / "kept") == expected
    assert (summary["num_samples"], summary["kept"], summary["failed"]) == (23, len(expected), [5])
    dataset = ShardDataset(folder, resolution=8, kept=tmp_path / "kept")
    assert [dataset[i, i, 0]["caption"] for i in range(len(dataset))] == [f"noise {n}" for n in expected]
    assert [dataset[i, i, 0]["index"] for i in range(3)] == [0, 1, 2]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.integers(0, 22), min_size=1), st.integers(0, 99), st.sampled_from([1, 2, 4]))
def test_an_epoch_is_a_permutation_of_the_kept_samples_on_any_number_of_ranks(
    write_noise: WriteNoise, tmp_path: Path, keep: set[int], seed: int, world_size: int
) -> None:
    folder = write_noise(23)
    filter_shards(folder, Filter(f"number in {sorted(keep)}"), tmp_path / "kept")
    dataset = ShardDataset(folder, resolution=8, columns=["number"], kept=tmp_path / "kept")
    order = ShardOrder(dataset.shard_sizes, seed=seed, block_size=2)
    ranks = [RankBatches(order, batch_size=4, rank=rank, world_size=world_size) for rank in range(world_size)]
    stream: list[int] = []
    for batches in zip(*ranks, strict=True):
        stream += [int(dataset[place]["number"]) for batch in batches for place in batch]
        if len(stream) >= 2 * len(keep):
            break
    for epoch in range(2):
        assert sorted(stream[epoch * len(keep) : (epoch + 1) * len(keep)]) == sorted(keep)


def test_what_is_written_depends_on_shards_and_filter_alone(write_noise: WriteNoise, tmp_path: Path) -> None:
    folder = write_noise(23)
    for write in ("keys", "shards"):
        results = []
        for name, workers in (("a", 0), ("b", 2)):
            out = tmp_path / f"{write}-{name}"
            filter_shards(folder, Filter("number > 4"), out, write=write, workers=workers)
            results.append(contents(out))
        filter_shards(folder, Filter("number > 9"), out, write=write)
        filter_shards(folder, Filter("number > 4"), out, write=write)
        assert results[0] == results[1] == contents(out)


def test_new_shards_hold_the_kept_samples_byte_for_byte(write_noise: WriteNoise, tmp_path: Path) -> None:
    folder = write_noise(23)
    filter_shards(folder, Filter("number > 8"), tmp_path / "new", write="shards")
    assert numbers(tmp_path / "new") == list(range(9, 23))
    before, after = ({}, {})
    for found, place in ((before, folder), (after, tmp_path / "new")):
        for path in place.glob("*.tar"):
            with tarfile.open(path) as tar:
                found |= {entry.name: tar.extractfile(entry).read() for entry in tar}
    assert after.items() <= before.items()
    assert len(after) == 3 * 14
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "00000.tar", "00001.tar", "00002.tar", "filter.json", "manifest.json",
    ]  # fmt: skip


def test_new_shards_are_written_after_a_stream_was_read(
    write_noise: WriteNoise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from webdataset import utils

    monkeypatch.setenv("WDS_SECURE", "1")
    monkeypatch.setattr(sys.modules[utils.__name__], "enforce_security", True)
    filter_shards(write_noise(3), Filter("width > 0"), tmp_path / "new", write="shards")
    assert index_shard(tmp_path / "new" / "00000.tar").keys


def test_new_shards_of_nothing_are_refused_and_unreadable(write_noise: WriteNoise, tmp_path: Path) -> None:
    folder = write_noise(5)
    with pytest.raises(ValueError, match="keeps no sample"):
        filter_shards(folder, Filter("number > 99"), tmp_path / "new", write="shards")
    filter_shards(folder, Filter("number > 99"), tmp_path / "kept")
    with pytest.raises(ValueError, match=r"of which data\.filter keeps no sample"):
        ShardDataset(folder, resolution=8, kept=tmp_path / "kept")


def test_a_part_of_the_filtered_shards_may_be_read(write_noise: WriteNoise, tmp_path: Path) -> None:
    folder = write_noise(23)
    filter_shards(folder, Filter("number > 8"), tmp_path / "kept")
    assert numbers(folder / "00001.tar", kept=tmp_path / "kept") == list(range(9, 14))


def test_the_shards_may_move(write_noise: WriteNoise, tmp_path: Path) -> None:
    folder = write_noise(9)
    filter_shards(folder, Filter("number > 5"), tmp_path / "kept")
    folder.rename(tmp_path / "elsewhere")
    assert numbers(tmp_path / "elsewhere", kept=tmp_path / "kept") == [6, 7, 8]


def test_other_or_changed_shards_are_refused(write_noise: WriteNoise, tmp_path: Path) -> None:
    filter_shards(write_noise(9), Filter("number > 5"), tmp_path / "kept")
    with pytest.raises(ValueError, match=r"00000\.tar, which .*kept\.json does not know or which has changed"):
        ShardDataset(write_noise(10, name="other", samples_per_shard=5), resolution=8, kept=tmp_path / "kept")


def test_a_result_that_is_missing_unfinished_or_broken_is_refused(write_noise: WriteNoise, tmp_path: Path) -> None:
    folder = write_noise(9)
    with pytest.raises(FileNotFoundError, match=r"data\.filter: got .*nowhere, where there is no kept\.json"):
        ShardDataset(folder, resolution=8, kept=tmp_path / "nowhere")
    filter_shards(folder, Filter("number > 5"), tmp_path / "kept")
    keys = next((tmp_path / "kept").glob("00000-*.json"))
    keys.write_text("[]")
    with pytest.raises(ValueError, match=r"got other bytes than kept\.json says"):
        KeptSamples(tmp_path / "kept").select(index_shard(folder / "00000.tar"))
    (tmp_path / "kept" / KEPT).write_text("{")
    with pytest.raises(ValueError, match="broken"):
        KeptSamples(tmp_path / "kept")


def test_an_interrupted_filter_leaves_nothing_to_read_and_may_be_repeated(
    write_noise: WriteNoise, tmp_path: Path
) -> None:
    folder = write_noise(23)
    second = folder / "00001.tar"
    content = second.read_bytes()
    second.write_bytes(content.replace(b'"number"', b'"numbre"'))
    for write in ("keys", "shards"):
        with pytest.raises(ValueError, match=r"00001\.tar: 000010000: number: there is no such column"):
            filter_shards(folder, Filter("number > 5"), tmp_path / write, write=write)
    with pytest.raises(FileNotFoundError, match=r"no kept\.json"):
        KeptSamples(tmp_path / "keys")
    with pytest.raises((ValueError, FileNotFoundError), match=r"unfinished|no tar file"):
        ShardDataset(tmp_path / "shards", resolution=8)
    second.write_bytes(content)
    for write in ("keys", "shards"):
        filter_shards(folder, Filter("number > 5"), tmp_path / write, write=write)
    assert numbers(folder, kept=tmp_path / "keys") == numbers(tmp_path / "shards") == list(range(6, 23))


def test_folders_of_others_are_left_alone(write_noise: WriteNoise, tmp_path: Path) -> None:
    folder = write_noise(9)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "00000.tar").write_bytes(b"precious")
    before = contents(folder)
    for write in ("keys", "shards"):
        with pytest.raises(ValueError, match="which holds files of others"):
            filter_shards(folder, Filter("number > 5"), tmp_path / "mine", write=write)
        with pytest.raises(ValueError, match="where the shards are"):
            filter_shards(folder, Filter("number > 5"), folder, write=write)
    assert contents(tmp_path / "mine") == {"00000.tar": b"precious"}
    assert contents(folder) == before


def test_a_misspelt_column_leaves_no_folder(write_noise: WriteNoise, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"00000\.tar: 000000000: nmuber: there is no such column"):
        filter_shards(write_noise(3), Filter("nmuber > 5"), tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_samples_without_readable_metadata_are_counted_and_left_out(tmp_path: Path) -> None:
    members = [*good("a"), *good("b", json=None), *good("c", json=b"{"), *good("d")]
    path = write_tar(tmp_path / "0.tar", members)
    kept = judge_shard(path, chosen=Filter("aesthetic > 5"))
    assert kept.keys == ["a", "d"]
    assert kept.survival.num_unreadable == 2
    assert kept.survival.unreadable[f"{path}: b"] == "no json"


def test_counts_tell_each_condition_apart(tmp_path: Path) -> None:
    rows = [(5, 0.1), (4, 0.1), (None, 0.9), (6, None)]
    members = []
    for i, (score, unsafe) in enumerate(rows):
        members += good(str(i), json=json.dumps({"aesthetic": score, "punsafe": unsafe}).encode())
    write_tar(tmp_path / "0.tar", members)
    summary = filter_shards(tmp_path, Filter(["aesthetic >= 5", "punsafe < 0.5"], nulls="keep"), tmp_path / "kept")
    assert (summary["failed"], summary["unknown"], summary["kept"]) == ([1, 1], [1, 1], 2)


@pytest.mark.parametrize("options", [{"write": "files"}, {"metadata": "xml"}, {"workers": -1}])
def test_unknown_settings_are_refused(write_noise: WriteNoise, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: got "):
        filter_shards(write_noise(3), Filter("number > 5"), tmp_path / "kept", **options)


def test_the_parquet_beside_a_shard_is_read_by_key(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    write_tar(tmp_path / "00000.tar", [*good("a"), *good("b"), *good("c")])
    table = pyarrow.table({"key": ["c", "a"], "AESTHETIC_SCORE": [7.0, float("nan")]})
    parquet.write_table(table, tmp_path / "00000.parquet")
    kept = judge_shard(tmp_path / "00000.tar", chosen=Filter("aesthetic > 6", nulls="drop"), metadata="parquet")
    assert kept.keys == ["c"]
    assert kept.survival.num_unreadable == 1


@pytest.mark.parametrize("has_key", [True, False])
def test_rows_of_a_table_are_joined_by_key_whatever_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_key: bool
) -> None:
    """With a stand-in for pyarrow, which may not be installed: what is tested is our join, not its reading."""
    rows: list[dict[str, Any]] = [{"key": "c", "WIDTH": 7}, {"key": "a", "WIDTH": None}]
    rows = rows if has_key else [{"WIDTH": 7}]
    table = SimpleNamespace(to_pylist=lambda: rows)
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(ArrowException=OSError))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", SimpleNamespace(read_table=lambda path: table))
    (tmp_path / "00000.parquet").touch()
    shard = write_tar(tmp_path / "00000.tar", [*good("x/a"), *good("x/b"), *good("x/c")])
    chosen = Filter("original_width > 6", nulls="drop")
    if not has_key:
        with pytest.raises(ValueError, match=r"00000\.parquet: got the columns \['WIDTH'\], expected key"):
            judge_shard(shard, chosen=chosen, metadata="parquet")
        return
    kept = judge_shard(shard, chosen=chosen, metadata="parquet")
    assert kept.keys == ["x/c"]
    assert (kept.survival.unknown, kept.survival.num_unreadable) == ([1], 1)


def test_a_parquet_that_is_asked_for_and_cannot_be_had_is_one_clear_error(
    write_noise: WriteNoise, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"^.*metadata: got (parquet, which needs the package pyarrow|no .*parquet)"):
        filter_shards(write_noise(3), Filter("number > 5"), tmp_path / "kept", metadata="parquet")


def test_training_reads_and_validation_does_not_heed_the_filter(write_noise: WriteNoise, tmp_path: Path) -> None:
    folder, validation = write_noise(23), write_noise(6, name="validation")
    filter_shards(folder, Filter("number >= 3"), tmp_path / "kept")
    data = {"filter": tmp_path / "kept", "validation": validation}
    model = fit(folder, max_steps=5, limit_val_batches=1.0, data=data)
    assert sorted(index for _, indices, _ in model.seen for index in indices) == list(range(20))
    assert model.validated == list(range(6))


@pytest.mark.parametrize("after", [3, 5, 7])
def test_resuming_with_a_filter_is_exact(write_noise: WriteNoise, tmp_path: Path, after: int) -> None:
    folder = write_noise(23)
    filter_shards(folder, Filter("number >= 3"), tmp_path / "kept")
    options = {"max_steps": 9, "data": {"filter": tmp_path / "kept"}}
    whole = fit(folder, **options).seen
    assert resume(folder, tmp_path, after=after, **options) == whole[after:]
    assert {index for _, indices, _ in whole for index in indices} == set(range(20))


def test_resuming_with_another_filter_is_refused_and_with_an_equal_one_not(
    write_noise: WriteNoise, tmp_path: Path
) -> None:
    folder, checkpoint = write_noise(23), tmp_path / "saved.ckpt"
    # The same number of samples, and of each shard the same first and last; only the whole list differs.
    for name, where in (("a", "number != 4"), ("b", "number != 5"), ("same", "not number == 4")):
        filter_shards(folder, Filter(where), tmp_path / name)
    whole = fit(folder, save=(2, checkpoint), max_steps=4, data={"filter": tmp_path / "a"}).seen
    for other in ({"filter": tmp_path / "b"}, {}):
        with pytest.raises(ValueError, match=r"^resume: got other training shards, data\.filter"):
            fit(folder, checkpoint=checkpoint, max_steps=4, data=other)
    assert fit(folder, checkpoint=checkpoint, max_steps=4, data={"filter": tmp_path / "same"}).seen == whole[2:]


def test_latents_may_be_filtered_too(tmp_path: Path) -> None:
    import numpy as np

    from ldm.data import LatentRecord, write_latent_shards

    rows = [LatentRecord(np.full((8, 2, 2), n, np.float32), f"c{n}", {"digit": n}) for n in range(5)]
    write_latent_shards(tmp_path / "latents", rows, encoder_sha256="abc")
    filter_shards(tmp_path / "latents", Filter("digit in [1, 4]"), tmp_path / "kept")
    dataset = ShardDataset(tmp_path / "latents", kept=tmp_path / "kept")
    assert [dataset[i, i, 0]["moments"][0, 0, 0].item() for i in range(len(dataset))] == [1, 4]


def test_two_copies_of_a_shard_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shards(tmp_path / name, [Record(_grey(), "x", {"number": 1})])
    with pytest.raises(ValueError, match="holds the samples of another shard"):
        filter_shards([str(tmp_path / "a"), str(tmp_path / "b")], Filter("number > 0"), tmp_path / "kept")


def _grey() -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("L", (8, 8), 90).save(stream, format="PNG")
    return stream.getvalue()

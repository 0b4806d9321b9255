"""What training does with each kind of bad sample: another stands in, the ledger has a line, and too many stop it."""

import json
import os
import resource
import subprocess
import sys
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_shards import encode, good, noise, sample_faults, write_shard_faults, write_tar
from test_datamodule import BATCH_SIZE, fit, make_data, resume

from ldm.cli.errors import RunFailed, UserError
from ldm.cli.train import data_faults
from ldm.data import BadDataError, CorruptSampleError, ShardDataset
from ldm.data.faults import KINDS, Fault
from ldm.data.ledger import FILE, Ledger
from ldm.data.position import ShardOrder
from ldm.data.readable import open_readable
from ldm.data.substitutes import GoodSamples
from ldm.data.training_stream import BATCHES_BETWEEN_CHECKS

HERE = Path(__file__).resolve().parent
NUM_GOOD = 24
SKIPPED = {kind for kind, (outcome, _) in KINDS.items() if outcome == "skipped"} - {
    *("truncated_tar", "missing_column", "unreadable")
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:data. .* bad samples"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]


@pytest.fixture(scope="module")
def marker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("marker") / "touched"
    yield path
    assert not path.exists(), "something was unpickled"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, marker: Path) -> Path:
    """Two shards in which every fault that a sample of images can have lies among good samples."""
    folder = tmp_path_factory.mktemp("images")
    faulty = [members for kind, members in sample_faults(marker) if kind != "broken_array"]
    for shard in range(2):
        members = [member for sample in faulty[shard::2] for member in sample]
        for place in range(NUM_GOOD // 2):
            members += good(f"good{shard}{place}")
        write_tar(folder / f"{shard}.tar", members)
    return folder


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def options(folder: Path, **changed: Any) -> dict[str, Any]:
    return {"max_bad_fraction": 1.0, "run_folder": folder, "columns": ["aesthetic"], **changed}


def test_training_reads_on_past_every_fault_and_notes_each_once(images: Path, tmp_path: Path) -> None:
    model = fit(images, max_steps=20, data=options(tmp_path))
    dataset = ShardDataset(images, resolution=8, columns=["aesthetic"])
    seen = Counter(dataset.located(index)[1] for _, indices, _ in model.seen for index in indices)
    expected = SKIPPED - {"broken_array"}
    assert not expected & seen.keys()
    assert sum(seen.values()) == 20 * BATCH_SIZE
    assert {kind for kind, (outcome, _) in KINDS.items() if outcome == "converted"} & seen.keys()
    found = lines(tmp_path)
    assert {(line["key"], line["kind"]) for line in found} == {(kind, kind) for kind in expected}
    assert len(found) == len(expected)
    assert all(line["reason"] and line["shard"].endswith(".tar") for line in found)


@pytest.mark.parametrize("after", [3, 9])
def test_substitutes_are_the_same_after_resuming_and_the_ledger_has_nothing_twice(
    images: Path, tmp_path: Path, after: int
) -> None:
    whole = fit(images, max_steps=14, data=options(tmp_path)).seen
    before = sorted(json.dumps(line) for line in lines(tmp_path))
    assert resume(images, tmp_path, after=after, max_steps=14, data=options(tmp_path)) == whole[after:]
    assert sorted(json.dumps(line) for line in lines(tmp_path)) == before


@pytest.mark.slow
def test_workers_change_neither_substitutes_nor_ledger(images: Path, tmp_path: Path) -> None:
    for name in ("alone", "workers"):
        (tmp_path / name).mkdir()
    whole = fit(images, max_steps=14, data=options(tmp_path / "alone"))
    same = fit(images, max_steps=14, data=options(tmp_path / "workers", num_workers=2))
    assert same.seen == whole.seen
    assert lines(tmp_path / "workers") == lines(tmp_path / "alone")


def test_a_single_pass_leaves_bad_samples_out(images: Path) -> None:
    data = make_data(images, max_bad_fraction=0.0, columns=["aesthetic"])
    dataset = data.dataset("train")
    keys = [dataset.located(int(i))[1] for batch in data.iterate_once("train", 5) for i in batch["index"]]
    every = [dataset.located(i)[1] for i in range(len(dataset))]
    assert keys == [key for key in every if key not in SKIPPED]


def test_too_many_bad_samples_stop_training_and_name_the_worst_shards(tmp_path: Path) -> None:
    half = encode(noise(size=(64, 64)), "JPEG")[:900]
    for shard, num_bad in enumerate((0, 3, 1)):
        rows = [good(f"{i}", jpg=half) if i < num_bad else good(f"{i}") for i in range(8)]
        write_tar(tmp_path / f"{shard}.tar", [member for row in rows for member in row])
    fit(tmp_path, max_steps=12, data=options(tmp_path, max_bad_fraction=4 / 24))
    assert Counter(Path(line["shard"]).name for line in lines(tmp_path)) == {"1.tar": 3, "2.tar": 1}
    message = (
        r"^data: got 4 bad among 24 samples, expected at most data\.max_bad_fraction=0\.15; worst shards: "
        r"\S*1\.tar \(3\), \S*2\.tar \(1\); such as \S*1\.tar: \d: broken_image \(\.jpg: .*\); see .*bad_samples"
    )
    with pytest.raises(BadDataError, match=message):
        fit(tmp_path, max_steps=12, data=options(tmp_path, max_bad_fraction=0.15))


def test_nothing_but_bad_samples_end_in_one_clear_error(tmp_path: Path) -> None:
    half = encode(noise(size=(64, 64)), "JPEG")[:900]
    write_tar(tmp_path / "0.tar", [member for i in range(70) for member in good(f"{i}", jpg=half)])
    with pytest.raises(BadDataError, match=r"0\.tar: \d+ cannot be read, nor can the 64 samples that follow it"):
        fit(tmp_path, max_steps=2, data=options(tmp_path, resolution=16))


def test_policies_say_what_becomes_of_missing_captions_and_bad_text(images: Path, tmp_path: Path) -> None:
    def kinds(**changed: Any) -> set[str]:
        data = make_data(images, max_bad_fraction=1.0, columns=["aesthetic"], **changed)
        list(data.iterate_once("train", 8))
        return {line["kind"] for line in data.ledger.lines.values()}

    assert kinds() == SKIPPED - {"broken_array"}
    assert kinds(missing_caption="skip") == SKIPPED - {"broken_array"} | {"missing_caption"}
    data = make_data(images, bad_text="replace")
    dataset = data.dataset("train")
    captions = {
        dataset.located(int(i))[1]: caption
        for batch in data.iterate_once("train", 8)
        for i, caption in zip(batch["index"], batch["caption"], strict=True)
    }
    assert captions["not_utf8"] == "caption �"
    assert captions["broken_json"] == "caption of broken_json"
    for wrong in ({"missing_caption": "no"}, {"bad_text": "no"}, {"bad_shards": "no"}, {"max_bad_fraction": 2.0}):
        with pytest.raises(ValueError, match=rf"^data\.{next(iter(wrong))}: got"):
            make_data(images, **wrong).dataset("train")


def test_a_shard_that_was_cut_off_is_read_to_its_last_whole_sample(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [member for i in range(4) for member in good(f"{i}")])
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    starts = [member.offset for member in members if member.name.endswith(".jpg")]
    ends = [member.offset_data + member.size for member in members if member.name.endswith(".json")]
    for cut in range(starts[2] + 256, starts[3] + 600, 256):
        path.write_bytes(content[:cut])
        try:
            (index,), faults = open_readable(path)
        except ValueError:
            pytest.fail(f"cut at {cut}")
        num_begun, num_whole = sum(start < cut for start in starts), sum(end <= cut for end in ends)
        # A cut inside a header may have been in one more member of the sample before it.
        assert num_whole - (cut % 512 != 0) <= len(index) <= num_whole
        assert list(index.keys) == [str(i) for i in range(len(index))]
        assert [fault.kind for fault in faults] == ["truncated_tar" if num_begun > num_whole else "no_end_marker"]


def test_shards_that_are_no_tar_are_refused_all_at_once_or_left_out(tmp_path: Path) -> None:
    write_shard_faults(tmp_path)
    with pytest.raises(ValueError, match=r"^5 shards cannot be read: .*00003\.tar: got an empty file.*bad_shards=skip"):
        ShardDataset(tmp_path, resolution=8)
    dataset = ShardDataset(tmp_path, resolution=8, bad_shards="skip")
    found = {(Path(fault.shard).name, fault.kind) for fault in dataset.index_faults}
    assert found == {
        ("00001.tar", "truncated_tar"), ("00002.tar", "no_end_marker"), ("00003.tar", "empty_file"),
        ("00004.tar", "not_a_tar"), ("00005.tar", "not_a_tar"), ("00007.tar", "repeated_member"),
        ("00010.tar", "broken_tar"),
    }  # fmt: skip
    assert sorted(dataset.located(i)[1] for i in range(len(dataset))) == ["../../up", "a", "a", "a", "a", "b", "b"]
    with pytest.raises(ValueError, match=r"00003\.tar: got an empty file, .* or set data\.bad_shards=skip to leave it"):
        ShardDataset(tmp_path / "00003.tar", resolution=8)


def test_shards_that_are_left_out_by_choice_do_not_stop_training(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for shard in range(2):
        write_tar(tmp_path / "set" / f"{shard}.tar", [member for i in range(8) for member in good(f"{shard}{i}")])
    for shard in range(2, 5):
        (tmp_path / "set" / f"{shard}.tar").write_bytes(b"")
    data = {"bad_shards": "skip", "max_bad_fraction": 0.0, "run_folder": tmp_path}
    assert len(fit(tmp_path / "set", max_steps=6, data=data).seen) == 6
    assert [(line["key"], line["kind"], line["position"]) for line in lines(tmp_path)] == [("", "empty_file", None)] * 3


def test_bombs_take_no_memory_in_training(images: Path) -> None:
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        warnings.simplefilter("ignore")
        dataset = ShardDataset(images, resolution=8, columns=["aesthetic"])
        reading = GoodSamples(dataset, substitutes=True, missing_caption="empty", assemble=lambda items, _: list(items))
        faults = [fault.kind for i in range(len(dataset)) for _, fault in reading.__getitems__([(i, i, 0)]).faults]
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        os.write(writer, json.dumps([faults, (after - before) / 1024]).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        faults, megabytes = json.load(told)
    assert os.waitpid(child, 0)[1] == 0
    assert {"image_bomb", "oversized_member"} <= set(faults)
    assert megabytes < 50


def test_ranks_write_each_line_once_and_know_each_others(tmp_path: Path) -> None:
    first, second = (Ledger(tmp_path, max_bad_fraction=0.5) for _ in range(2))
    faults = [Fault("0.tar", str(i), "broken_image", "half") for i in range(6)]
    first.add(faults[:4], split="train", position=1)
    second.add(faults[2:], split="train", position=2)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"shard": "cut')  # as a killed process leaves it
    first.add(faults, split="train", position=9)
    first.add([Fault("1.tar", "x", "broken_image", "half")], split="validation", position=0)
    assert [line["key"] for line in lines(tmp_path)] == ["0", "1", "2", "3", "4", "5", "x"]
    second.refresh()
    assert first.lines == second.lines == Ledger(tmp_path, max_bad_fraction=0.5).lines
    assert first.is_too_bad(num_read=5, num_samples=11)
    assert not first.is_too_bad(num_read=5, num_samples=12)
    assert not first.is_too_bad(num_read=5, num_samples=10**6)


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_where_only_one_of_them_met_the_bad_samples(tmp_path: Path) -> None:
    count, half = 240, encode(noise(size=(64, 64)), "JPEG")[:900]
    order, _ = ShardOrder([count], seed=3).take(0, count)
    of_second = [int(index) for position, index in enumerate(order) if position % BATCH_SIZE >= BATCH_SIZE // 2]
    bad = set(of_second[:12])
    (tmp_path / "set").mkdir()
    rows = [good(f"{i:03d}", jpg=half) if i in bad else good(f"{i:03d}") for i in range(count)]
    write_tar(tmp_path / "set" / "0.tar", [member for row in rows for member in row])
    done = subprocess.run(
        [sys.executable, str(HERE / "bad_rank_worker.py"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    assert ranks[0]["steps"] == BATCHES_BETWEEN_CHECKS - 1
    assert ranks[0]["told"].startswith(f"data: got 12 bad among {count} samples, expected at most")
    assert sorted(int(line["key"]) for line in lines(tmp_path)) == sorted(bad)


def test_what_the_index_shows_is_a_share_of_all_samples_and_what_reading_met_of_those_that_were_read() -> None:
    ledger = Ledger(None, max_bad_fraction=0.01)
    ledger.add([Fault("0.tar", str(i), "no_image", "none") for i in range(5_000)], split="train")
    assert not ledger.is_too_bad(num_read=128, num_samples=10**6)
    for position in range(6):
        assert not ledger.is_too_bad(num_read=128, num_samples=10**6)
        fault = Fault("1.tar", str(position), "broken_image", "half")
        ledger.add([fault], split="train", position=position)
    assert ledger.is_too_bad(num_read=128, num_samples=10**6)
    told = str(ledger.error(num_read=128, num_samples=10**6))
    assert "got 6 bad among 1,000 samples and 5000 bad among 1,000,000 in the index, expected at most" in told
    assert not ledger.is_too_bad(num_read=5_000, num_samples=10**6)
    nothing_met_here = Ledger(None, max_bad_fraction=0.01).error(num_read=128, num_samples=10**6)
    assert "another process" in str(nothing_met_here)


def test_it_is_told_at_the_first_the_tenth_and_the_hundredth(tmp_path: Path) -> None:
    ledger = Ledger(None, max_bad_fraction=1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(101):
            ledger.add([Fault("0.tar", str(i), "broken_image", "half")], split="train", position=i)
    assert [str(w.message).split()[1] for w in caught] == ["1", "10", "100"]


@pytest.mark.parametrize("error", [BadDataError("too bad"), CorruptSampleError("0.tar: a: foreign")])
def test_the_command_line_ends_with_the_code_of_data_faults(error: Exception) -> None:
    for raised in (error, UserError("wrapped")):
        raised.__cause__ = None if raised is error else error
        with pytest.raises(RunFailed, match=str(error)) as caught, data_faults():
            raise raised
        assert caught.value.code == 1
    with pytest.raises(UserError, match="mine"), data_faults():
        raise UserError("mine")

"""The record of steps that were left out."""

import json
import math
from pathlib import Path

from ldm.training.skip_record import Skip, SkipRecord

BROKEN = Skip(7, "not finite", (math.nan, math.inf), (70, 80))
SPIKE = Skip(9, "spike", (0.1, 123.45678901234567), None)


def test_what_is_written_is_read_again_bit_for_bit(tmp_path: Path) -> None:
    SkipRecord(tmp_path / "skipped.jsonl").add([BROKEN, SPIKE], write=True)
    again = SkipRecord(tmp_path / "skipped.jsonl")
    again.take_up(again.read())
    assert again.skips[9] == SPIKE
    assert again.skips[7].positions == (70, 80)
    assert [math.isnan(value) for value in again.skips[7].values] == [True, False]


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    SkipRecord(tmp_path / "skipped.jsonl").add([BROKEN], write=True)
    line = json.loads((tmp_path / "skipped.jsonl").read_text(), parse_constant=lambda name: 1 / 0)
    assert line == {"step": 7, "reason": "not finite", "values": ["nan", "inf"], "positions": [70, 80]}


def test_a_step_is_recorded_once(tmp_path: Path) -> None:
    record = SkipRecord(tmp_path / "skipped.jsonl")
    record.add([BROKEN], write=True)
    record.add([BROKEN, SPIKE], write=True)
    assert [line["step"] for line in record.read()] == [7, 9]


def test_a_line_that_a_kill_cut_short_goes_and_the_next_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    SkipRecord(path).add([BROKEN, SPIKE], write=True)
    path.write_bytes(path.read_bytes()[:-9])
    again = SkipRecord(path)
    again.take_up(again.read())
    assert list(again.skips) == [7]
    again.add([Skip(11, "spike", (1.0, 2.0))], write=True)
    assert [line["step"] for line in again.read()] == [7, 11]


def test_steps_that_an_abort_or_a_rollback_answered_are_settled(tmp_path: Path) -> None:
    record = SkipRecord(tmp_path / "skipped.jsonl")
    record.add([BROKEN], write=True)
    record.settle({"event": "rollback", "at": 7, "to": 5}, write=True)
    record.add([SPIKE], write=True)
    again = SkipRecord(record.path)
    again.take_up(again.read())
    assert (again.settled, again.rollbacks) == ({7}, [(7, 5)])


def test_a_process_that_does_not_write_knows_the_same(tmp_path: Path) -> None:
    record = SkipRecord(tmp_path / "skipped.jsonl")
    record.add([BROKEN], write=False)
    assert list(record.skips) == [7]
    assert not record.path.exists()


def test_words_name_loss_and_norm() -> None:
    assert SPIKE.in_words == "loss 0.1, gradient norm 123.5 (spike)"

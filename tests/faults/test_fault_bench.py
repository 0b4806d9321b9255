"""The bench injects, tells held rows from missed ones, and holds its quick rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import bench
from tests.faults.bench_child import Setting
from tests.faults.bench_row import Result, Row, run_row

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_quick_rows_hold_and_every_row_is_there(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.faults.bench", "--quick", "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=280)
    found = json.loads((tmp_path / "found.json").read_text())
    missed = {row["number"]: [row["figure"], row["details"]] for row in found["rows"] if not row["held"]}
    assert not missed, missed
    assert done.returncode == 0
    assert [row["number"] for row in found["rows"]] == list(bench.QUICK)
    assert found["known"] == list(range(1, 37))


def test_a_row_that_could_not_be_injected_is_a_miss(tmp_path: Path) -> None:
    def fails(setting: Setting) -> Result:
        raise OSError("no room for it")

    found = run_row(Row(1, "a fault", "must hold", "", fails), Setting(tmp_path / "row", tmp_path))
    assert not found["held"]
    assert found["figure"] == "not injected: OSError: no room for it"


@pytest.mark.parametrize("text", ["0", "37", "1-40"])
def test_a_number_outside_the_matrix_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.parse(["--rows", text])
    assert stop.value.code == 2
    assert "expected numbers from 1 to 36" in capsys.readouterr().err


def test_pieces_add_up_to_one_file_and_one_table(tmp_path: Path) -> None:
    common = {"fault": "a|b", "must_hold": "x", "figure": "y", "stock": "", "processor_seconds": 1.0, "load": 2.0}
    rows = [{"number": number, "held": number != 2, "seconds": 3.0, **common} for number in (1, 2, 3)]
    path = tmp_path / "found.json"
    bench.write(path, rows[:2], range(1, 37))
    bench.write(path, [{**rows[0], "held": False}, rows[2]], range(1, 37))
    found = json.loads(path.read_text())
    assert [(row["number"], row["held"]) for row in found["rows"]] == [(1, False), (2, False), (3, True)]
    assert (found["held"], found["seconds"]) == (1, 9.0)
    table = (tmp_path / "found.md").read_text().splitlines()
    assert "1 of 3 rows held, of 36 there are" in table[2]
    assert table[-1] == "| 3 | a/b | x | y | yes | 3.0 | 2.0 | not measured |"


def test_ranges_and_numbers_mix() -> None:
    assert bench.parse(["--rows", "1,5,11-13"]).rows == [1, 5, 11, 12, 13]


def test_a_killed_child_shows_and_a_slow_one_is_ended(tmp_path: Path) -> None:
    """In a process of its own: a fork of a busy one may hang."""
    code = (
        "import os, signal, time; from pathlib import Path; from tests.faults.bench_child import Child, Setting\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "print(Child(lambda: os.kill(os.getpid(), signal.SIGKILL), folder, {}).wait().code)\n"
        "print(Child(lambda: time.sleep(60), folder, {}).wait(0.3).code)\n"
        "print(Child(lambda: 7, folder, {}).wait().code, Child(lambda: print('said'), folder, {}).wait().text)\n"
        "print(Setting(folder / 'one', folder).call(lambda: [1, 'a']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["-9", "-9", "7", "said", "[1,", "'a']"], done.stderr[-2000:]

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
@pytest.mark.parametrize("trials", [6])
def test_kill_9_at_any_time_changes_neither_the_samples_nor_the_weights(tmp_path: Path, trials: int) -> None:
    """With 0, 1 and 2 workers before and after; on shards three of whose samples have substitutes.

    `python tests/data/kill_trials.py FOLDER` does the same 20 times.
    """
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "kill_trials.py"), str(tmp_path), str(trials)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])["trials"]
    assert len(found) == trials
    for one in found:
        assert one["finished"] and one["same_keys"] and one["all_steps"], one
        assert one["same_weights"] and one["same_ledger"], one
    killed = [one for one in found if one["killed"]]
    assert len(killed) > trials / 2
    assert any(one["went_on_at"] for one in killed), "some were killed after a checkpoint"

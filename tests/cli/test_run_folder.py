"""A run's folder: its id, its lock, its marks, its checkpoints, its secrets."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from cli_helpers import environment, read_json
from hydra import initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from ldm.cli.compose import compose_command, conf_folder
from ldm.cli.errors import UserError
from ldm.cli.provenance import REDACTED, is_secret, redact, redact_override
from ldm.cli.run_folder import RunFolder, finished_runs, latest_finished, run_folder_of
from ldm.training.checkpoint_files import is_valid


def config(**changes: object) -> DictConfig:
    plain = {
        "name": "toy",
        "run_id": None,
        "run_dir": None,
        "resume": "auto",
        "paths": {"runs": "runs"},
        "model": {"learning_rate": 0.1, "file": "${paths.runs}/x", "out": "${run_dir}/y"},
        "trainer": {"max_steps": 5, "log_every_n_steps": 1},
        "callback": {"progress": {"every": 1}, "checkpoint": {"every_n_steps": 5}},
        "logger": {"csv": {"folder": "${run_dir}"}},
    }
    return OmegaConf.merge(OmegaConf.create(plain), OmegaConf.from_dotlist([f"{k}={v}" for k, v in changes.items()]))


def run_id(**changes: object) -> str:
    return RunFolder.of(config(**changes), command="train").path.name


def save(path: Path, step: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": step, "state_dict": {"w": torch.zeros(1000)}}, path)
    return path


@pytest.fixture
def run(folder: Path) -> RunFolder:
    return RunFolder.of(config(), command="train")


def test_the_same_config_finds_the_same_folder(folder: Path) -> None:
    assert RunFolder.of(config(), command="train").path == RunFolder.of(config(), command="train").path


@pytest.mark.parametrize(
    "change",
    [
        {"paths.runs": "/elsewhere"},
        {"logger.csv.folder": "x"},
        {"callback.progress.every": 9},
        {"callback.sample_grid.every_n_steps": 9},
        {"callback.checkpoint.every_n_steps": 9, "callback.checkpoint.keep": 3},
        {"trainer.log_every_n_steps": 9},
        {"trainer.devices": 4, "trainer.num_nodes": 2},
    ],
    ids=str,
)
def test_places_and_displays_leave_the_run_id(change: dict[str, object], folder: Path) -> None:
    assert run_id(**change) == run_id()


def test_workers_leave_the_run_id_unless_they_decide_the_order(folder: Path) -> None:
    data = {"data.train": "shards", "data.num_workers": 0}
    assert run_id(**data) == run_id(**{**data, "data.num_workers": 8, "data.cache": True})
    stream = {**data, "data.mode": "stream"}
    assert run_id(**stream) != run_id(**{**stream, "data.num_workers": 8})


@pytest.mark.parametrize("change", [{"model.learning_rate": 0.2}, {"trainer.max_steps": 6}, {"name": "other"}], ids=str)
def test_what_changes_the_result_changes_the_run_id(change: dict[str, object], folder: Path) -> None:
    assert run_id(**change) != run_id()


def test_data_that_lie_in_a_place_of_ones_own_are_told_from_others(folder: Path) -> None:
    data = {"data.train": "${paths.data}/train"}
    assert run_id(**data, **{"paths.data": "/faces"}) != run_id(**data, **{"paths.data": "/birds"})
    assert run_id(**{"paths.data": "/faces"}) == run_id(**{"paths.data": "/birds"}) == run_id()


def test_the_current_folder_leaves_the_run_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = set()
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        ids.add(run_id())
    assert len(ids) == 1


@pytest.mark.parametrize(
    ("typed", "other"),
    [
        (["trainer.max_steps=1e4"], ["trainer.max_steps=10000"]),
        (["trainer.precision=32"], []),
        (["seed=${oc.env:TOY_SEED}"], ["seed=3"]),
    ],
)
def test_two_ways_to_write_one_setting_are_one_run(
    typed: list[str], other: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_SEED", "3")
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        found = [compose_command("train", ["~experiment", "name=mine", *words]) for words in (typed, other)]
    assert len({RunFolder.of(one, command="train").path for one in found}) == 1


def test_all_of_the_batches_does_not_become_one_of_them() -> None:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        trainer = compose_command("train", ["debug=fast", "trainer.limit_val_batches=1.0"]).trainer
    assert isinstance(trainer.limit_val_batches, float)


def test_a_given_run_id_names_the_folder(folder: Path) -> None:
    assert RunFolder.of(config(run_id="mine"), command="train").path == folder / "runs" / "toy" / "mine"


def test_resume_never_takes_the_next_free_folder(run: RunFolder) -> None:
    with run.hold("ldm train"):
        pass
    assert RunFolder.of(config(resume="never"), command="train").path.name == f"{run.path.name}-2"


def test_starts_in_the_same_moment_take_a_folder_each_and_a_question_takes_none(folder: Path) -> None:
    barrier = Barrier(8)

    def start(_: int) -> str:
        chosen = config(resume="never", run_id="same")
        barrier.wait()
        return RunFolder.of(chosen, command="train", reserve=True).path.name

    with ThreadPoolExecutor(8) as pool:
        found = sorted(pool.map(start, range(8)))
    assert found == ["same", *(f"same-{number}" for number in range(2, 9))]
    assert RunFolder.of(config(resume="never", run_id="same"), command="train").path.name == "same-9"
    assert not (folder / "runs" / "toy" / "same-9").exists()


def test_a_run_started_from_a_checkpoint_is_another_run(folder: Path) -> None:
    start = save(folder / "start.ckpt", 3)
    run = RunFolder.of(config(resume=start), command="train")
    assert run.path.name != run_id()
    assert run.checkpoint_to_resume() == start
    own = save(run.checkpoints / "step=000000004.ckpt", 4)
    assert run.checkpoint_to_resume() == own


def test_a_held_folder_records_config_command_and_environment(run: RunFolder) -> None:
    with run.hold("ldm train seed=1"):
        pass
    with run.hold("ldm train seed=1"):
        pass
    saved = OmegaConf.load(run.path / "config.yaml")
    assert saved.model.out == f"{run.path}/y"
    assert (run.path / "command.txt").read_text().count("  ldm train seed=1\n") == 2
    environment = read_json(run.path / "environment.json")
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))


def test_only_finishing_marks_a_run_as_finished(run: RunFolder) -> None:
    with run.hold("ldm train"):
        assert not run.finished
        run.finish({"sum": torch.tensor(1.5), "path": run.path})
    assert run.finished
    result = read_json(run.path / "result.json")
    head = {"command": "train", "name": "toy", "run_id": run.path.name, "settings": run.settings}
    assert result == {**head, "sum": 1.5, "path": str(run.path)}


HOLDER = """
import sys, time
from pathlib import Path
from ldm.cli.run_folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(run: RunFolder) -> None:
    run.path.mkdir(parents=True)
    words = [sys.executable, "-c", HOLDER, str(run.path)]
    with subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {holder.pid} is at work"), run.hold("ldm train"):
            pass
        holder.kill()
    with run.hold("ldm train"):
        assert (run.path / "config.yaml").is_file()


def test_the_newest_checkpoint_resumes_even_where_times_say_otherwise(run: RunFolder) -> None:
    newest = save(run.checkpoints / "step=000000200.ckpt", 200)
    older = save(run.checkpoints / "step=000000090.ckpt", 90)
    os.utime(newest, (time.time() - 100, time.time() - 100))
    assert older.stat().st_mtime > newest.stat().st_mtime
    assert run.checkpoint_to_resume() == newest


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99], ids="{:.0%} of the bytes".format)
def test_a_truncated_checkpoint_falls_back_to_the_one_before(kept: float, run: RunFolder) -> None:
    before = save(run.checkpoints / "step=000000100.ckpt", 100)
    newest = save(run.checkpoints / "step=000000200.ckpt", 200)
    content = newest.read_bytes()
    newest.write_bytes(content[: int(len(content) * kept)])
    assert run.checkpoint_to_resume() == before


def test_a_flipped_byte_is_seen_without_unpickling(tmp_path: Path) -> None:
    path = save(tmp_path / "step=1.ckpt", 1)
    assert is_valid(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert not is_valid(path)


def test_a_fresh_run_has_nothing_to_resume(run: RunFolder) -> None:
    assert run.checkpoint_to_resume() is None


def test_the_newest_finished_run_is_found_by_name_and_by_what_it_can_do(tmp_path: Path) -> None:
    for age, place in enumerate(["a/1", "a/2", "b/1"]):
        mark = tmp_path / place / "result.json"
        mark.parent.mkdir(parents=True)
        mark.write_text("{}")
        os.utime(mark, (1000 + age, 1000 + age))
    (tmp_path / "b" / "unfinished").mkdir()
    assert [path.relative_to(tmp_path).as_posix() for path in finished_runs(tmp_path)] == ["b/1", "a/2", "a/1"]
    assert latest_finished(tmp_path, name="a") == tmp_path / "a" / "2"
    assert latest_finished(tmp_path, accept=lambda folder: folder.name == "1") == tmp_path / "b" / "1"
    assert latest_finished(tmp_path, name="c") is None


def test_a_file_belongs_to_the_run_folder_around_it(run: RunFolder) -> None:
    with run.hold("ldm train"):
        checkpoint = save(run.checkpoints / "step=1.ckpt", 1)
    assert run_folder_of(checkpoint) == run.path
    assert run_folder_of(run.path.parent) is None


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("WANDB_API_KEY", True),
        ("HF_TOKEN", True),
        ("api_key", True),
        ("aws_access_key", True),
        ("password", True),
        ("client_secret", True),
        ("auth_token", True),
        ("caption_key", False),
        ("pad_token", False),
        ("num_tokens", False),
        ("tokenizer", False),
        ("monkey", False),
    ],
)
def test_credentials_are_known_by_their_names(name: str, secret: bool) -> None:
    assert is_secret(name) is secret


def test_credentials_reach_no_saved_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "hunter2hunter2")
    settings = config()
    OmegaConf.set_struct(settings, False)
    settings.logger.wandb = {"api_key": "swordfish", "header": "bearer ${oc.env:SOME_SERVICE_TOKEN}", "tags": ["x"]}
    run = RunFolder.of(settings, command="train")
    with run.hold(f"ldm train {redact_override('logger.wandb.api_key=swordfish')}"):
        run.finish({})
    written = "".join(path.read_text() for path in run.path.iterdir())
    assert "swordfish" not in written
    assert "hunter2" not in written
    assert redact({"api_key": None, "a": [{"password": "x"}]}) == {"api_key": None, "a": [{"password": REDACTED}]}


def test_a_finished_run_of_that_id_and_other_settings_is_refused(folder: Path) -> None:
    run = RunFolder.of(config(run_id="mine"), command="train")
    run.path.mkdir(parents=True)
    run.finish({})
    RunFolder.of(config(run_id="mine"), command="train").check_is_of_these_settings()
    other = RunFolder.of(config(run_id="mine", seed=5), command="train")
    with pytest.raises(UserError, match=r"got mine, where a run with other settings is finished .* another run_id"):
        other.check_is_of_these_settings()

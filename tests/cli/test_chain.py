"""What an experiment requires runs before it, in order, once, and only if it is not there yet."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_helpers import only, read_json
from hydra import initialize_config_dir

from ldm.cli.compose import compose_command, conf_folder


def headings(printed: str) -> list[str]:
    """The lines that say which link is at work or skipped."""
    return [line for line in printed.splitlines() if re.match(r"\[\d/\d\]", line)]


def test_links_run_first_in_order_and_hand_on_their_folders(
    ldm: Callable[..., int], capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    assert ldm("train", "experiment=toy_after") == 0
    assert headings(capsys.readouterr().out) == [
        "[1/3] shard dataset=toy_rows",
        "[2/3] train experiment=toy",
        "[3/3] train experiment=toy_after",
    ]
    run = only(folder, "runs/toy_after/*")
    config = (run / "config.yaml").read_text()
    assert f"folder: {only(folder, 'runs/toy_rows/*')}\n" in config
    assert f"reads: {only(folder, 'runs/toy/*')}/sum.json\n" in config


def test_a_second_start_does_nothing_and_says_so(
    ldm: Callable[..., int], capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    ldm("train", "experiment=toy_after")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    assert ldm("train", "experiment=toy_after") == 0
    printed = headings(capsys.readouterr().out)
    assert len(printed) == 3
    assert all("finished before, nothing to do" in line for line in printed)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_link_that_is_there_is_skipped(
    ldm: Callable[..., int], capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    ldm("shard", "dataset=toy_rows")
    capsys.readouterr()
    assert ldm("train", "experiment=toy_after") == 0
    where = only(folder, "runs/toy_rows/*").relative_to(folder)
    printed = headings(capsys.readouterr().out)
    assert printed[0] == f"[1/3] shard dataset=toy_rows: finished before, nothing to do ({where})"
    assert printed[1] == "[2/3] train experiment=toy"


def test_links_take_over_the_paths_and_nothing_else(ldm: Callable[..., int], folder: Path) -> None:
    assert ldm("train", "experiment=toy_after", "paths.runs=elsewhere", "model.learning_rate=0.5") == 0
    results = {path.parent.parent.name: read_json(path) for path in folder.glob("elsewhere/*/*/result.json")}
    assert set(results) == {"toy_rows", "toy", "toy_after"}
    assert results["toy"]["summary"]["learning_rate"] == 0.1
    assert results["toy_after"]["summary"]["learning_rate"] == 0.5


def test_a_required_train_takes_over_what_the_config_says_is_inherited(ldm: Callable[..., int], folder: Path) -> None:
    assert ldm("train", "experiment=toy_after", "inherit=['trainer.max_steps=2']") == 0
    names = [path.name for path in folder.glob("runs/toy/*/checkpoints/*.ckpt")]
    assert names == ["step=000000002.ckpt"]


def test_debug_fast_shortens_the_whole_chain_in_a_place_of_its_own(ldm: Callable[..., int], folder: Path) -> None:
    assert ldm("train", "experiment=toy_after", "debug=fast") == 0
    steps = {path.parent.parent.parent.name: path.name for path in folder.glob("runs/debug/*/*/checkpoints/*.ckpt")}
    assert steps == {"toy": "step=000000004.ckpt", "toy_after": "step=000000004.ckpt"}


def test_a_circle_is_refused(ldm: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert ldm("train", "experiment=toy_circle") == 2
    assert capsys.readouterr().err == (
        "error: requires: `train experiment=toy_circle_back` requires itself (train experiment=toy_circle_back -> "
        "train experiment=toy_circle -> train experiment=toy_circle_back); break the circle\n"
    )


def test_a_mistake_in_a_link_shows_before_anything_runs(
    ldm: Callable[..., int], capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    assert ldm("train", "experiment=toy_wrong_link") == 2
    assert capsys.readouterr().err.startswith(
        "error: requires: `train experiment=toy trainer.max_stepz=3`: trainer.max_stepz: there is no such setting; "
        "did you mean trainer.max_steps?"
    )
    assert list(folder.iterdir()) == []


def test_only_commands_with_a_run_folder_can_be_required(
    ldm: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ldm("train", "experiment=toy", "requires=['sample prompt=x']") == 2
    assert "expected one of train, shard, data encode" in capsys.readouterr().err


def test_a_result_from_outside_the_chain_is_the_newest_finished_run(ldm: Callable[..., int], folder: Path) -> None:
    ldm("shard", "dataset=toy_rows")
    ldm("shard", "dataset=toy_rows", "dataset.count=5")
    newest = max(folder.glob("runs/toy_rows/*/result.json"), key=lambda path: path.stat().st_mtime).parent
    assert read_json(newest / "result.json")["summary"] == {"rows": 5}
    assert ldm("train", "experiment=toy", "data.folder='${result:toy_rows}'") == 0
    assert f"folder: {newest}\n" in (only(folder, "runs/toy/*") / "config.yaml").read_text()


def test_an_experiment_in_a_folder_of_ones_own_is_named_with_an_underscore(folder: Path) -> None:
    (folder / "experiment/team").mkdir(parents=True)
    (folder / "experiment/team/first.yaml").write_text("# @package _global_\nseed: 4\n")
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = compose_command("train", [f"hydra.searchpath=[file://{folder}]", "experiment=team/first"])
    assert (config.name, config.seed) == ("team_first", 4)


def test_a_missing_result_names_the_command_that_makes_it(
    ldm: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, command in {
        "folder": "ldm shard dataset=folder",
        "finetune_lora": "ldm train experiment=finetune/lora",
        "quickstart": "ldm train experiment=quickstart",
    }.items():
        assert ldm("train", "experiment=toy", f"data.folder='${{result:{name}}}'") == 2
        assert f"run `{command}` first" in capsys.readouterr().err


def test_another_input_makes_another_run(ldm: Callable[..., int], folder: Path) -> None:
    for count in (3, 4):
        ldm("shard", "dataset=toy_rows", f"dataset.count={count}")
        ldm("train", "experiment=toy", "data.folder='${result:toy_rows}'")
    assert len(list(folder.glob("runs/toy/*"))) == 2


@pytest.mark.parametrize(
    ("override", "least"),
    [
        ("trainer.accumulate_grad_batches=0", 1),
        ("data.batch_size=7.5", 1),
        ("trainer.max_steps=-5", -1),
    ],
)
def test_a_count_that_no_training_has_shows_before_anything_runs(
    ldm: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str], override: str, least: int
) -> None:
    key, _, got = override.partition("=")
    for words in (["train", override], ["plan", override]):
        assert ldm(*words) == 2
        assert capsys.readouterr().err == f"error: {key}: got {got}, expected a whole number from {least} on\n"
    assert list(folder.iterdir()) == []

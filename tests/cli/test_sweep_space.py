"""The search space of a sweep: what yaml may say, what is drawn, and how it reaches a command line."""

from pathlib import Path
from typing import Any

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from ldm.cli.errors import UserError
from ldm.cli.sweep_space import Choice, Range, Value, check_free, override, read_space
from ldm.cli.sweep_study import Study, open_study

SPACE = {"optimizer.lr": {"low": 1e-5, "high": 1e-3, "log": True}, "sampler": ["ddim", "dpmpp_2m"]}


def test_a_space_holds_ranges_and_choices_by_override_key() -> None:
    assert read_space(SPACE) == [Range("optimizer.lr", 1e-5, 1e-3, log=True), Choice("sampler", ("ddim", "dpmpp_2m"))]


def test_keys_within_keys_are_the_same_as_dotted_keys() -> None:
    nested = {"optimizer": {"lr": {"low": 1e-5, "high": 1e-3, "log": True}}, "sampler": ["ddim", "dpmpp_2m"]}
    assert read_space(nested) == read_space(SPACE)


@pytest.mark.parametrize(
    ("space", "line"),
    [
        ({}, "got nothing to search; choose space=NAME"),
        ({"lr": 3}, "lr: got 3, expected [a, list, of, choices]"),
        ({"lr": {"low": 1, "hihg": 2}}, "lr: a range has no 'hihg'; did you mean high?"),
        ({"lr": {"low": 1}}, "lr: high is missing"),
        ({"lr": {"low": 2, "high": 1}}, "lr: got low=2 and high=1, expected low < high"),
        ({"lr": {"low": "a", "high": 1}}, "lr: low: got 'a', expected a number"),
        ({"lr": {"low": 0.0, "high": 1.0, "log": True}}, "got low=0.0 with log: true, expected low > 0"),
        ({"lr": {"low": 1, "high": 9, "log": True, "step": 2}}, "got both log and step"),
        ({"lr": {"low": 1, "high": 9, "step": 0}}, "step: got 0, expected more than 0"),
        ({"lr": [1]}, "got 1 choices, expected at least 2"),
        ({"lr": [1, 1]}, "got a choice twice"),
        ({"a.b": [1, 2], "a": {"b": [3, 4]}}, "a.b: got it twice"),
    ],
)
def test_a_wrong_space_is_said_in_one_line(space: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        read_space(space)
    assert line in str(caught.value)


def test_a_key_cannot_be_fixed_and_searched() -> None:
    with pytest.raises(UserError, match=r"optimizer\.lr: got it on the command line too"):
        check_free(read_space(SPACE), ["experiment=toy", "optimizer.lr=1"])


@pytest.mark.parametrize(
    "value", [1e-05, 3, True, None, "ddim", "true", "1e3", "it's, [odd]", r"a\b", "", "runs/x.ckpt"]
)
def test_what_is_drawn_reaches_hydra_as_it_is(value: Value) -> None:
    parsed = OverridesParser.create().parse_override(override("key", value)).value()
    parsed = getattr(parsed, "text", parsed)
    assert (parsed, type(parsed)) == (value, type(value))


def test_a_choice_may_be_a_list() -> None:
    (betas,) = read_space({"optimizer.betas": [[0.9, 0.99], [0.5, 0.9]]})
    parsed = OverridesParser.create().parse_override(override(betas.key, betas.examples[1])).value()
    assert parsed == [0.5, 0.9]


def make_study(folder: Path, *, seed: int) -> Study:
    folder.mkdir(exist_ok=True)
    return open_study(
        folder,
        read_space({**SPACE, "depth": {"low": 1, "high": 8}, "scale": {"low": 1.0, "high": 2.0, "step": 0.25}}),
        direction="minimize",
        pruner=optuna.pruners.NopPruner(),
        search=lambda number: optuna.samplers.TPESampler(seed=number, n_startup_trials=3),
        seed=seed,
    )


def draw(study: Study, count: int) -> list[dict[str, Value]]:
    drawn = []
    for _ in range(count):
        trial = study.ask()
        drawn.append(study.values(trial))
        study.tell(trial, "finished", value=float(drawn[-1]["optimizer.lr"]))
    return drawn


def test_draws_stay_within_the_space(tmp_path: Path) -> None:
    for values in draw(make_study(tmp_path, seed=0), 8):
        assert 1e-5 <= values["optimizer.lr"] <= 1e-3
        assert values["sampler"] in ("ddim", "dpmpp_2m")
        assert isinstance(values["depth"], int)
        assert values["scale"] in (1.0, 1.25, 1.5, 1.75, 2.0)


def test_the_seed_decides_every_draw_however_often_the_sweep_is_stopped(tmp_path: Path) -> None:
    whole = draw(make_study(tmp_path / "whole", seed=1), 6)
    stopped = [draw(make_study(tmp_path / "stopped", seed=1), 1)[0] for _ in range(6)]
    assert stopped == whole
    assert draw(make_study(tmp_path / "other", seed=2), 6) != whole


def test_a_trial_under_way_keeps_what_was_drawn_for_it(tmp_path: Path) -> None:
    first = make_study(tmp_path, seed=0)
    trial = first.ask()
    drawn = first.values(trial)
    again = make_study(tmp_path, seed=0)
    (unfinished,) = again.unfinished()
    assert (unfinished.number, again.values(unfinished)) == (trial.number, drawn)


def test_a_journal_cut_off_in_mid_line_is_taken_up(tmp_path: Path) -> None:
    draw(make_study(tmp_path, seed=0), 2)
    journal = tmp_path / "journal.log"
    journal.write_bytes(journal.read_bytes() + b'{"op_code":4,"tri')
    (tmp_path / "journal.log.lock").write_text("")
    again = make_study(tmp_path, seed=0)
    draw(again, 1)
    assert len(make_study(tmp_path, seed=0).finished) == 3


def test_yaml_numbers_are_numbers() -> None:
    (parameter,) = read_space(OmegaConf.to_container(OmegaConf.create("lr: {low: 1e-5, high: 1e-3}")))
    assert parameter == Range("lr", 1e-5, 1e-3)

"""The door: help, unknown commands, exit codes, and what it must not import."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_helpers import CONFIG_DIR, ROOT, environment
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from ldm.cli.job import grouped, quote
from ldm.cli.main import COMMANDS, main

# Prints at the very end, however the command leaves, whether torch was imported.
PROBE = """
import atexit, sys
from ldm.cli.main import main
atexit.register(lambda: print("torch" in sys.modules))
sys.exit(main(sys.argv[1:]))
"""


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name}" in printed and phrase in printed for name, phrase in COMMANDS.items())


def test_an_unknown_command_names_the_nearest_and_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err.startswith("error: trian: there is no such command; did you mean train?")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_commands_help_says_what_it_does_and_lists_its_groups(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    assert printed.startswith(f"ldm {command}: {COMMANDS[command]}\n")
    assert "Groups (group=option)" in printed


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        *[([*command.split(), "--help"], 0) for command in COMMANDS],
        *[([*command.split(), "--cfg", "job"], 0) for command in COMMANDS],
        (["train", "optimiser.lr=1"], 2),
        (["train", "sampler=huen"], 2),
        (["train", *CONFIG_DIR, "experiment=toy", "+trainer.max_stepz=1"], 2),
        (["train", *CONFIG_DIR, "experiment=toy", "trainer.max_steps=many"], 2),
        (["sample"], 2),
        (["sample", "prompt=x", "checkpoint=nowhere"], 2),
        (["evaluate"], 2),
    ],
    ids=lambda value: " ".join(value[:1] + value[-1:]) if isinstance(value, list) else str(value),
)
def test_help_and_config_errors_do_without_torch(words: list[str], code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROBE, *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "typed", "meant"),
    [
        ("evaluate", "metrics=[fid,is]", "metric=[fid,inception_score]"),
        ("train", "callback=[checkpoint,is]", "callback=[checkpoint,inception_score]"),
        ("train", "callback=[this]", "callback=[this]"),
        ("train", "+callback=is", "+callback=inception_score"),
        ("sample", "prompt=is", "prompt=is"),
    ],
)
def test_is_among_metrics_means_the_inception_score(command: str, typed: str, meant: str) -> None:
    assert grouped(command, typed) == meant


@pytest.mark.parametrize(("door", "command"), [("train.py", "train"), ("sample.py", "sample")])
def test_the_root_doors_are_the_commands(door: str, command: str, tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / door), "--help"]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.startswith(f"ldm {command}:")


def printed_commands(file: Path) -> Iterator[list[str]]:
    """The words of each command in the examples of a text, as a shell reads them."""
    for line in re.sub(r"\\\n[# ]*", "", file.read_text()).splitlines():
        if found := re.match(r"(?:#? {3,4})?(?:ldm|python (?:train|sample)\.py) ([a-z~+'].*)", line):
            example = re.split(r"(?<=\S)\s{2,}(?=\S)| && ", found[1])[0]
            yield shlex.split(example, comments=True)


def test_every_command_of_the_texts_can_be_read_by_shell_and_hydra() -> None:
    for file in (ROOT / "README.md", *sorted((ROOT / "conf").rglob("*.yaml"))):
        for words in printed_commands(file):
            overrides = [quote(word) for word in words if "=" in word and "..." not in word]
            assert len(OverridesParser.create().parse_overrides(overrides)) == len(overrides)


def test_a_warning_is_one_line_without_code(tmp_path: Path) -> None:
    lines = [
        "import warnings",
        "from ldm.cli.main import main",
        'main(["train", "--cfg", "job"])',
        'warnings.warn("so and so")',
    ]
    probe = "\n".join(lines)
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.stderr == "warning: so and so\n"


def test_importing_the_package_imports_no_torch() -> None:
    words = [sys.executable, "-c", "import sys, ldm; sys.exit('torch' in sys.modules)"]
    assert subprocess.run(words, env=environment(), timeout=60).returncode == 0


@given(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1).filter(
        lambda text: text[0] not in "'\""
    )
)
def test_any_prompt_reaches_the_config_as_it_was_typed(text: str) -> None:
    if text == "null":
        return
    parsed = OverridesParser.create().parse_override(quote(f"prompt={text}"))
    assert parsed.value() == text


@pytest.mark.parametrize("argument", ["prompt=null", "prompt='quoted already'", "seed=3", "-m", "prompt="])
def test_what_needs_no_quotes_gets_none(argument: str) -> None:
    assert quote(argument) == argument

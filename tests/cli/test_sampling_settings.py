"""What `ldm sample` makes of single settings, without a model."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

import ldm
from ldm.cli.errors import UserError
from ldm.cli.sample import prompts_left_out, read_prompts
from ldm.cli.sampling import read_loras
from ldm.conditioners import ClassLabel, Unconditional


@pytest.mark.parametrize(
    ("value", "loras"),
    [
        (None, []),
        ("a", [("a", 1.0)]),
        (["a", 0.5], [("a", 0.5)]),
        (["a", "b"], [("a", 1.0), ("b", 1.0)]),
        ([["a", 2], "b"], [("a", 2.0), ("b", 1.0)]),
        ([["a", 0.5], ["b", 1]], [("a", 0.5), ("b", 1.0)]),
    ],
)
def test_loras_are_paths_with_or_without_scales(value: object, loras: list[tuple[str, float]]) -> None:
    assert read_loras(OmegaConf.create({"lora": value}).lora) == loras


def test_a_device_that_is_not_there_is_refused_from_python() -> None:
    with pytest.raises(ValueError, match=r"^device: got abacus, which torch cannot use here; expected cpu, cuda"):
        ldm.load("nowhere", device="abacus")


def test_only_a_model_without_conditions_does_without_a_prompt() -> None:
    assert prompts_left_out(SimpleNamespace(conditioner=Unconditional())) == [""]
    with pytest.raises(UserError, match=r"^prompt: got none"):
        prompts_left_out(SimpleNamespace(conditioner=ClassLabel(10, width=8)))


def test_what_unicode_calls_a_line_break_is_part_of_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat,\u2028asleep\r\n\r\na\x0cdog\r\n", encoding="utf-8", newline="")
    config = OmegaConf.create({"prompt": None, "prompt_file": str(tmp_path / "prompts.txt")})
    assert read_prompts(config) == ["a cat,\u2028asleep", "a\x0cdog"]

"""`ldm papers`: cards are listed, shown beside what is built and measured, and checked."""

import sys
from pathlib import Path

import pytest
from cli_helpers import ROOT

from ldm.cli.main import main

sys.path.insert(0, str(ROOT / "tests/generation/report"))
from evaluation_folders import write_evaluation

OWN = """# @package _global_
defaults:
  - /experiment/paper/ldm4_celebahq
  - _self_
name: mine
card:
  parameters: {network: 274.2, total: null}
  differences: {parameters.network: {built: 274.05, because: no reason}}
  published: {inception_score: null}
"""


def test_cards_are_listed_and_one_is_shown_beside_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["papers"]) == 0
    said = capsys.readouterr().out
    assert "sd2_x4" in said and "LDM-4-G, ImageNet 256" in said
    # The table has the sum alone: the first stage's 69.5 M must not be read as the network's.
    (line,) = [line for line in said.splitlines() if line.startswith("celebahq_ldm16 ")]
    assert "260 in all" in line and "69.5" not in line
    place = folder / "runs/paper_ldm8_churches/1"
    write_evaluation(place / "evaluations/a", fid=6.5)
    assert main(["papers", "ldm8_churches"]) == 0
    said = capsys.readouterr().out
    assert "294.97" in said and "the table cuts the digits of 294.97 off" in said
    assert "encode" in said and "after: ldm train experiment=paper/kl_f8" in said
    assert "contradiction: 400 DDIM steps in the README, 200 in table 1, 100 in table 18." in said
    assert "fid" in said and "6.5" in said and "num_samples: published 50000, measured 12" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3_medium", "sdxl_256", "sd2_1_unclip_l", "adm_64_classifier"])
def test_what_reads_values_is_counted_without_any(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["papers", name]) == 0
    assert "10^9 multiply-adds" in capsys.readouterr().out


def test_a_wrong_card_of_ones_own_is_a_fault(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "conf/experiment").mkdir(parents=True)
    (folder / "conf/experiment/mine.yaml").write_text(OWN)
    assert main(["papers", "--config-dir", "conf", "mine", "--check"]) == 1
    said = capsys.readouterr()
    assert "mine: card.differences.parameters.network: says 274.05 is built, which is 274.056" in said.out
    assert "1 cards in" in said.out and "1 faults in paper cards" in said.err
    assert main(["papers", "ldm4_celeba"]) == 2
    assert "did you mean ldm4_celebahq?" in capsys.readouterr().err


@pytest.mark.slow
def test_every_card_keeps_its_word(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["papers", "--check"]) == 0, capsys.readouterr().out
    assert ": 0 faults," in capsys.readouterr().out

"""What `ldm papers --check` finds in a card, and what every card says."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hydra import initialize_config_dir

from ldm.cli.cards import card_node
from ldm.cli.compose import conf_folder
from ldm.cli.papers_build import Library, Paper, agrees, decimals
from ldm.cli.papers_check import faults


@pytest.fixture(scope="module")
def papers() -> Iterator[Library]:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        yield Library()


@pytest.fixture
def paper(papers: Library) -> Callable[..., Paper]:
    """LDM-4 on churches, whose card explains a difference, with changes."""

    def changed(**changes: Any) -> Paper:
        found = papers.paper("ldm8_churches")
        return replace(found, card=replace(found.card, **changes))

    return changed


def test_a_card_keeps_its_word(paper: Callable[..., Paper]) -> None:
    assert faults(paper()) == []


def test_a_count_that_is_not_as_printed_is_a_fault(paper: Callable[..., Paper]) -> None:
    parameters = {"network": 294.98, "first_stage": 83.7, "total": 294}
    [line] = faults(paper(parameters=parameters))
    assert line.startswith("parameters.network: published 294.98, built 294.97")


def test_a_difference_has_to_be_explained_and_to_be_there(paper: Callable[..., Paper]) -> None:
    [line] = faults(paper(differences={}))
    assert line.startswith("parameters.total: published 294, built 295")
    gone = {"parameters.total": {"built": 295, "because": ""}, "parameters.network": {"built": 1, "because": ""}}
    assert faults(paper(differences=gone)) == [
        "card.differences.parameters.network: nothing differs, 294.97 is built; take it out"
    ]
    [line] = faults(paper(differences={"parameters.total": {"built": 296, "because": ""}}))
    assert line.startswith("card.differences.parameters.total: says 296 is built, which is 294.9")
    assert faults(paper(differences={"parameters.encoder": {"built": 1, "because": ""}}))[0].endswith(
        "is of nothing published"
    )


def test_training_is_compared_with_what_the_experiment_sets(paper: Callable[..., Paper]) -> None:
    training = {"batch_size": 96, "lr": 6e-5, "base_lr": 5e-7, "lr_rule": "", "steps": 500001}
    assert faults(paper(training=training)) == [
        "training.lr: published 6e-05, built 5e-05; add card.differences.training.lr or mend it".replace(
            "built 5e-05;", "built 5e-05 (5e-05);"
        ),
        "training.steps: published 500001, built 500000 (500000); add card.differences.training.steps or mend it",
        "training: base_lr times batch_size is 4.8e-05, and lr 6e-05",
    ]


def test_digits_are_those_that_are_printed() -> None:
    assert [decimals(value) for value in (274, 55.3, "1.10", "1454", 294.97)] == [0, 1, 2, 0, 2]
    assert agrees(274.06, 274) and agrees(274.06, 274.06) and not agrees(274.06, 274.05)


def test_a_card_takes_from_its_base_what_it_does_not_say() -> None:
    node = card_node(conf_folder() / "experiment/paper/ldm4_ffhq.yaml")
    assert node["hardware"] == "one A100" and node["published"]["fid"] == 4.98
    assert node["training"]["base_lr"] == 2e-6 and node["training"]["batch_size"] == 42


def test_every_card_of_this_package_says_where_it_is_from(papers: Library) -> None:
    for name in papers.names:
        card = papers.paper(name).card
        assert card.url.startswith("https://") and card.hardware and card.training["lr_rule"], name
        assert json.dumps(card.protocol)

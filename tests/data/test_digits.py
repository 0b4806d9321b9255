import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ldm.data import index_shard, write_digits
from ldm.data.digits import (
    COLOURS,
    NUMBER_WORDS,
    PALETTE,
    PHRASINGS,
    caption,
    evaluation_prompts,
    is_held_out,
    load_scans,
    render,
    split_scans,
    training_samples,
    validation_samples,
)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, renderings_per_scan=1, validation_renderings_per_scan=2, samples_per_shard=800)
    return folder


def rows(folder: Path) -> list[dict]:
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [json.loads(tar.extractfile(entry).read()) for entry in tar if entry.name.endswith(".json")]
    return found


def test_the_caption_of_the_issue_is_among_the_phrasings() -> None:
    captions = [caption(7, COLOURS.index("red"), COLOURS.index("blue"), phrasing=i) for i in range(len(PHRASINGS))]
    assert "a red handwritten seven on a blue background" in captions
    assert len(set(captions)) == len(PHRASINGS) > 3


@pytest.mark.parametrize("phrasing", range(len(PHRASINGS)))
def test_every_phrasing_says_ink_and_paper_the_right_way_round(phrasing: int) -> None:
    words = caption(3, COLOURS.index("green"), COLOURS.index("white"), phrasing=phrasing)
    names = [word.strip(",") for word in words.split() if word.strip(",") in {*COLOURS, *NUMBER_WORDS}]
    assert sorted(names) == ["green", "three", "white"]
    paper_comes_first = words.startswith(("a white background", "on white paper"))
    assert (names.index("white") < names.index("green")) == paper_comes_first


def test_the_colours_stand_in_the_order_that_the_held_out_rule_counts() -> None:
    assert COLOURS == ("black", "white", "red", "green", "blue", "yellow")
    assert is_held_out(0, 0, 2)  # 0 + 0 + 10
    assert is_held_out(7, 1, 4)  # 7 + 3 + 20
    assert not is_held_out(7, COLOURS.index("red"), COLOURS.index("blue"))  # 7 + 6 + 20


def test_scans_are_split_by_four_to_one_within_every_digit() -> None:
    _, targets = load_scans()
    train, validation = split_scans()
    assert sorted([*train, *validation]) == list(range(1797))
    for digit in range(10):
        count = int((targets == digit).sum())
        assert abs(int((targets[validation] == digit).sum()) - 0.2 * count) <= 0.5


def test_no_held_out_combination_is_in_a_training_shard(digits: Path) -> None:
    found = rows(digits / "train")
    assert len(found) == len(split_scans()[0])
    assert not any((row["digit"] + 3 * row["ink"] + 5 * row["paper"]) % 10 == 0 for row in found)
    assert not any(row["ink"] == row["paper"] for row in found)
    assert not any(row["held_out"] for row in found)


def test_training_shows_every_combination_that_it_may() -> None:
    shown = {(r.columns["digit"], r.columns["ink"], r.columns["paper"]) for r in training_samples(0, 2)}
    every = {(d, i, p) for d in range(10) for i in range(6) for p in range(6) if i != p}
    assert shown == {combination for combination in every if not is_held_out(*combination)}


def test_validation_shards_flag_what_training_never_shows(digits: Path) -> None:
    found = rows(digits / "validation")
    for row in found:
        assert row["held_out"] == ((row["digit"] + 3 * row["ink"] + 5 * row["paper"]) % 10 == 0)
    assert 0 < sum(row["held_out"] for row in found) < len(found)


def test_no_scan_is_in_both_training_and_validation_shards(digits: Path) -> None:
    train, validation = ({row["scan"] for row in rows(digits / split)} for split in ("train", "validation"))
    assert not train & validation
    assert len(train | validation) == 1797


def test_shards_describe_the_scan_and_its_rendering(digits: Path) -> None:
    index = index_shard(digits / "train" / "00000.tar")
    row = rows(digits / "train")[0]
    assert index.keys[0] == row["key"] == "000000000"
    assert (row["width"], row["height"], row["original_width"], row["original_height"]) == (32, 32, 8, 8)
    assert load_scans()[1][row["scan"]] == row["digit"]
    assert NUMBER_WORDS[row["digit"]] in row["caption"]


def test_the_same_seed_writes_the_same_shards(tmp_path: Path, digits: Path) -> None:
    write_digits(tmp_path, renderings_per_scan=1, validation_renderings_per_scan=2, samples_per_shard=800)
    for path in digits.rglob("*.tar"):
        assert (tmp_path / path.relative_to(digits)).read_bytes() == path.read_bytes()


def test_the_renderings_of_a_scan_differ_in_colours() -> None:
    pairs = Counter((r.columns["scan"], r.columns["ink"], r.columns["paper"]) for r in validation_samples(0, 4))
    assert set(pairs.values()) == {1}


def test_ink_and_paper_have_exactly_the_palettes_colours() -> None:
    for amount, colour in ((1.0, "red"), (0.0, "yellow")):
        image = render(np.full((8, 8), amount), ink=COLOURS.index("red"), paper=COLOURS.index("yellow"), size=16)
        assert image.shape == (16, 16, 3)
        assert np.unique(image.reshape(-1, 3), axis=0).tolist() == [list(PALETTE[colour])]


def test_ink_lies_where_the_scan_is_dark() -> None:
    scan = np.zeros((8, 8))
    scan[:, 4:] = 1.0
    image = render(scan, ink=COLOURS.index("black"), paper=COLOURS.index("white"))
    assert (image[:, 20:] <= 2).all()
    assert (image[:, :12] >= 253).all()


@pytest.mark.parametrize("num_samples", [1, 20, 37, 500])
def test_half_of_the_evaluation_prompts_were_never_seen(num_samples: int) -> None:
    prompts = evaluation_prompts(num_samples, seed=0)
    held_out = [prompt for prompt in prompts if prompt["held_out"]]
    assert (len(prompts), len(held_out)) == (num_samples, num_samples // 2)
    for prompt in prompts:
        assert prompt["held_out"] == is_held_out(prompt["digit"], prompt["ink"], prompt["paper"])
        assert prompt["ink"] != prompt["paper"]


def test_evaluation_prompts_are_even_over_digits_and_combinations() -> None:
    prompts = evaluation_prompts(1000, seed=0)
    for held_out in (False, True):
        half = [prompt for prompt in prompts if prompt["held_out"] == held_out]
        assert set(Counter(prompt["digit"] for prompt in half).values()) == {50}
        for digit in range(10):
            pairs = Counter((prompt["ink"], prompt["paper"]) for prompt in half if prompt["digit"] == digit)
            assert max(pairs.values()) - min(pairs.values()) <= 1


def test_evaluation_prompts_follow_their_seed() -> None:
    assert evaluation_prompts(50, seed=0) == evaluation_prompts(50, seed=0)
    assert evaluation_prompts(50, seed=0) != evaluation_prompts(50, seed=1)


def test_impossible_renderings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got \(0, 4\) for train and validation, expected at least 1 each"):
        write_digits(tmp_path / "set", renderings_per_scan=0)
    with pytest.raises(ValueError, match="seed: got -1"):
        write_digits(tmp_path / "set", seed=-1)
    assert not (tmp_path / "set").exists()

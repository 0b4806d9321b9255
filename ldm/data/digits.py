"""The embedded data set: 1,797 real handwritten digits (UCI, as shipped in scikit-learn), rendered in two colours."""

import os
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from ldm.data.position import permutation
from ldm.data.writer import Record, write_shards

Choice = TypeVar("Choice")
# The values that CSS gives to these names.
PALETTE: dict[str, tuple[int, int, int]] = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "red": (255, 0, 0),
    "green": (0, 128, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
}
COLOURS = tuple(PALETTE)
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHRASINGS = (
    "a {ink} handwritten {digit} on a {paper} background",
    "the digit {digit} in {ink} on a {paper} background",
    "a handwritten {digit}, {ink} ink on {paper} paper",
    "{ink} {digit} on {paper}",
    "a {paper} background with a {ink} {digit} on it",
    "on {paper} paper, the number {digit} written in {ink}",
)
# The split of the scans is a property of the data set, so it does not follow a run's seed.
SPLIT_SEED = 1797
VALIDATION_SHARE = 0.2


@cache
def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """Return the scans, float32 (1797, 8, 8) in [0, 1] with ink at 1, and their digits, int64 (1797,)."""
    from sklearn.datasets import load_digits  # a second of imports that only writing the data set needs

    bunch = load_digits()
    return (bunch.images / 16.0).astype(np.float32), bunch.target.astype(np.int64)


def split_scans() -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the training and of the validation scans, 80 to 20 within every digit, always the same."""
    _, digits = load_scans()
    train, validation = [], []
    for digit in range(10):
        scans = np.flatnonzero(digits == digit)
        scans = scans[permutation(len(scans), seed=SPLIT_SEED, purpose="split", epoch=digit)]
        count = round(VALIDATION_SHARE * len(scans))
        validation.append(scans[:count])
        train.append(scans[count:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(validation))


def render(scan: np.ndarray, *, ink: int, paper: int, size: int = 32) -> np.ndarray:
    """Draw a scan (8, 8) in [0, 1] in two colours, given by their place in COLOURS; return uint8 (size, size, 3)."""
    grey = Image.fromarray(np.asarray(scan, dtype=np.float32))
    amount = np.clip(np.asarray(grey.resize((size, size), Image.Resampling.BICUBIC)), 0.0, 1.0)[..., None]
    front, back = (np.array(PALETTE[COLOURS[colour]], dtype=np.float32) for colour in (ink, paper))
    return np.asarray(np.rint(back + amount * (front - back)), dtype=np.uint8)


def is_held_out(digit: int, ink: int, paper: int) -> bool:
    """Say whether a combination never enters training: (digit + 3 ink + 5 paper) divisible by 10."""
    return (digit + 3 * ink + 5 * paper) % 10 == 0


def caption(digit: int, ink: int, paper: int, *, phrasing: int) -> str:
    """Say a combination in words; `phrasing` is a place in PHRASINGS."""
    return PHRASINGS[phrasing].format(digit=NUMBER_WORDS[digit], ink=COLOURS[ink], paper=COLOURS[paper])


def combinations(digit: int, *, held_out: bool) -> list[tuple[int, int]]:
    """Return the pairs (ink, paper), never equal, that are held out for a digit, or those that are not."""
    pairs = product(range(len(COLOURS)), range(len(COLOURS)))
    return [(ink, paper) for ink, paper in pairs if ink != paper and is_held_out(digit, ink, paper) == held_out]


def training_samples(seed: int, renderings_per_scan: int) -> Iterator[Record]:
    """Yield the training scans in colours that training may show, each scan in different ones."""
    scans, _ = split_scans()
    allowed = [combinations(digit, held_out=False) for digit in range(10)]
    return _samples(scans, allowed, seed=seed, renderings_per_scan=renderings_per_scan)


def validation_samples(seed: int, renderings_per_scan: int) -> Iterator[Record]:
    """Yield the validation scans in any colours; the column `held_out` flags what training never shows."""
    _, scans = split_scans()
    allowed = [combinations(digit, held_out=False) + combinations(digit, held_out=True) for digit in range(10)]
    return _samples(scans, allowed, seed=seed, renderings_per_scan=renderings_per_scan)


def evaluation_prompts(num_samples: int, seed: int) -> list[dict[str, Any]]:
    """Return prompts with their digit, ink, paper and held_out, half of them (rounded up) seen combinations.

    Each half goes round the digits, and within a digit round its combinations, so both are as even as they can be.
    """
    num_seen = (num_samples + 1) // 2
    seen = _prompts(num_seen, seed=seed, held_out=False)
    return seen + _prompts(num_samples - num_seen, seed=seed, held_out=True)


def write_digits(
    folder: str | os.PathLike[str],
    *,
    renderings_per_scan: int = 8,
    validation_renderings_per_scan: int = 4,
    samples_per_shard: int = 2000,
    image_format: str = "png",
    seed: int = 0,
) -> dict[str, Any]:
    """Write folder/train and folder/validation as LAION-style shards; return the number of samples in each.

    Raises ValueError for less than one rendering per scan and for what `write_shards` refuses.
    """
    if seed < 0:
        raise ValueError(f"seed: got {seed}, expected 0 or more")
    if min(renderings_per_scan, validation_renderings_per_scan) < 1:
        got = (renderings_per_scan, validation_renderings_per_scan)
        raise ValueError(f"renderings per scan: got {got} for train and validation, expected at least 1 each")
    splits = {
        "train": training_samples(seed, renderings_per_scan),
        "validation": validation_samples(seed, validation_renderings_per_scan),
    }
    summary = {}
    for split, records in splits.items():
        manifest = write_shards(
            Path(folder) / split, records, samples_per_shard=samples_per_shard, image_format=image_format
        )
        summary[split] = manifest["num_samples"]
    return summary


def _samples(
    scans: np.ndarray, allowed: list[list[tuple[int, int]]], *, seed: int, renderings_per_scan: int
) -> Iterator[Record]:
    """Yield every scan once, then every scan again in its next colours and words, and so on."""
    images, digits = load_scans()
    for rendering, scan in product(range(renderings_per_scan), scans.tolist()):
        digit = int(digits[scan])
        ink, paper = _turn(allowed[digit], rendering, seed=seed, purpose="colours", item=scan)
        phrasing = _turn(range(len(PHRASINGS)), rendering, seed=seed, purpose="words", item=scan)
        columns = {"digit": digit, "ink": ink, "paper": paper, "scan": scan, "held_out": is_held_out(digit, ink, paper)}
        yield Record(
            image=render(images[scan], ink=ink, paper=paper),
            caption=caption(digit, ink, paper, phrasing=phrasing),
            columns=columns,
            original_size=(images.shape[2], images.shape[1]),
        )


def _prompts(num_samples: int, *, seed: int, held_out: bool) -> list[dict[str, Any]]:
    prompts = []
    for number in range(num_samples):
        turn, digit = divmod(number, 10)
        ink, paper = _turn(combinations(digit, held_out=held_out), turn, seed=seed, purpose="colours", item=digit)
        phrasing = _turn(range(len(PHRASINGS)), turn, seed=seed, purpose="words", item=digit)
        words = caption(digit, ink, paper, phrasing=phrasing)
        prompts.append({"prompt": words, "digit": digit, "ink": ink, "paper": paper, "held_out": held_out})
    return prompts


def _turn(choices: Sequence[Choice], turn: int, *, seed: int, purpose: str, item: int) -> Choice:
    """Return the choice of an item at its turn: all choices in a seeded order of the item's own, then again."""
    order = permutation(len(choices), seed=seed, purpose=purpose, epoch=item)
    return choices[int(order[turn % len(choices)])]

"""What `ldm doctor` concludes from a tiny model that was trained by one process and by two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldm.cli.doctor_machine import Check
from ldm.training.trial import NUM_SAMPLES

# Of weights near 1, and of the scale, that sums in another order may make; float32 has 1e-7.
TOLERANCE = 1e-4


def judge(found: Mapping[str, Any]) -> list[Check]:
    """The checks of what `ldm.training.trial.run` returns."""
    alone, straight = found["alone"], [rank["straight"] for rank in found["ranks"]]
    parts = [rank["parts"] for rank in found["ranks"]]
    between = max(difference(straight[0]["weights"], other["weights"]) for other in straight[1:])
    against_one = difference(straight[0]["weights"], alone["weights"])
    changed = max(difference(straight[0]["weights"], part["weights"]) for part in parts)
    averages = [run["average"] for run in (alone, found["accumulated"], *straight)]
    scales = [tuple(run["scale"]) for run in straight]
    off = max(abs(a - b) for scale in scales for a, b in zip(scale, alone["scale"], strict=True))
    return [
        _check(
            "parameters on all ranks", between == 0, "bit-equal, buffers and moving average too", f"{between:.1e} apart"
        ),
        _gradients([run["gradients"] for run in straight], alone["gradients"]),
        _places([place for run in straight for place in run["places"]], alone["places"]),
        _check(
            "moving average",
            max(averages) <= TOLERANCE,
            "follows optimizer steps, also with accumulated batches and on two ranks",
            f"{max(averages):.1e} off its formula by optimizer steps",
        ),
        _check(
            "latent scale",
            len(set(scales)) == 1 and off <= TOLERANCE,
            f"{scales[0][1]:.6g} on all ranks; {off:.1e} from one process's",
            f"{scales} on the ranks, {alone['scale']} on one process",
        ),
        _within("one process and two", against_one, "with the same global batch"),
        _within(
            "accumulated batches", difference(alone["weights"], found["accumulated"]["weights"]), "2 x 3 against 6"
        ),
        _within("2 -> 1 -> 2 processes", changed, "resumed twice with the same global batch, against never stopped"),
    ]


def difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """The largest absolute difference of two state dicts of the same names."""
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)


def _gradients(together: list[Mapping[str, Tensor]], alone: Mapping[str, Tensor]) -> Check:
    """Whether all ranks step by the same gradients, the mean of their own."""
    between = max(difference(together[0], other) for other in together[1:])
    largest = max(value.abs().max().item() for value in alone.values())
    off = difference(together[0], alone) / largest
    return _check(
        "gradients",
        between == 0 and off <= TOLERANCE,
        f"bit-equal on all ranks; {off:.1e} of the largest from one process's, with the same global batch",
        f"{between:.1e} apart between the ranks, {off:.1e} of the largest from one process's: not synchronised",
    )


def _places(together: list[tuple[int, int]], alone: list[tuple[int, int]]) -> Check:
    """Whether an epoch has each sample once, whoever reads it."""
    again = len(together) - len(set(together))
    epochs = len(together) // NUM_SAMPLES
    fine = not again and sorted(together) == sorted(alone)
    text = (
        f"each of {NUM_SAMPLES} once an epoch, over {epochs} epochs and both ranks; the same ones as one process reads"
    )
    return _check("samples", fine, text, f"{again} read twice in an epoch, or others than one process reads")


def _within(name: str, value: float, what: str) -> Check:
    text = f"largest difference of a weight {value:.1e}, {what}"
    return _check(name, value <= TOLERANCE, text, f"{text}; expected {TOLERANCE:.0e} at most")


def _check(name: str, fine: bool, text: str, wrong: str) -> Check:
    return Check(name, "ok" if fine else "FAILED", text if fine else wrong)

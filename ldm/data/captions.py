"""Which of several captions of a picture is read, as a function of (seed, epoch, sample)."""

from collections.abc import Mapping, Sequence
from typing import Any

from ldm.data.draws import Draws
from ldm.data.expressions import is_null

# The name of the .txt member among columns of the json.
TEXT = "txt"


def caption_of(text: str | None, row: Mapping[str, Any]) -> str:
    """Return a sample's caption: its .txt, else that of its json, else the empty one; a NaN is none."""
    if text is not None:
        return text
    value = row.get("caption")
    return "" if is_null(value) else str(value or "")


class CaptionChoice:
    """Draws one of a sample's captions, by weight; what a sample lacks, or has empty, is not drawn.

    Args:
        weights: by column of the json, or `txt` for the .txt member.
        seed: of the draws.

    Raises:
        ValueError: no caption, or a weight that is not positive.
    """

    def __init__(self, weights: Mapping[str, float], *, seed: int) -> None:
        if not weights or not isinstance(weights, Mapping) or any(weight <= 0 for weight in weights.values()):
            raise ValueError(f"data.captions: got {weights}, expected a positive weight by column, as in {{txt: 1}}")
        self.weights, self.seed = dict(weights), seed

    def candidates(self, text: str | None, row: Mapping[str, Any]) -> list[tuple[str, float]]:
        """Return the captions that a sample has, with their weights; several in one column share its weight."""
        found = []
        for column, weight in self.weights.items():
            value = text if column == TEXT else row.get(column)
            texts = [str(part) for part in _listed(value) if part and not is_null(part)]
            found += [(part, weight / len(texts)) for part in texts]
        return found

    def choose(self, candidates: Sequence[tuple[str, float]], *, index: int, epoch: int) -> str:
        """Return one of the candidates, "" where there is none."""
        if len(candidates) < 2:
            return candidates[0][0] if candidates else ""
        draws = Draws(seed=self.seed, epoch=epoch, index=index, purpose="caption")
        return candidates[draws.choice([weight for _, weight in candidates])][0]


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]

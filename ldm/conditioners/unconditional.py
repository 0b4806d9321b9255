"""No condition at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ldm.conditioners.base import Conditioner
from ldm.diffusion import Conditioning


class Unconditional(Conditioner):
    """Tells the network nothing: an empty Conditioning."""

    arguments: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.arguments = {}

    def forward(self, batch: dict[str, Any]) -> Conditioning:
        """Nothing, whatever the batch says."""
        return Conditioning()

    def null(self, n: int) -> Conditioning:
        """Nothing."""
        return Conditioning()

    def prompt_pair(
        self, prompts: Sequence[str], negatives: Sequence[str], *, image_size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning]:
        """Nothing, twice.

        Raises:
            ValueError: a prompt, which could have no effect.
        """
        if told := next((text for text in [*prompts, *negatives] if text.strip()), None):
            raise ValueError(f"got the prompt {told!r}, expected none: this model is unconditional; set prompt=''")
        return Conditioning(), Conditioning()

"""The seam of all conditioners."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ldm.diffusion import Conditioning


class Conditioner(nn.Module, ABC):
    """From what a batch says of its samples to what the network is told.

    Attributes:
        columns: what a batch must hold besides captions, numbers (B,) each.
        always_told: the parts of its Conditioning that condition dropout and `null` leave out.
    """

    columns: tuple[str, ...] = ()
    always_told: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, batch: dict[str, Any]) -> Conditioning:
        """The conditions of the B samples of a batch."""

    @abstractmethod
    def null(self, n: int) -> Conditioning:
        """The condition "nothing is known", n times: what condition dropout puts in, and guidance leads away from."""

    def prompt_pair(
        self, prompts: Sequence[str], negatives: Sequence[str], *, image_size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning]:
        """What guidance needs to sample B prompts: (their conditions, what it leads away from), of equal shapes.

        Args:
            negatives: B texts; where all are empty, the null condition.
            image_size: height and width in pixels of the pictures to come, for models that are told.
        """
        cond = self({"caption": list(prompts)})
        return cond, self({"caption": list(negatives)}) if any(negatives) else self.null(len(prompts))

    def pictures(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Pictures (B, 3, H, W) in [-1, 1] whose latents `forward` reads: batch["NAME_latents"] for each NAME."""
        return {}

    def num_chunks(self, text: str) -> int:
        """How many times as long as that of a short one a prompt's context is; other prompts may lengthen it."""
        return 1

    def __call__(self, batch: dict[str, Any]) -> Conditioning:
        """`forward`, through the hooks of nn.Module."""
        return super().__call__(batch)

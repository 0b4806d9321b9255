"""What the network is told besides the noisy sample: the one value that conditioners make and networks read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """The conditions of B samples; a part that the model does not use is None.

    Args:
        context: (B, L, D) token embeddings for cross-attention.
        mask: (B, L) bool, True where a token is real; None when all are.
        vector: (B, D) pooled embedding, or (B,) int64 class ids, added to the time embedding.
        concat: (B, C, H, W) image-like condition, concatenated to the noisy sample on channels.
    """

    context: Tensor | None = None
    mask: Tensor | None = None
    vector: Tensor | None = None
    concat: Tensor | None = None

    def __len__(self) -> int:
        parts = self.parts()
        if not parts:
            raise ValueError("an empty Conditioning has no batch size")
        return len(next(iter(parts.values())))

    def __getitem__(self, index: slice) -> Conditioning:
        return self._map(lambda part: part[index])

    def parts(self) -> dict[str, Tensor]:
        """The parts that are there, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def to(self, device: torch.device | str) -> Conditioning:
        """The same conditions on another device."""
        return self._map(lambda part: part.to(device))

    def expand(self, n: int) -> Conditioning:
        """The one condition n times, without copying it."""
        return self._map(lambda part: part.expand(n, *part.shape[1:]))

    def select(self, drop: Tensor, null: Conditioning) -> Conditioning:
        """Replaces every part of the samples where `drop` (B,) is True by that of `null`: joint condition dropout.

        One draw per sample drops all of its conditions together, as classifier-free guidance needs
        (Ho & Salimans 2022, algorithm 1).
        """
        other = null.parts()
        if other.keys() != self.parts().keys():
            raise ValueError(f"got null conditions with parts {sorted(other)}, expected {sorted(self.parts())}")
        return Conditioning(
            **{
                name: torch.where(drop.view(-1, *[1] * (part.dim() - 1)), other[name].to(part.dtype), part)
                for name, part in self.parts().items()
            }
        )

    @staticmethod
    def cat(conditions: Sequence[Conditioning]) -> Conditioning:
        """Joins batches of conditions that have the same parts."""
        names = conditions[0].parts().keys()
        if any(condition.parts().keys() != names for condition in conditions):
            raise ValueError(f"got conditions with different parts, expected each to have {sorted(names)}")
        return Conditioning(**{name: torch.cat([getattr(c, name) for c in conditions]) for name in names})

    def _map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning(**{name: function(part) for name, part in self.parts().items()})

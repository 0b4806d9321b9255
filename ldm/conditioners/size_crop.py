"""What a picture's file was like, as a condition (Podell et al. 2023, sections 2.2 and 2.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ldm.conditioners.base import Conditioner
from ldm.diffusion import Conditioning
from ldm.nn.arguments import keeps_arguments
from ldm.nn.embeddings import timestep_embedding

SDXL = ("original_height", "original_width", "crop_top", "crop_left", "target_height", "target_width")
SDXL_REFINER = ("original_height", "original_width", "crop_top", "crop_left", "aesthetic_score")
_HEIGHTS, _WIDTHS = ("original_height", "target_height"), ("original_width", "target_width")
_DEFAULTS = dict.fromkeys(SDXL, 1024.0) | {"crop_top": 0.0, "crop_left": 0.0, "aesthetic_score": 6.0}
_NULL_DEFAULTS = {"aesthetic_score": 2.5}


class SizeCrop(Conditioner):
    """Columns of the metadata, each as cosines and sines: Conditioning(vector (B, len(columns) * dim)).

    `prompt_pair` tells both sides that the picture to come has the size it will have and is not cropped, and where
    there is an `aesthetic_score`, 6 on the one side and 2.5 on the other. The null condition, which replaces all in
    condition dropout, is that other side at the model's own size: what guidance leads away from at sampling time is
    what dropout trained.

    Args:
        columns: entries of the batch, (B,) numbers each; sizes and offsets in pixels.
        dim: width of each column's embedding.
        defaults: values by column that differ from SDXL's own (sizes 1024, crops 0, aesthetic score 6): the model's
            own size, and whatever else `columns` names.
        null_defaults: values that the null side has instead (aesthetic score 2.5).
    """

    @keeps_arguments
    def __init__(
        self,
        columns: Sequence[str] = SDXL,
        *,
        dim: int = 256,
        defaults: Mapping[str, float] | None = None,
        null_defaults: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        values = _DEFAULTS | dict(defaults or {})
        null_values = values | _NULL_DEFAULTS | dict(null_defaults or {})
        if not columns or (unknown := sorted(set(columns) - values.keys())):
            raise ValueError(
                f"got conditioner.columns={list(columns)}, expected names with a default; "
                f"set conditioner.defaults for {', '.join(unknown) if columns else 'them'}"
            )
        self.columns, self.dim = tuple(columns), dim
        self._values = tuple(float(values[name]) for name in columns)
        self._null_values = tuple(float(null_values[name]) for name in columns)
        # Holds no number: it follows the module from device to device, and is real even where that is the meta device.
        self.register_buffer("_place", torch.empty(0, device="cpu"), persistent=False)

    @property
    def vector_dim(self) -> int:
        """The vector's width."""
        return len(self.columns) * self.dim

    def forward(self, batch: dict[str, Any]) -> Conditioning:
        """Embeds the batch's columns.

        Raises:
            ValueError: the batch lacks one.
        """
        if missing := [name for name in self.columns if name not in batch]:
            raise ValueError(
                f"got a batch with {sorted(batch)}, expected {', '.join(missing)}; "
                f"set data.columns=[{','.join(self.columns)}]"
            )
        return self._embed(torch.stack([torch.as_tensor(batch[name]).double() for name in self.columns], dim=1))

    def null(self, n: int) -> Conditioning:
        """An uncropped picture of the model's own size, n times."""
        return self._embed(torch.tensor([self._null_values])).expand(n)

    def prompt_pair(
        self, prompts: Sequence[str], negatives: Sequence[str], *, image_size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning]:
        """An uncropped picture of `image_size`, whatever the prompts say."""
        return (
            self._embed(torch.tensor([self._of_size(self._values, image_size)])).expand(len(prompts)),
            self._embed(torch.tensor([self._of_size(self._null_values, image_size)])).expand(len(prompts)),
        )

    def _of_size(self, values: Sequence[float], image_size: tuple[int, int]) -> list[float]:
        height, width = map(float, image_size)
        return [
            height if name in _HEIGHTS else width if name in _WIDTHS else value
            for name, value in zip(self.columns, values, strict=True)
        ]

    def _embed(self, numbers: Tensor) -> Conditioning:
        """(B, columns) numbers to the vector, computed in float32."""
        place: Tensor = self._place  # type: ignore[assignment]
        flat = rearrange(numbers.to(place.device, torch.float32), "b c -> (b c)")
        embedded = rearrange(timestep_embedding(flat, self.dim), "(b c) d -> b (c d)", c=len(self.columns))
        return Conditioning(vector=embedded.to(place.dtype))

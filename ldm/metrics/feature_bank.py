"""What metrics that compare feature with feature have in common: a bounded, exactly mergeable store of features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from ldm.metrics.features import as_seen, describe_network, num_features_of

Side = Literal["generated", "real"]
# Rows of a block that batches are joined to: large enough for memory of its own, which is given back when it is freed.
BLOCK = 8192


class FeatureBank(Metric):
    """Features of generated and of real images, at most `max_images` of each, whatever the number seen.

    Every image has a number, its place in the evaluated set. A hash of number and seed decides which images stay, the
    `max_images` with the smallest, and the order they stand in; so what is kept depends on neither batch size, nor
    order, nor number of ranks, and it is a uniform draw. Features are kept in float32, 400 MB a side for 50,000 of
    2048 dimensions; what is computed from them is computed in float64.

    Args:
        features: network from images (B, 3, H, W) in [-1, 1] to (B, num_features), with that attribute.
        max_images: kept on each side.
        seed: of the hash.

    Raises:
        ValueError: max_images below 2; in `compute`, a number that occurs twice.
    """

    is_differentiable = False
    full_state_update = False
    network_name = "features"
    uses_real = True

    generated_features: list[Tensor]
    generated_numbers: list[Tensor]
    real_features: list[Tensor]
    real_numbers: list[Tensor]

    def __init__(self, features: nn.Module, *, max_images: int = 50_000, seed: int = 0) -> None:
        super().__init__()
        if max_images < 2:
            raise ValueError(f"got max_images={max_images}, expected at least 2")
        self.size = num_features_of(features)
        self.features = features.eval()
        self.max_images, self.seed = max_images, seed
        for name in ("generated_features", "generated_numbers", "real_features", "real_numbers"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, images: Tensor, index: Tensor, real: bool) -> None:
        """Adds images (B, 3, H, W) in [-1, 1] with their places (B,) in the real or in the generated set."""
        self.see(self.features(as_seen(images)), {"index": index}, real=real)

    def see(self, features: Tensor, batch: Mapping[str, Any], *, real: bool) -> None:
        """Adds images by their features (B, num_features) and batch["index"], their places (B,) in the set."""
        side: Side = "real" if real else "generated"
        parts, numbers = self._of(side)
        parts.append(features.float())
        numbers.append(batch["index"].to(features.device, torch.int64))
        join_tail(parts)
        join_tail(numbers)
        if sum(map(len, numbers)) > 2 * self.max_images:
            self._settle(side)

    def check_counts(self, num_generated: int, num_real: int | None) -> None:
        """Raises ValueError where there will be too few images; None = unknown."""
        least, setting = self.least_images()
        for side, count in (("generated", num_generated), ("real", num_real)):
            if count is not None and count < least:
                raise ValueError(
                    f"got {count} {side} images for {type(self).__name__}, expected at least {least} ({setting}); give "
                    "more images, or change that"
                )

    def least_images(self) -> tuple[int, str]:
        """How many images a side takes at least, and why."""
        return 2, "two make a distance"

    def describe(self) -> dict[str, Any]:
        """What goes into the protocol: the feature network and what is kept."""
        return {"features": describe_network(self.features), "max_images": self.max_images, "seed": self.seed}

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Shares only what can stay, and an empty table where a rank has seen nothing, which torchmetrics cannot."""
        self._settle("generated")
        self._settle("real")
        super().sync(*args, **kwargs)

    def kept(self, side: Side) -> Tensor:
        """Features (N, num_features), float32, in the order of their hash; N may be 0."""
        features, numbers = self._settle(side)
        values, counts = numbers.unique(return_counts=True)
        if bool((counts > 1).any()):
            raise ValueError(
                f"got {side} image number {int(values[counts > 1][0])} more than once, expected each once; number "
                "the images over all batches and ranks"
            )
        return features

    def _of(self, side: Side) -> tuple[list[Tensor], list[Tensor]]:
        if side == "real":
            return self.real_features, self.real_numbers
        return self.generated_features, self.generated_numbers

    def _settle(self, side: Side) -> tuple[Tensor, Tensor]:
        """What stays, in its order; it takes the place of the parts, each freed as it is copied."""
        parts, numbers = self._parts(side)
        order = hashed(numbers, self.seed).argsort(stable=True)[: self.max_images]
        if len(parts) == 1 and torch.equal(order, torch.arange(len(numbers), device=order.device)):
            features = parts[0]
        else:
            features = parts[0].new_empty(len(order), self.size)
            place = torch.full_like(numbers, -1)
            place[order] = torch.arange(len(order), device=order.device)
            places = list(place.split([len(part) for part in parts]))
            while parts:
                part, where = parts.pop(), places.pop()
                features[where[where >= 0]] = part[where >= 0]
        numbers = numbers[order]
        setattr(self, f"{side}_features", [features])
        setattr(self, f"{side}_numbers", [numbers])
        return features, numbers

    def _parts(self, side: Side) -> tuple[list[Tensor], Tensor]:
        features, numbers = self._of(side)
        if isinstance(features, Tensor):
            # So they are after a merge across ranks.
            return [features], torch.as_tensor(numbers)
        if not features:
            features.append(torch.zeros(0, self.size, dtype=torch.float32, device=self.device))
            numbers.append(torch.zeros(0, dtype=torch.int64, device=self.device))
        return features, torch.cat(numbers)


def join_tail(parts: list[Tensor]) -> None:
    """Joins the parts at the end that are shorter than a block, once they make one up."""
    start = len(parts)
    while start and len(parts[start - 1]) < BLOCK:
        start -= 1
    if sum(map(len, parts[start:])) >= BLOCK:
        parts[start:] = [torch.cat(parts[start:])]


def hashed(numbers: Tensor, seed: int) -> Tensor:
    """A hash of int64 numbers, a different one for each seed, without collisions (splitmix64's last steps)."""
    x = numbers + _signed((seed + 1) * 0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return x


def _signed(value: int) -> int:
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value


def subset(count: int, size: int, generator: torch.Generator) -> Tensor:
    """`size` different places of `count`, drawn on the CPU so that every device has the same."""
    return torch.randperm(count, generator=generator)[:size]

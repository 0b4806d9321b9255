"""Classifier-free guidance: from a denoiser and two conditions to one function that a sampler can call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.diffusion.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser, Prediction

Denoise = Callable[[Tensor, Tensor], Prediction]
"""denoise(x_t (B, C, H, W), t ()) -> Prediction: all that a sampler knows of a model."""


class Guidance:
    """F = F_uncond + scale (F_cond - F_uncond) (Ho & Salimans 2022, with scale = 1 + w: 1 is no guidance).

    Args:
        scale: guidance scale; 0 ignores the condition.
        rescale: 0 to 1, how far the guided output takes back the standard deviation of the conditional one
            (Lin et al. 2024, section 3.4).
        interval: noise levels sigma / alpha, lowest and highest, between which guidance acts; outside it the
            conditional output is used (Kynkäänniemi et al. 2024).
        channels: how many of the output's channels are guided, from the first; None is all. DiT and SiT guide 3 of 4
            (Peebles & Xie 2023, appendix A).
    """

    def __init__(
        self,
        *,
        scale: float = 1.0,
        rescale: float = 0.0,
        interval: Sequence[float] | None = None,
        channels: int | None = None,
    ) -> None:
        if interval is not None and len(interval) != 2:
            raise ValueError(f"got guidance.interval={list(interval)}, expected two noise levels, lowest and highest")
        low, high = (0.0, math.inf) if interval is None else interval
        if not 0 <= rescale <= 1:
            raise ValueError(f"got guidance.rescale={rescale}, expected a number from 0 to 1")
        if not 0 <= low < high:
            raise ValueError(f"got guidance.interval=[{low}, {high}], expected 0 <= lowest < highest noise level")
        if channels is not None and channels < 1:
            raise ValueError(f"got guidance.channels={channels}, expected at least 1, or null for all")
        self.scale, self.rescale, self.interval, self.channels = scale, rescale, (low, high), channels

    def __call__(self, denoiser: Denoiser, cond: Conditioning, uncond: Conditioning) -> Denoise:
        """The guided model; both conditions are of the same B samples."""
        both = Conditioning.cat([cond, uncond])

        def denoise(x_t: Tensor, t: Tensor) -> Prediction:
            times = t.to(x_t).expand(len(x_t))
            if not self.acts_at(t, denoiser):
                return denoiser(x_t, times, cond)
            output, share = denoiser.output_and_share(x_t.repeat(2, 1, 1, 1), times.repeat(2), both)
            # A variance is that of the conditional model.
            conditional = None if share is None else share.chunk(2)[0]
            return denoiser.predict(x_t, times, self.combine(*output.chunk(2)), conditional)

        return denoise

    def acts_at(self, t: Tensor, denoiser: Denoiser) -> bool:
        """Whether the unconditional output is needed at time t ()."""
        level = denoiser.schedule.ratio(t).item()
        return self.scale != 1.0 and self.interval[0] <= level <= self.interval[1]

    def combine(self, cond: Tensor, uncond: Tensor) -> Tensor:
        """The guided output from the two, each (B, C, H, W)."""
        guided = uncond + self.scale * (cond - uncond)
        if self.channels is not None:
            guided = torch.cat([guided[:, : self.channels], cond[:, self.channels :]], dim=1)
        if self.rescale == 0:
            return guided
        # The floor is for outputs of zero, which an untrained network gives.
        rescaled = guided * (_std(cond) / _std(guided).clamp_min(1e-12))
        return torch.lerp(guided, rescaled, self.rescale)


def _std(x: Tensor) -> Tensor:
    return x.flatten(1).std(1).view(-1, 1, 1, 1)

"""Ancestral sampling as in DDPM."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ldm.diffusion import Prediction, PredictionWithVariance
from ldm.diffusion.variance import between, large_variance, posterior_variance
from ldm.samplers.base import Process, Sampler


class DDPM(Sampler):
    """Samples x_s ~ q(x_s | x_t, x_0) with the predicted x_0 (Ho et al. 2020, algorithm 2).

    Args:
        variance: "small" is that of q(x_s | x_t, x_0), optimal for a point of data; "large" is optimal for unit normal
            data, on variance-preserving schedules that of q(x_t | x_s) (their section 3.2); "learned" is what the
            network says between the two (Nichol & Dhariwal 2021, eq. 15), as DiT and ADM sample.
        clip: x_0 is believed to lie in [-clip, clip], as pixels do in [-1, 1]; None believes anything.

    Raises:
        ValueError: another word, a clip that is not positive; in `step`, "learned" with a model without a variance.
    """

    def __init__(self, *, variance: Literal["small", "large", "learned"] = "small", clip: float | None = None) -> None:
        if variance not in ("small", "large", "learned"):
            raise ValueError(f"got sampler.variance={variance}, expected small, large or learned")
        if clip is not None and clip <= 0:
            raise ValueError(f"got sampler.clip={clip}, expected a positive number, or null")
        self.variance, self.clip = variance, clip

    def step(self, process: Process, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        prediction = process.evaluate(x, t)
        x_0, eps = prediction
        alpha, sigma = process.schedule.alpha, process.schedule.sigma
        if self.clip is not None:
            x_0 = x_0.clamp(-self.clip, self.clip)
            eps = (x - alpha(t) * x_0) / sigma(t)
        small = posterior_variance(process.schedule, t, s)
        mean = alpha(s) * x_0 + (sigma(s) ** 2 - small).clamp_min(0).sqrt() * eps
        if sigma(s) == 0:
            return mean
        variance = self._variance(prediction, small, large_variance(process.schedule, t, s))
        return mean + variance.sqrt() * process.noise()

    def _variance(self, prediction: Prediction, small: Tensor, large: Tensor) -> Tensor:
        if self.variance == "small":
            return small
        if self.variance == "large":
            return large
        if not isinstance(prediction, PredictionWithVariance):
            raise ValueError(
                "got sampler.variance=learned with a model that learned none, expected a network with "
                "learned_variance=true on a schedule of training steps; set sampler.variance=small"
            )
        return between(prediction.share, small, large)

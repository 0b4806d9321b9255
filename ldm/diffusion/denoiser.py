"""The denoiser: a network, and what its output means."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from ldm.diffusion.conditioning import Conditioning
from ldm.diffusion.parameterizations import Parameterization
from ldm.diffusion.schedules import Schedule
from ldm.diffusion.times import Times
from ldm.diffusion.weightings import Weighting


class Prediction(NamedTuple):
    """What the model believes of x_t = alpha x_0 + sigma eps; both of the shape of x_t."""

    x_0: Tensor
    eps: Tensor


class Denoiser(nn.Module):
    """Turns a network's output into (x_0, eps), and a batch into a loss.

    Args:
        network: forward(x (B, C, H, W), t (B,), cond) -> (B, C, H, W).
        schedule, parameterization, weighting, times: the diffusion process, configured here once; a sampler takes
            the schedule from here.

    Raises:
        ValueError: the parts do not fit each other.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        schedule: Schedule,
        parameterization: Parameterization,
        weighting: Weighting,
        times: Times,
    ) -> None:
        super().__init__()
        parameterization.check(schedule)
        times.check(schedule)
        self.network = network
        self.schedule = schedule
        self.parameterization = parameterization
        self.weighting = weighting
        self.times = times

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Prediction:
        """The pair (x_0, eps) for x_t (B, C, H, W) at times t (B,)."""
        return self.predict(x_t, t, self.output(x_t, t, cond))

    def output(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """F, what the network says, in float32 also under autocast."""
        x_in = x_t * per_sample(self.schedule.input_scale(t), x_t)
        return self.network(x_in, self.schedule.network_time(t), cond).to(x_t.dtype)

    def predict(self, x_t: Tensor, t: Tensor, output: Tensor) -> Prediction:
        """The pair that an output F stands for."""
        return Prediction(*self.parameterization.solve(x_t, output, per_sample(t, x_t), self.schedule))

    def noised(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x_0 + sigma eps at times t (B,)."""
        t = per_sample(t, x_0)
        return self.schedule.alpha(t) * x_0 + self.schedule.sigma(t) * eps

    def loss(self, x_0: Tensor, eps: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The weighted squared error of the output, mean over (C, H, W): (B,).

        A network that learns the uncertainty u of each noise level turns an error e into e / exp(u) + u
        (Karras et al. 2024, eq. 21): all levels then weigh the same, however hard they are.
        """
        target = self.parameterization.output(x_0, eps, per_sample(t, x_0), self.schedule)
        error = self.output(self.noised(x_0, eps, t), t, cond) - target
        loss = self.loss_weight(t) * error.square().flatten(1).mean(1)
        network: Any = self.network
        if not getattr(network, "learns_uncertainty", False):
            return loss
        uncertainty = network.log_variance(self.schedule.network_time(t))
        return loss / uncertainty.exp() + uncertainty

    def loss_weight(self, t: Tensor) -> Tensor:
        """The weight (B,) of the squared error of the output, carried over from the space of the weighting."""
        weight = self.weighting(self.schedule.snr(t))
        if self.weighting.space == "output":
            return weight
        determinant = self.parameterization.determinant(t, self.schedule)
        part = self.schedule.sigma(t) if self.weighting.space == "x_0" else self.schedule.alpha(t)
        return weight * (part / determinant) ** 2


def per_sample(t: Tensor, x: Tensor) -> Tensor:
    """t (B,) as (B, 1, 1, 1), so that it cannot broadcast over the wrong axis of x (B, C, H, W)."""
    if t.shape != x.shape[:1]:
        raise ValueError(f"got times of shape {tuple(t.shape)} for {len(x)} samples, expected ({len(x)},)")
    return t.view(-1, *[1] * (x.dim() - 1))

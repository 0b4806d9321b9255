"""The variance of a step back in time: its two bounds, what a network learns between them, and the loss of that.

Source: Nichol & Dhariwal 2021, sections 3.1 and 3.2, as DiT and ADM train it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.diffusion.schedules import Schedule

# Half the distance between two of the 256 values of a pixel in [-1, 1]; DiT bins latents in the same way.
HALF_BIN = 1 / 255
LAST_BIN = 0.999
TINY = 1e-12


def posterior_variance(schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
    """The variance of q(x_s | x_t, x_0): sigma_s^2 (1 - (alpha_t sigma_s / alpha_s sigma_t)^2)."""
    kept = (schedule.alpha(t) * schedule.sigma(s)) / (schedule.alpha(s) * schedule.sigma(t))
    return schedule.sigma(s) ** 2 * (1 - kept**2)


def large_variance(schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
    """The variance of p(x_s | x_t) for unit normal data: that of q(x_t | x_s) times var(x_s) / var(x_t).

    On variance-preserving schedules it is beta (Ho et al. 2020, section 3.2).
    """
    alpha, sigma = schedule.alpha, schedule.sigma
    forward = sigma(t) ** 2 - (alpha(t) / alpha(s) * sigma(s)) ** 2
    return forward * (alpha(s) ** 2 + sigma(s) ** 2) / (alpha(t) ** 2 + sigma(t) ** 2)


def between(share: Tensor, small: Tensor, large: Tensor) -> Tensor:
    """The variance whose logarithm is (1 + v) / 2 of the way from small to large, for what a network says, v.

    Source: Nichol & Dhariwal 2021, eq. 15; v = -1 is the small bound, 1 the large one.
    """
    return torch.lerp(small.log(), large.log(), (share + 1) / 2).exp()


def variational_bound(
    x_0: Tensor, eps: Tensor, predicted: tuple[Tensor, Tensor], *, share: Tensor, t: Tensor, schedule: Schedule
) -> Tensor:
    """L_t of the variational bound in bits a value, mean over (C, H, W): (B,), for one training step each.

    It is the divergence of p(x_s | x_t) from q(x_s | x_t, x_0) (Ho et al. 2020, eq. 5), and for the step that ends in
    the data -log p(x_0 | x_t) of values in 256 bins. The prediction has no gradient here: v alone is learned.

    Args:
        x_0, eps: (B, C, H, W), of which x_t is made; `predicted` is the pair that the model believes of it.
        share: (B, C, H, W), v.
        t: (B,) times.
        schedule: one of training steps.
    """
    step = schedule.t_min
    t = t.double().view(-1, *[1] * (x_0.dim() - 1))
    s = (t - step).clamp_min(0)
    ends = s < step / 2
    small, large = _bounds(schedule, t, s.masked_fill(ends, 0), ends)
    log_variance = between(share, small.to(share), large.to(share)).log()
    true, believed = (
        _mean(*pair, schedule=schedule, s=s, small=small.masked_fill(ends, 0))
        for pair in ((x_0, eps), (predicted[0].detach(), predicted[1].detach()))
    )
    divergence = _divergence(true - believed, small.to(share).log(), log_variance)
    likelihood = _log_likelihood(x_0, believed, log_variance)
    return torch.where(ends, -likelihood, divergence).flatten(1).mean(1) / math.log(2)


def _bounds(schedule: Schedule, t: Tensor, s: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Small and large variance; in the step that ends in the data the small one is that of the step before."""
    step = schedule.t_min
    later = t.masked_fill(ends, 2 * step), s.masked_fill(ends, step)
    return posterior_variance(schedule, *later), large_variance(schedule, t, s)


def _mean(x_0: Tensor, eps: Tensor, *, schedule: Schedule, s: Tensor, small: Tensor) -> Tensor:
    """The mean of q(x_s | x_t, x_0), for s = 0 the data."""
    direction = (schedule.sigma(s) ** 2 - small).clamp_min(0).sqrt()
    return schedule.alpha(s).to(x_0) * x_0 + direction.to(x_0) * eps


def _divergence(difference: Tensor, log_true: Tensor, log_believed: Tensor) -> Tensor:
    """KL(N(m, exp a) || N(m', exp b)) in nats, by the difference of the means."""
    ratio = (log_true - log_believed).exp()
    return 0.5 * (log_believed - log_true - 1 + ratio + difference**2 * (-log_believed).exp())


def _log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of the probability that a normal value falls into the bin of x (Ho et al. 2020, eq. 13)."""
    inverse_std = (-0.5 * log_variance).exp()
    above, below = ((x - mean + side) * inverse_std for side in (HALF_BIN, -HALF_BIN))
    inside = (torch.special.ndtr(above) - torch.special.ndtr(below)).clamp_min(TINY).log()
    lowest, highest = torch.special.log_ndtr(above), torch.special.log_ndtr(-below)
    return torch.where(x < -LAST_BIN, lowest, torch.where(x > LAST_BIN, highest, inside))

"""Noise schedules: x_t = alpha(t) x_0 + sigma(t) eps, with t = 0 the data and noise growing with t.

A schedule is alpha, sigma and their derivatives. Time runs over [0, t_max]; `network_time` is what the network
is fed. Discrete DDPM schedules are continuous here: index i of T training steps is t = (i + 1) / T, and log alpha
is interpolated linearly in between, so that t = 0 is exactly the data and every sampler may stop at any time.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

# Below this factor of the data none is left: zero terminal SNR is never quite 0 on an interpolable schedule.
NO_DATA = 1e-6


class Schedule(ABC):
    """alpha(t) and sigma(t) for times t in [0, t_max], any shape, any float dtype.

    Attributes:
        t_max: the noisiest time.
        t_min: the least noisy time that is trained and sampled; 0 if the model may be asked there.
    """

    t_max: float = 1.0
    t_min: float = 0.0

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """The factor of the data at time t."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """The factor of the noise at time t."""

    @abstractmethod
    def alpha_dot(self, t: Tensor) -> Tensor:
        """d alpha / d t."""

    @abstractmethod
    def sigma_dot(self, t: Tensor) -> Tensor:
        """d sigma / d t."""

    @abstractmethod
    def time_of(self, ratio: Tensor) -> Tensor:
        """The time at which sigma / alpha, the noise level of Karras et al. 2022, has the given value."""

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """What the network is told of the time."""

    def prior_std(self, t: Tensor) -> Tensor:
        """Standard deviation of the pure noise that sampling starts from at time t."""
        return torch.ones_like(t)

    def input_scale(self, t: Tensor) -> Tensor:
        """What x_t is multiplied by before the network sees it (c_in of Karras et al. 2022)."""
        return torch.ones_like(t)

    def coordinates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(m, tau): the sampling ODE is integrated as d(x / m) / d tau, here with m = alpha, tau = sigma / alpha."""
        alpha = self.alpha(t)
        return alpha, self.sigma(t) / alpha

    def tangent(self, x_0: Tensor, eps: Tensor) -> Tensor:
        """d(x / m) / d tau in those coordinates: eps (Karras et al. 2022, eq. 4 with s = alpha)."""
        return eps

    def ratio(self, t: Tensor) -> Tensor:
        """sigma / alpha: infinite where no data is left."""
        return self.sigma(t) / self.alpha(t)

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2: infinite at t = 0."""
        return (self.alpha(t) / self.sigma(t)) ** 2

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether no data at all is left at t_max."""
        return self.alpha(torch.tensor(self.t_max, dtype=torch.float64)).item() < NO_DATA


class DiscreteSchedule(Schedule):
    """The variance-preserving schedule of DDPM from its T values of beta (Ho et al. 2020, eq. 4).

    Args:
        betas: (T,) variances of the forward steps, in (0, 1].
    """

    def __init__(self, betas: Tensor) -> None:
        betas = betas.double()
        if betas.dim() != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas <= 1)).all()):
            raise ValueError(
                "got betas outside (0, 1] or fewer than two, expected (T,) variances; check beta_start, beta_end"
            )
        self.num_steps = len(betas)
        self.t_min = 1 / self.num_steps
        # log alpha = (log alpha-bar) / 2; the floor keeps zero terminal SNR interpolable: alpha = e^-17 there, not 0.
        log_alpha = torch.cumsum(torch.log1p(-betas), 0).div(2).clamp_min(-17.0)
        self._log_alpha = torch.cat([log_alpha.new_zeros(1), log_alpha])

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,) alpha-bar of the training steps, float64."""
        return torch.exp(2 * self._log_alpha[1:])

    def alpha(self, t: Tensor) -> Tensor:
        return self._interpolate(t)[0].exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._interpolate(t)[0])).sqrt()

    def alpha_dot(self, t: Tensor) -> Tensor:
        log_alpha, slope = self._interpolate(t)
        return slope * log_alpha.exp()

    def sigma_dot(self, t: Tensor) -> Tensor:
        # sigma^2 + alpha^2 = 1, so sigma sigma' = -alpha alpha'.
        return -self.alpha(t) * self.alpha_dot(t) / self.sigma(t)

    def time_of(self, ratio: Tensor) -> Tensor:
        log_alpha = -0.5 * torch.log1p(ratio.double() ** 2)
        table = self._log_alpha.to(ratio.device)
        upper = torch.searchsorted(-table, -log_alpha).clamp(1, self.num_steps)
        fraction = (log_alpha - table[upper - 1]) / (table[upper] - table[upper - 1])
        return ((upper - 1 + fraction.clamp(0, 1)) / self.num_steps).to(ratio.dtype)

    def network_time(self, t: Tensor) -> Tensor:
        """The training index in [0, T - 1], fractional between two training steps."""
        return (t * self.num_steps - 1).clamp_min(0)

    def _interpolate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(log alpha, its slope) at t: piecewise linear between the training steps."""
        table = self._log_alpha.to(t.device)
        position = t.double() * self.num_steps
        lower = position.floor().long().clamp(0, self.num_steps - 1)
        step = table[lower + 1] - table[lower]
        log_alpha = table[lower] + (position - lower) * step
        return log_alpha.to(t.dtype), (step * self.num_steps).to(t.dtype)


class Linear(DiscreteSchedule):
    """Betas linear in the step (Ho et al. 2020; DiT and ADM use 1e-4 to 0.02)."""

    def __init__(self, *, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> None:
        super().__init__(torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64))


class ScaledLinear(DiscreteSchedule):
    """sqrt(beta) linear in the step: what LDM and Stable Diffusion call "linear" (Rombach et al. 2022).

    Args:
        zero_terminal_snr: shift and scale sqrt(alpha-bar) so that no data is left at the last step
            (Lin et al. 2024, algorithm 1).
    """

    def __init__(
        self,
        *,
        num_steps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        zero_terminal_snr: bool = False,
    ) -> None:
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64) ** 2
        super().__init__(rescale_to_zero_terminal_snr(betas) if zero_terminal_snr else betas)


class Cosine(DiscreteSchedule):
    """alpha-bar = cos^2, betas capped at 0.999 (Nichol & Dhariwal 2021, eq. 17)."""

    def __init__(self, *, num_steps: int = 1000, offset: float = 0.008) -> None:
        u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        alpha_bar = torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
        super().__init__((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999))


class EDM(Schedule):
    """alpha = 1, sigma = t: noise is added and nothing is scaled (Karras et al. 2022, table 1).

    Args:
        sigma_data: standard deviation of the data; 0.5 for images in [-1, 1], about 1 for scaled latents.
    """

    def __init__(self, *, sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 0.5) -> None:
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"got sigma_min={sigma_min}, sigma_max={sigma_max}, expected 0 < sigma_min < sigma_max")
        if sigma_data <= 0:
            raise ValueError(f"got schedule.sigma_data={sigma_data}, expected a positive number")
        self.t_min, self.t_max = sigma_min, sigma_max
        self.sigma_data = sigma_data

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def alpha_dot(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time_of(self, ratio: Tensor) -> Tensor:
        return ratio

    def prior_std(self, t: Tensor) -> Tensor:
        return t

    def input_scale(self, t: Tensor) -> Tensor:
        """c_in = 1 / sqrt(sigma^2 + sigma_data^2) (Karras et al. 2022, table 1)."""
        return (t**2 + self.sigma_data**2).rsqrt()

    def network_time(self, t: Tensor) -> Tensor:
        """c_noise = ln(sigma) / 4 (Karras et al. 2022, table 1)."""
        return t.clamp_min(1e-8).log() / 4


class RectifiedFlow(Schedule):
    """A straight path: alpha = 1 - t, sigma = t (Liu et al. 2023; in most flow papers time runs the other way).

    Args:
        time_scale: the network is told time_scale * t, to fit sinusoidal embeddings made for 1000 steps.
    """

    def __init__(self, *, time_scale: float = 1000.0) -> None:
        if time_scale <= 0:
            raise ValueError(f"got schedule.time_scale={time_scale}, expected a positive number")
        self.time_scale = time_scale

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time_of(self, ratio: Tensor) -> Tensor:
        return ratio / (1 + ratio)

    def prior_std(self, t: Tensor) -> Tensor:
        """t: sampling that starts below t = 1 (Karras times) starts from less noise."""
        return t

    def coordinates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """x itself over t: nothing is singular at t = 1, where alpha = 0."""
        return torch.ones_like(t), t

    def tangent(self, x_0: Tensor, eps: Tensor) -> Tensor:
        """The velocity eps - x_0."""
        return eps - x_0

    def network_time(self, t: Tensor) -> Tensor:
        return t * self.time_scale


def rescale_to_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shifts and scales sqrt(alpha-bar), (T,), to end in 0 and keep its first value (Lin et al. 2024, algorithm 1)."""
    root = torch.cumprod(1 - betas, 0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = torch.cat([root.new_ones(1), root**2])
    return 1 - alpha_bar[1:] / alpha_bar[:-1]

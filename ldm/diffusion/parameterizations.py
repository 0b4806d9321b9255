"""What the network's output F means: always a combination a(t) x_0 + b(t) eps.

With x_t = alpha x_0 + sigma eps the pair (x_0, eps) follows from F by solving two equations, so that one formula
serves every parameterization, and every sampler works with all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ldm.diffusion.schedules import EDM as EDMSchedule
from ldm.diffusion.schedules import Schedule


class Parameterization(ABC):
    """The coefficients of F = a x_0 + b eps."""

    def check(self, schedule: Schedule) -> None:  # noqa: B027 - most have nothing to check
        """Raises ValueError where x_0 and eps cannot be recovered from F on this schedule."""

    @abstractmethod
    def coefficients(self, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """(a, b) at times t."""

    def determinant(self, t: Tensor, schedule: Schedule) -> Tensor:
        """alpha b - sigma a: an error dF is an error -sigma/det dF in x_0 and alpha/det dF in eps."""
        a, b = self.coefficients(t, schedule)
        return schedule.alpha(t) * b - schedule.sigma(t) * a

    def output(self, x_0: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
        """F = a x_0 + b eps, the target of training, for t that broadcasts against x_0."""
        a, b = self.coefficients(t, schedule)
        return a * x_0 + b * eps

    def solve(self, x_t: Tensor, output: Tensor, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """(x_0, eps) from x_t = alpha x_0 + sigma eps and F = a x_0 + b eps."""
        a, b = self.coefficients(t, schedule)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        determinant = alpha * b - sigma * a
        return (b * x_t - sigma * output) / determinant, (alpha * output - a * x_t) / determinant


class Epsilon(Parameterization):
    """F = eps (Ho et al. 2020)."""

    def check(self, schedule: Schedule) -> None:
        if schedule.has_zero_terminal_snr:
            raise ValueError(
                f"got parameterization epsilon with {type(schedule).__name__}, where alpha(t_max) = 0 and eps says "
                "nothing of x_0; expected v, velocity or x_0 there; set parameterization=v"
            )

    def coefficients(self, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)


class X0(Parameterization):
    """F = x_0."""

    def coefficients(self, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), torch.zeros_like(t)


class V(Parameterization):
    """F = alpha eps - sigma x_0 (Salimans & Ho 2022, section 4)."""

    def coefficients(self, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        return -schedule.sigma(t), schedule.alpha(t)


class Velocity(Parameterization):
    """F = dx_t/dt = alpha' x_0 + sigma' eps (Lipman et al. 2023; eps - x_0 on rectified flow)."""

    def coefficients(self, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        return schedule.alpha_dot(t), schedule.sigma_dot(t)


class EDM(Parameterization):
    """F = (x_0 - c_skip x_t) / c_out, scaled to unit variance (Karras et al. 2022, eq. 7 and table 1)."""

    def check(self, schedule: Schedule) -> None:
        if not isinstance(schedule, EDMSchedule):
            raise ValueError(
                f"got parameterization edm with {type(schedule).__name__}, expected the schedule edm, whose sigma_data "
                "it needs; set schedule=edm, or parameterization=v for variance-preserving schedules"
            )

    def coefficients(self, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        assert isinstance(schedule, EDMSchedule)
        variance = t**2 + schedule.sigma_data**2
        c_skip = schedule.sigma_data**2 / variance
        c_out = t * schedule.sigma_data / variance.sqrt()
        return (1 - c_skip) / c_out, -c_skip * t / c_out

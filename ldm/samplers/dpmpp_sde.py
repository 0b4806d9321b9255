"""DPM-Solver++ for the reverse SDE: the ODE's extrapolation of x_0, with noise added at every step."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion import Schedule
from ldm.samplers.ancestral import ancestral_step, check_eta, level_between, noise_for
from ldm.samplers.base import MAX_RATIO, Process, Sampler
from ldm.samplers.dpmpp import log_snr, recent_beliefs


class DPMSolverPPSDE(Sampler):
    """Asks once more half way in log(sigma / alpha), at a state with noise of its own (k-diffusion, `dpmpp_sde`).

    The noise of the half step is a part of that of the whole step, as of one Brownian motion in sigma / alpha.

    Args:
        eta: 1 is the SDE, 0 the ODE.
    """

    evaluations_per_step = 2

    def __init__(self, *, eta: float = 1.0) -> None:
        check_eta(eta)
        self.eta = eta

    def step(self, process: Process, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        x_0, schedule, eta = process.evaluate(x, t).x_0, process.schedule, self.eta
        z = noise_for(process, x, s, eta=eta)
        if schedule.sigma(s) > 0 and schedule.ratio(t) <= MAX_RATIO:
            middle = level_between(schedule, t, schedule.ratio(s.double()))
            x_middle = ancestral_step(process, x, x_0, t=t, s=middle, eta=eta, z=z)
            x_0 = process.evaluate(x_middle, middle).x_0
            levels = [schedule.ratio(time.double()) for time in (t, middle, s)]
            share = (levels[0] - levels[1]) / (levels[0] - levels[2])
            z = share.sqrt() * z + (1 - share).sqrt() * noise_for(process, x, s, eta=eta)
        return ancestral_step(process, x, x_0, t=t, s=s, eta=eta, z=z)


class DPMSolverPP2MSDE(Sampler):
    """Second order in x_0 from two answers (Lu et al. 2022, SDE-DPM-Solver++(2M); diffusers' sde-dpmsolver++).

    The draws of noise are those of diffusers: one a step, in order. A step to t = 0 is of first order.

    Args:
        eta: 1 is the SDE, 0 the ODE.
        solver: how the slope of x_0 counts, "midpoint" or "heun", as diffusers and k-diffusion name it.
    """

    looks_back = True

    def __init__(self, *, eta: float = 1.0, solver: Literal["midpoint", "heun"] = "midpoint") -> None:
        check_eta(eta)
        if solver not in ("midpoint", "heun"):
            raise ValueError(f"got sampler.solver={solver}, expected midpoint or heun")
        self.eta, self.solver = eta, solver

    def step(self, process: Process, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        process.evaluate(x, t)
        lambdas, beliefs = recent_beliefs(process, process.lowered(2))
        width = exponent(process.schedule, t, s, eta=self.eta)
        if len(beliefs) < 2 or process.schedule.sigma(s) == 0:
            return drift_and_noise(process, x, beliefs[0], t=t, s=s, eta=self.eta)
        slope = (beliefs[0] - beliefs[1]) / (lambdas[0] - lambdas[1])
        # What a slope of 1 in lambda adds, as a share of alpha_s.
        gain = -torch.expm1(-width) / 2 if self.solver == "midpoint" else torch.expm1(-width) / width + 1
        lift = process.schedule.alpha(s.double()) * gain * (width / (1 + self.eta)) * slope
        return drift_and_noise(process, x, beliefs[0], t=t, s=s, eta=self.eta) + lift


class DPMSolverPP3MSDE(Sampler):
    """Slope and curvature of x_0 from three answers (k-diffusion, `dpmpp_3m_sde`).

    As published the curvature counts half of what its Taylor term would, so the method is of second order too.
    diffusers' third-order sde-dpmsolver++ has the opposite sign in a term of the curvature, which then does not vanish
    with the step, so that its states differ from these. A step to t = 0 is of first order.

    Args:
        eta: 1 is the SDE, 0 the ODE.
    """

    looks_back = True

    def __init__(self, *, eta: float = 1.0) -> None:
        check_eta(eta)
        self.eta = eta

    def step(self, process: Process, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        process.evaluate(x, t)
        lambdas, beliefs = recent_beliefs(process, 3)
        x_s = drift_and_noise(process, x, beliefs[0], t=t, s=s, eta=self.eta)
        if len(beliefs) < 2 or process.schedule.sigma(s) == 0:
            return x_s
        width = exponent(process.schedule, t, s, eta=self.eta)
        h, alpha = width / (1 + self.eta), process.schedule.alpha(s.double())
        phi_2 = torch.expm1(-width) / width + 1
        slopes = [(a - b) / (p - q) for (a, b), (p, q) in zip(pairwise(beliefs), pairwise(lambdas), strict=True)]
        if len(slopes) == 1:
            return x_s + alpha * phi_2 * h * slopes[0]
        curvature = (slopes[0] - slopes[1]) / (lambdas[0] - lambdas[2])
        slope = slopes[0] + curvature * (lambdas[0] - lambdas[1])
        return x_s + alpha * (phi_2 * h * slope - (phi_2 / width - 0.5) * h**2 * curvature)


def exponent(schedule: Schedule, t: Tensor, s: Tensor, *, eta: float) -> Tensor:
    """(1 + eta) h, by which the share of x_0 in x_t decays in a step of h in lambda."""
    return (1 + eta) * (log_snr(schedule, s.double()) - log_snr(schedule, t.double()))


def drift_and_noise(process: Process, x: Tensor, x_0: Tensor, *, t: Tensor, s: Tensor, eta: float) -> Tensor:
    """The exact step of the SDE if x_0 were the same all the way; finite also where alpha(t) = 0."""
    alpha, sigma = process.schedule.alpha, process.schedule.sigma
    z, t, s = noise_for(process, x, s, eta=eta), t.double(), s.double()
    decay = alpha(t) * sigma(s) / (alpha(s) * sigma(t))
    drift = sigma(s) / sigma(t) * decay**eta * x + alpha(s) * (1 - decay ** (1 + eta)) * x_0
    return drift + sigma(s) * (1 - decay ** (2 * eta)).sqrt() * z

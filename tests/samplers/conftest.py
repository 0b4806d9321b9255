"""Data whose best denoiser and probability flow are known: independent normal values N(mean, std^2)."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from ldm.diffusion import Conditioning, Denoiser, Prediction, schedules, times, weightings
from ldm.diffusion.parameterizations import Parameterization
from ldm.diffusion.schedules import Schedule


@dataclass(frozen=True)
class Normal:
    """The distribution of every value of the data."""

    mean: float = 0.4
    std: float = 0.6

    def denoise(self, schedule: Schedule, x: Tensor, t: Tensor) -> Prediction:
        """The expectations of x_0 and eps given x_t."""
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        surprise = (x - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)
        return Prediction(self.mean + alpha * self.std**2 * surprise, sigma * surprise)

    def flow_to_data(self, schedule: Schedule, x: Tensor, t: Tensor) -> Tensor:
        """Where the probability flow carries x_t: it keeps the number of standard deviations from the mean."""
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return self.mean + self.std * (x - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2).sqrt()


class PerfectNetwork(nn.Module):
    """Outputs what is best for normal data in the given parameterization, from what a network is told."""

    def __init__(self, data: Normal, schedule: Schedule, parameterization: Parameterization) -> None:
        super().__init__()
        self.data, self.schedule, self.parameterization = data, schedule, parameterization

    def forward(self, x: Tensor, network_time: Tensor, cond: Conditioning) -> Tensor:
        t = self.time(network_time).view(-1, 1, 1, 1)
        x_t = x / self.schedule.input_scale(t)
        return self.parameterization.output(*self.data.denoise(self.schedule, x_t, t), t, self.schedule)

    def time(self, network_time: Tensor) -> Tensor:
        """The inverse of `Schedule.network_time`."""
        if isinstance(self.schedule, schedules.DiscreteSchedule):
            return (network_time + 1) / self.schedule.num_steps
        if isinstance(self.schedule, schedules.EDM):
            return torch.exp(4 * network_time)
        assert isinstance(self.schedule, schedules.RectifiedFlow)
        return network_time / self.schedule.time_scale


@pytest.fixture
def data() -> Normal:
    return Normal()


@pytest.fixture
def perfect_denoiser(data: Normal) -> Callable[[Schedule, Parameterization], Denoiser]:
    """Builds the best denoiser of the data; raises ValueError where schedule and parameterization do not fit."""

    def make(schedule: Schedule, parameterization: Parameterization) -> Denoiser:
        return Denoiser(
            PerfectNetwork(data, schedule, parameterization),
            schedule=schedule,
            parameterization=parameterization,
            weighting=weightings.Unit(),
            times=times.Uniform(),
        )

    return make

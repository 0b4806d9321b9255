"""The same network stepped by a sampler of ours and by a scheduler of diffusers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion import Conditioning, Denoiser, Guidance, times, weightings
from ldm.diffusion.parameterizations import Epsilon, Parameterization, V
from ldm.diffusion.schedules import Schedule
from ldm.samplers import Sampler

SHAPE = (2, 3, 4, 4)
SCALED_LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PREDICTIONS = [("epsilon", Epsilon()), ("v_prediction", V())]


class Wavy(nn.Module):
    """A smooth, bounded function of x and of the time that a network is told."""

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return wavy(x, t.view(-1, 1, 1, 1))


def wavy(x: Tensor, t: Tensor) -> Tensor:
    return 0.8 * torch.sin(1.3 * x + t / 300) + 0.1 * x


def start() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def generator() -> torch.Generator:
    """What both sides draw the noise of their steps from."""
    return torch.Generator().manual_seed(1)


def noise_like(x: Tensor) -> Callable[[], Tensor]:
    source = generator()
    return lambda: torch.randn(x.shape, generator=source, dtype=x.dtype)


def our_states(
    sampler: Sampler, schedule: Schedule, parameterization: Parameterization, *, x: Tensor, at: Tensor
) -> list[Tensor]:
    """The states after every step."""
    denoiser = Denoiser(
        Wavy(), schedule=schedule, parameterization=parameterization, weighting=weightings.Unit(), times=times.Uniform()
    )
    cond = Conditioning(vector=torch.zeros(len(x), 1))
    denoise = Guidance()(denoiser, cond, cond)
    return [state.x for state in sampler.trajectory(denoise, schedule, x, times=at, noise=noise_like(x))][1:]


def their_states(scheduler: Any, x: Tensor, **options: Any) -> list[Tensor]:
    """The states after every call, at the scheduler's own times."""
    states = []
    for t in scheduler.timesteps:
        output = wavy(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x, return_dict=False, **options)[0]
        states.append(x)
    return states


def at_indices(timesteps: Tensor, *, end: float = 0.0, num_steps: int = 1000) -> Tensor:
    """Our times for diffusers' indices, and the end."""
    return torch.cat([(timesteps.double() + 1) / num_steps, torch.tensor([end]).double()])

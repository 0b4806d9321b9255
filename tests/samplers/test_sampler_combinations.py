"""Every sampler with every path, parameterization and discretization."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from sampler_cases import PARAMETERIZATIONS, SAMPLERS, SCHEDULES, seeded_noise
from torch import Tensor
from torch.testing import assert_close

from ldm.diffusion import Conditioning, Denoiser, Guidance, schedules
from ldm.diffusion.parameterizations import Parameterization
from ldm.diffusion.schedules import Cosine, RectifiedFlow, Schedule
from ldm.samplers import (
    AlignYourSteps,
    Beta,
    CompVis,
    Discretization,
    DistilledSteps,
    Exponential,
    Karras,
    Leading,
    Linspace,
    Shifted,
    Trailing,
)

MakeDenoiser = Callable[[Schedule, Parameterization], Denoiser]

COUNTING_TRAINING_STEPS: dict[str, Discretization] = {"leading": Leading(), "compvis": CompVis()}
SPREADING_LEVELS: dict[str, Callable[..., Discretization]] = {
    "karras": Karras,
    "exponential": Exponential,
    "beta": Beta,
}
OTHERS: dict[str, Discretization] = {
    "linspace": Linspace(),
    "linspace_no_endpoint": Linspace(endpoint=False),
    "trailing": Trailing(),
    "lcm": DistilledSteps(),
    "ays": AlignYourSteps(),
    "shifted": Shifted(),
}
KINDS = [*COUNTING_TRAINING_STEPS, *SPREADING_LEVELS, *OTHERS]


def discretization(kind: str, schedule: Schedule) -> Discretization:
    if kind in COUNTING_TRAINING_STEPS:
        return COUNTING_TRAINING_STEPS[kind]
    if kind in OTHERS:
        return OTHERS[kind]
    # Where the schedule ends in noise alone, or starts at the data, noise levels must be told.
    open_ended = isinstance(schedule, RectifiedFlow | Cosine) or schedule.has_zero_terminal_snr
    return SPREADING_LEVELS[kind](sigma_min=0.03, sigma_max=80.0) if open_ended else SPREADING_LEVELS[kind]()


def goes_with(kind: str, path: str) -> bool:
    if kind in COUNTING_TRAINING_STEPS:
        return isinstance(SCHEDULES[path], schedules.DiscreteSchedule)
    return kind != "shifted" or path == "rectified_flow"


def builds(parameterization: str, path: str) -> bool:
    try:
        PARAMETERIZATIONS[parameterization].check(SCHEDULES[path])
    except ValueError:
        return False
    return True


FITTING = [pair for pair in product(PARAMETERIZATIONS, SCHEDULES) if builds(*pair)]


# One of each kind of step; variants of order and noise run through the same lines.
REPRESENTATIVE = [
    *["euler", "heun", "kdpm2", "dpmpp_2m", "plms", "lms_4", "deis_3", "unipc_2", "unipc_3", "lcm", "ddpm_large"],
    *["ddim_eta_half", "dpmpp_2s_ancestral", "dpmpp_sde_eta_half", "dpmpp_2m_sde_heun", "dpmpp_3m_sde", "restart"],
]


def agrees_with_the_bare_equations(name: str, denoiser: Denoiser, times: Tensor, data: Any) -> None:
    """A perfect network in single precision, whatever it outputs, against (x_0, eps) given in double precision."""
    schedule, sampler, shape = denoiser.schedule, SAMPLERS[name], (4, 1, 4, 4)
    start = seeded_noise(shape)() * schedule.prior_std(times[0])
    cond = Conditioning(vector=torch.zeros(len(start), 1))
    denoise = Guidance(scale=1.0)(denoiser, cond, cond)
    found = sampler(denoise, schedule, start, times=times, noise=seeded_noise(shape))
    noise = seeded_noise(shape)
    expected = sampler(
        lambda x, t: data.denoise(schedule, x, t),
        schedule,
        start.double(),
        times=times.double(),
        noise=lambda: noise().double(),
    )
    assert found.dtype == torch.float32
    assert_close(found.double(), expected, rtol=0, atol=5e-3, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize(("parameterization", "path"), FITTING)
def test_every_combination_that_builds_samples_what_the_bare_equations_do(
    parameterization: str, path: str, data: Any, perfect_denoiser: MakeDenoiser
) -> None:
    denoiser = perfect_denoiser(SCHEDULES[path], PARAMETERIZATIONS[parameterization])
    times = Trailing()(12, SCHEDULES[path])
    for name in REPRESENTATIVE:
        agrees_with_the_bare_equations(name, denoiser, times, data)


@pytest.mark.parametrize(("path", "kind"), [pair for pair in product(SCHEDULES, KINDS) if goes_with(*reversed(pair))])
def test_every_discretization_goes_with_every_schedule(
    path: str, kind: str, data: Any, perfect_denoiser: MakeDenoiser
) -> None:
    schedule = SCHEDULES[path]
    denoiser = perfect_denoiser(schedule, PARAMETERIZATIONS["edm" if path == "edm" else "v"])
    times = discretization(kind, schedule)(20, schedule)
    assert bool((times.diff() < 0).all()) and times[-1] in (0, torch.tensor(schedule.t_min).float())
    for name in ("heun", "plms", "deis_3", "unipc_2", "dpmpp_2m_sde"):
        agrees_with_the_bare_equations(name, denoiser, times, data)

"""Samplers against those of diffusers, step by step, with one fixed function as the network."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers_states import PREDICTIONS, SCALED_LINEAR, at_indices, our_states, start, their_states, wavy
from torch import Tensor
from torch.testing import assert_close

from ldm.diffusion import parameterizations, schedules
from ldm.diffusion.parameterizations import Parameterization, Velocity
from ldm.diffusion.schedules import Linear, RectifiedFlow, ScaledLinear
from ldm.samplers import DDIM, DDPM, DPMSolverPP2M, Euler, Heun, Karras, Linspace, Sampler, Trailing

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize(("prediction_type", "parameterization"), PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_steps_as_in_diffusers(eta: float, prediction_type: str, parameterization: Parameterization) -> None:
    scheduler = diffusers.DDIMScheduler(
        **SCALED_LINEAR, prediction_type=prediction_type, clip_sample=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(20)
    expected = their_states(scheduler, start(), eta=eta, generator=torch.Generator().manual_seed(1))
    at = at_indices(scheduler.timesteps)
    assert_close(Trailing()(20, ScaledLinear()), at.float())
    assert_close(
        our_states(DDIM(eta=eta), ScaledLinear(), parameterization, x=start(), at=at), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("prediction_type", "parameterization"), PREDICTIONS)
@pytest.mark.parametrize(("variance", "variance_type"), [("small", "fixed_small"), ("large", "fixed_large")])
@pytest.mark.parametrize("num_steps", [20, 250])
def test_ddpm_steps_as_in_diffusers(
    variance: Any, variance_type: str, prediction_type: str, parameterization: Parameterization, num_steps: int
) -> None:
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="linear",
        prediction_type=prediction_type,
        variance_type=variance_type,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    # Theirs takes them from products in float32, which eps-prediction at the noisy end amplifies.
    scheduler.alphas_cumprod = Linear().alphas_cumprod
    scheduler.set_timesteps(num_steps)
    x = start().double()
    expected = their_states(scheduler, x, generator=torch.Generator().manual_seed(1))
    found = our_states(DDPM(variance=variance), Linear(), parameterization, x=x, at=at_indices(scheduler.timesteps))
    # Theirs adds noise also to the last step of variance "large".
    assert_close(found[:-1], expected[:-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("prediction_type", "parameterization"), PREDICTIONS)
@pytest.mark.parametrize(("final", "end"), [("zero", 0.0), ("sigma_min", 0.001)])
@pytest.mark.parametrize("num_steps", [5, 20, 50])
def test_dpm_solver_steps_as_in_diffusers(
    num_steps: int, final: str, end: float, prediction_type: str, parameterization: Parameterization
) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **SCALED_LINEAR,
        prediction_type=prediction_type,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        final_sigmas_type=final,
    )
    scheduler.set_timesteps(num_steps)
    expected = their_states(scheduler, start())
    at = at_indices(scheduler.timesteps, end=end)
    if end == 0:
        assert_close(Linspace(endpoint=False)(num_steps, ScaledLinear()), at.float())
    found = our_states(DPMSolverPP2M(), ScaledLinear(), parameterization, x=start(), at=at)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("prediction_type", "parameterization"), PREDICTIONS)
@pytest.mark.parametrize(
    ("sampler", "scheduler_class", "steps_per_state"),
    [(Euler(), diffusers.EulerDiscreteScheduler, 1), (Heun(), diffusers.HeunDiscreteScheduler, 2)],
    ids=["euler", "heun"],
)
def test_euler_and_heun_step_as_in_diffusers(
    sampler: Sampler,
    scheduler_class: Any,
    steps_per_state: int,
    prediction_type: str,
    parameterization: Parameterization,
) -> None:
    """Theirs integrate x / alpha over sigma / alpha, so their states are ours divided by alpha."""
    schedule = ScaledLinear()
    scheduler = scheduler_class(**SCALED_LINEAR, prediction_type=prediction_type, timestep_spacing="linspace")
    scheduler.set_timesteps(10)
    at = Linspace()(10, schedule)
    assert_close(at, at_indices(scheduler.timesteps.unique().flip(0)).float())
    alpha = schedule.alpha(at)
    # Heun's last step is one evaluation, so its states after two calls are all but the last.
    calls = their_states(scheduler, start() / alpha[0])
    expected = [*calls[steps_per_state - 1 : -1 : steps_per_state], calls[-1]]
    found = our_states(sampler, schedule, parameterization, x=start(), at=at)
    assert len(found) == len(expected) == 10
    for ours, theirs, a in zip(found, expected, alpha[1:], strict=True):
        assert_close(ours / a, theirs, rtol=1e-4, atol=1e-4 / a.item())


def test_euler_on_rectified_flow_steps_as_in_diffusers() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 20, 20))
    expected = their_states_of_flow(scheduler, start())
    schedule = RectifiedFlow(time_scale=1000.0)
    at = Linspace()(20, schedule)
    assert_close(at, scheduler.sigmas)
    found = our_states(Euler(), schedule, Velocity(), x=start(), at=at)
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


def their_states_of_flow(scheduler: Any, x: Tensor) -> list[Tensor]:
    states = []
    for t in scheduler.timesteps:
        x = scheduler.step(wavy(x, t), t, x, return_dict=False)[0]
        states.append(x)
    return states


@pytest.mark.parametrize(
    ("sampler", "scheduler_class"),
    [(Euler(), diffusers.EDMEulerScheduler), (DPMSolverPP2M(), diffusers.EDMDPMSolverMultistepScheduler)],
    ids=["euler", "dpmpp_2m"],
)
def test_edm_preconditioning_and_karras_times_are_those_of_diffusers(sampler: Sampler, scheduler_class: Any) -> None:
    scheduler = scheduler_class(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0)
    scheduler.set_timesteps(12)
    schedule = schedules.EDM(sigma_data=0.5)
    at = Karras(rho=7.0)(12, schedule)
    assert_close(at, scheduler.sigmas, rtol=1e-4, atol=0)
    expected = their_states(scheduler, start() * 80.0)
    found = our_states(sampler, schedule, parameterizations.EDM(), x=start() * 80.0, at=at)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)

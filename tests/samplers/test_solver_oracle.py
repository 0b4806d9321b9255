"""The solvers of higher order, step by step, against diffusers, and by hand against CompVis's and k-diffusion's."""

from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from diffusers_states import (
    PREDICTIONS,
    SCALED_LINEAR,
    SHAPE,
    at_indices,
    generator,
    noise_like,
    our_states,
    start,
    their_states,
    wavy,
)
from torch import Tensor
from torch.testing import assert_close

from ldm.diffusion import Prediction
from ldm.diffusion.parameterizations import Epsilon, Parameterization, V
from ldm.diffusion.schedules import EDM, ScaledLinear
from ldm.samplers import (
    DEIS,
    KDPM2,
    LCM,
    LMS,
    PLMS,
    Beta,
    CompVis,
    DistilledSteps,
    DPMSolverPP2MSDE,
    DPMSolverPP2S,
    DPMSolverPP3MSDE,
    DPMSolverPPSDE,
    Euler,
    EulerAncestral,
    Exponential,
    Karras,
    Leading,
    Linspace,
    NoiseLevels,
    Sampler,
    UniPC,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

SCHEDULE = ScaledLinear()
predictions = pytest.mark.parametrize(("prediction_type", "parameterization"), PREDICTIONS)


def scheduler_of(name: str, num_steps: int, **settings: Any) -> Any:
    scheduler = getattr(diffusers, name)(**SCALED_LINEAR, **settings)
    scheduler.set_timesteps(num_steps)
    return scheduler


def assert_states(found: list[Tensor], expected: list[Tensor], scales: Tensor | None = None) -> None:
    """Every step within 1e-4; theirs in noise levels are ours divided by alpha."""
    scales = torch.ones(len(found)) if scales is None else scales
    assert len(found) == len(expected) == len(scales)
    for ours, theirs, scale in zip(found, expected, scales, strict=True):
        assert_close(ours / scale, theirs, rtol=1e-4, atol=1e-4 / scale.item())


@predictions
@pytest.mark.parametrize("num_steps", [5, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_steps_as_in_diffusers(
    order: int, num_steps: int, prediction_type: str, parameterization: Parameterization
) -> None:
    scheduler = scheduler_of("DEISMultistepScheduler", num_steps, solver_order=order, prediction_type=prediction_type)
    at = at_indices(scheduler.timesteps, end=1 / 1000)
    found = our_states(DEIS(order=order), SCHEDULE, parameterization, x=start(), at=at)
    assert_states(found, their_states(scheduler, start()))


@predictions
@pytest.mark.parametrize("num_steps", [5, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    # Theirs of bh1 is not a number after a step to 0, for infinity times 0.
    ("variant", "final", "end"),
    [("bh2", "zero", 0.0), ("bh2", "sigma_min", 0.001), ("bh1", "sigma_min", 0.001)],
)
def test_unipc_steps_as_in_diffusers(
    variant: Any,
    final: str,
    end: float,
    order: int,
    num_steps: int,
    prediction_type: str,
    parameterization: Parameterization,
) -> None:
    scheduler = scheduler_of(
        "UniPCMultistepScheduler",
        num_steps,
        solver_order=order,
        solver_type=variant,
        final_sigmas_type=final,
        prediction_type=prediction_type,
    )
    at = at_indices(scheduler.timesteps, end=end)
    found = our_states(UniPC(order=order, variant=variant), SCHEDULE, parameterization, x=start(), at=at)
    assert_states(found, their_states(scheduler, start()))


@predictions
@pytest.mark.parametrize("num_steps", [5, 20])
def test_lms_steps_as_in_diffusers(num_steps: int, prediction_type: str, parameterization: Parameterization) -> None:
    scheduler = scheduler_of("LMSDiscreteScheduler", num_steps, prediction_type=prediction_type)
    at = at_indices(scheduler.timesteps)
    alpha = SCHEDULE.alpha(at)
    found = our_states(LMS(), SCHEDULE, parameterization, x=start(), at=at)
    assert_states(found, their_states(scheduler, start() / alpha[0]), alpha[1:])


@pytest.mark.parametrize("num_steps", [5, 20, 50])
def test_plms_steps_as_in_diffusers(num_steps: int) -> None:
    scheduler = scheduler_of("PNDMScheduler", num_steps, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    found = our_states(PLMS(), SCHEDULE, Epsilon(), x=start(), at=Leading()(num_steps, SCHEDULE))
    # Theirs calls the first of two evaluations of the first step a step of its own.
    assert_states(found, their_states(scheduler, start())[1:])


def test_plms_of_a_v_prediction_is_not_that_of_diffusers() -> None:
    """Theirs averages what the network says, here v; the method is defined on eps, where CompVis's code has it."""
    scheduler = scheduler_of(
        "PNDMScheduler",
        20,
        skip_prk_steps=True,
        steps_offset=1,
        set_alpha_to_one=False,
        prediction_type="v_prediction",
    )
    found = our_states(PLMS(), SCHEDULE, V(), x=start(), at=Leading()(20, SCHEDULE))
    assert (found[-1] - their_states(scheduler, start())[-1]).abs().max() > 1e-2


def compvis_plms(num_steps: int) -> list[Tensor]:
    """CompVis's PLMSSampler: states of the eps-network `wavy`."""
    alphas_cumprod = SCHEDULE.alphas_cumprod
    steps = torch.arange(0, 1000, 1000 // num_steps) + 1
    before = torch.cat([alphas_cumprod[:1], alphas_cumprod[steps[:-1]]])
    order = list(range(len(steps) - 1, -1, -1))
    x, old, states = start().double(), [], []

    def moved(eps: Tensor, i: int) -> Tensor:
        x_0 = (x - (1 - alphas_cumprod[steps[i]]).sqrt() * eps) / alphas_cumprod[steps[i]].sqrt()
        return before[i].sqrt() * x_0 + (1 - before[i]).sqrt() * eps

    for position, i in enumerate(order):
        eps = wavy(x, steps[i])
        if not old:
            ahead = steps[order[min(position + 1, len(order) - 1)]]
            mean = (eps + wavy(moved(eps, i), ahead)) / 2
        elif len(old) == 1:
            mean = (3 * eps - old[-1]) / 2
        elif len(old) == 2:
            mean = (23 * eps - 16 * old[-1] + 5 * old[-2]) / 12
        else:
            mean = (55 * eps - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
        x = moved(mean, i)
        old.append(eps)
        states.append(x)
    return states


@pytest.mark.parametrize("num_steps", [1, 2, 4, 20, 60])
def test_plms_steps_as_in_compvis(num_steps: int) -> None:
    """60 steps are 63 there; of one step the second evaluation is at the same time as the first."""
    at = CompVis()(num_steps, SCHEDULE)
    found = our_states(PLMS(), SCHEDULE, Epsilon(), x=start().double(), at=at)
    assert_states(found, compvis_plms(num_steps))


@predictions
@pytest.mark.parametrize(("eta", "name"), [(0.0, "KDPM2DiscreteScheduler"), (1.0, "KDPM2AncestralDiscreteScheduler")])
def test_kdpm2_steps_as_in_diffusers(
    eta: float, name: str, prediction_type: str, parameterization: Parameterization
) -> None:
    """With the same generator: one draw a step. Theirs call half a step a step."""
    scheduler = scheduler_of(name, 10, prediction_type=prediction_type)
    at = Linspace()(10, SCHEDULE)
    alpha = SCHEDULE.alpha(at)
    options = {"generator": generator()} if eta else {}
    calls = their_states(scheduler, start() / alpha[0], **options)
    found = our_states(KDPM2(eta=eta), SCHEDULE, parameterization, x=start(), at=at)
    assert_states(found, [*calls[1:-1:2], calls[-1]], alpha[1:])


@predictions
def test_euler_ancestral_steps_as_in_diffusers(prediction_type: str, parameterization: Parameterization) -> None:
    """With the same generator: one draw a step, though theirs also draws for the last, which adds none."""
    scheduler = scheduler_of("EulerAncestralDiscreteScheduler", 10, prediction_type=prediction_type)
    at = Linspace()(10, SCHEDULE)
    alpha = SCHEDULE.alpha(at)
    found = our_states(EulerAncestral(), SCHEDULE, parameterization, x=start(), at=at)
    assert_states(found, their_states(scheduler, start() / alpha[0], generator=generator()), alpha[1:])


@predictions
@pytest.mark.parametrize("num_steps", [5, 20])
@pytest.mark.parametrize(("final", "end"), [("zero", 0.0), ("sigma_min", 0.001)])
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
def test_dpmpp_2m_sde_steps_as_in_diffusers(
    solver: Any, final: str, end: float, num_steps: int, prediction_type: str, parameterization: Parameterization
) -> None:
    """With the same generator: one draw a step."""
    scheduler = scheduler_of(
        "DPMSolverMultistepScheduler",
        num_steps,
        algorithm_type="sde-dpmsolver++",
        solver_type=solver,
        final_sigmas_type=final,
        prediction_type=prediction_type,
    )
    at = at_indices(scheduler.timesteps, end=end)
    found = our_states(DPMSolverPP2MSDE(solver=solver), SCHEDULE, parameterization, x=start(), at=at)
    assert_states(found, their_states(scheduler, start(), generator=generator()))


@predictions
def test_dpmpp_2s_steps_as_in_diffusers(prediction_type: str, parameterization: Parameterization) -> None:
    """Theirs takes two of its steps for one of ours, whose first must lie half way in log(sigma / alpha)."""
    scheduler = scheduler_of("DPMSolverSinglestepScheduler", 11, prediction_type=prediction_type, solver_order=2)
    levels = Karras().spread(*Karras().ends(SCHEDULE), 6)
    half_way = (levels[:-1] * levels[1:]).sqrt()
    grid = torch.cat([torch.stack([levels[:-1], half_way], 1).flatten(), levels[-1:]])
    scheduler.timesteps = SCHEDULE.network_time(SCHEDULE.time_of(grid))
    scheduler.sigmas = torch.cat([grid, torch.zeros(1)])
    found = our_states(DPMSolverPP2S(), SCHEDULE, parameterization, x=start(), at=Karras()(6, SCHEDULE))
    calls = their_states(scheduler, start())
    assert_states(found, [*calls[1:-1:2], calls[-1]])


@predictions
@pytest.mark.parametrize("num_steps", [1, 3, 4, 8])
def test_lcm_steps_as_in_diffusers(num_steps: int, prediction_type: str, parameterization: Parameterization) -> None:
    """With the same generator: one draw a step but the last."""
    scheduler = scheduler_of("LCMScheduler", num_steps, clip_sample=False, prediction_type=prediction_type)
    at = DistilledSteps()(num_steps, SCHEDULE)
    found = our_states(LCM(), SCHEDULE, parameterization, x=start(), at=at)
    assert_states(found, their_states(scheduler, start(), generator=generator()))


@predictions
@pytest.mark.parametrize("num_steps", [5, 30])
@pytest.mark.parametrize(
    ("name", "discretization"), [("karras", Karras()), ("exponential", Exponential()), ("beta", Beta())]
)
def test_spread_noise_levels_are_those_of_diffusers(
    name: str, discretization: NoiseLevels, num_steps: int, prediction_type: str, parameterization: Parameterization
) -> None:
    """Theirs tells the network a time interpolated in log sigma, ours one in log alpha: up to 0.09 training steps."""
    scheduler = scheduler_of(
        "EulerDiscreteScheduler", num_steps, prediction_type=prediction_type, **{f"use_{name}_sigmas": True}
    )
    at = discretization(num_steps, SCHEDULE)
    # Theirs are made from products in single precision.
    assert_close(SCHEDULE.ratio(at.double()), scheduler.sigmas.double(), rtol=2e-5, atol=0)
    assert_close(SCHEDULE.network_time(at[:-1]), scheduler.timesteps, rtol=0, atol=0.09)
    alpha = SCHEDULE.alpha(at)
    found = our_states(Euler(), SCHEDULE, parameterization, x=start(), at=at)
    assert_states(found, their_states(scheduler, start() / alpha[0]), alpha[1:])


SIGMAS = Karras()(9, EDM(sigma_max=20.0)).double()


def denoised(x: Tensor, sigma: Tensor) -> Tensor:
    """What a model says of x_0, as k-diffusion asks it."""
    return x / (1 + sigma**2) + 0.5 * torch.sin(x / (1 + sigma**2).sqrt() + sigma.log() / 4)


def our_denoised_states(sampler: Sampler) -> list[Tensor]:
    """The states of `denoised` on the variance-exploding path, where x is what it is in k-diffusion."""
    x = 20 * start().double()
    states = sampler.trajectory(
        lambda x, t: Prediction(denoised(x, t), (x - denoised(x, t)) / t),
        EDM(sigma_max=20.0),
        x,
        times=SIGMAS,
        noise=noise_like(x),
    )
    return [state.x for state in states][1:]


def ancestral(sigma: Tensor, sigma_next: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """(sigma_down, sigma_up), as in k-diffusion."""
    up = eta * (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2).sqrt()
    return (sigma_next**2 - up**2).clamp_min(0).sqrt(), up


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_dpmpp_2s_ancestral_is_that_of_k_diffusion(eta: float) -> None:
    x, noise, expected = 20 * start().double(), noise_like(start().double()), []
    for sigma, sigma_next in pairwise(SIGMAS):
        down, up = ancestral(sigma, sigma_next, eta)
        belief = denoised(x, sigma)
        if down > 0:
            middle = (sigma * down).sqrt()
            belief = denoised(middle / sigma * x + (1 - middle / sigma) * belief, middle)
        x = down / sigma * x + (1 - down / sigma) * belief
        if eta > 0 and sigma_next > 0:
            x = x + up * noise()
        expected.append(x)
    assert_states(our_denoised_states(DPMSolverPP2S(eta=eta)), expected)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_dpmpp_sde_is_that_of_k_diffusion(eta: float) -> None:
    """Its noise over a stretch of sigma is a Brownian motion's, here made of the two draws of each step."""
    x, noise, expected = 20 * start().double(), noise_like(start().double()), []
    for sigma, sigma_next in pairwise(SIGMAS):
        belief = denoised(x, sigma)
        if sigma_next == 0:
            expected.append(belief)
            break
        middle = (sigma * sigma_next).sqrt()
        to_middle, from_middle = ((sigma - middle).sqrt() * noise(), (middle - sigma_next).sqrt() * noise())
        down, up = ancestral(sigma, middle, eta)
        x_middle = down / sigma * x + (1 - down / sigma) * belief + up * to_middle / (sigma - middle).sqrt()
        belief = denoised(x_middle, middle)
        down, up = ancestral(sigma, sigma_next, eta)
        x = down / sigma * x + (1 - down / sigma) * belief
        x = x + up * (to_middle + from_middle) / (sigma - sigma_next).sqrt()
        expected.append(x)
    assert_states(our_denoised_states(DPMSolverPPSDE(eta=eta)), expected)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_dpmpp_3m_sde_is_that_of_k_diffusion(eta: float) -> None:
    x, noise, expected = 20 * start().double(), noise_like(start().double()), []
    beliefs: list[Tensor] = []
    steps = (SIGMAS[:-1] / SIGMAS[1:]).log().tolist()
    for i, (sigma, sigma_next) in enumerate(pairwise(SIGMAS)):
        beliefs.insert(0, denoised(x, sigma))
        if sigma_next == 0:
            expected.append(beliefs[0])
            break
        h = torch.tensor(steps[i], dtype=torch.float64)
        width = h * (1 + eta)
        phi_2 = torch.expm1(-width) / width + 1
        x = torch.exp(-width) * x - torch.expm1(-width) * beliefs[0]
        if i >= 2:
            r_0, r_1 = steps[i - 1] / h, steps[i - 2] / h
            first, second = (beliefs[0] - beliefs[1]) / r_0, (beliefs[1] - beliefs[2]) / r_1
            d_1 = first + (first - second) * r_0 / (r_0 + r_1)
            x = x + phi_2 * d_1 - (phi_2 / width - 0.5) * (first - second) / (r_0 + r_1)
        elif i == 1:
            x = x + phi_2 * (beliefs[0] - beliefs[1]) / (steps[0] / h)
        if eta > 0:
            x = x + sigma_next * torch.sqrt(-torch.expm1(-2 * h * eta)) * noise()
        expected.append(x)
    assert_states(our_denoised_states(DPMSolverPP3MSDE(eta=eta)), expected)


def test_the_third_order_sde_of_diffusers_differs_by_the_whole_curvature() -> None:
    """Its coefficient of D2 has - 1/2 for + 1/2, so that it goes to -1 and not to 0 with the step (diffusers 0.42)."""
    scheduler = scheduler_of(
        "DPMSolverMultistepScheduler", 20, algorithm_type="sde-dpmsolver++", solver_order=3, solver_type="heun"
    )
    at = at_indices(scheduler.timesteps)
    x, beliefs = start(), []
    ours = our_states(DPMSolverPP3MSDE(), SCHEDULE, Epsilon(), x=x, at=at)[:3]
    states = []
    source = generator()
    for index, t in zip(scheduler.timesteps[:3], at, strict=False):
        beliefs.append((x - SCHEDULE.sigma(t) * wavy(x, index)) / SCHEDULE.alpha(t))
        x = scheduler.step(wavy(x, index), index, x, return_dict=False, generator=source)[0]
        states.append(x)
    assert_states(ours[:2], states[:2])
    log_snr = torch.log(SCHEDULE.alpha(at[:4]) / SCHEDULE.sigma(at[:4]))
    slopes = [(beliefs[i + 1] - beliefs[i]) / (log_snr[i + 1] - log_snr[i]) for i in (0, 1)]
    curvature = (slopes[1] - slopes[0]) / (log_snr[2] - log_snr[0]) * (log_snr[3] - log_snr[2]) ** 2
    assert x.shape == SHAPE
    assert_close(ours[2] - SCHEDULE.alpha(at[3]).float() * curvature.float(), states[2], rtol=1e-3, atol=1e-3)

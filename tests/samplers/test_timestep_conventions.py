"""The training steps that CompVis's code and diffusers visit, by name."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers_states import (
    PREDICTIONS,
    SCALED_LINEAR,
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

from ldm.diffusion.parameterizations import Epsilon, Parameterization
from ldm.diffusion.schedules import EDM, Linear, RectifiedFlow, ScaledLinear, Schedule
from ldm.samplers import (
    DDIM,
    AlignYourSteps,
    CompVis,
    Discretization,
    DistilledSteps,
    Leading,
    Linspace,
    Shifted,
    Trailing,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCHEDULE = ScaledLinear()
ALL_COUNTS = range(1, 1001)


def indices(discretization: Discretization, num_steps: int) -> Tensor:
    """The training indices visited; the end is left out."""
    index = 1000 * discretization(num_steps, SCHEDULE)[:-1].double() - 1
    assert_close(index, index.round(), rtol=0, atol=1e-4)
    return index.round().long()


def compvis_timesteps(num_steps: int) -> np.ndarray:
    """`make_ddim_timesteps(method="uniform")`, from the noisiest."""
    return (np.asarray(list(range(0, 1000, 1000 // num_steps))) + 1)[::-1]


def off_by_one(num_steps: int) -> bool:
    return 999 % (1000 // num_steps) == 0


def test_compvis_visits_its_timesteps_and_ends_at_the_first_training_step() -> None:
    for num_steps in ALL_COUNTS:
        if not off_by_one(num_steps):
            assert indices(CompVis(), num_steps).tolist() == compvis_timesteps(num_steps).tolist()
            assert CompVis()(num_steps, SCHEDULE)[-1] == torch.tensor(1 / 1000)


def test_compvis_may_visit_more_times_than_steps_were_asked_for() -> None:
    assert len(indices(CompVis(), 60)) == 63
    assert len(indices(CompVis(), 50)) == 50


def test_compvis_refuses_the_599_numbers_of_steps_that_would_reach_index_1000() -> None:
    """Where 999 is a multiple of the stride; there the original ends in an IndexError."""
    refused = []
    for num_steps in ALL_COUNTS:
        try:
            CompVis()(num_steps, SCHEDULE)
        except ValueError:
            refused.append(num_steps)
            assert compvis_timesteps(num_steps)[0] == 1000
    assert refused == [3, 9, 27, 36, 37, *range(101, 112), *range(251, 334), *range(501, 1001)]
    assert len(refused) == 599


@pytest.mark.parametrize(("num_steps", "nearest"), [(3, 2), (110, 100), (300, 250), (1000, 500)])
def test_the_refusal_names_a_number_of_steps_that_works(num_steps: int, nearest: int) -> None:
    with pytest.raises(ValueError, match=rf"^got {num_steps} .*index 1000 of 0 to 999; set num_steps={nearest} or .*"):
        CompVis()(num_steps, SCHEDULE)
    CompVis()(nearest, SCHEDULE)


def ddim_timesteps(spacing: str, num_steps: int) -> Tensor:
    scheduler = diffusers.DDIMScheduler(
        **SCALED_LINEAR, timestep_spacing=spacing, steps_offset=int(spacing == "leading")
    )
    scheduler.set_timesteps(num_steps)
    return scheduler.timesteps


def dpm_solver_timesteps(spacing: str, num_steps: int) -> Tensor:
    scheduler = diffusers.DPMSolverMultistepScheduler(**SCALED_LINEAR, timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(num_steps)
    return scheduler.timesteps


SOME_COUNTS = [2, 3, 7, 26, 27, 30, 31, 48, 50, 61, 103, 333, 500, 720, 976, 998]


@pytest.mark.parametrize("num_steps", SOME_COUNTS)
def test_leading_linspace_and_trailing_visit_the_timesteps_of_diffusers(num_steps: int) -> None:
    """By default those of its DDIM, PNDM, Euler; without the end point those of its DPM-Solver, UniPC and DEIS."""
    assert torch.equal(indices(Leading(), num_steps), ddim_timesteps("leading", num_steps))
    assert torch.equal(indices(Linspace(), num_steps), ddim_timesteps("linspace", num_steps))
    # Its arange may yield an index -1 in the end.
    assert torch.equal(indices(Trailing(), num_steps), ddim_timesteps("trailing", num_steps)[:num_steps])
    without = dpm_solver_timesteps("linspace", num_steps)
    assert torch.equal(indices(Linspace(endpoint=False), num_steps), without)
    assert torch.equal(indices(Leading(endpoint=False), num_steps), dpm_solver_timesteps("leading", num_steps))


@pytest.mark.parametrize("num_steps", [1, 3, 4, 8, 50])
def test_distilled_steps_are_the_timesteps_of_lcm(num_steps: int) -> None:
    scheduler = diffusers.LCMScheduler(**SCALED_LINEAR)
    scheduler.set_timesteps(num_steps)
    assert torch.equal(indices(DistilledSteps(), num_steps), scheduler.timesteps)


@pytest.mark.parametrize(("prediction_type", "parameterization"), PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("num_steps", [2, 20, 30, 50])
def test_ddim_at_leading_times_steps_as_stable_diffusion_in_diffusers(
    num_steps: int, eta: float, prediction_type: str, parameterization: Parameterization
) -> None:
    scheduler = diffusers.DDIMScheduler(
        **SCALED_LINEAR,
        prediction_type=prediction_type,
        clip_sample=False,
        timestep_spacing="leading",
        steps_offset=1,
        set_alpha_to_one=False,
    )
    scheduler.set_timesteps(num_steps)
    expected = their_states(scheduler, start(), eta=eta, generator=generator())
    at = Leading()(num_steps, SCHEDULE)
    found = our_states(DDIM(eta=eta), SCHEDULE, parameterization, x=start(), at=at)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("end", [0.0, 1 / 1000])
def test_ddim_ends_at_zero_or_at_the_first_training_step_as_told(end: float) -> None:
    scheduler = diffusers.DDIMScheduler(
        **SCALED_LINEAR, clip_sample=False, timestep_spacing="leading", steps_offset=1, set_alpha_to_one=end == 0
    )
    scheduler.set_timesteps(20)
    at = Leading(end="t_min" if end else "zero")(20, SCHEDULE)
    assert_close(at, at_indices(scheduler.timesteps, end=end).float())
    found = our_states(DDIM(), SCHEDULE, Epsilon(), x=start(), at=at)
    assert_close(found, their_states(scheduler, start()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("num_steps", [1, 4, 50, 60])
def test_ddim_at_compvis_times_steps_as_in_compvis(num_steps: int, eta: float) -> None:
    """`make_ddim_sampling_parameters` and `p_sample_ddim`, by hand."""
    alphas_cumprod = SCHEDULE.alphas_cumprod
    steps = torch.from_numpy(compvis_timesteps(num_steps).copy())
    before = torch.cat([alphas_cumprod[steps[1:]], alphas_cumprod[:1]])
    x = start().double()
    noise, expected = noise_like(x), []
    for step, a_prev in zip(steps, before, strict=True):
        eps, a_t = wavy(x, step), alphas_cumprod[step]
        sigma = eta * torch.sqrt((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev))
        x_0 = (x - (1 - a_t).sqrt() * eps) / a_t.sqrt()
        x = a_prev.sqrt() * x_0 + (1 - a_prev - sigma**2).sqrt() * eps + sigma * (noise() if eta else 0)
        expected.append(x)
    found = our_states(DDIM(eta=eta), SCHEDULE, Epsilon(), x=start().double(), at=CompVis()(num_steps, SCHEDULE))
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "published"),
    [
        ("sd1", [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]),
        ("sdxl", [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]),
    ],
)
def test_ten_aligned_steps_are_the_published_timesteps(model: Any, published: list[int]) -> None:
    assert indices(AlignYourSteps(model=model), 10).tolist() == published


def test_other_numbers_of_aligned_steps_lie_between_the_ten() -> None:
    ten, twenty = (SCHEDULE.ratio(AlignYourSteps()(n, SCHEDULE)[:-1].double()) for n in (10, 20))
    assert_close(twenty[::2], ten)
    assert_close(twenty[1:-1:2], (ten[:-1] * ten[1:]).sqrt())


@pytest.mark.parametrize("num_steps", [1, 4, 28])
def test_shifted_times_are_those_of_flow_matching_in_diffusers(num_steps: int) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps))
    assert_close(Shifted(shift=3.0)(num_steps, RectifiedFlow()), scheduler.sigmas, rtol=1e-5, atol=0)


def test_the_lowest_shifted_time_of_sd3_is_that_of_diffusers() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(28)
    assert_close(Shifted(lowest=0.002994)(28, RectifiedFlow()), scheduler.sigmas, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("discretization", "schedule", "num_steps", "text"),
    [
        (Leading(), EDM(), 10, "discretization=leading .*trailing"),
        (CompVis(), RectifiedFlow(), 10, "discretization=compvis .*trailing"),
        (Shifted(), SCHEDULE, 10, "shifted times .*rectified_flow"),
        (Leading(), SCHEDULE, 1000, "1000 sampling steps .*index 1000 .*trailing"),
        (Leading(endpoint=False), SCHEDULE, 1000, "1000 sampling steps .*fewer"),
        (DistilledSteps(), SCHEDULE, 51, "51 of 50 distilled steps"),
        (DistilledSteps(num_distilled=50), Linear(num_steps=40), 4, "4 of 50 distilled steps"),
        (AlignYourSteps(), ScaledLinear(beta_end=0.01), 10, "Align Your Steps .*reaches"),
        (AlignYourSteps(model="svd"), SCHEDULE, 10, "Align Your Steps for svd .*reaches"),
    ],
)
def test_times_that_a_schedule_does_not_have_are_refused(
    discretization: Discretization, schedule: Schedule, num_steps: int, text: str
) -> None:
    with pytest.raises(ValueError, match=rf"^got {text}"):
        discretization(num_steps, schedule)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Leading(offset=-1), r"discretization\.offset=-1"),
        (lambda: Leading(offset=0), r"discretization\.offset=0 .*stay"),
        (lambda: Leading(end="one"), r"discretization\.end=one"),
        (lambda: Shifted(shift=0.0), r"discretization\.shift=0"),
        (lambda: Shifted(lowest=1.0), r"discretization\.lowest=1"),
        (lambda: AlignYourSteps(model="sd3"), r"discretization\.model=sd3"),
        (lambda: DistilledSteps(num_distilled=0), r"discretization\.num_distilled=0"),
    ],
)
def test_conventions_out_of_range_refuse_to_build(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=rf"^got {text}"):
        make()

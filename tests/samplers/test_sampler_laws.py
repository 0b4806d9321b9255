"""Laws of sampling on data whose probability flow is known in closed form (see conftest)."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ldm.diffusion import Conditioning, Denoiser, Guidance, Prediction, parameterizations, schedules
from ldm.diffusion.parameterizations import X0, Epsilon, Parameterization, V, Velocity
from ldm.diffusion.schedules import Cosine, Linear, RectifiedFlow, ScaledLinear, Schedule
from ldm.samplers import (
    DDIM,
    DDPM,
    Discretization,
    DPMSolverPP2M,
    Euler,
    Heun,
    Karras,
    Sampler,
    Trailing,
    Uniform,
)

MakeDenoiser = Callable[[Schedule, Parameterization], Denoiser]

SCHEDULES: dict[str, Schedule] = {
    "linear": Linear(),
    "scaled_linear": ScaledLinear(),
    "zero_terminal_snr": ScaledLinear(zero_terminal_snr=True),
    "cosine": Cosine(),
    "edm": schedules.EDM(sigma_max=20.0, sigma_data=0.6),
    "rectified_flow": RectifiedFlow(),
}
PARAMETERIZATIONS: dict[str, Parameterization] = {
    "epsilon": Epsilon(),
    "x_0": X0(),
    "v": V(),
    "velocity": Velocity(),
    "edm": parameterizations.EDM(),
}
DETERMINISTIC: dict[str, tuple[Sampler, int]] = {
    "euler": (Euler(), 1),
    "ddim": (DDIM(eta=0.0), 1),
    "heun": (Heun(), 2),
    "dpmpp_2m": (DPMSolverPP2M(), 2),
}
STOCHASTIC: dict[str, Sampler] = {
    "ddpm": DDPM(),
    "ddpm_large": DDPM(variance="large"),
    "ddim_eta_1": DDIM(eta=1.0),
    "ddim_eta_half": DDIM(eta=0.5),
}
SAMPLERS = {name: sampler for name, (sampler, _) in DETERMINISTIC.items()} | STOCHASTIC


def no_noise() -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def seeded_noise(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(1)
    return lambda: torch.randn(shape, generator=generator, dtype=dtype)


def smooth_times(num_steps: int, schedule: Schedule) -> Tensor:
    """Times that refine evenly: cubes of a ramp in the noise level, or t itself on rectified flow."""
    ramp = 1 - torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    if isinstance(schedule, RectifiedFlow):
        return ramp
    return schedule.time_of(ramp**3 * schedule.ratio(torch.tensor(schedule.t_max, dtype=torch.float64)))


@pytest.mark.parametrize("path", ["scaled_linear", "edm", "rectified_flow"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_sampler_converges_to_the_exact_flow_at_its_stated_order(name: str, path: str, data: Any) -> None:
    schedule, (sampler, order) = SCHEDULES[path], DETERMINISTIC[name]
    start = schedule.prior_std(torch.tensor(schedule.t_max)) * torch.tensor([-1.5, 0.3, 2.0]).double().view(3, 1, 1, 1)
    exact = data.flow_to_data(schedule, start, torch.tensor(schedule.t_max, dtype=torch.float64))

    def error(num_steps: int) -> float:
        times = smooth_times(num_steps, schedule)
        found = sampler(lambda x, t: data.denoise(schedule, x, t), schedule, start, times=times, noise=no_noise)
        return (found - exact).abs().max().item()

    errors = torch.tensor([error(num_steps) for num_steps in (100, 200, 400)])
    assert errors[-1] < (2e-2 if order == 1 else 4e-4)
    assert_close((errors[:-1] / errors[1:]).log2(), torch.full((2,), float(order)), rtol=0, atol=0.25)


@pytest.mark.parametrize("path", ["scaled_linear", "edm", "rectified_flow"])
@pytest.mark.parametrize("name", ["ddpm", "ddpm_large", "ddim_eta_1", "ddim_eta_half"])
def test_stochastic_sampling_reproduces_the_moments_of_the_data(name: str, path: str, data: Any) -> None:
    schedule, shape = SCHEDULES[path], (30_000, 1, 1, 1)
    noise = seeded_noise(shape, torch.float64)
    start = noise() * schedule.prior_std(torch.tensor(schedule.t_max, dtype=torch.float64))
    times = smooth_times(250, schedule)
    found = STOCHASTIC[name](lambda x, t: data.denoise(schedule, x, t), schedule, start, times=times, noise=noise)
    assert_close(found.mean().item(), data.mean, rtol=0, atol=0.03)
    assert_close(found.std().item(), data.std, rtol=0.03, atol=0)


@pytest.mark.parametrize("path", SCHEDULES)
@pytest.mark.parametrize(("variance", "std"), [("small", 0.0), ("large", 1.0)], ids=["point", "unit_normal"])
def test_each_variance_of_ddpm_is_exact_for_its_data_in_any_number_of_steps(
    variance: Any, std: float, path: str, data: Any
) -> None:
    """Ho et al. 2020, section 3.2; carried over to paths that do not preserve variance."""
    schedule, exact = SCHEDULES[path], replace(data, std=std)
    noise = seeded_noise((20_000, 1, 1, 1), torch.float64)
    t = torch.tensor(schedule.t_max, dtype=torch.float64)
    s, start_std = schedule.time_of(torch.ones_like(t)), exact.std * schedule.alpha(t)
    start = schedule.alpha(t) * exact.mean + torch.sqrt(start_std**2 + schedule.sigma(t) ** 2) * noise()
    states = list(
        DDPM(variance=variance).trajectory(
            lambda x, t: exact.denoise(schedule, x, t), schedule, start, times=torch.stack([t, s]), noise=noise
        )
    )
    expected = torch.sqrt(schedule.alpha(s) ** 2 * exact.std**2 + schedule.sigma(s) ** 2)
    assert_close(states[-1].x.std(), expected, rtol=0.03, atol=0)


def discretization(kind: str, schedule: Schedule) -> Discretization:
    if kind == "uniform":
        return Uniform()
    if kind == "trailing":
        return Trailing()
    # Where the schedule ends in noise alone, or starts at the data, Karras times must be told where to stop.
    open_ended = isinstance(schedule, RectifiedFlow | Cosine) or schedule.has_zero_terminal_snr
    return Karras(sigma_min=0.03, sigma_max=80.0) if open_ended else Karras()


def builds(parameterization: str, path: str) -> bool:
    try:
        PARAMETERIZATIONS[parameterization].check(SCHEDULES[path])
    except ValueError:
        return False
    return True


FITTING = [pair for pair in product(PARAMETERIZATIONS, SCHEDULES) if builds(*pair)]


@pytest.mark.parametrize("kind", ["uniform", "trailing", "karras"])
@pytest.mark.parametrize(("parameterization", "path"), FITTING)
def test_every_combination_that_builds_samples_what_the_bare_equations_do(
    parameterization: str, path: str, kind: str, data: Any, perfect_denoiser: MakeDenoiser
) -> None:
    """A perfect network in single precision, whatever it outputs, against (x_0, eps) given in double precision."""
    schedule, shape = SCHEDULES[path], (4, 1, 8, 8)
    denoiser = perfect_denoiser(schedule, PARAMETERIZATIONS[parameterization])
    times = discretization(kind, schedule)(20, schedule)
    start = seeded_noise(shape)() * schedule.prior_std(times[0])
    cond = Conditioning(vector=torch.zeros(len(start), 1))
    denoise = Guidance(scale=1.0)(denoiser, cond, cond)
    for name, sampler in SAMPLERS.items():
        found = sampler(denoise, schedule, start, times=times, noise=seeded_noise(shape))
        noise = seeded_noise(shape)
        expected = sampler(
            lambda x, t: data.denoise(schedule, x, t),
            schedule,
            start.double(),
            times=times.double(),
            noise=lambda noise=noise: noise().double(),
        )
        assert found.dtype == torch.float32
        assert_close(found.double(), expected, rtol=0, atol=5e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_the_first_state_is_the_start_and_the_last_is_the_sample(data: Any) -> None:
    schedule = Linear()
    start = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    times = Trailing()(7, schedule)

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        return data.denoise(schedule, x, t)

    states = list(Heun().trajectory(denoise, schedule, start, times=times, noise=no_noise))
    assert torch.equal(torch.stack([state.t for state in states]), times)
    assert states[0].prediction is None and torch.equal(states[0].x, start)
    assert_close(states[-1].x, Heun()(denoise, schedule, start, times=times, noise=no_noise), rtol=0, atol=0)
    for before, after in pairwise(states):
        assert after.prediction is not None
        assert_close(after.prediction, denoise(before.x, before.t))


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_ask_as_often_as_they_say(name: str, data: Any) -> None:
    schedule, sampler, asked = Linear(), SAMPLERS[name], []

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        asked.append(t.item())
        return data.denoise(schedule, x, t)

    start = torch.zeros(1, 1, 4, 4)
    sampler(denoise, schedule, start, times=Trailing()(10, schedule), noise=seeded_noise(start.shape))
    # The last step of Heun's, to t = 0, is Euler's.
    assert len(asked) == 10 * sampler.evaluations_per_step - (sampler.evaluations_per_step - 1)
    assert min(asked) > 0


def test_a_long_run_does_not_keep_every_answer(data: Any) -> None:
    """A thousand steps of DDPM on large latents would not fit into memory otherwise."""
    schedule, alive = Linear(), []

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        prediction = data.denoise(schedule, x, t)
        alive.append(weakref.ref(prediction.x_0))
        return prediction

    start = torch.zeros(1, 1, 4, 4)
    most = 0
    for _ in DDPM().trajectory(
        denoise, schedule, start, times=Trailing()(50, schedule), noise=seeded_noise(start.shape)
    ):
        most = max(most, sum(reference() is not None for reference in alive))
    assert len(alive) == 50 and most < 10


@pytest.mark.parametrize(
    ("make", "name"),
    [(lambda: DDIM(eta=1.5), "eta=1.5"), (lambda: DDPM(variance="medium"), "variance=medium")],  # type: ignore[arg-type]
)
def test_settings_out_of_range_refuse_to_build(make: Callable[[], Sampler], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^got sampler\.{name}, expected"):
        make()

"""Laws of sampling on data whose probability flow is known in closed form (see conftest)."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from sampler_cases import DETERMINISTIC, SAMPLERS, SCHEDULES, STOCHASTIC, no_noise, seeded_noise, smooth_times
from torch import Tensor
from torch.testing import assert_close

from ldm.diffusion import Prediction
from ldm.diffusion.schedules import Linear, ScaledLinear, Schedule
from ldm.samplers import (
    DDIM,
    DDPM,
    DEIS,
    KDPM2,
    LCM,
    LMS,
    PLMS,
    DistilledSteps,
    DPMSolverPP2M,
    DPMSolverPP2MSDE,
    DPMSolverPP3MSDE,
    Evaluation,
    Heun,
    Interval,
    Linspace,
    Process,
    Restart,
    Sampler,
    Trailing,
    UniPC,
)


def exact_run(data: Any, sampler: Sampler, schedule: Schedule, times: Tensor) -> Tensor:
    """How far three samples end from where the exact flow carries them."""
    start = schedule.prior_std(times[0]) * torch.tensor([-1.5, 0.3, 2.0]).double().view(3, 1, 1, 1)
    found = sampler(lambda x, t: data.denoise(schedule, x, t), schedule, start, times=times, noise=no_noise)
    return (found - data.flow_to_data(schedule, start, times[0])).abs().max()


@pytest.mark.parametrize("path", ["scaled_linear", "edm", "rectified_flow"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_sampler_converges_to_the_exact_flow_at_its_stated_order(name: str, path: str, data: Any) -> None:
    schedule, (sampler, curved, straight) = SCHEDULES[path], DETERMINISTIC[name]
    order = straight if path == "rectified_flow" else curved
    # Orders above 2 are seen before the few steps of lower order at the start outweigh the rest.
    counts = (100, 200) if order <= 2 else (60, 120)
    errors = torch.stack([exact_run(data, sampler, schedule, smooth_times(n, schedule)) for n in counts])
    assert errors[1] < (2e-2 if order == 1 else 1e-3)
    assert order - 0.4 < (errors[0] / errors[1]).log2() < order + 0.5


MULTISTEP: dict[str, tuple[Sampler, int]] = {
    "dpmpp_2m": (DPMSolverPP2M(), 2),
    "dpmpp_2m_sde_heun_eta_0": (DPMSolverPP2MSDE(eta=0.0, solver="heun"), 2),
    # Its curvature counts half, see there: third order would need all of it.
    "dpmpp_3m_sde_eta_0": (DPMSolverPP3MSDE(eta=0.0), 2),
    **{f"lms_{order}": (LMS(order=order), order) for order in (1, 2, 3, 4)},
    **{f"deis_{order}": (DEIS(order=order), order) for order in (1, 2, 3)},
}


@pytest.mark.parametrize("path", ["scaled_linear", "edm", "rectified_flow"])
@pytest.mark.parametrize("name", MULTISTEP)
def test_a_multistep_method_errs_by_its_order_plus_one_in_one_step_from_exact_answers(
    name: str, path: str, data: Any
) -> None:
    schedule, (sampler, order) = SCHEDULES[path], MULTISTEP[name]

    def error(size: float) -> Tensor:
        times = schedule.time_of(1 - size * torch.tensor([-3.0, -2.1, -1.0, 0.0, 1.2], dtype=torch.float64))
        x = torch.tensor([-1.5, 0.3, 2.0]).double().view(3, 1, 1, 1)
        data_end = data.flow_to_data(schedule, x, times[3])
        on_path = [flow_from_data(data, schedule, data_end, t) for t in times]
        process = Process(lambda x, t: data.denoise(schedule, x, t), schedule, no_noise, num_steps=99, steps_left=50)
        process.history.extend(
            Evaluation(t, data.denoise(schedule, point, t)) for t, point in zip(times[:3], on_path[:3], strict=True)
        )
        return (sampler.step(process, x, times[3], times[4]) - on_path[4]).abs().max()

    # Small enough for the order to show, large enough for the digits of double precision.
    size = 0.01 if order <= 2 else 0.04
    assert_close((error(size) / error(size / 2)).log2().item(), order + 1.0, rtol=0, atol=0.35)


def flow_from_data(data: Any, schedule: Schedule, x_0: Tensor, t: Tensor) -> Tensor:
    """The inverse of `Normal.flow_to_data`."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return alpha * data.mean + (x_0 - data.mean) / data.std * (alpha**2 * data.std**2 + sigma**2).sqrt()


def test_dpmpp_2m_wants_times_that_stop_short_of_t_min(data: Any) -> None:
    """Even times with t_min end in steps that grow in log(sigma / alpha), over which it extrapolates too far."""
    schedule = ScaledLinear()
    for num_steps in (8, 10, 20, 50):
        with_it, without, trailing = (
            exact_run(data, DPMSolverPP2M(), schedule, times(num_steps, schedule).double())
            for times in (Linspace(), Linspace(endpoint=False), Trailing())
        )
        first_order = exact_run(data, DDIM(), schedule, Linspace(endpoint=False)(num_steps, schedule).double())
        assert without < 0.8 * with_it
        assert without < 0.8 * first_order
        assert_close(without, trailing, rtol=0.1, atol=0)


@pytest.mark.parametrize("path", ["scaled_linear", "edm", "rectified_flow"])
@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_sampling_reproduces_the_moments_of_the_data(name: str, path: str, data: Any) -> None:
    schedule, shape = SCHEDULES[path], (30_000, 1, 1, 1)
    noise = seeded_noise(shape, torch.float64)
    start = noise() * schedule.prior_std(torch.tensor(schedule.t_max, dtype=torch.float64))
    times = smooth_times(250, schedule)
    found = STOCHASTIC[name](lambda x, t: data.denoise(schedule, x, t), schedule, start, times=times, noise=noise)
    assert_close(found.mean().item(), data.mean, rtol=0, atol=0.03)
    assert_close(found.std().item(), data.std, rtol=0.03, atol=0)


@pytest.mark.parametrize("path", ["scaled_linear", "edm", "rectified_flow"])
@pytest.mark.parametrize("num_steps", [1, 4])
def test_lcm_samples_a_perfect_consistency_model_in_any_number_of_steps(num_steps: int, path: str, data: Any) -> None:
    schedule, shape = SCHEDULES[path], (30_000, 1, 1, 1)
    noise, times = seeded_noise(shape, torch.float64), DistilledSteps()(num_steps, schedule).double()
    start_std = torch.sqrt((schedule.alpha(times[0]) * data.std) ** 2 + schedule.sigma(times[0]) ** 2)
    start = schedule.alpha(times[0]) * data.mean + start_std * noise()

    def consistent(x: Tensor, t: Tensor) -> Prediction:
        x_0 = data.flow_to_data(schedule, x, t)
        return Prediction(x_0, (x - schedule.alpha(t) * x_0) / schedule.sigma(t))

    found = LCM()(consistent, schedule, start, times=times, noise=noise)
    assert_close(found.mean().item(), data.mean, rtol=0, atol=0.01)
    assert_close(found.std().item(), data.std, rtol=0.01, atol=0)


def test_restarts_contract_the_error_of_a_wrong_start(data: Any) -> None:
    """Samples that start one standard deviation off end nearer to the data's mean with restarts than without."""
    schedule, shape = ScaledLinear(), (4_000, 1, 1, 1)
    off = {}
    for num_restarts in (0, 1, 8):
        noise = seeded_noise(shape, torch.float64)
        intervals = [Interval(0.1, 4.0, num_restarts=num_restarts, num_steps=20)] if num_restarts else []
        start = noise() + 1
        found = Restart(intervals=intervals)(
            lambda x, t: data.denoise(schedule, x, t), schedule, start, times=smooth_times(40, schedule), noise=noise
        )
        off[num_restarts] = abs(found.mean().item() - data.mean)
    # A restart to noise level 4 keeps 0.15 of the distance: it is the flow down to the data's own spread, 0.6.
    assert off[0] > 0.5 and off[1] < 0.3 * off[0] and off[8] < 0.05


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
    # A step to t = 0 that would ask half way or at its end asks once.
    expected = 10 * sampler.evaluations_per_step - (sampler.evaluations_per_step - 1)
    if isinstance(sampler, PLMS):
        expected += 1
    if isinstance(sampler, Restart):
        more = sum(1 + interval.num_restarts * interval.num_steps for interval in sampler.intervals)
        expected += sampler.evaluations_per_step * more
    assert len(asked) == expected
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


@pytest.mark.parametrize("name", SAMPLERS)
def test_only_samplers_that_look_back_depend_on_earlier_answers(name: str, data: Any) -> None:
    schedule, sampler = ScaledLinear(), SAMPLERS[name]
    times = Trailing()(10, schedule).double()
    x = seeded_noise((2, 1, 4, 4), torch.float64)()

    def step(history: list[Evaluation]) -> Tensor:
        noise = seeded_noise(x.shape, torch.float64)
        process = Process(lambda x, t: data.denoise(schedule, x, t), schedule, noise, num_steps=10, steps_left=6)
        process.history.extend(history)
        return sampler.step(process, x, times[4], times[5])

    answers = [Evaluation(t, data.denoise(schedule, x + 1, t)) for t in times[1:4]]
    # Of first order nothing looks back, whatever the class may.
    looks_back = sampler.looks_back and not (isinstance(sampler, LMS | DEIS) and sampler.order == 1)
    assert torch.equal(step([]), step(answers)) == (not looks_back)


WRONG: dict[str, Callable[[], Sampler]] = {
    "eta=1.5": lambda: DDIM(eta=1.5),
    "eta=-1.0": lambda: KDPM2(eta=-1.0),
    "eta=2.0": lambda: DPMSolverPP2MSDE(eta=2.0),
    "variance=medium": lambda: DDPM(variance="medium"),  # type: ignore[arg-type]
    "solver=euler": lambda: DPMSolverPP2MSDE(solver="euler"),  # type: ignore[arg-type]
    "variant=bh3": lambda: UniPC(variant="bh3"),  # type: ignore[arg-type]
    "order=0": lambda: UniPC(order=0),
    "order=4": lambda: DEIS(order=4),
    "order=5": lambda: LMS(order=5),
    "time_scale=0": lambda: LCM(time_scale=0),
    "sampler=UniPC": lambda: Restart(UniPC()),
    "sampler=LCM": lambda: Restart(LCM()),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_out_of_range_refuse_to_build(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^got sampler\.{name}\b.*expected"):
        WRONG[name]()


@pytest.mark.parametrize(("low", "high", "num_restarts"), [(0.0, 1.0, 1), (2.0, 1.0, 1), (0.1, 1.0, 0)])
def test_a_restart_that_goes_nowhere_refuses_to_build(low: float, high: float, num_restarts: int) -> None:
    with pytest.raises(ValueError, match=r"^got .*restart.*, expected"):
        Interval(low, high, num_restarts=num_restarts)


@pytest.mark.parametrize(("low", "high"), [(0.1, 20.0), (0.01, 1.0)])
def test_a_restart_outside_the_schedule_is_refused_in_the_first_step(low: float, high: float, data: Any) -> None:
    schedule, sampler = ScaledLinear(), Restart(intervals=[Interval(low, high)])
    states = sampler.trajectory(
        lambda x, t: data.denoise(schedule, x, t),
        schedule,
        torch.zeros(1, 1, 4, 4),
        times=Trailing()(10, schedule),
        noise=no_noise,
    )
    next(states)
    with pytest.raises(ValueError, match=rf"^got a restart from noise level {low} to {high:g} .*expected levels"):
        next(states)

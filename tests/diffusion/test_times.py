from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ldm.diffusion.schedules import EDM, Cosine, Linear, RectifiedFlow, ScaledLinear, Schedule
from ldm.diffusion.times import LogitNormal, LogNormal, Times, Uniform, UniformSteps


def fine_u(n: int = 100_000) -> Tensor:
    """The midpoints of n equal strata of (0, 1): averages over them are integrals over the distribution."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


@pytest.mark.parametrize(
    ("schedule", "low", "high"),
    [(RectifiedFlow(), 0.0, 1.0), (Linear(), 1e-3, 1.0), (EDM(), 0.002, 80.0)],
    ids=["rectified_flow", "linear", "edm"],
)
def test_uniform_times_have_the_moments_of_the_trained_interval(schedule: Schedule, low: float, high: float) -> None:
    t = Uniform()(fine_u(), schedule)
    assert_close(t.mean().item(), (low + high) / 2, rtol=1e-6, atol=0)
    assert_close(t.var().item(), (high - low) ** 2 / 12, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.8, 0.6)])
@pytest.mark.parametrize("schedule", [RectifiedFlow(), EDM()], ids=["rectified_flow", "edm"])
def test_logit_normal_times_are_normal_under_the_logit(mean: float, std: float, schedule: Schedule) -> None:
    logits = torch.logit(LogitNormal(mean=mean, std=std)(fine_u(), schedule) / schedule.t_max)
    assert_close(logits.mean().item(), mean, rtol=0, atol=1e-3)
    assert_close(logits.std().item(), std, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("p_mean", "p_std"), [(-1.2, 1.2), (-0.4, 1.0)])
@pytest.mark.parametrize(
    "schedule", [EDM(sigma_min=1e-4, sigma_max=1e4), RectifiedFlow()], ids=["edm", "rectified_flow"]
)
def test_log_normal_noise_levels_are_normal_under_the_logarithm(
    p_mean: float, p_std: float, schedule: Schedule
) -> None:
    logs = schedule.ratio(LogNormal(p_mean=p_mean, p_std=p_std)(fine_u(), schedule)).log()
    assert_close(logs.mean().item(), p_mean, rtol=0, atol=1e-3)
    assert_close(logs.std().item(), p_std, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "schedule", [Linear(), ScaledLinear(num_steps=40), Cosine()], ids=["linear", "short", "cosine"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_steps_hit_each_training_step_equally(schedule: Linear, dtype: torch.dtype) -> None:
    t = UniformSteps()(fine_u(10 * schedule.num_steps).to(dtype), schedule)
    counts = torch.bincount(schedule.network_time(t).round().long(), minlength=schedule.num_steps)
    # A float32 u may fall on the other side of an edge.
    assert_close(counts, torch.full_like(counts, 10), rtol=0, atol=0 if dtype == torch.float64 else 1)


@pytest.mark.parametrize("schedule", [EDM(), RectifiedFlow()], ids=type)
def test_uniform_steps_need_a_discrete_schedule(schedule: Schedule) -> None:
    with pytest.raises(ValueError, match=r"^got times uniform_steps .*expected.*set times=uniform"):
        UniformSteps().check(schedule)


@pytest.mark.parametrize(
    ("times", "schedule"),
    [
        *product([Uniform(), LogitNormal(), LogNormal()], [Linear(), Cosine(), EDM(), RectifiedFlow()]),
        *product([UniformSteps()], [Linear(), Cosine()]),
    ],
    ids=type,
)
def test_times_stay_within_what_is_trained_and_rise_with_u(times: Times, schedule: Schedule) -> None:
    times.check(schedule)
    u = torch.cat([torch.tensor([1e-6]), torch.linspace(0.001, 0.999, 500), torch.tensor([1 - 1e-6])])
    t = times(u, schedule)
    assert t.dtype == torch.float32
    assert bool((t > 0).all()) and bool((t >= schedule.t_min).all()) and bool((t <= schedule.t_max).all())
    assert bool((t.diff() >= 0).all()) and t[0] < t[-1]


@pytest.mark.parametrize("make", [lambda: LogitNormal(std=0.0), lambda: LogNormal(p_std=-1.0)], ids=["logit", "log"])
def test_distributions_without_width_refuse_to_build(make: Callable[[], Times]) -> None:
    with pytest.raises(ValueError, match=r"^got times\.(p_)?std=.*expected a positive number"):
        make()


def test_the_lowest_steps_alone_are_those_with_the_least_noise() -> None:
    """SDXL's refiner learns 200 of 1000 (Podell et al. 2023, section 2.5)."""
    schedule, times = Linear(), UniformSteps(num_lowest=200)
    times.check(schedule)
    index = times(torch.linspace(0.0005, 0.9995, 1000), schedule) * 1000 - 1
    assert sorted(set(index.round().int().tolist())) == list(range(200))
    with pytest.raises(ValueError, match=r"^got times\.num_lowest=2000, expected at most 1000"):
        UniformSteps(num_lowest=2000).check(schedule)
    with pytest.raises(ValueError, match=r"^got times\.num_lowest=0"):
        UniformSteps(num_lowest=0)

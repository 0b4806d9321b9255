import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from torch import Tensor
from torch.testing import assert_close

from ldm.diffusion.schedules import EDM, Cosine, DiscreteSchedule, Linear, RectifiedFlow, ScaledLinear, Schedule

SCHEDULES: dict[str, Schedule] = {
    "linear": Linear(),
    "scaled_linear": ScaledLinear(),
    "zero_terminal_snr": ScaledLinear(zero_terminal_snr=True),
    "cosine": Cosine(),
    "short_linear": Linear(num_steps=20, beta_start=0.01, beta_end=0.4),
    "edm": EDM(),
    "rectified_flow": RectifiedFlow(),
}
VARIANCE_PRESERVING = [name for name, schedule in SCHEDULES.items() if isinstance(schedule, DiscreteSchedule)]

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
every_discrete_schedule = pytest.mark.parametrize("name", VARIANCE_PRESERVING)


def inner_times(schedule: Schedule) -> Tensor:
    """Times strictly inside the segments of a discrete schedule, and evenly over a continuous one, float64."""
    if isinstance(schedule, DiscreteSchedule):
        return (torch.arange(schedule.num_steps, dtype=torch.float64) + 0.37) / schedule.num_steps
    return torch.linspace(0.01, 0.99, 99, dtype=torch.float64) * schedule.t_max


def training_times(schedule: DiscreteSchedule, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.arange(schedule.num_steps) + 1).to(dtype) / schedule.num_steps


@every_schedule
def test_derivatives_agree_with_finite_differences(schedule: Schedule) -> None:
    t = inner_times(schedule)
    # The first segment of a discrete schedule has sigma ~ sqrt(t), where differences need a step far below t.
    h = 1e-4 * t.clamp(max=1 / getattr(schedule, "num_steps", 1))
    for function, derivative in ((schedule.alpha, schedule.alpha_dot), (schedule.sigma, schedule.sigma_dot)):
        difference = (function(t + h) - function(t - h)) / (2 * h)
        assert_close(derivative(t), difference, rtol=1e-5, atol=1e-7)


@every_schedule
def test_time_zero_is_the_data(schedule: Schedule) -> None:
    zero = torch.zeros((), dtype=torch.float64)
    assert_close((schedule.alpha(zero), schedule.sigma(zero)), (torch.ones_like(zero), zero))


@every_schedule
def test_noise_grows_and_data_does_not_grow_with_time(schedule: Schedule) -> None:
    t = torch.linspace(0, schedule.t_max, 400, dtype=torch.float64)
    assert bool((schedule.sigma(t).diff() > 0).all())
    assert bool((schedule.alpha(t).diff() <= 0).all())


@every_schedule
def test_time_of_inverts_the_noise_level(schedule: Schedule) -> None:
    t = inner_times(schedule)
    assert_close(schedule.time_of(schedule.ratio(t)), t, rtol=1e-9, atol=1e-12)


@every_schedule
def test_single_precision_agrees_with_double(schedule: Schedule) -> None:
    t = inner_times(schedule).float()
    for function in (schedule.alpha, schedule.sigma, schedule.alpha_dot, schedule.sigma_dot, schedule.network_time):
        value = function(t)
        assert value.dtype == torch.float32
        assert_close(value.double(), function(t.double()), rtol=2e-5, atol=1e-6)


@every_schedule
def test_times_keep_any_shape(schedule: Schedule) -> None:
    t = inner_times(schedule)[:12]
    assert_close(schedule.alpha(t.view(3, 1, 4)).flatten(), schedule.alpha(t))
    assert schedule.sigma(t[0]).shape == ()


@every_schedule
def test_the_sampling_coordinates_follow_the_tangent(schedule: Schedule) -> None:
    """For a fixed pair (x_0, eps), x / m is a straight line over tau with the tangent as its slope."""
    x_0, eps = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-1.3, dtype=torch.float64)
    t = inner_times(schedule)
    scale, tau = schedule.coordinates(t)
    scaled = (schedule.alpha(t) * x_0 + schedule.sigma(t) * eps) / scale
    slope = scaled.diff() / tau.diff()
    assert_close(slope, schedule.tangent(x_0, eps).expand_as(slope), rtol=1e-6, atol=0)


@every_discrete_schedule
def test_discrete_schedules_preserve_variance(name: str) -> None:
    schedule = SCHEDULES[name]
    t = inner_times(schedule)
    assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t))


@every_discrete_schedule
def test_alphas_cumprod_are_alpha_squared_at_the_training_steps(name: str) -> None:
    schedule = SCHEDULES[name]
    assert isinstance(schedule, DiscreteSchedule)
    assert_close(schedule.alphas_cumprod, schedule.alpha(training_times(schedule)) ** 2, rtol=1e-10, atol=0)


@every_discrete_schedule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_network_is_told_the_integer_index_at_training_steps(name: str, dtype: torch.dtype) -> None:
    schedule = SCHEDULES[name]
    assert isinstance(schedule, DiscreteSchedule)
    index = torch.arange(schedule.num_steps).to(dtype)
    assert_close(schedule.network_time(training_times(schedule, dtype)), index, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        (Linear(), {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        (ScaledLinear(), {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        (Cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
        (
            ScaledLinear(num_steps=400, beta_start=0.0015, beta_end=0.0195),
            {"beta_schedule": "scaled_linear", "num_train_timesteps": 400, "beta_start": 0.0015, "beta_end": 0.0195},
        ),
    ],
    ids=["linear", "scaled_linear", "cosine", "400_steps"],
)
def test_tables_equal_those_of_diffusers(schedule: DiscreteSchedule, options: dict[str, float | str]) -> None:
    # Theirs are cumulative products in float32.
    expected = DDPMScheduler(**options).alphas_cumprod.double()
    assert_close(schedule.alphas_cumprod, expected, rtol=2e-4, atol=1e-9)


def test_zero_terminal_snr_equals_that_of_diffusers() -> None:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    assert_close(ScaledLinear(zero_terminal_snr=True).alphas_cumprod, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    ("schedule", "alpha_bar", "source"),
    [
        (Linear(), 4.04e-5, "Ho et al. 2020: nothing is left but 0.6 % of the data's amplitude"),
        (ScaledLinear(), 0.00466, "Lin et al. 2024, table 1: Stable Diffusion's terminal sqrt(alpha-bar) is 0.0683"),
        (Cosine(), 2.43e-9, "Lin et al. 2024, table 1: cosine's terminal sqrt(alpha-bar) is 4.93e-5"),
    ],
    ids=["linear", "scaled_linear", "cosine"],
)
def test_terminal_alpha_bar_is_the_published_one(schedule: DiscreteSchedule, alpha_bar: float, source: str) -> None:
    assert schedule.alphas_cumprod[-1].item() == pytest.approx(alpha_bar, rel=3e-3), source


def test_stable_diffusion_spans_the_published_noise_levels() -> None:
    ratio = ScaledLinear().ratio(torch.tensor([1e-3, 1.0], dtype=torch.float64))
    assert_close(ratio, torch.tensor([0.029167, 14.6146], dtype=torch.float64), rtol=1e-3, atol=0)


def test_edm_scales_input_and_time_as_published() -> None:
    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    schedule = EDM(sigma_data=0.5)
    assert_close(schedule.input_scale(sigma), 1 / torch.sqrt(sigma**2 + 0.25))
    assert_close(schedule.network_time(sigma), torch.log(sigma) / 4)
    assert (schedule.t_min, schedule.t_max) == (0.002, 80.0)


def test_rectified_flow_is_the_straight_path() -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    schedule = RectifiedFlow(time_scale=1000.0)
    assert_close((schedule.alpha(t), schedule.sigma(t), schedule.network_time(t)), (1 - t, t, 1000 * t))


@pytest.mark.parametrize(
    ("name", "is_zero"),
    [("linear", False), ("scaled_linear", False), ("cosine", False), ("zero_terminal_snr", True), ("edm", False),
     ("rectified_flow", True)],
)  # fmt: skip
def test_zero_terminal_snr_is_recognised(name: str, is_zero: bool) -> None:
    assert SCHEDULES[name].has_zero_terminal_snr is is_zero


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "short_linear"])
def test_the_prior_has_the_deviation_of_the_noise_at_the_last_time(name: str) -> None:
    schedule = SCHEDULES[name]
    t = torch.tensor(schedule.t_max, dtype=torch.float64)
    assert schedule.prior_std(t).item() == pytest.approx(schedule.sigma(t).item(), rel=3e-3)


def test_on_rectified_flow_an_earlier_start_has_less_noise() -> None:
    t = torch.tensor(0.8, dtype=torch.float64)
    assert RectifiedFlow().prior_std(t).item() == pytest.approx(0.8)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Linear(beta_start=0.0),
        lambda: Linear(beta_end=1.5),
        lambda: ScaledLinear(num_steps=1),
        lambda: EDM(sigma_min=0.0),
        lambda: EDM(sigma_min=2.0, sigma_max=1.0),
        lambda: EDM(sigma_data=0.0),
        lambda: RectifiedFlow(time_scale=0.0),
    ],
)
def test_impossible_schedules_refuse_to_build(make: type[Schedule]) -> None:
    with pytest.raises(ValueError, match=r"^got .*expected"):
        make()


def test_log_alpha_is_straight_between_training_steps() -> None:
    schedule = Linear()
    ends = schedule.alpha(torch.tensor([0.5, 0.501], dtype=torch.float64)).log()
    middle = schedule.alpha(torch.tensor(0.5005, dtype=torch.float64)).log()
    assert math.isclose(middle.item(), ends.mean().item(), rel_tol=1e-12)

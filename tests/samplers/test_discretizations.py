import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ldm.diffusion.schedules import EDM, Cosine, DiscreteSchedule, Linear, RectifiedFlow, ScaledLinear, Schedule
from ldm.samplers import Beta, Discretization, Exponential, Karras, Linspace, Trailing

SCHEDULES = [Linear(), ScaledLinear(zero_terminal_snr=True), EDM(), RectifiedFlow()]
ONE_TO_EIGHTY = Karras(sigma_min=1.0, sigma_max=80.0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["linear", "zero_terminal_snr", "edm", "rectified_flow"])
@pytest.mark.parametrize(
    "discretization", [Linspace(), Trailing(), ONE_TO_EIGHTY], ids=["linspace", "trailing", "karras"]
)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50, 400])
def test_times_fall_from_noise_to_zero(discretization: Discretization, schedule: Schedule, num_steps: int) -> None:
    times = discretization(num_steps, schedule)
    assert times.shape == (num_steps + 1,) and times.dtype == torch.float32
    assert bool((times.diff() < 0).all()) and times[-1] == 0
    start = schedule.time_of(torch.tensor(80.0)).item() if discretization is ONE_TO_EIGHTY else schedule.t_max
    assert times[0].item() == pytest.approx(start, rel=1e-6)


@pytest.mark.parametrize("discretization", [Linspace(), Trailing()], ids=["linspace", "trailing"])
@pytest.mark.parametrize("num_steps", [3, 30, 999, 1000])
def test_times_of_discrete_schedules_are_training_steps(discretization: Discretization, num_steps: int) -> None:
    schedule = Linear()
    index = schedule.network_time(discretization(num_steps, schedule)[:-1].double())
    assert_close(index, index.round(), rtol=0, atol=1e-4)


def test_linspace_visits_the_first_and_the_last_training_step() -> None:
    index = Linear().network_time(Linspace()(10, Linear())[:-1].double())
    assert_close(index, torch.arange(999, -1, -111).double(), rtol=0, atol=1e-4)


def test_linspace_comes_to_its_last_step_evenly() -> None:
    """SiT, table 10: 250 evaluations, of which the last is from 0.04 to 0."""
    times = Linspace(last_step=0.04)(250, RectifiedFlow())
    assert_close(times[[0, -2, -1]], torch.tensor([1.0, 0.04, 0.0]))
    assert_close(times[:-1].diff(), torch.full((249,), -0.96 / 249))
    with pytest.raises(ValueError, match=r"^got discretization\.last_step=0\.04 on Linear, expected null"):
        Linspace(last_step=0.04)(250, Linear())
    with pytest.raises(ValueError, match=r"a time between 0\.002 and 80"):
        Linspace(last_step=100.0)(250, EDM())
    with pytest.raises(ValueError, match=r"^got 1 sampling step with discretization\.last_step"):
        Linspace(last_step=0.04)(1, RectifiedFlow())


def test_trailing_starts_at_the_last_training_step_and_ends_a_stride_before_the_data() -> None:
    index = Linear().network_time(Trailing()(10, Linear())[:-1].double())
    assert_close(index, torch.arange(999, 0, -100).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rho", [3.0, 7.0])
def test_karras_noise_levels_are_those_of_the_paper(rho: float) -> None:
    i, n = np.arange(18), 18
    expected = (80 ** (1 / rho) + i / (n - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    assert_close(Karras(rho=rho)(n, EDM())[:-1], torch.from_numpy(expected).float())


@pytest.mark.parametrize("schedule", [Linear(), ScaledLinear()], ids=["linear", "scaled_linear"])
def test_karras_spans_what_a_discrete_schedule_was_trained_on(schedule: DiscreteSchedule) -> None:
    times = Karras()(10, schedule)
    assert_close(times[[0, -2]], torch.tensor([1.0, 1 / schedule.num_steps]))


@pytest.mark.parametrize(
    ("discretization", "schedule"),
    [
        (Karras(), RectifiedFlow()),
        (Karras(), ScaledLinear(zero_terminal_snr=True)),
        (Karras(), Cosine()),
        (Karras(sigma_min=2.0, sigma_max=1.0), EDM()),
        (Karras(sigma_min=0.0), EDM()),
    ],
    ids=["flow", "zero_snr", "cosine", "crossed", "zero"],
)
def test_karras_without_two_finite_noise_levels_is_refused(discretization: Karras, schedule: Schedule) -> None:
    with pytest.raises(ValueError, match=r"^got noise levels .*expected.*discretization\.sigma_m.*trailing"):
        discretization(10, schedule)


@pytest.mark.parametrize("schedule", [ScaledLinear(), EDM()], ids=["scaled_linear", "edm"])
def test_karras_above_the_trained_noise_levels_is_refused(schedule: Schedule) -> None:
    """Times beyond the last one would all be the last one, and steps between equal times divide by zero."""
    with pytest.raises(ValueError, match=r"^got noise levels .*expected.*discretization\.sigma_max"):
        Karras(sigma_max=200.0)(10, schedule)


@pytest.mark.parametrize("num_steps", [0, -3])
@pytest.mark.parametrize("discretization", [Linspace(), Trailing(), Karras()], ids=["linspace", "trailing", "karras"])
def test_fewer_steps_than_one_are_refused(discretization: Discretization, num_steps: int) -> None:
    with pytest.raises(ValueError, match=f"^got {num_steps} sampling steps, expected at least 1"):
        discretization(num_steps, EDM())


def test_more_steps_than_were_trained_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^got 41 sampling steps, expected at most the 40"):
        Trailing()(41, ScaledLinear(num_steps=40))


def test_karras_needs_a_positive_rho() -> None:
    with pytest.raises(ValueError, match=r"^got discretization\.rho=0\.0, expected"):
        Karras(rho=0.0)


def test_exponential_noise_levels_fall_by_one_factor() -> None:
    levels = Exponential()(18, EDM())[:-1]
    assert_close(levels, torch.logspace(np.log10(80), np.log10(0.002), 18), rtol=1e-5, atol=0)


@pytest.mark.parametrize("over", ["level", "time"])
def test_beta_spreads_levels_or_times_by_its_quantiles(over: str) -> None:
    schedule = ScaledLinear()
    times = Beta(alpha=0.5, beta=0.5, over=over)(11, schedule)[:-1].double()  # type: ignore[arg-type]
    spread = times if over == "time" else schedule.ratio(times)
    # The arcsine distribution, whose quantiles are sin^2.
    expected = np.sin(np.linspace(1, 0, 11) * np.pi / 2) ** 2
    assert_close(((spread - spread[-1]) / (spread[0] - spread[-1])).numpy(), expected, rtol=0, atol=1e-5)
    assert_close(times[[0, -1]], torch.tensor([1.0, 1e-3]).double())


@pytest.mark.parametrize(
    ("settings", "text"),
    [({"alpha": 0.0}, "alpha=0"), ({"beta": -1.0}, "alpha=0.6, beta=-1"), ({"over": "x"}, "over=x")],
)
def test_beta_out_of_range_refuses_to_build(settings: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=rf"^got discretization\.{text}"):
        Beta(**settings)  # type: ignore[arg-type]

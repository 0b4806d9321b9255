from itertools import product

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ldm.diffusion import parameterizations, schedules
from ldm.diffusion.parameterizations import X0, Epsilon, Parameterization, V, Velocity
from ldm.diffusion.schedules import Cosine, Linear, RectifiedFlow, ScaledLinear, Schedule

SCHEDULES: dict[str, Schedule] = {
    "linear": Linear(),
    "scaled_linear": ScaledLinear(),
    "zero_terminal_snr": ScaledLinear(zero_terminal_snr=True),
    "cosine": Cosine(),
    "edm": schedules.EDM(sigma_data=0.7),
    "rectified_flow": RectifiedFlow(),
}
PARAMETERIZATIONS: dict[str, Parameterization] = {
    "epsilon": Epsilon(),
    "x_0": X0(),
    "v": V(),
    "velocity": Velocity(),
    "edm": parameterizations.EDM(),
}
REFUSED = {
    ("epsilon", "zero_terminal_snr"),
    ("epsilon", "rectified_flow"),
    *(("edm", schedule) for schedule in SCHEDULES if schedule != "edm"),
}
ACCEPTED = [pair for pair in product(PARAMETERIZATIONS, SCHEDULES) if pair not in REFUSED]


def every_time(schedule: Schedule) -> Tensor:
    """(N, 1) times, both ends of what is trained included, float64."""
    start = max(schedule.t_min, 1e-3)
    ends = torch.tensor([start, schedule.t_max], dtype=torch.float64)
    return torch.cat([ends, torch.linspace(start, schedule.t_max, 77, dtype=torch.float64)[1:-1]])[:, None]


def random_pair(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, n, 5, generator=generator, dtype=torch.float64)
    return x_0, eps


@pytest.mark.parametrize(("parameterization", "schedule"), ACCEPTED)
def test_the_pair_comes_back_from_the_output(parameterization: str, schedule: str) -> None:
    meaning, path = PARAMETERIZATIONS[parameterization], SCHEDULES[schedule]
    meaning.check(path)
    t = every_time(path)
    x_0, eps = random_pair(len(t))
    x_t = path.alpha(t) * x_0 + path.sigma(t) * eps
    found = meaning.solve(x_t, meaning.output(x_0, eps, t, path), t, path)
    assert_close(found, (x_0, eps), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("parameterization", "schedule"), ACCEPTED)
def test_the_determinant_carries_an_error_of_the_output_over(parameterization: str, schedule: str) -> None:
    meaning, path = PARAMETERIZATIONS[parameterization], SCHEDULES[schedule]
    t = every_time(path)
    x_t, output = random_pair(len(t))
    error = 1e-3
    before, after = (meaning.solve(x_t, output + e, t, path) for e in (0.0, error))
    determinant = meaning.determinant(t, path)
    expected = (-path.sigma(t) / determinant * error, path.alpha(t) / determinant * error)
    for old, new, change in zip(before, after, expected, strict=True):
        assert_close(new - old, change.expand_as(old), rtol=1e-5, atol=1e-9 * old.abs().max().item())


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "zero_terminal_snr", "cosine"])
def test_v_is_alpha_eps_minus_sigma_x_0(schedule: str) -> None:
    path = SCHEDULES[schedule]
    t = every_time(path)
    x_0, eps = random_pair(len(t))
    assert_close(V().output(x_0, eps, t, path), path.alpha(t) * eps - path.sigma(t) * x_0)


@pytest.mark.parametrize("schedule", ["linear", "zero_terminal_snr", "cosine"])
def test_x_0_is_alpha_x_t_minus_sigma_v_on_variance_preserving_paths(schedule: str) -> None:
    path = SCHEDULES[schedule]
    t = every_time(path)
    x_t, v = random_pair(len(t))
    expected = (path.alpha(t) * x_t - path.sigma(t) * v, path.sigma(t) * x_t + path.alpha(t) * v)
    assert_close(V().solve(x_t, v, t, path), expected, rtol=1e-9, atol=1e-9)


def test_velocity_on_rectified_flow_is_noise_minus_data() -> None:
    path = RectifiedFlow()
    t = every_time(path)
    x_0, eps = random_pair(len(t))
    assert_close(Velocity().output(x_0, eps, t, path), eps - x_0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_velocity_is_the_derivative_of_the_path(schedule: str) -> None:
    path = SCHEDULES[schedule]
    # Inside the segments of the discrete schedules, whose derivative jumps between them.
    t = (torch.arange(10, 900, 50, dtype=torch.float64)[:, None] + 0.5) / 1000 * path.t_max
    x_0, eps = random_pair(len(t))
    h = 1e-7 * path.t_max
    later, earlier = (path.alpha(t + d) * x_0 + path.sigma(t + d) * eps for d in (h, -h))
    assert_close(Velocity().output(x_0, eps, t, path), (later - earlier) / (2 * h), rtol=1e-5, atol=1e-5)


def test_edm_preconditioning_follows_from_its_principles() -> None:
    """c_skip minimises c_out, and with unit-normal-scaled data both input and target have unit variance (B.6)."""
    sigma_data, sigma = 0.7, torch.logspace(-2.6, 1.9, 50, dtype=torch.float64)
    path, edm = schedules.EDM(sigma_data=sigma_data), parameterizations.EDM()
    variance = sigma**2 + sigma_data**2
    c_skip, c_out = sigma_data**2 / variance, sigma * sigma_data / variance.sqrt()
    output, x_t = random_pair(len(sigma))
    column = sigma[:, None]
    x_0, _ = edm.solve(x_t, output, column, path)
    assert_close(x_0, c_skip[:, None] * x_t + c_out[:, None] * output)
    a, b = edm.coefficients(sigma, path)
    assert_close(a**2 * sigma_data**2 + b**2, torch.ones_like(sigma))
    assert_close(path.input_scale(sigma) ** 2 * variance, torch.ones_like(sigma))


@pytest.mark.parametrize(
    ("parameterization", "schedule", "remedy"),
    [(p, s, "parameterization=v" if p == "epsilon" else "schedule=edm") for p, s in sorted(REFUSED)],
)
def test_ill_posed_pairs_are_refused_with_a_remedy(parameterization: str, schedule: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=f"^got parameterization {parameterization} .*expected.*{remedy}"):
        PARAMETERIZATIONS[parameterization].check(SCHEDULES[schedule])

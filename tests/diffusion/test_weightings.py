from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ldm.diffusion import Denoiser, parameterizations, schedules, times, weightings
from ldm.diffusion.parameterizations import X0, Epsilon, Parameterization, V, Velocity
from ldm.diffusion.schedules import Cosine, Linear, RectifiedFlow, ScaledLinear, Schedule
from ldm.diffusion.weightings import P2, MinSNR, Unit, Weighting

Formula = Callable[[Tensor], Tensor]


def weight(t: Tensor, schedule: Schedule, parameterization: Parameterization, weighting: Weighting) -> Tensor:
    denoiser = Denoiser(
        nn.Identity(),
        schedule=schedule,
        parameterization=parameterization,
        weighting=weighting,
        times=times.Uniform(),
    )
    return denoiser.loss_weight(t)


def trained_times(schedule: Schedule) -> Tensor:
    return torch.linspace(max(schedule.t_min, 1e-3), schedule.t_max, 50, dtype=torch.float64)


PUBLISHED: list[tuple[str, Parameterization, Weighting, Formula]] = [
    # Hang et al. 2023, section 3.4 and, for v, diffusers' min-SNR recipe
    ("min_snr_epsilon", Epsilon(), MinSNR(gamma=5.0), lambda snr: snr.clamp(max=5.0) / snr),
    ("min_snr_x_0", X0(), MinSNR(gamma=5.0), lambda snr: snr.clamp(max=5.0)),
    ("min_snr_v", V(), MinSNR(gamma=5.0), lambda snr: snr.clamp(max=5.0) / (snr + 1)),
    # Choi et al. 2022, eq. 8, for a network that predicts eps
    ("p2_epsilon", Epsilon(), P2(gamma=0.5, k=1.0), lambda snr: 1 / (1.0 + snr) ** 0.5),
    ("p2_v", V(), P2(gamma=1.0, k=1.0), lambda snr: snr / (snr + 1) / (1.0 + snr)),
    ("unit", V(), Unit(), torch.ones_like),
]


@pytest.mark.parametrize("schedule", [Linear(), ScaledLinear(), Cosine()], ids=["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize(
    ("parameterization", "weighting", "formula"), [row[1:] for row in PUBLISHED], ids=[row[0] for row in PUBLISHED]
)
def test_weights_of_the_output_are_the_published_ones(
    schedule: Schedule, parameterization: Parameterization, weighting: Weighting, formula: Formula
) -> None:
    t = trained_times(schedule)
    expected = formula(schedule.snr(t))
    assert_close(weight(t, schedule, parameterization, weighting), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_weighting_gives_every_noise_level_the_output_weight_one(sigma_data: float) -> None:
    schedule = schedules.EDM(sigma_data=sigma_data)
    t = torch.logspace(-2.6, 1.9, 50, dtype=torch.float64)
    found = weight(t, schedule, parameterizations.EDM(), weightings.EDM(sigma_data=sigma_data))
    assert_close(found, torch.ones_like(t))


@pytest.mark.parametrize("weighting", [MinSNR(), P2(), weightings.EDM()], ids=["min_snr", "p2", "edm"])
@pytest.mark.parametrize(
    ("schedule", "parameterization"),
    [
        (Linear(), Epsilon()),
        (Cosine(), Velocity()),
        (RectifiedFlow(), Velocity()),
        (schedules.EDM(), parameterizations.EDM()),
    ],
    ids=["linear", "cosine", "rectified_flow", "edm"],
)
def test_a_weighted_loss_is_the_same_whatever_the_network_predicts(
    weighting: Weighting, schedule: Schedule, parameterization: Parameterization
) -> None:
    """The loss of a pair (x_0, eps) that is off by a consistent error is a fact of that pair, not of its encoding."""
    t = trained_times(schedule)[:-1]
    x_t, x_0, wrong_x_0 = torch.randn(3, len(t), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(meaning: Parameterization) -> Tensor:
        true, wrong = (
            meaning.output(x, (x_t - schedule.alpha(t) * x) / schedule.sigma(t), t, schedule) for x in (x_0, wrong_x_0)
        )
        return weight(t, schedule, meaning, weighting) * (true - wrong) ** 2

    assert_close(loss(parameterization), loss(X0()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("weighting", [MinSNR(), P2(), weightings.EDM(), Unit()], ids=["min_snr", "p2", "edm", "unit"])
@pytest.mark.parametrize("parameterization", [X0(), V(), Velocity()], ids=["x_0", "v", "velocity"])
@pytest.mark.parametrize("schedule", [RectifiedFlow(), ScaledLinear(zero_terminal_snr=True)], ids=["flow", "discrete"])
def test_weights_are_finite_where_no_signal_is_left(
    schedule: Schedule, parameterization: Parameterization, weighting: Weighting
) -> None:
    found = weight(torch.ones(1), schedule, parameterization, weighting)
    assert bool(torch.isfinite(found).all()) and bool((found >= 0).all())


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: P2(k=0.0), "weighting.k"),
        (lambda: MinSNR(gamma=0.0), "weighting.gamma"),
        (lambda: weightings.EDM(sigma_data=0.0), "weighting.sigma_data"),
    ],
    ids=["p2", "min_snr", "edm"],
)
def test_weightings_that_would_divide_by_zero_or_vanish_refuse_to_build(
    make: Callable[[], Weighting], name: str
) -> None:
    with pytest.raises(ValueError, match=f"^got {name}=0.0, expected"):
        make()

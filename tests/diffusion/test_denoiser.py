import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ldm.diffusion import Conditioning, Denoiser, parameterizations, schedules, times, weightings

COND = Conditioning(vector=torch.zeros(6, 1, dtype=torch.float64))


class Fixed(nn.Module):
    """Remembers what it is given and answers with a constant."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self.x, self.t = x, t
        return self.answer


def edm_denoiser(answer: Tensor, *, sigma_data: float = 0.5) -> Denoiser:
    return Denoiser(
        Fixed(answer),
        schedule=schedules.EDM(sigma_data=sigma_data),
        parameterization=parameterizations.EDM(),
        weighting=weightings.EDM(sigma_data=sigma_data),
        times=times.LogNormal(),
    )


def test_the_edm_loss_is_equation_2_of_the_paper() -> None:
    """E lambda(sigma) ||D(y + n; sigma) - y||^2 with lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2."""
    generator = torch.Generator().manual_seed(0)
    y, eps, answer = torch.randn(3, 6, 2, 4, 4, generator=generator, dtype=torch.float64)
    sigma = torch.logspace(-2, 1.5, 6, dtype=torch.float64)
    denoiser = edm_denoiser(answer)
    s, variance = sigma.view(-1, 1, 1, 1), (sigma**2 + 0.25).view(-1, 1, 1, 1)
    noisy = y + s * eps
    denoised = 0.25 / variance * noisy + s * 0.5 / variance.sqrt() * answer
    expected = (variance / (s * 0.5) ** 2 * (denoised - y) ** 2).mean((1, 2, 3))
    assert_close(denoiser.loss(y, eps, sigma, COND), expected)
    assert_close(denoiser(noisy, sigma, COND).x_0, denoised)
    assert_close(denoiser.network.x, noisy / variance.sqrt())
    assert_close(denoiser.network.t, sigma.log() / 4)


def test_an_uncertainty_that_is_learned_weighs_noise_levels() -> None:
    """L / exp(u) + u (Karras et al. 2024, eq. 21), least where u is the logarithm of the error."""
    generator = torch.Generator().manual_seed(0)
    y, eps, answer = torch.randn(3, 6, 2, 4, 4, generator=generator, dtype=torch.float64)
    sigma = torch.logspace(-2, 1.5, 6, dtype=torch.float64)
    denoiser = edm_denoiser(answer)
    plain = denoiser.loss(y, eps, sigma, COND)
    asked: list[Tensor] = []

    class Uncertain(Fixed):
        learns_uncertainty = True

        def __init__(self, uncertainty: Tensor) -> None:
            super().__init__(answer)
            self.uncertainty = uncertainty

        def log_variance(self, t: Tensor) -> Tensor:
            asked.append(t)
            return self.uncertainty

    def loss(uncertainty: Tensor) -> Tensor:
        denoiser.network = Uncertain(uncertainty)
        return denoiser.loss(y, eps, sigma, COND)

    u = torch.linspace(-1, 1, 6, dtype=torch.float64)
    assert_close(loss(u), plain / u.exp() + u)
    assert_close(asked[0], sigma.log() / 4)
    best = loss(plain.log())
    assert (best <= torch.stack([loss(plain.log() + 0.1), loss(plain.log() - 0.1)])).all()


def test_a_perfect_output_has_no_loss() -> None:
    x_0, eps = torch.randn(2, 6, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoiser = Denoiser(
        Fixed(eps - x_0),
        schedule=schedules.RectifiedFlow(),
        parameterization=parameterizations.Velocity(),
        weighting=weightings.Unit(),
        times=times.Uniform(),
    )
    t = torch.linspace(0.1, 1.0, 6, dtype=torch.float64)
    assert_close(denoiser.loss(x_0, eps, t, COND), torch.zeros_like(t))


@pytest.mark.parametrize("shape", [(1,), (5,), (6, 1), ()])
def test_times_that_would_broadcast_over_the_wrong_axis_are_refused(shape: tuple[int, ...]) -> None:
    x = torch.zeros(6, 2, 4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^got times of shape .* for 6 samples, expected \(6,\)"):
        edm_denoiser(x)(x, torch.ones(shape, dtype=torch.float64), COND)


@pytest.mark.parametrize(
    ("parts", "remedy"),
    [
        ({"parameterization": parameterizations.Epsilon()}, "parameterization=v"),
        ({"parameterization": parameterizations.EDM()}, "schedule=edm"),
        ({"times": times.UniformSteps()}, "times=uniform"),
    ],
    ids=["epsilon", "edm", "uniform_steps"],
)
def test_parts_that_do_not_fit_refuse_to_build(parts: dict[str, object], remedy: str) -> None:
    fitting: dict[str, object] = {
        "schedule": schedules.RectifiedFlow(),
        "parameterization": parameterizations.Velocity(),
        "weighting": weightings.Unit(),
        "times": times.Uniform(),
    }
    with pytest.raises(ValueError, match=f"^got .*expected.*{remedy}"):
        Denoiser(nn.Identity(), **(fitting | parts))  # type: ignore[arg-type]

"""Learned variances: their bounds, and the loss that teaches them, from the tables of betas of the papers."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from ldm.diffusion import Conditioning, Denoiser, Guidance, Prediction, PredictionWithVariance
from ldm.diffusion.parameterizations import Epsilon, Velocity
from ldm.diffusion.schedules import Linear, RectifiedFlow
from ldm.diffusion.times import Uniform, UniformSteps
from ldm.diffusion.variance import between
from ldm.diffusion.weightings import Unit

STEPS, SHAPE = 40, (4, 2, 3, 3)
COND = Conditioning(vector=torch.zeros(SHAPE[0], 1))
BETAS = torch.linspace(1e-3, 0.2, STEPS, dtype=torch.float64)
ALPHA_BAR = torch.cumprod(1 - BETAS, 0)


class Says(nn.Module):
    """A network whose output and v are parameters, the same for every sample."""

    learned_variance = True

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.output = nn.Parameter(torch.randn(SHAPE[1:], generator=generator, dtype=torch.float64))
        self.share = nn.Parameter(0.7 * torch.randn(SHAPE[1:], generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return torch.cat([self.output, self.share]).expand(len(x), -1, -1, -1)


def make_denoiser(**options: float) -> Denoiser:
    schedule = Linear(num_steps=STEPS, beta_start=1e-3, beta_end=0.2)
    return Denoiser(
        Says(), schedule=schedule, parameterization=Epsilon(), weighting=Unit(), times=UniformSteps(), **options
    )


def samples() -> tuple[Tensor, Tensor]:
    """x_0, with values at both ends of a picture's range, and eps."""
    x_0, eps = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()
    return x_0.clamp(-1, 1), eps


def bound_by_tables(denoiser: Denoiser, x_0: Tensor, eps: Tensor, index: int) -> Tensor:
    """L_t in bits a value (B,) of the training step `index` (Ho et al. 2020, eq. 5 to 8 and 13), variance learned."""
    network = denoiser.network
    before = ALPHA_BAR[index - 1] if index else torch.ones((), dtype=torch.float64)
    beta, now = BETAS[index], ALPHA_BAR[index]
    x_t = now.sqrt() * x_0 + (1 - now).sqrt() * eps

    def posterior_mean(clean: Tensor) -> Tensor:
        of_clean, of_x_t = before.sqrt() * beta, (1 - beta).sqrt() * (1 - before)
        return (of_clean * clean + of_x_t * x_t) / (1 - now)

    smalls = BETAS[1:] * (1 - ALPHA_BAR[:-1]) / (1 - ALPHA_BAR[1:])
    small = smalls[max(index, 1) - 1]  # that of the first step is 0, and taken from the second
    fraction = (network.share + 1) / 2
    std = torch.exp(0.5 * (fraction * beta.log() + (1 - fraction) * small.log()))
    believed = Normal(posterior_mean((x_t - (1 - now).sqrt() * network.output) / now.sqrt()), std)
    if index:
        return kl_divergence(Normal(posterior_mean(x_0), small.sqrt()), believed).flatten(1).mean(1) / math.log(2)
    upper = torch.where(x_0 > 0.999, torch.ones_like(x_0), believed.cdf(x_0 + 1 / 255))
    lower = torch.where(x_0 < -0.999, torch.zeros_like(x_0), believed.cdf(x_0 - 1 / 255))
    return -(upper - lower).clamp_min(1e-12).log().flatten(1).mean(1) / math.log(2)


@pytest.mark.parametrize("index", [0, 1, 2, 17, STEPS - 1])
def test_the_hybrid_loss_is_the_simple_one_and_the_bound_of_the_papers(index: int) -> None:
    """L_simple + lambda L_vlb, lambda = 0.001, whose T terms are drawn one at a time (Nichol & Dhariwal, eq. 16)."""
    (x_0, eps), denoiser = samples(), make_denoiser()
    t = torch.full((SHAPE[0],), (index + 1) / STEPS, dtype=torch.float64)
    simple = (denoiser.network.output - eps).square().flatten(1).mean(1)

    loss = denoiser.loss(x_0, eps, t, COND)

    assert_close(loss, simple + 1e-3 * STEPS * bound_by_tables(denoiser, x_0, eps, index), rtol=1e-8, atol=1e-10)


def test_training_steps_may_differ_from_sample_to_sample() -> None:
    (x_0, eps), denoiser = samples(), make_denoiser()
    t = torch.tensor([1, 2, 9, 40], dtype=torch.float64) / STEPS
    alone = [denoiser.loss(x_0[i : i + 1], eps[i : i + 1], t[i : i + 1], COND[i : i + 1]) for i in range(4)]
    assert_close(denoiser.loss(x_0, eps, t, COND), torch.cat(alone))


@pytest.mark.parametrize("index", [0, 20])
def test_the_bound_teaches_the_variance_and_leaves_the_output_alone(index: int) -> None:
    (x_0, eps), (both, simple) = samples(), (make_denoiser(bound_weight=1.0), make_denoiser(bound_weight=0.0))
    t = torch.full((SHAPE[0],), (index + 1) / STEPS, dtype=torch.float64)
    for denoiser in (both, simple):
        denoiser.loss(x_0, eps, t, COND).sum().backward()
    assert_close(both.network.output.grad, simple.network.output.grad)
    assert both.network.share.grad.abs().mean() > 1e-2
    assert simple.network.share.grad.abs().max() == 0


def test_the_variance_runs_from_the_small_bound_to_the_large_one_in_its_logarithm() -> None:
    small, large = torch.tensor(0.01), torch.tensor(0.09)
    assert_close(between(torch.tensor([-1.0, 0.0, 1.0]), small, large), torch.tensor([0.01, 0.03, 0.09]))


def test_a_prediction_with_a_variance_is_still_a_pair() -> None:
    x_0, _ = samples()
    prediction = make_denoiser()(x_0, torch.full((4,), 0.5, dtype=torch.float64), COND)
    believed, noise = prediction
    assert isinstance(prediction, PredictionWithVariance)
    assert_close((believed, noise), (prediction.x_0, prediction.eps))
    assert prediction.share.shape == x_0.shape


def test_guidance_keeps_the_variance_of_the_conditional_model() -> None:
    class Told(Says):
        def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
            assert cond.vector is not None
            return super().forward(x, t, cond) * cond.vector.view(-1, 1, 1, 1)

    denoiser = make_denoiser()
    denoiser.network = Told()
    cond, uncond = (Conditioning(vector=torch.full((4, 1), value, dtype=torch.float64)) for value in (2.0, 0.5))
    guided = Guidance(scale=3.0)(denoiser, cond, uncond)(samples()[0], torch.tensor(0.5, dtype=torch.float64))
    assert isinstance(guided, PredictionWithVariance)
    assert_close(guided.share, (2 * denoiser.network.share).expand_as(guided.share))
    assert_close(guided.eps, ((3 * 2 - 2 * 0.5) * denoiser.network.output).expand_as(guided.eps))


def test_on_a_schedule_without_training_steps_the_variance_is_left_out() -> None:
    """SiT has DiT's network, and trains the velocity alone."""
    flow = Denoiser(Says(), schedule=RectifiedFlow(), parameterization=Velocity(), weighting=Unit(), times=Uniform())
    (x_0, eps), t = samples(), torch.linspace(0.2, 0.9, 4, dtype=torch.float64)
    assert_close(flow.loss(x_0, eps, t, COND), (flow.network.output - eps + x_0).square().flatten(1).mean(1))
    assert type(flow(x_0, t, COND)) is Prediction

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ldm.diffusion import (
    Autoguidance,
    ClassifierGuidance,
    Conditioning,
    Denoiser,
    Guidance,
    PredictionWithVariance,
)
from ldm.diffusion.parameterizations import V, Velocity
from ldm.diffusion.schedules import Linear, RectifiedFlow, ScaledLinear
from ldm.diffusion.times import Uniform
from ldm.diffusion.weightings import Unit


class Shifting(nn.Module):
    """A network that adds the condition's vector to a bent x, and counts its calls and samples."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        assert cond.vector is not None
        self.asked.append(len(x))
        return torch.tanh(x) * cond.vector.view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1) / 1000


class Unled(nn.Module):
    """A network that takes class ids and says nothing of them."""

    def __init__(self, *, learned_variance: bool = False) -> None:
        super().__init__()
        self.learned_variance = learned_variance

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return torch.cat([torch.tanh(x), x.sin()], dim=1) if self.learned_variance else torch.tanh(x)


def make_denoiser(*, flow: bool = False) -> Denoiser:
    return Denoiser(
        Shifting(),
        schedule=RectifiedFlow() if flow else Linear(),
        parameterization=Velocity() if flow else V(),
        weighting=Unit(),
        times=Uniform(),
    )


def conditions(*values: float) -> Conditioning:
    return Conditioning(vector=torch.tensor(values, dtype=torch.float64))


X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = torch.tensor(0.5, dtype=torch.float64)
COND, UNCOND = conditions(1.0, 2.0), conditions(0.3, -0.4)


def outputs(denoiser: Denoiser) -> tuple[Tensor, Tensor]:
    """The network's conditional and unconditional output at (X, T)."""
    times = T.expand(len(X))
    return denoiser.output(X, times, COND), denoiser.output(X, times, UNCOND)


def asked(denoiser: Denoiser) -> list[int]:
    assert isinstance(denoiser.network, Shifting)
    return denoiser.network.asked


def test_scale_one_is_the_conditional_model_asked_once() -> None:
    denoiser = make_denoiser()
    expected = denoiser(X, T.expand(2), COND)
    asked(denoiser).clear()
    assert_close(Guidance(scale=1.0)(denoiser, COND, UNCOND)(X, T), expected)
    assert asked(denoiser) == [2]


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 7.5])
@pytest.mark.parametrize("flow", [False, True], ids=["linear", "rectified_flow"])
def test_the_prediction_is_extrapolated_from_the_unconditional_one(scale: float, flow: bool) -> None:
    denoiser = make_denoiser(flow=flow)
    cond, uncond = denoiser(X, T.expand(2), COND), denoiser(X, T.expand(2), UNCOND)
    asked(denoiser).clear()
    guided = Guidance(scale=scale)(denoiser, COND, UNCOND)(X, T)
    assert asked(denoiser) == [4]
    # The output is affine in (x_0, eps), so guiding it is guiding both.
    assert_close(guided.x_0, uncond.x_0 + scale * (cond.x_0 - uncond.x_0))
    assert_close(guided.eps, uncond.eps + scale * (cond.eps - uncond.eps))


def test_rescale_one_restores_the_deviation_of_the_conditional_output() -> None:
    cond, uncond = outputs(make_denoiser())
    rescaled = Guidance(scale=7.5, rescale=1.0).combine(cond, uncond)
    plain = Guidance(scale=7.5).combine(cond, uncond)
    assert_close(rescaled.flatten(1).std(1), cond.flatten(1).std(1))
    assert bool((plain.flatten(1).std(1) > 1.5 * cond.flatten(1).std(1)).all())
    half = Guidance(scale=7.5, rescale=0.5).combine(cond, uncond)
    assert_close(half, (plain + rescaled) / 2)


def test_rescale_keeps_an_output_of_zero() -> None:
    """A network with zero-initialised last layer, at the first step of training, must not become NaN."""
    zero = torch.zeros_like(X)
    assert_close(Guidance(scale=3.0, rescale=0.7).combine(zero, zero), zero)


@pytest.mark.parametrize(
    ("interval", "acts"),
    [([0.0, 0.9], False), ([0.9, 1.1], True), ([1.0, 50.0], True), ([1.1, 50.0], False), (None, True)],
)
def test_guidance_acts_within_its_interval_of_noise_levels(interval: Sequence[float] | None, acts: bool) -> None:
    denoiser = make_denoiser(flow=True)
    cond = denoiser(X, T.expand(2), COND)
    asked(denoiser).clear()
    guided = Guidance(scale=4.0, interval=interval)(denoiser, COND, UNCOND)(X, T)  # sigma / alpha = 1 at t = 0.5
    assert asked(denoiser) == ([4] if acts else [2])
    assert torch.equal(guided.x_0, cond.x_0) is not acts


def test_guidance_without_an_interval_acts_where_no_data_is_left() -> None:
    assert Guidance(scale=4.0).acts_at(torch.tensor(1.0), make_denoiser(flow=True))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"rescale": -0.1}, "rescale"),
        ({"rescale": 1.1}, "rescale"),
        ({"interval": [-1.0, 2.0]}, "interval"),
        ({"interval": [2.0, 1.0]}, "interval"),
        ({"interval": [1.0, 1.0]}, "interval"),
        ({"interval": [1.0]}, "interval"),
    ],
)
def test_settings_out_of_range_refuse_to_build(options: dict[str, float | list[float]], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^got guidance\.{name}=.*expected"):
        Guidance(scale=2.0, **options)  # type: ignore[arg-type]


def test_channels_beyond_those_that_are_guided_are_the_conditional_ones() -> None:
    denoiser = make_denoiser(flow=True)
    cond, uncond = outputs(denoiser)
    combined = Guidance(scale=4.0, channels=2).combine(cond, uncond)
    assert_close(combined[:, :2], Guidance(scale=4.0).combine(cond, uncond)[:, :2])
    assert_close(combined[:, 2:], cond[:, 2:], rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"^got guidance\.channels=0, expected at least 1"):
        Guidance(channels=0)


class Telling(nn.Module):
    """A classifier of two classes whose logits are the mean of x and its negative, told apart by time."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1) * (1 + t / 1000)
        return torch.stack([mean, -mean], dim=1)


def classes(*labels: int) -> Conditioning:
    return Conditioning(vector=torch.tensor(labels))


def test_a_worse_model_is_led_away_from_and_each_is_asked_once() -> None:
    model, guide = make_denoiser(), make_denoiser()
    good, bad = model.output(X, T.expand(2), COND), guide.output(X, T.expand(2), COND)
    assert isinstance(guide.network, Shifting)
    guide.network.register_forward_hook(lambda module, inputs, output: 0.5 * output)
    asked(model).clear()
    asked(guide).clear()
    guided = Autoguidance(guide, scale=2.5)(model, COND, UNCOND)(X, T)
    assert (asked(model), asked(guide)) == ([2], [2])
    expected = model.predict(X, T.expand(2), 0.5 * bad + 2.5 * (good - 0.5 * bad))
    assert_close(guided, expected)


def test_a_guide_that_knows_no_conditions_is_told_none() -> None:
    class Untold(nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
            assert not cond.parts()
            return torch.zeros_like(x)

    guide, model = make_denoiser(), make_denoiser()
    guide.network = Untold()
    guided = Autoguidance(guide, is_told=False, scale=3.0)(model, COND, UNCOND)(X, T)
    assert_close(guided, model.predict(X, T.expand(2), 3.0 * model.output(X, T.expand(2), COND)))


def test_a_guide_of_another_process_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^got guidance\.guide of another schedule or parameterization .*expected"):
        Autoguidance(make_denoiser(flow=True), scale=2.0)(make_denoiser(), COND, UNCOND)


def test_a_classifier_shifts_the_noise_by_its_gradient() -> None:
    denoiser = make_denoiser()
    denoiser.network = Unled()
    told = classes(0, 1)
    plain = denoiser(X, T.expand(2), told)
    guided = ClassifierGuidance(Telling(), classifier_scale=4.0)(denoiser, told, told)(X, T)
    # log p(0) = -log(1 + exp(-2 m)), whose slope in the mean m is 2 p(1); the mean has one over its size of each value.
    slope = 1 + denoiser.schedule.network_time(T) / 1000
    mean = X.flatten(1).mean(1) * slope
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64)
    gradient = sign * 2 * torch.sigmoid(-2 * sign * mean) * slope / X[0].numel()
    alpha, sigma = denoiser.schedule.alpha(T), denoiser.schedule.sigma(T)
    assert_close(guided.eps, plain.eps - 4.0 * sigma * gradient.view(-1, 1, 1, 1).expand_as(X))
    assert_close(alpha * guided.x_0 + sigma * guided.eps, X)


def test_a_classifier_keeps_the_variance_and_does_nothing_where_no_data_is_left() -> None:
    flow = make_denoiser(flow=True)
    flow.network = Unled()
    end = torch.tensor(1.0, dtype=torch.float64)
    told = classes(0, 1)
    guidance = ClassifierGuidance(Telling(), classifier_scale=4.0)
    assert_close(guidance(flow, told, told)(X, end), flow(X, end.expand(2), told))
    learning = make_denoiser()
    learning.network = Unled(learned_variance=True)
    guided = guidance(learning, told, told)(X, T)
    assert isinstance(guided, PredictionWithVariance)
    assert_close(guided.share, learning.answer(X, T.expand(2), told).share)


def test_a_classifier_does_nothing_at_zero_terminal_snr_where_its_gradient_would_be_all_of_the_picture() -> None:
    denoiser = make_denoiser()
    denoiser.network, denoiser.schedule = Unled(), ScaledLinear(zero_terminal_snr=True)
    end, told = torch.tensor(1.0, dtype=torch.float64), classes(0, 1)
    guided = ClassifierGuidance(Telling(), classifier_scale=4.0)(denoiser, told, told)(X, end)
    assert_close(guided, denoiser(X, end.expand(2), told))


def test_a_classifier_needs_class_ids() -> None:
    with pytest.raises(ValueError, match=r"^got guidance\.classifier with a model that is not told class ids"):
        ClassifierGuidance(Telling())(make_denoiser(), COND, UNCOND)

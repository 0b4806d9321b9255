from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ldm.diffusion import Conditioning, Denoiser, Guidance
from ldm.diffusion.parameterizations import V, Velocity
from ldm.diffusion.schedules import Linear, RectifiedFlow
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

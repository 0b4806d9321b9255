"""DDPM with a variance that the network says, and with beliefs clipped to the range of pixels, beside diffusers."""

import diffusers
import pytest
import torch
from diffusers_states import at_indices, generator, noise_like, start, wavy
from torch import Tensor, nn
from torch.testing import assert_close

from ldm.diffusion import Conditioning, Denoiser, Guidance
from ldm.diffusion.parameterizations import Epsilon
from ldm.diffusion.schedules import Linear
from ldm.diffusion.times import Uniform
from ldm.diffusion.weightings import Unit
from ldm.samplers import DDPM


class WavyWithVariance(nn.Module):
    learned_variance = True

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return both(x, t.view(-1, 1, 1, 1))


def both(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([wavy(x, t), torch.cos(2 * x + t / 500)], dim=1)


def make_denoiser(network: nn.Module) -> Denoiser:
    return Denoiser(network, schedule=Linear(), parameterization=Epsilon(), weighting=Unit(), times=Uniform())


@pytest.mark.parametrize("clip", [None, 1.0], ids=["free", "clipped"])
@pytest.mark.parametrize("num_steps", [10, 100, 1000])
def test_a_learned_variance_steps_as_in_diffusers(num_steps: int, clip: float | None) -> None:
    scheduler = diffusers.DDPMScheduler(
        beta_start=1e-4, beta_end=0.02, variance_type="learned_range", clip_sample=clip is not None
    )
    scheduler.set_timesteps(num_steps)
    source, theirs = generator(), start()
    for t in scheduler.timesteps:
        theirs = scheduler.step(both(theirs, t), t, theirs, generator=source, return_dict=False)[0]

    x, denoiser = start(), make_denoiser(WavyWithVariance())
    cond = Conditioning(vector=torch.zeros(len(x), 1))
    denoise = Guidance()(denoiser, cond, cond)
    at = at_indices(scheduler.timesteps).float()
    ours = DDPM(variance="learned", clip=clip)(denoise, denoiser.schedule, x, times=at, noise=noise_like(x))

    assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


def test_a_model_without_a_variance_is_refused() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
            return x

    denoiser, x = make_denoiser(Plain()), start()
    cond = Conditioning(vector=torch.zeros(len(x), 1))
    with pytest.raises(ValueError, match=r"^got sampler\.variance=learned .* set sampler\.variance=small"):
        DDPM(variance="learned")(
            Guidance()(denoiser, cond, cond), denoiser.schedule, x, times=torch.tensor([1.0, 0.5]), noise=noise_like(x)
        )


@pytest.mark.parametrize("options", [{"variance": "none"}, {"clip": 0.0}])
def test_settings_that_mean_nothing_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"^got sampler\.\w+="):
        DDPM(**options)  # type: ignore[arg-type]

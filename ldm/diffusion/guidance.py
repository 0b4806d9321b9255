"""Guidance: from a denoiser and two conditions to one function that a sampler can call.

Away from the unconditional output (`Guidance`), away from the output of a worse model (`Autoguidance`), or along the
gradient of a classifier (`ClassifierGuidance`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ldm.diffusion.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser, Prediction, PredictionWithVariance, per_sample
from ldm.diffusion.schedules import NO_DATA

Denoise = Callable[[Tensor, Tensor], Prediction]
"""denoise(x_t (B, C, H, W), t ()) -> Prediction: all that a sampler knows of a model."""


class Guidance:
    """F = F_uncond + scale (F_cond - F_uncond) (Ho & Salimans 2022, with scale = 1 + w: 1 is no guidance).

    Args:
        scale: guidance scale; 0 ignores the condition.
        rescale: 0 to 1, how far the guided output takes back the standard deviation of the conditional one
            (Lin et al. 2024, section 3.4).
        interval: noise levels sigma / alpha, lowest and highest, between which guidance acts; outside it the
            conditional output is used (Kynkäänniemi et al. 2024).
        channels: how many of the output's channels are guided, from the first; None is all. DiT and SiT guide 3 of 4
            (Peebles & Xie 2023, appendix A).

    Attributes:
        leads_from_null: whether it does nothing where there is no condition.
    """

    leads_from_null = True

    def __init__(
        self,
        *,
        scale: float = 1.0,
        rescale: float = 0.0,
        interval: Sequence[float] | None = None,
        channels: int | None = None,
    ) -> None:
        if interval is not None and len(interval) != 2:
            raise ValueError(f"got guidance.interval={list(interval)}, expected two noise levels, lowest and highest")
        low, high = (0.0, math.inf) if interval is None else interval
        if not 0 <= rescale <= 1:
            raise ValueError(f"got guidance.rescale={rescale}, expected a number from 0 to 1")
        if not 0 <= low < high:
            raise ValueError(f"got guidance.interval=[{low}, {high}], expected 0 <= lowest < highest noise level")
        if channels is not None and channels < 1:
            raise ValueError(f"got guidance.channels={channels}, expected at least 1, or null for all")
        self.scale, self.rescale, self.interval, self.channels = scale, rescale, (low, high), channels

    def __call__(self, denoiser: Denoiser, cond: Conditioning, uncond: Conditioning) -> Denoise:
        """The guided model; both conditions are of the same B samples."""

        def denoise(x_t: Tensor, t: Tensor) -> Prediction:
            times = t.to(x_t).expand(len(x_t))
            if not self.acts_at(t, denoiser):
                return denoiser(x_t, times, cond)
            output, away, share = self.outputs(denoiser, x_t, times, cond=cond, uncond=uncond)
            return denoiser.predict(x_t, times, self.combine(output, away), share)

        return denoise

    def outputs(
        self, denoiser: Denoiser, x_t: Tensor, t: Tensor, *, cond: Conditioning, uncond: Conditioning
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(F under the condition, F to lead away from, v of the former where the model learns a variance)."""
        both = Conditioning.cat([cond, uncond])
        output, share, _ = denoiser.answer(x_t.repeat(2, 1, 1, 1), t.repeat(2), both)
        told, untold = output.chunk(2)
        return told, untold, None if share is None else share.chunk(2)[0]

    def acts_at(self, t: Tensor, denoiser: Denoiser) -> bool:
        """Whether the output to lead away from is needed at time t ()."""
        level = denoiser.schedule.ratio(t).item()
        return self.scale != 1.0 and self.interval[0] <= level <= self.interval[1]

    def combine(self, cond: Tensor, uncond: Tensor) -> Tensor:
        """The guided output from the two, each (B, C, H, W)."""
        guided = uncond + self.scale * (cond - uncond)
        if self.channels is not None:
            guided = torch.cat([guided[:, : self.channels], cond[:, self.channels :]], dim=1)
        if self.rescale == 0:
            return guided
        # The floor is for outputs of zero, which an untrained network gives.
        rescaled = guided * (_std(cond) / _std(guided).clamp_min(1e-12))
        return torch.lerp(guided, rescaled, self.rescale)


class Autoguidance(Guidance):
    """F = F_guide + scale (F - F_guide): away from a model that is smaller, or trained for a shorter time.

    A guide that knows no conditions makes it the guidance of EDM2, whose unconditional model is a network of its own.

    Args:
        guide: the other model, of the same process.
        is_told: whether the guide is told the condition.
        guide_sha256: of its weights, for protocols.
        scale, rescale, interval, channels: see `Guidance`.

    Raises:
        ValueError: in `__call__`, a guide whose outputs mean something else.

    Source: Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself", eq. 3.
    """

    leads_from_null = False

    def __init__(
        self,
        guide: Denoiser,
        *,
        is_told: bool = True,
        guide_sha256: str | None = None,
        scale: float = 1.0,
        rescale: float = 0.0,
        interval: Sequence[float] | None = None,
        channels: int | None = None,
    ) -> None:
        super().__init__(scale=scale, rescale=rescale, interval=interval, channels=channels)
        self.guide, self.is_told, self.guide_sha256 = guide, is_told, guide_sha256

    def __call__(self, denoiser: Denoiser, cond: Conditioning, uncond: Conditioning) -> Denoise:
        if not self.guide.has_process_of(denoiser):
            raise ValueError(
                "got guidance.guide of another schedule or parameterization than the model's, expected the same, so "
                "that both outputs mean one thing; choose a guide that was trained alike"
            )
        return super().__call__(denoiser, cond, uncond)

    def outputs(
        self, denoiser: Denoiser, x_t: Tensor, t: Tensor, *, cond: Conditioning, uncond: Conditioning
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        output, share, _ = denoiser.answer(x_t, t, cond)
        return output, self.guide.output(x_t, t, cond if self.is_told else Conditioning()), share


class ClassifierGuidance(Guidance):
    """eps - scale sigma grad log p(y | x_t), of a classifier of noisy samples (Dhariwal & Nichol 2021, eq. 14).

    It acts on the prediction, and so under every sampler; where no data is left it does nothing.

    Args:
        classifier: forward(x (B, C, H, W), t (B,)) -> logits (B, K), told what a network is told.
        classifier_scale: s of the paper.
        classifier_sha256: of its weights, for protocols.
        interval: see `Guidance`.

    Raises:
        ValueError: in `__call__`, conditions without class ids.
    """

    leads_from_null = False

    def __init__(
        self,
        classifier: nn.Module,
        *,
        classifier_scale: float = 1.0,
        classifier_sha256: str | None = None,
        interval: Sequence[float] | None = None,
    ) -> None:
        super().__init__(interval=interval)
        self.classifier, self.classifier_scale = classifier, classifier_scale
        self.classifier_sha256 = classifier_sha256

    def __call__(self, denoiser: Denoiser, cond: Conditioning, uncond: Conditioning) -> Denoise:
        labels = cond.vector
        if labels is None or labels.dtype != torch.int64:
            raise ValueError(
                "got guidance.classifier with a model that is not told class ids, expected conditioner=class_ids; "
                "guide this one with guidance.scale"
            )

        def denoise(x_t: Tensor, t: Tensor) -> Prediction:
            times = t.to(x_t).expand(len(x_t))
            prediction: Prediction = denoiser(x_t, times, cond)
            alpha, sigma = (
                factor(per_sample(times, x_t)) for factor in (denoiser.schedule.alpha, denoiser.schedule.sigma)
            )
            within = self.interval[0] <= denoiser.schedule.ratio(t).item() <= self.interval[1]
            if not within or bool((alpha < NO_DATA).any()):
                return prediction
            eps = prediction.eps - self.classifier_scale * sigma * self.gradient(denoiser, x_t, times, labels)
            x_0 = (x_t - sigma * eps) / alpha
            if isinstance(prediction, PredictionWithVariance):
                return PredictionWithVariance(x_0, eps, prediction.share)
            return Prediction(x_0, eps)

        return denoise

    def gradient(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """d log p(label | x_t) / d x_t, (B, C, H, W), for labels (B,)."""
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            logits = self.classifier(
                x * per_sample(denoiser.schedule.input_scale(t), x), denoiser.schedule.network_time(t)
            )
            chosen = logits.float().log_softmax(1).gather(1, labels[:, None])
            return torch.autograd.grad(chosen.sum(), x)[0]


def _std(x: Tensor) -> Tensor:
    return x.flatten(1).std(1).view(-1, 1, 1, 1)

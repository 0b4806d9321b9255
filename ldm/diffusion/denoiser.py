"""The denoiser: a network, and what its output means."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor, nn

from ldm.diffusion.conditioning import Conditioning
from ldm.diffusion.parameterizations import Parameterization
from ldm.diffusion.schedules import DiscreteSchedule, Schedule
from ldm.diffusion.times import Times
from ldm.diffusion.variance import variational_bound
from ldm.diffusion.weightings import Weighting

Distance = Literal["square", "absolute"]


class Prediction(NamedTuple):
    """What the model believes of x_t = alpha x_0 + sigma eps; both of the shape of x_t."""

    x_0: Tensor
    eps: Tensor


class PredictionWithVariance(Prediction):
    """A prediction, a pair like any other, of a model that also says the variance of a step back in time.

    Attributes:
        share: v, of the shape of x_t: where the variance lies between its bounds, see `ldm.diffusion.variance`.
    """

    share: Tensor

    def __new__(cls, x_0: Tensor, eps: Tensor, share: Tensor) -> Self:
        prediction = super().__new__(cls, x_0, eps)
        prediction.share = share
        return prediction


class Answer(NamedTuple):
    """What the network says of x_t (B, C, H, W), in float32 also under autocast.

    Attributes:
        output: F, of the shape of x_t.
        share: v, of the shape of x_t, where the network learns a variance; see `ldm.diffusion.variance`.
        given: (B, 1, H, W), where the network dropped patches: 1 where it answered, 0 where F says nothing.
    """

    output: Tensor
    share: Tensor | None = None
    given: Tensor | None = None


class Denoiser(nn.Module):
    """Turns a network's output into (x_0, eps), and a batch into a loss.

    Args:
        network: forward(x (B, C, H, W), t (B,), cond) -> (B, C, H, W); with an attribute `learned_variance` that is
            true (B, 2C, H, W), of which the second half says the variance; while an attribute `drops_patches` is true
            (B, C + 1, H, W), of which the last channel is 1 where it answered, and 0 elsewhere.
        schedule, parameterization, weighting, times: the diffusion process, configured here once; a sampler takes
            the schedule from here.
        distance: what the loss takes of the error of a value: its "square", or the "absolute" error, as LDM's models of
            churches, layouts, masks and semantic maps were trained (`loss_type: l1`).
        bound_weight: of the variational bound, beside the squared error, where the network learns a variance
            (lambda of Nichol & Dhariwal 2021, eq. 16) on a schedule of training steps. On others, as in SiT, what it
            says of the variance is not trained.

    Raises:
        ValueError: the parts do not fit each other, or there is no such distance.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        schedule: Schedule,
        parameterization: Parameterization,
        weighting: Weighting,
        times: Times,
        distance: Distance = "square",
        bound_weight: float = 1e-3,
    ) -> None:
        super().__init__()
        if distance not in get_args(Distance):
            raise ValueError(
                f"got model.denoiser.distance={distance!r}, expected one of {', '.join(get_args(Distance))}"
            )
        parameterization.check(schedule)
        times.check(schedule)
        self.network = network
        self.schedule = schedule
        self.parameterization = parameterization
        self.weighting = weighting
        self.times = times
        self.distance = distance
        self.bound_weight = bound_weight

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Prediction:
        """The pair (x_0, eps) for x_t (B, C, H, W) at times t (B,)."""
        answer = self.answer(x_t, t, cond)
        return self.predict(x_t, t, answer.output, answer.share)

    def output(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """F, what the network says, in float32 also under autocast."""
        return self.answer(x_t, t, cond).output

    def answer(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Answer:
        """F, and what else the network says."""
        x_in = x_t * per_sample(self.schedule.input_scale(t), x_t)
        output = self.network(x_in, self.schedule.network_time(t), cond).to(x_t.dtype)
        if getattr(self.network, "drops_patches", False):
            return Answer(output[:, :-1], given=output[:, -1:])
        if not getattr(self.network, "learned_variance", False):
            return Answer(output)
        output, share = output.chunk(2, dim=1)
        return Answer(output, share if isinstance(self.schedule, DiscreteSchedule) else None)

    def predict(self, x_t: Tensor, t: Tensor, output: Tensor, share: Tensor | None = None) -> Prediction:
        """The pair that an output F stands for, with v where there is one."""
        pair = self.parameterization.solve(x_t, output, per_sample(t, x_t), self.schedule)
        return Prediction(*pair) if share is None else PredictionWithVariance(*pair, share)

    def has_process_of(self, other: Denoiser) -> bool:
        """Whether another model's x_t and output mean the same at every time."""
        own, theirs = self.schedule, other.schedule
        if type(self.parameterization) is not type(other.parameterization) or own.t_max != theirs.t_max:
            return False
        # Within the times that any schedule allows.
        t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64) * own.t_max
        a, b = (
            torch.stack([*self.parameterization.coefficients(t, one), one.alpha(t), one.sigma(t)])
            for one in (own, theirs)
        )
        return torch.allclose(a, b)

    def noised(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x_0 + sigma eps at times t (B,)."""
        t = per_sample(t, x_0)
        return self.schedule.alpha(t) * x_0 + self.schedule.sigma(t) * eps

    def loss(self, x_0: Tensor, eps: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The weighted squared, or absolute, error of the output, mean over (C, H, W) where there is one: (B,).

        A network that learns the uncertainty u of each noise level turns an error e into e / exp(u) + u
        (Karras et al. 2024, eq. 21): all levels then weigh the same, however hard they are.
        """
        target = self.parameterization.output(x_0, eps, per_sample(t, x_0), self.schedule)
        x_t = self.noised(x_0, eps, t)
        output, share, given = self.answer(x_t, t, cond)
        error = output - target
        distances = error.square() if self.distance == "square" else error.abs()
        loss = self.loss_weight(t) * (distances.flatten(1).mean(1) if given is None else mean_where(given, distances))
        if share is not None:
            loss = loss + self.variance_loss(x_0, eps, self.predict(x_t, t, output), share=share, t=t)
        network: Any = self.network
        if not getattr(network, "learns_uncertainty", False):
            return loss
        uncertainty = network.log_variance(self.schedule.network_time(t))
        return loss / uncertainty.exp() + uncertainty

    def variance_loss(self, x_0: Tensor, eps: Tensor, prediction: Prediction, *, share: Tensor, t: Tensor) -> Tensor:
        """What teaches the variance (B,): bound_weight times the whole bound, of which t is one of the T terms."""
        assert isinstance(self.schedule, DiscreteSchedule)
        term = variational_bound(x_0, eps, prediction, share=share, t=t, schedule=self.schedule)
        return self.bound_weight * self.schedule.num_steps * term

    def loss_weight(self, t: Tensor) -> Tensor:
        """The weight (B,) of the squared error of the output, carried over from the space of the weighting."""
        weight = self.weighting(self.schedule.snr(t))
        if self.weighting.space == "output":
            return weight
        determinant = self.parameterization.determinant(t, self.schedule)
        part = self.schedule.sigma(t) if self.weighting.space == "x_0" else self.schedule.alpha(t)
        return weight * (part / determinant) ** 2


def per_sample(t: Tensor, x: Tensor) -> Tensor:
    """t (B,) as (B, 1, 1, 1), so that it cannot broadcast over the wrong axis of x (B, C, H, W)."""
    if t.shape != x.shape[:1]:
        raise ValueError(f"got times of shape {tuple(t.shape)} for {len(x)} samples, expected ({len(x)},)")
    return t.view(-1, *[1] * (x.dim() - 1))


def mean_where(given: Tensor, values: Tensor) -> Tensor:
    """The mean (B,) of values (B, C, H, W) over the places where given (B, 1, H, W) is 1; it is 0 elsewhere."""
    return (given * values).mean(1).flatten(1).sum(1) / given.flatten(1).sum(1)

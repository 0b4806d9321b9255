"""Between models of other projects and what samples here: a pipeline of one, or one of a pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ldm.conditioners import Conditioner
from ldm.diffusion import Denoiser, Guidance
from ldm.diffusion.parameterizations import Parameterization
from ldm.diffusion.schedules import DiscreteSchedule
from ldm.generation import Pipeline, SamplingSettings
from ldm.interop import Family, Origin, PretrainedModel
from ldm.interop.conditioning import conditioner_kind
from ldm.interop.families import recognise
from ldm.interop.model import PARAMETERIZATIONS, CarriedConditioner, betas_of, schedule_of
from ldm.interop.resolve import CUSTOM
from ldm.networks import UNet
from ldm.samplers import DDIM, Euler, Leading, Trailing

# How far a betas table may be off one of the known kinds: float32 is 1e-7.
TOLERANCE = 1e-9


def settings_of(family: Family) -> SamplingSettings:
    """How a family is sampled where nobody says otherwise: as its authors did, deterministically."""
    is_xl = (family.text or "") in ("sdxl", "refiner")
    guidance = Guidance(scale=family.guidance_scale, rescale=0.7 if family.zero_terminal_snr else 0.0)
    if family.zero_terminal_snr:
        # The last training step holds no data at all, and only times that begin there make use of that.
        return SamplingSettings(DDIM(), Trailing(), guidance, family.num_steps, family.image_size)
    if is_xl:
        return SamplingSettings(Euler(), Leading(end="zero"), guidance, family.num_steps, family.image_size)
    return SamplingSettings(DDIM(), Leading(), guidance, family.num_steps, family.image_size)


def pipeline_of(model: PretrainedModel, *, dtype: torch.dtype | None = torch.float32) -> Pipeline:
    """A model of another project, ready to sample.

    Args:
        dtype: of the weights; None leaves them as the file has them.
    """
    if model.origin.is_overruled:
        warnings.warn(f"the model predicts {model.family.prediction}, says {model.origin.prediction}", stacklevel=2)
    for part in (model.denoiser, model.conditioner, model.autoencoder):
        part.eval().to(dtype=dtype) if dtype else part.eval()
    return Pipeline(
        model.denoiser,
        conditioner=model.conditioner,
        autoencoder=model.autoencoder,
        settings=settings_of(model.family),
    )


def pretrained_of(pipeline: Pipeline) -> PretrainedModel:
    """A model of ours as one to be written in another project's format.

    A conditioner that no other format holds is carried along under its own names.

    Raises:
        ValueError: a network, a prediction or a schedule that no other format holds.
    """
    network = pipeline.denoiser.network
    if not isinstance(network, UNet):
        raise ValueError(f"got a {type(network).__name__}, expected a UNet; other formats hold no other network")
    conditioner, kind = _known(pipeline.conditioner)
    height, _ = pipeline.settings.size
    base = recognise(network.arguments, kind) or replace(CUSTOM, text=kind)
    family = replace(
        base,
        heads={},
        prediction=_prediction(pipeline.denoiser.parameterization),
        image_size=height,
        guidance_scale=pipeline.settings.guidance.scale,
        num_steps=pipeline.settings.num_steps,
        latent_scale=None,
        **_schedule(pipeline.denoiser),
    )
    return PretrainedModel(
        pipeline.denoiser, conditioner, pipeline.autoencoder, family, Origin("ldm", "the run's config", "as sampled")
    )


def _known(conditioner: Conditioner) -> tuple[Conditioner, str | None]:
    try:
        return conditioner, conditioner_kind(conditioner)
    except ValueError:
        name = type(conditioner).__name__
        return CarriedConditioner(name, conditioner.state_dict()), name


def _prediction(parameterization: Parameterization) -> str:
    for name, known in PARAMETERIZATIONS.items():
        if type(parameterization) is known:
            return name
    raise ValueError(
        f"got parameterization {type(parameterization).__name__}, expected one that other projects' formats know: "
        f"{', '.join(PARAMETERIZATIONS)}"
    )


def _schedule(denoiser: Denoiser) -> dict[str, Any]:
    """The fields of `Family` that make the denoiser's schedule."""
    schedule = denoiser.schedule
    if isinstance(schedule, DiscreteSchedule):
        for fields in _candidates(schedule):
            if torch.allclose(betas_of(schedule_of(replace(CUSTOM, **fields))), betas_of(schedule), atol=TOLERANCE):
                return fields
    raise ValueError(
        f"got the schedule {type(schedule).__name__}, expected one that other projects' formats know: betas that are "
        "linear, linear in their root, or the cosine's"
    )


def _candidates(schedule: DiscreteSchedule) -> Iterator[dict[str, Any]]:
    betas = betas_of(schedule)
    own = tuple(float(f"{beta:.9g}") for beta in (betas[0].item(), betas[-1].item()))
    # Rescaling to zero terminal SNR hides where the betas ended: those that were published are tried.
    ends = [(0.00085, 0.012), (0.0001, 0.02)] if schedule.has_zero_terminal_snr else [own]
    for kind in ("scaled_linear", "linear", "cosine"):
        for start, end in ends:
            yield {
                "betas": kind,
                "beta_start": start,
                "beta_end": end,
                "num_training_steps": schedule.num_steps,
                "zero_terminal_snr": schedule.has_zero_terminal_snr and kind != "cosine",
            }

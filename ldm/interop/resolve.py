"""From evidence to a family with nothing left open: explicit settings, then stored ones, then what the family says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.interop.families import Family, as_prediction, chosen_family, recognise
from ldm.interop.stored_config import StoredConfig

# What a model is sampled with that belongs to no family.
CUSTOM = Family("custom", "a geometry of its own", None, image_size=256, guidance_scale=1.0, num_steps=50, heads={})
# As the families with these kinds of text encoder are sampled.
_GUIDANCE = {"clip": 7.5, "open_clip": 7.5, "sdxl": 5.0, "refiner": 5.0}


def custom(text: str | None) -> Family:
    """No family, with a kind of text encoder, and the guidance that goes with it; 1.0 is none."""
    return replace(CUSTOM, text=text, guidance_scale=_GUIDANCE.get(text or "", CUSTOM.guidance_scale))


def resolve_family(
    path: Path, geometry: Mapping[str, Any], text: str | None, *, family: str | None, stored: StoredConfig | None
) -> Family:
    """The family of a model, with what a config stored beside it says in place of the family's own facts.

    Args:
        geometry: arguments of `UNet` that the tensors tell.
        text: kind of the text encoder, see `conditioning`.
        family: the family's name, where the user gives it.

    Raises:
        ValueError: the model is of no known family and no config says what shapes do not tell.
    """
    found = chosen_family(family, geometry, text) if family else recognise(geometry, text)
    if found is None and (stored is None or stored.network is None):
        raise ValueError(
            f"got {path}, a {described(geometry)} of no known family, expected its config; give config=FILE.yaml or "
            f"put it beside the file as {path.with_suffix('.yaml').name}"
        )
    base = found or custom(text)
    if stored is None:
        return base
    changes = {**(stored.schedule or {}), **({"heads": stored.network} if stored.network else {})}
    if stored.latent_scale is not None:
        changes["latent_scale"] = stored.latent_scale
    return replace(base, **changes)


def resolve_prediction(
    path: Path, family: Family, *, given: str | None, stored: list[tuple[str, str]]
) -> tuple[Family, str]:
    """(the family told what it predicts, who says so).

    The user's word comes first, then the stored ones, then the family's own where published members
    agree. What is not said is never guessed.

    Args:
        stored: (prediction, where it is said).

    Raises:
        ValueError: nobody says it.
    """
    if given is not None:
        chosen = as_prediction(given, source="prediction=")
        others = " and ".join(f"{source} says {prediction}" for prediction, source in stored if prediction != chosen)
        return family.with_prediction(chosen), f"prediction=, although {others}" if others else "prediction="
    if len({prediction for prediction, _ in stored}) > 1:
        told = " but ".join(f"{source} says {prediction}" for prediction, source in stored)
        raise ValueError(f"got {path}, where {told}; expected one word; decide with prediction=epsilon or prediction=v")
    if stored:
        prediction, source = stored[0]
        return family.with_prediction(prediction), source
    if family.prediction is None:
        raise ValueError(
            f"got {path}, {family.title}, which does not say what its network predicts; expected prediction=epsilon "
            "(of 2.x the base models for 512 pixels) or prediction=v (of 2.x those for 768 pixels), or its yaml"
        )
    return family, f"the family {family.name}"


def described(geometry: Mapping[str, Any]) -> str:
    """A U-Net in a few words."""
    context = geometry["context_dim"]
    return (
        f"U-Net from {geometry['in_channels']} to {geometry['out_channels']} channels, {geometry['model_channels']} "
        f"wide, {'without context' if context is None else f'with a context {context} wide'}"
    )

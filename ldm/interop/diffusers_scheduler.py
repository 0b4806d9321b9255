"""Noise schedule and prediction between a family and the scheduler_config.json of a diffusers folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ldm.interop import families
from ldm.interop.families import Family, as_prediction
from ldm.interop.stored_config import StoredConfig

_KINDS = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}
# By these is a schedule told, of which a config of diffusers always has one; others have sigmas or a shift.
_BETAS = {"beta_schedule", "beta_start", "beta_end"}
_PREDICTIONS = {families.EPSILON: "epsilon", families.V: "v_prediction", families.X_0: "sample"}
# The image pipelines of the x4 upscaler add noise to the low-resolution picture by this schedule.
LOW_RESOLUTION = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
}


def read_scheduler(folder: Path) -> StoredConfig:
    """What a scheduler's config says; a field that it lacks beside others has the default of diffusers.

    Raises:
        ValueError: the config is missing or damaged, or says what no discrete schedule of ours computes.
    """
    config = read_json(folder / "scheduler_config.json")
    name = str(config.get("_class_name"))
    if name.startswith(("FlowMatch", "EDM")) or not _BETAS & config.keys():
        raise ValueError(
            f"got {folder / 'scheduler_config.json'} of a {name}, expected a scheduler with betas, such as "
            "DDIMScheduler; ldm reads no model that was trained otherwise, so give another"
        )
    kind = config.get("beta_schedule", "linear")
    if kind not in _KINDS or config.get("trained_betas") is not None:
        raise ValueError(
            f"got {folder / 'scheduler_config.json'} with a {name} whose betas are {kind}, "
            f"expected one of {', '.join(_KINDS)}; ldm has no such schedule"
        )
    place = "scheduler/scheduler_config.json"
    said = config.get("prediction_type")
    return StoredConfig(
        source=place,
        prediction=None if said is None else as_prediction(said, source=place),
        schedule={
            "betas": _KINDS[kind],
            "beta_start": float(config.get("beta_start", 1e-4)),
            "beta_end": float(config.get("beta_end", 0.02)),
            "num_training_steps": int(config.get("num_train_timesteps", 1000)),
            "zero_terminal_snr": bool(config.get("rescale_betas_zero_snr", False)),
        },
    )


def scheduler_config(family: Family) -> dict[str, Any]:
    """The scheduler that samples a family as published."""
    theirs = {ours: name for name, ours in _KINDS.items()}
    shared = {
        "num_train_timesteps": family.num_training_steps,
        "beta_schedule": theirs[family.betas],
        "beta_start": family.beta_start,
        "beta_end": family.beta_end,
        "prediction_type": _PREDICTIONS[str(family.prediction)],
        "timestep_spacing": "trailing" if family.zero_terminal_snr else "leading",
        "steps_offset": 1,
        "rescale_betas_zero_snr": family.zero_terminal_snr,
    }
    if (family.pipeline or "").startswith("StableDiffusionXL"):
        return {"_class_name": "EulerDiscreteScheduler", **shared, "interpolation_type": "linear"}
    return {"_class_name": "DDIMScheduler", **shared, "clip_sample": False, "set_alpha_to_one": False}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: the file is missing, or holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"got a folder without {path}, expected a whole diffusers folder; copy it again") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"got {path}, which is not JSON, expected a config; copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"got {path}, expected a JSON object; copy it again")
    return content

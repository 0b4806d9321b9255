"""What is written beside weights: CompVis and Stability yaml files, metadata of safetensors, and marker tensors."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ldm.interop.families import EPSILON, V, as_prediction
from ldm.interop.safe_load import WeightsFile

# By the last part of a class's name in Stability's yaml files.
_SCALINGS = {"EpsScaling": EPSILON, "VScaling": V}
_DISCRETIZATIONS = ("LegacyDDPMDiscretization",)
# Metadata of ours beside other projects' own, which pass over it; with the weights, as a yaml is easily left behind.
TEXT_ENCODERS = "ldm.text_encoders"
_CLIP_SETTINGS = {"num_attention_heads", "hidden_act", "layer_norm_eps"}


@dataclass(frozen=True)
class StoredConfig:
    """Facts that a config states; None where it is silent.

    Args:
        source: what to call it, such as the file's name.
        network: arguments of `UNet` that shapes do not tell.
        latent_scale: None also where it is measured and lies in the weights.
        latent_size: height of latents that the model was trained for.
        schedule: fields of `Family` about the noise schedule.
        text: arguments of the text encoder that differ from those of its family.
    """

    source: str
    prediction: str | None = None
    network: Mapping[str, Any] | None = None
    latent_scale: float | None = None
    latent_size: int | None = None
    schedule: Mapping[str, Any] | None = None
    text: Mapping[str, Any] = field(default_factory=dict)


def read_yaml(path: Path) -> StoredConfig:
    """Reads a CompVis or Stability config, without building anything that it names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such config, or sets what our modules do not compute.
    """
    if not path.is_file():
        raise FileNotFoundError(f"got config={path}, where there is no file; expected the model's yaml")
    try:
        params = yaml.safe_load(path.read_text())["model"]["params"]
        network = params["unet_config" if "unet_config" in params else "network_config"]["params"]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"got {path}, expected a CompVis yaml with model.params.unet_config (or network_config); name another"
        ) from error
    return StoredConfig(
        source=path.name,
        prediction=_prediction(params, path),
        network=_network(network, path),
        latent_scale=params.get("scale_factor"),
        latent_size=params.get("image_size") or network.get("image_size"),
        schedule=_schedule(params, path),
        text=_text(params.get("cond_stage_config"), path),
    )


def yaml_beside(path: Path) -> Path | None:
    """The yaml of a weights file: the file of the same name with another ending."""
    found = (path.with_suffix(ending) for ending in (".yaml", ".yml"))
    return next((candidate for candidate in found if candidate.is_file()), None)


def prediction_in_file(file: WeightsFile) -> tuple[str, str] | None:
    """(prediction, where it is said), by the file's metadata or its marker tensors, or None."""
    key = "modelspec.prediction_type"
    if key in file.metadata:
        return as_prediction(file.metadata[key], source=f"the file's {key}"), f"the file's {key}"
    if "v_pred" in file.state:
        return V, "the file's marker v_pred"
    return None


def text_settings_in_file(file: WeightsFile, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """For each text encoder of the kinds given what `write_compvis` noted of it in the file's metadata.

    Raises:
        ValueError: the note is damaged, or about other encoders.
    """
    if TEXT_ENCODERS not in file.metadata:
        return [{} for _ in kinds]
    try:
        noted = json.loads(file.metadata[TEXT_ENCODERS])
        fits = len(noted) == len(kinds) and all(map(_fits, noted, kinds))
    except (json.JSONDecodeError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise ValueError(
            f"got {TEXT_ENCODERS} in the file's metadata, which does not fit its {len(kinds)} text encoders "
            f"({', '.join(kinds)}), expected one entry each; convert the model's source again"
        )
    return list(noted)


def _fits(noted: Mapping[str, Any], kind: str) -> bool:
    settings = {"clip": {"config", "padding", "null"}, "open_clip": {"heads", "null", "quick_gelu"}}.get(kind, set())
    return noted.keys() <= settings and noted.get("config", {}).keys() <= _CLIP_SETTINGS


def _prediction(params: Mapping[str, Any], path: Path) -> str | None:
    """What `parameterization` or the denoiser's scaling says; CompVis's own default is eps."""
    if "denoiser_config" in params:
        return _SCALINGS[_denoiser_part(params, "scaling_config", _SCALINGS, path)[0]]
    return as_prediction(params.get("parameterization", "eps"), source=path.name)


def _denoiser_part(
    params: Mapping[str, Any], part: str, known: Collection[str], path: Path
) -> tuple[str, Mapping[str, Any]]:
    """(name of the class, its params) of a part of Stability's denoiser.

    Raises:
        ValueError: it is none of the known ones: the family's own facts are no answer to what a config states.
    """
    config = (params["denoiser_config"].get("params") or {}).get(part) or {}
    name = str(config.get("target")).rpartition(".")[2]
    if name not in known:
        raise ValueError(
            f"got {path} with the {part} {name}, expected {' or '.join(known)}; ldm has no such denoiser, so give a "
            "model that was trained otherwise"
        )
    return name, config.get("params") or {}


def _network(network: Mapping[str, Any], path: Path) -> dict[str, Any]:
    if network.get("disable_middle_self_attn"):
        raise ValueError(f"got {path} with disable_middle_self_attn, which ldm's U-Net does not have")
    arguments: dict[str, Any] = {}
    for name in ("num_heads", "num_head_channels"):
        if network.get(name, -1) not in (-1, None):
            arguments[name] = int(network[name])
    if "num_head_channels" in arguments:
        arguments.pop("num_heads", None)
    if network.get("use_new_attention_order"):
        arguments["new_attention_order"] = True
    if network.get("disable_self_attentions"):
        arguments["disable_self_attention"] = [bool(value) for value in network["disable_self_attentions"]]
    return arguments


def _schedule(params: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The noise schedule; "linear" in these files is linear in sqrt(beta)."""
    if "denoiser_config" in params:
        _, given = _denoiser_part(params, "discretization_config", _DISCRETIZATIONS, path)
        names = {"linear_start": "beta_start", "linear_end": "beta_end", "num_timesteps": "num_training_steps"}
        return {"beta_start": 0.00085, "beta_end": 0.012} | {
            ours: given[theirs] for theirs, ours in names.items() if theirs in given
        }
    kinds = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "cosine"}
    kind = str(params.get("beta_schedule", "linear"))
    if kind not in kinds:
        raise ValueError(f"got {path} with beta_schedule {kind}, expected one of {', '.join(kinds)}")
    return {
        "betas": kinds[kind],
        "beta_start": float(params.get("linear_start", 1e-4)),
        "beta_end": float(params.get("linear_end", 2e-2)),
        "num_training_steps": int(params.get("timesteps", 1000)),
    }


def _text(config: Any, path: Path) -> dict[str, Any]:
    """Which layer of the text encoder is the context, where a CompVis config says so."""
    if not isinstance(config, Mapping):
        return {}
    given = config.get("params") or {}
    kind = str(config.get("target", "")).rpartition(".")[2]
    layer = given.get("layer", "last")
    if kind == "FrozenOpenCLIPEmbedder" and layer in ("last", "penultimate"):
        return {"layer": layer}
    if kind == "FrozenCLIPEmbedder" and layer == "hidden":
        return {"layer": int(given["layer_idx"]), "final_norm": False}
    if kind in ("FrozenCLIPEmbedder", "FrozenOpenCLIPEmbedder") and layer != "last":
        raise ValueError(f"got {path} with the text encoder's layer {layer}, expected last, penultimate or hidden")
    return {}

"""Writes the yaml that CompVis's and Stability AI's programs build a model from: what weights alone do not tell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ldm.autoencoders import VQAutoencoder
from ldm.conditioners import BERTText, ClassLabel, CLIPText, Combined, Conditioner, OpenCLIPText, SizeCrop
from ldm.interop.families import EPSILON, V
from ldm.interop.model import PretrainedModel, arguments_of

_KEYS = {"scaled_linear": "linear", "linear": "sqrt_linear", "cosine": "cosine"}


def write_yaml(model: PretrainedModel, path: Path) -> Path:
    """Writes the config of a model and gives its path.

    Raises:
        ValueError: a part that such configs cannot say.
    """
    config = {"model": _stability(model) if is_stability(model) else _compvis(model)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def is_stability(model: PretrainedModel) -> bool:
    """Whether Stability's program builds the model, sgm, and not CompVis's: it alone has several conditioners."""
    return isinstance(model.conditioner, Combined)


def _compvis(model: PretrainedModel) -> dict[str, Any]:
    family, arguments = model.family, model.network.arguments
    if family.prediction not in (EPSILON, V):
        raise ValueError(f"got prediction {family.prediction}, expected {EPSILON} or {V} in CompVis files")
    if family.zero_terminal_snr:
        raise ValueError("got a schedule with zero terminal SNR, for which CompVis's yaml has no word; write diffusers")
    params = {
        "parameterization": "eps" if family.prediction == EPSILON else "v",
        "beta_schedule": _KEYS[family.betas],
        "linear_start": family.beta_start,
        "linear_end": family.beta_end,
        "timesteps": family.num_training_steps,
        "image_size": family.image_size // model.autoencoder.downsampling_factor,
        "channels": model.autoencoder.latent_channels,
        "conditioning_key": _conditioning_key(arguments),
        "use_ema": False,
        **({"scale_by_std": True} if family.latent_scale is None else {"scale_factor": family.latent_scale}),
        "unet_config": _network(arguments, "ldm.modules.diffusionmodules.openaimodel.UNetModel"),
        "first_stage_config": _first_stage(model, "ldm"),
        "cond_stage_config": _encoder(model.conditioner),
    }
    return {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}


def _stability(model: PretrainedModel) -> dict[str, Any]:
    family = model.family
    scalings = {EPSILON: "EpsScaling", V: "VScaling"}
    if family.prediction not in scalings or family.betas != "scaled_linear" or family.zero_terminal_snr:
        raise ValueError(
            f"got {family.prediction} on a {family.betas} schedule, for which Stability's yaml has no word"
        )
    place = "sgm.modules.diffusionmodules"
    steps = {"num_timesteps": family.num_training_steps}
    discretization = {"linear_start": family.beta_start, "linear_end": family.beta_end, **steps}
    denoiser = {
        "num_idx": family.num_training_steps,
        "scaling_config": {"target": f"{place}.denoiser_scaling.{scalings[family.prediction]}"},
        "discretization_config": {"target": f"{place}.discretizer.LegacyDDPMDiscretization", "params": discretization},
    }
    params = {
        "scale_factor": float(model.autoencoder.latent_scale) if family.latent_scale is None else family.latent_scale,
        "denoiser_config": {"target": f"{place}.denoiser.DiscreteDenoiser", "params": denoiser},
        "network_config": _network(model.network.arguments, f"{place}.openaimodel.UNetModel"),
        "conditioner_config": {"target": "sgm.modules.GeneralConditioner", "params": _embedders(model.conditioner)},
        "first_stage_config": _first_stage(model, "sgm"),
    }
    return {"target": "sgm.models.diffusion.DiffusionEngine", "params": params}


def _network(arguments: Mapping[str, Any], target: str) -> dict[str, Any]:
    context = arguments["context_dim"]
    params: dict[str, Any] = {
        "in_channels": arguments["in_channels"],
        "out_channels": arguments["out_channels"],
        "model_channels": arguments["model_channels"],
        "attention_resolutions": list(arguments["attention_resolutions"]),
        "num_res_blocks": arguments["num_res_blocks"],
        "channel_mult": list(arguments["channel_mult"]),
        "use_scale_shift_norm": arguments["use_scale_shift_norm"],
        "resblock_updown": arguments["resblock_updown"],
        "use_new_attention_order": arguments["new_attention_order"],
        "legacy": False,
    }
    heads = {name: arguments[name] for name in ("num_heads", "num_head_channels") if arguments[name] is not None}
    params |= heads
    if context is not None:
        params |= {
            "use_spatial_transformer": True,
            "transformer_depth": arguments["transformer_depth"],
            "context_dim": context,
            "use_linear_in_transformer": arguments["use_linear_projection"],
        }
    if arguments["disable_self_attention"] is not None:
        params["disable_self_attentions"] = list(arguments["disable_self_attention"])
    if arguments["num_classes"] is not None:
        params["num_classes"] = arguments["num_classes"]
    if arguments["vector_dim"] is not None:
        params |= {"num_classes": "sequential", "adm_in_channels": arguments["vector_dim"]}
    return {"target": target, "params": params}


def _first_stage(model: PretrainedModel, project: str) -> dict[str, Any]:
    arguments = arguments_of(model.autoencoder)
    quantized = isinstance(model.autoencoder, VQAutoencoder)
    config = {
        "double_z": not quantized,
        "z_channels": arguments["latent_channels"],
        "resolution": arguments["resolution"] or 256,
        "in_channels": arguments["image_channels"],
        "out_ch": arguments["image_channels"],
        "ch": arguments["base_channels"],
        "ch_mult": list(arguments["channel_mult"]),
        "num_res_blocks": arguments["num_res_blocks"],
        "attn_resolutions": list(arguments["attn_resolutions"]),
        "attn_type": arguments["attention_type"],
        "dropout": 0.0,
    }
    params = {
        "embed_dim": arguments["latent_channels"],
        "ddconfig": config,
        "lossconfig": {"target": "torch.nn.Identity"},
    }
    if quantized:
        params["n_embed"] = arguments["num_codes"]
    name = "VQModelInterface" if quantized else "AutoencoderKL"
    return {"target": f"{project}.models.autoencoder.{name}", "params": params}


def _encoder(conditioner: Conditioner) -> Any:
    """The cond_stage_config of one conditioner; of one that ldm does not have, its kind alone."""
    place = "ldm.modules.encoders.modules"
    if isinstance(conditioner, OpenCLIPText | CLIPText):
        normed = isinstance(conditioner, OpenCLIPText) or conditioner.layer is None
        if conditioner.pooled or conditioner.final_norm != normed:
            raise ValueError(
                "got a text encoder with a pooled vector, or a final norm where CompVis's has none, which its yaml "
                "cannot say; write format=ldm"
            )
    if isinstance(conditioner, OpenCLIPText):
        return {"target": f"{place}.FrozenOpenCLIPEmbedder", "params": {"freeze": True, "layer": conditioner.layer}}
    if isinstance(conditioner, CLIPText):
        params: dict[str, Any] = (
            {} if conditioner.layer is None else {"layer": "hidden", "layer_idx": conditioner.layer}
        )
        return {"target": f"{place}.FrozenCLIPEmbedder", "params": params}
    if isinstance(conditioner, BERTText):
        built = arguments_of(conditioner)
        params = {"n_embed": built["width"], "n_layer": built["depth"], "vocab_size": built["vocabulary_size"]}
        return {"target": f"{place}.BERTEmbedder", "params": {**params, "max_seq_len": built["length"]}}
    if isinstance(conditioner, ClassLabel):
        classes, width = conditioner.embedding.weight.shape
        params = {"n_classes": classes, "embed_dim": width, "key": conditioner.column}
        return {"target": f"{place}.ClassEmbedder", "params": params}
    return "__is_unconditional__"


def _embedders(conditioner: Conditioner) -> dict[str, Any]:
    """The emb_models of SDXL's conditioner; every embedded number is part of a pair or stands alone."""
    place = "sgm.modules.encoders.modules"
    models: list[dict[str, Any]] = []
    for part in conditioner.conditioners:  # type: ignore[union-attr]
        if isinstance(part, CLIPText):
            params: dict[str, Any] = {"layer": "hidden", "layer_idx": part.layer}
            models.append({"input_key": "txt", "target": f"{place}.FrozenCLIPEmbedder", "params": params})
        elif isinstance(part, OpenCLIPText):
            params = {"arch": "ViT-bigG-14", "layer": part.layer, "legacy": False, "always_return_pooled": True}
            models.append({"input_key": "txt", "target": f"{place}.FrozenOpenCLIPEmbedder2", "params": params})
        elif isinstance(part, SizeCrop):
            target = f"{place}.ConcatTimestepEmbedderND"
            models += [{"input_key": key, "target": target, "params": {"outdim": part.dim}} for key in _keys(part)]
    return {"emb_models": [{"is_trainable": False, **model} for model in models]}


def _keys(sizes: SizeCrop) -> list[str]:
    """Stability's names for the columns, of which it reads heights together with widths, and tops with lefts."""
    names = {
        "original_height": "original_size_as_tuple",
        "crop_top": "crop_coords_top_left",
        "target_height": "target_size_as_tuple",
        "aesthetic_score": "aesthetic_score",
    }
    return [names[column] for column in sizes.columns if column in names]


def _conditioning_key(arguments: Mapping[str, Any]) -> str | None:
    """How the network takes its conditions in: by attention, on channels, or both."""
    extra = arguments["in_channels"] > arguments["out_channels"]
    attends = arguments["context_dim"] is not None
    key = "hybrid" if extra and attends else "crossattn" if attends else "concat" if extra else None
    return f"{key}-adm" if arguments["num_classes"] is not None and key else key

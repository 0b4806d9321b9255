"""Folders of diffusers: read into our parts, and written from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.autoencoders import Autoencoder
from ldm.interop.autoencoder import autoencoder_class, autoencoder_from_diffusers
from ldm.interop.conditioning import TextPart, build_conditioner, text_kind, text_parts
from ldm.interop.diffusers_scheduler import read_json, read_scheduler, scheduler_config
from ldm.interop.families import Family, chosen_family, recognise
from ldm.interop.model import Origin, PretrainedModel, arguments_of, build_denoiser, check_base, fill
from ldm.interop.resolve import CUSTOM, custom, resolve_prediction
from ldm.interop.safe_load import find_weights, read_file
from ldm.interop.text_encoders import (
    ldm_bert_to_compvis,
    transformers_to_open_clip,
    with_prefix,
    without_prefix,
)
from ldm.interop.unet import unet_from_diffusers
from ldm.networks import UNet

INDEX = "model_index.json"
# What CompVis files hold and diffusers has no place for lies here, under CompVis names; diffusers passes over it.
CARRIED = "not_in_diffusers.safetensors"
_STEMS = {"diffusers": ("diffusion_pytorch_model",), "transformers": ("model", "pytorch_model")}


def read_diffusers(
    folder: Path, *, prediction: str | None = None, family: str | None = None, base: PretrainedModel | None = None
) -> PretrainedModel:
    """A folder of diffusers as a model in our parts; for the arguments see `open_model`.

    Raises:
        ValueError: a component is missing or is none that our parts compute, or nobody says the prediction.
    """
    index = _index(folder)
    stored = read_scheduler(folder / "scheduler")
    network = _network(folder)
    carried = read_file(folder / CARRIED).state if (folder / CARRIED).is_file() else {}
    parts = _text_parts(folder, index, carried)
    lacks_text = network.arguments["context_dim"] is not None and not parts
    lacks_autoencoder = not (_is_there(index, "vae") or _is_there(index, "vqvae"))
    check_base(folder, base, lacks_text=lacks_text, lacks_autoencoder=lacks_autoencoder)
    kind = text_kind(parts, has_vector=network.arguments["vector_dim"] is not None)
    chosen = _family(family, network, kind)
    autoencoder = base.autoencoder if base and lacks_autoencoder else _autoencoder(folder, index)
    scale = base.family.latent_scale if base and lacks_autoencoder else _latent_scale(chosen, autoencoder)
    chosen = replace(chosen, latent_scale=scale, **(stored.schedule or {}))
    told = [(stored.prediction, stored.source)] if stored.prediction else []
    chosen, said_by = resolve_prediction(folder, chosen, given=prediction, stored=told)
    if chosen.name == CUSTOM.name:
        chosen = replace(chosen, image_size=_sample_size(folder) * autoencoder.downsampling_factor)
    conditioner = build_conditioner(
        kind,
        parts,
        vector_dim=network.arguments["vector_dim"],
        image_size=chosen.image_size,
        zero_null=index.get("force_zeros_for_empty_prompt", True),
    )
    return PretrainedModel(
        build_denoiser(network, chosen),
        base.conditioner if base and lacks_text else conditioner,
        autoencoder,
        chosen,
        Origin("diffusers", said_by, left_out=_left_out(index, chosen)),
        {
            name: tensor
            for name, tensor in carried.items()
            if not name.startswith(("cond_stage_model.", "conditioner."))
        },
    )


def is_diffusers(folder: Path) -> bool:
    """Whether a folder is one of diffusers: with an index, or at least a U-Net in its place."""
    return (folder / INDEX).is_file() or (folder / "unet" / "config.json").is_file()


def _index(folder: Path) -> dict[str, Any]:
    """The components: those of the index, or for a model without a pipeline those that are there."""
    if (folder / INDEX).is_file():
        return read_json(folder / INDEX)
    configs = {place.parent.name: read_json(place) for place in sorted(folder.glob("*/config.json"))}
    return {name: [None, config.get("_class_name") or config["architectures"][0]] for name, config in configs.items()}


def _network(folder: Path) -> UNet:
    arguments, state = unet_from_diffusers(read_json(folder / "unet" / "config.json"), _weights(folder / "unet"))
    with torch.device("meta"):
        network = UNet(**arguments)
    return fill(network, state, part="the U-Net")


def _autoencoder(folder: Path, index: Mapping[str, Any]) -> Autoencoder:
    place = folder / ("vqvae" if _is_there(index, "vqvae") else "vae")
    arguments, state = autoencoder_from_diffusers(read_json(place / "config.json"), _weights(place))
    with torch.device("meta"):
        autoencoder = autoencoder_class(arguments)(**arguments)
    return fill(autoencoder, state, part="the autoencoder")


def _latent_scale(family: Family, autoencoder: Autoencoder) -> float | None:
    """That of the folder's autoencoder; None where the family's files hold a measured one."""
    return None if family.latent_scale is None else float(arguments_of(autoencoder)["latent_scale"])


def _text_parts(folder: Path, index: Mapping[str, Any], carried: Mapping[str, Tensor]) -> list[TextPart]:
    """The text encoders in their order, with what diffusers has no place for."""
    names = [name for name in ("text_encoder", "text_encoder_2") if _is_there(index, name)]
    beside = text_parts(carried)
    if _is_there(index, "bert"):
        vocabulary = folder / "tokenizer" / "vocab.txt"
        settings = {"vocabulary": vocabulary if vocabulary.is_file() else None}
        return [TextPart("bert", ldm_bert_to_compvis(_weights(folder / "bert", library="transformers")), settings)]
    if not names:
        return beside
    parts = [_text_part(folder, index, name) for name in names]
    for part in beside:
        for i, known in enumerate(parts):
            if known.kind == part.kind == "open_clip":
                parts[i] = replace(known, state={**known.state, **part.state})
    return parts


def _text_part(folder: Path, index: Mapping[str, Any], name: str) -> TextPart:
    config = read_json(folder / name / "config.json")
    architecture = index[name][1]
    if architecture not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        raise ValueError(f"got {folder / name}, a {architecture}, expected a CLIPTextModel; ldm has no other yet")
    state = without_prefix(_weights(folder / name, library="transformers"))
    pad = _pad_token(folder / name.replace("text_encoder", "tokenizer"))
    # Without a word from a tokenizer the encoder decides: open_clip's were trained padded with zero, OpenAI's with the
    # end token, and the two differ in geometry.
    pads_with_zero = _is_open_clip(config) if pad is None else pad == "!"
    pooled = architecture.endswith("WithProjection")
    if pads_with_zero and _is_open_clip(config):
        return _open_clip_part(state, heads=int(config["num_attention_heads"]), whole=pooled)
    told = {key: config[key] for key in ("num_attention_heads", "hidden_act", "layer_norm_eps") if key in config}
    settings: dict[str, Any] = {
        "config": told,
        "padding": "zero" if pads_with_zero else "end",
    }
    return TextPart("clip", {f"transformer.{key}": value for key, value in with_prefix(state).items()}, settings)


def _is_open_clip(config: Mapping[str, Any]) -> bool:
    """Whether an encoder computes what open_clip's text towers do; fields that a config lacks are those of CLIP."""
    widths = (config.get("intermediate_size", 2048), 4 * config.get("hidden_size", 512))
    return (config.get("hidden_act"), config.get("layer_norm_eps", 1e-5)) == ("gelu", 1e-5) and widths[0] == widths[1]


def _open_clip_part(state: Mapping[str, Tensor], *, heads: int, whole: bool) -> TextPart:
    """An encoder of open_clip. One without a vector lacks its last block, which nothing reads: zeros stand there."""
    tower = transformers_to_open_clip(state)
    if not whole:
        tower |= _unread_block(tower)
        tower.pop("text_projection", None)
    return TextPart("open_clip", {f"model.{name}": tensor for name, tensor in tower.items()}, {"heads": heads})


def _unread_block(tower: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = "transformer.resblocks."
    count = len({name.split(".")[2] for name in tower if name.startswith(start)})
    first = {name.removeprefix(f"{start}0."): tensor for name, tensor in tower.items() if name.startswith(f"{start}0.")}
    return {f"{start}{count}.{name}": torch.zeros_like(tensor) for name, tensor in first.items()}


def _family(name: str | None, network: UNet, kind: str | None) -> Family:
    """The family named, or the one recognised, or none: a folder tells all that has to be known."""
    if name:
        return chosen_family(name, network.arguments, kind)
    found = recognise(network.arguments, kind)
    return found or custom(kind)


def _pad_token(tokenizer: Path) -> str | None:
    """The token that fills short texts up: "!", id 0, as in open_clip, or CLIP's end; None where no file tells it."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (tokenizer / name).is_file():
            token = read_json(tokenizer / name).get("pad_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None:
                return str(token)
    return None


def _weights(folder: Path, *, library: str = "diffusers") -> dict[str, Tensor]:
    stems = _STEMS[library]
    for stem in stems[:-1]:
        try:
            return read_file(find_weights(folder, stem)).state
        except FileNotFoundError:
            continue
    return read_file(find_weights(folder, stems[-1])).state


def _sample_size(folder: Path) -> int:
    size = read_json(folder / "unet" / "config.json").get("sample_size") or 64
    return int(size[0] if isinstance(size, list) else size)


def _is_there(index: Mapping[str, Any], name: str) -> bool:
    return bool(index.get(name)) and index[name][1] is not None


def _left_out(index: Mapping[str, Any], family: Family) -> tuple[str, ...]:
    """Components that our parts have no use for, and a sampler other than the one that is written again."""
    known = ("unet", "vae", "vqvae", "text_encoder", "text_encoder_2", "bert", "scheduler", "tokenizer", "tokenizer_2")
    left_out = [name for name in index if not name.startswith("_") and name not in known and _is_list(index, name)]
    theirs, ours = index["scheduler"][1] if _is_there(index, "scheduler") else None, scheduler_config(family)
    if theirs not in (None, ours["_class_name"]):
        left_out.append(f"the sampler {theirs}: a folder written from this names {ours['_class_name']}")
    return tuple(left_out)


def _is_list(index: Mapping[str, Any], name: str) -> bool:
    return isinstance(index[name], list) and _is_there(index, name)

"""Writes a model as a folder that diffusers' pipelines load, tokenizers included."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.conditioners import BERTText, CLIPText, Combined, Conditioner, OpenCLIPText, SizeCrop, TextEncoder
from ldm.interop.autoencoder import autoencoder_to_diffusers
from ldm.interop.conditioning import compvis_state, conditioner_kind
from ldm.interop.diffusers import CARRIED, INDEX
from ldm.interop.diffusers_scheduler import LOW_RESOLUTION, scheduler_config
from ldm.interop.families import recognise
from ldm.interop.model import PretrainedModel, arguments_of
from ldm.interop.resolve import described
from ldm.interop.safe_save import write_file
from ldm.interop.text_encoders import (
    clip_config,
    clip_vocabulary,
    ldm_bert_from_compvis,
    open_clip_to_transformers,
    with_prefix,
    without_prefix,
)
from ldm.interop.unet import unet_to_diffusers

# The oldest version whose pipelines read all that is written here.
VERSION = "0.30.0"
START, END = "<|startoftext|>", "<|endoftext|>"
Components = dict[str, tuple[str | None, str | None]]


def write_diffusers(model: PretrainedModel, folder: Path | str, *, dtype: torch.dtype | None = None) -> list[str]:
    """Writes a folder of diffusers; what it has no place for goes into one more file of it.

    Args:
        dtype: precision of all floating-point tensors; None leaves each as it is.

    Returns:
        What the reader should know: parts that diffusers has no place for.

    Raises:
        ValueError: a part that diffusers cannot compute, or a folder with something else in it.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"got out={folder}, where something is already, expected a new folder; name another")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        notes = _Writer(model, partial, dtype).write()
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return notes


class _Writer:
    """One folder in the making."""

    def __init__(self, model: PretrainedModel, folder: Path, dtype: torch.dtype | None) -> None:
        self.model, self.folder, self.dtype = model, folder, dtype
        self.components: Components = {}

    def write(self) -> list[str]:
        """Writes every component, and the index last."""
        # Asked first: it refuses conditioners that diffusers has no place for.
        kind = conditioner_kind(self.model.conditioner)
        pipeline = self.model.family.pipeline or _pipeline(self.model, kind)
        self._network()
        self._autoencoder("vqvae" if pipeline and pipeline.startswith("LDM") else "vae")
        self._scheduler(pipeline)
        unread = {**self._encoders(self.model.conditioner), **self.model.carried}
        if unread:
            write_file(self.folder / CARRIED, unread, dtype=self.dtype)
        if pipeline:
            self._index(pipeline)
        return self._notes(pipeline, unread)

    def _network(self) -> None:
        model = self.model
        sizes = next((part for part in _parts(model.conditioner) if isinstance(part, SizeCrop)), None)
        name, config, state = unet_to_diffusers(
            model.network,
            sample_size=model.family.image_size // model.autoencoder.downsampling_factor,
            size_embed_dim=sizes.dim if sizes else None,
        )
        self._component("unet", "diffusers", name, config, state)

    def _autoencoder(self, place: str) -> None:
        name, config, state = autoencoder_to_diffusers(self.model.autoencoder, sample_size=self.model.family.image_size)
        self._component(place, "diffusers", name, config, state)

    def _scheduler(self, pipeline: str | None) -> None:
        config = scheduler_config(self.model.family)
        _write_json(self.folder / "scheduler" / "scheduler_config.json", {**config, "_diffusers_version": VERSION})
        self.components["scheduler"] = ("diffusers", config["_class_name"])
        if pipeline == "StableDiffusionUpscalePipeline":
            _write_json(self.folder / "low_res_scheduler" / "scheduler_config.json", LOW_RESOLUTION)
            self.components["low_res_scheduler"] = ("diffusers", LOW_RESOLUTION["_class_name"])  # type: ignore[assignment]

    def _encoders(self, conditioner: Conditioner) -> dict[str, Tensor]:
        """Writes text encoders and tokenizers; gives what is left, under CompVis names."""
        left = compvis_state(conditioner)
        texts = [part for part in _parts(conditioner) if isinstance(part, CLIPText | OpenCLIPText)]
        # The second place is that of encoders that pool, also where they are alone.
        places = ["text_encoder", "text_encoder_2"] if not _pools_alone(texts) else ["text_encoder_2"]
        for index, (place, part) in enumerate(zip(places, texts, strict=False)):
            _check_reading(part)
            prefix = f"conditioner.embedders.{index}." if isinstance(conditioner, Combined) else "cond_stage_model."
            config, state, used = _clip(part) if isinstance(part, CLIPText) else _open_clip(part)
            name = "CLIPTextModelWithProjection" if part.pooled else "CLIPTextModel"
            self._component(place, "transformers", name, config, state)
            self._tokenizer(place.replace("text_encoder", "tokenizer"), part)
            left = {key: tensor for key, tensor in left.items() if key.removeprefix(prefix) not in used}
        if isinstance(conditioner, BERTText):
            self._bert(conditioner)
            left = {}
        return left

    def _bert(self, encoder: BERTText) -> None:
        state, built = ldm_bert_from_compvis(encoder.state_dict()), arguments_of(encoder)
        config = {
            "model_type": "ldmbert",
            "vocab_size": built["vocabulary_size"],
            "max_position_embeddings": built["length"],
            "encoder_layers": built["depth"],
            "encoder_ffn_dim": 4 * built["width"],
            "encoder_attention_heads": built["heads"],
            "head_dim": built["head_dim"],
            "d_model": built["width"],
        }
        self._component("bert", "latent_diffusion", "LDMBertModel", config, state)

    def _component(
        self, place: str, library: str, name: str, config: Mapping[str, Any], state: Mapping[str, Tensor]
    ) -> None:
        from_diffusers = library == "diffusers"
        head = {"_class_name": name, "_diffusers_version": VERSION} if from_diffusers else {"architectures": [name]}
        _write_json(self.folder / place / "config.json", {**head, **config})
        file = "diffusion_pytorch_model.safetensors" if from_diffusers else "model.safetensors"
        write_file(self.folder / place / file, state, dtype=self.dtype)
        self.components[place] = (library, name)

    def _tokenizer(self, place: str, encoder: CLIPText | OpenCLIPText) -> None:
        """CLIP's vocabulary in the two files of transformers, and its special tokens."""
        tokenizer = encoder.tokenizer
        padding = "!" if tokenizer.padding == "zero" else END
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": padding}
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.length, "do_lower_case": True}
        (self.folder / place).mkdir(parents=True, exist_ok=True)
        for name, text in _vocabulary_files().items():
            (self.folder / place / name).write_text(text, encoding="utf-8")
        _write_json(self.folder / place / "special_tokens_map.json", special)
        _write_json(self.folder / place / "tokenizer_config.json", {**settings, **special})
        self.components[place] = ("transformers", "CLIPTokenizer")

    def _index(self, pipeline: str) -> None:
        settings: dict[str, Any] = {}
        nothing: tuple[str, ...] = ()
        if pipeline in ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline"):
            nothing = ("safety_checker", "feature_extractor", "image_encoder")
            settings |= {"requires_safety_checker": False}
        elif pipeline.startswith("StableDiffusionXL"):
            nothing = ("feature_extractor", "image_encoder")
            encoders = [part for part in _parts(self.model.conditioner) if isinstance(part, TextEncoder)]
            settings |= {"force_zeros_for_empty_prompt": encoders[-1].null_kind == "zeros"}
            if pipeline.endswith("Img2ImgPipeline"):
                nothing = (*nothing, "text_encoder", "tokenizer")
                settings |= {"requires_aesthetics_score": True}
        elif pipeline == "StableDiffusionUpscalePipeline":
            nothing = ("safety_checker", "feature_extractor", "watermarker")
            settings |= {"max_noise_level": 350}
        parts = {**dict.fromkeys(nothing, (None, None)), **self.components}
        index = {"_class_name": pipeline, "_diffusers_version": VERSION, **settings}
        _write_json(self.folder / INDEX, {**index, **{name: list(parts[name]) for name in sorted(parts)}})

    def _notes(self, pipeline: str | None, unread: Mapping[str, Tensor]) -> list[str]:
        notes = []
        if pipeline is None:
            notes.append(
                f"no pipeline of diffusers samples a {described(self.model.network.arguments)} with a "
                f"{type(self.model.conditioner).__name__}: {INDEX} is left out, so load its parts one by one"
            )
        if pipeline == "StableDiffusionDepth2ImgPipeline":
            notes.append("the pipeline needs depth_estimator= and feature_extractor= from elsewhere")
        if unread:
            notes.append(f"{len(unread)} tensors that diffusers has no place for are in {CARRIED}")
        return notes


def _clip(part: CLIPText) -> tuple[dict[str, Any], dict[str, Tensor], set[str]]:
    """(config, weights under transformers' names, names of ours that they took up)."""
    own = part.state_dict()
    bare = without_prefix({name.removeprefix("transformer."): tensor for name, tensor in own.items()})
    settings: Any = part.tower.config
    told = {key: getattr(settings, key) for key in ("num_attention_heads", "hidden_act", "layer_norm_eps")}
    return _config({**clip_config(bare), **told}), with_prefix(bare), set(own)


def _open_clip(part: OpenCLIPText) -> tuple[dict[str, Any], dict[str, Tensor], set[str]]:
    """As `_clip`; of an encoder without vector the blocks that nothing reads stay behind."""
    own = part.state_dict()
    bare = {name.removeprefix("model."): tensor for name, tensor in own.items()}
    unread: tuple[str, ...] = ("logit_scale",)
    if not part.pooled:
        last = f"transformer.resblocks.{arguments_of(part)['layers'] - 1}."
        unread = (*unread, "text_projection", *([last] if part.layer == "penultimate" else []))
    read = {name: tensor for name, tensor in bare.items() if not name.startswith(unread)}
    theirs = open_clip_to_transformers(read)
    activation = "quick_gelu" if part.quick_gelu else "gelu"
    config = {**clip_config(theirs, hidden_act=activation), "num_attention_heads": arguments_of(part)["heads"]}
    return _config(config), with_prefix(theirs), {f"model.{name}" for name in read}


def _config(settings: Mapping[str, Any]) -> dict[str, Any]:
    ends = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    return {"model_type": "clip_text_model", "projection_dim": settings["hidden_size"], **settings, **ends}


def _check_reading(part: CLIPText | OpenCLIPText) -> None:
    """Pipelines take the last state with its norm, or for SDXL the last but one without: other readings are refused."""
    settings: Any = part
    layers = arguments_of(part)["layers"] if isinstance(part, OpenCLIPText) else settings.tower.config.num_hidden_layers
    if isinstance(part, OpenCLIPText):
        plain, of_xl = not part.pooled, part.pooled and part.layer == "penultimate"
    else:
        plain, of_xl = not part.pooled and part.layer in (None, -1, layers), part.layer in (-2, layers - 1)
    if not (plain if part.final_norm else of_xl):
        raise ValueError(
            "got a text encoder read in a way that no pipeline of diffusers reads it, expected that of Stable "
            "Diffusion 1, 2 or XL; write format=ldm, which holds any"
        )


def _parts(conditioner: Conditioner) -> list[Any]:
    return list(conditioner.conditioners) if isinstance(conditioner, Combined) else [conditioner]


def _pools_alone(texts: list[Any]) -> bool:
    return len(texts) == 1 and bool(texts[0].pooled)


def _pipeline(model: PretrainedModel, kind: str | None) -> str | None:
    """The pipeline for a model of no known family, or None."""
    arguments = model.network.arguments
    if kind in ("clip", "open_clip"):
        # To diffusers both are a CLIPTextModel: the structure of the U-Net alone tells families apart.
        for text in ("clip", "open_clip"):
            if found := recognise(arguments, text):
                return found.pipeline
    if arguments["in_channels"] != arguments["out_channels"] or arguments["num_classes"]:
        return None
    if kind in ("clip", "open_clip") and not arguments["vector_dim"]:
        return "StableDiffusionPipeline"
    if kind == "sdxl":
        return "StableDiffusionXLPipeline"
    return "LDMPipeline" if kind is None and arguments["context_dim"] is None else None


@cache
def _vocabulary_files() -> dict[str, str]:
    vocabulary, merges = clip_vocabulary()
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

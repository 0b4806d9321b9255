"""Small models with random weights, and pipelines of diffusers that hold the same weights."""

import zlib
from typing import Any

import diffusers
import open_clip
import torch
from torch import nn
from transformers import CLIPTokenizer

from ldm.autoencoders import KLAutoencoder
from ldm.conditioners import CLIPText, Combined, OpenCLIPText, SizeCrop
from ldm.conditioners.base import Conditioner
from ldm.diffusion import Denoiser, Guidance, parameterizations, schedules, times, weightings
from ldm.generation import Pipeline, SamplingSettings
from ldm.interop.autoencoder import autoencoder_to_diffusers
from ldm.interop.unet import unet_to_diffusers
from ldm.networks import UNet
from ldm.samplers import DDIM, Leading

NUM_STEPS = 5
GUIDANCE = 4.0
SIZE_DIM = 8
CLIP = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "projection_dim": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def randomized(module: nn.Module, *, gain: float = 1.0) -> Any:
    """Random numbers for every matrix, also for those that start as zero, by name: a network that does something."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain * fan_in**-0.5)
    return module.eval()


def small_pipeline(
    conditioner: Conditioner | None = None, *, in_channels: int = 4, latent_scale: float = 0.18215, **unet: Any
) -> Pipeline:
    """A model of 32 x 32 pictures; `unet` adds arguments of the network."""
    geometry: dict[str, Any] = {
        "model_channels": 16,
        "channel_mult": [1, 2],
        "num_res_blocks": 1,
        "attention_resolutions": [1, 2],
        "num_heads": 2,
        "context_dim": 16,
        "norm_groups": 8,
        "use_linear_projection": True,
    }
    network = UNet(in_channels, 4, **geometry | unet)
    denoiser = Denoiser(
        randomized(network),
        schedule=schedules.ScaledLinear(),
        parameterization=parameterizations.Epsilon(),
        weighting=weightings.Unit(),
        times=times.Uniform(),
    )
    autoencoder = KLAutoencoder(
        base_channels=16, channel_mult=[1, 2], num_res_blocks=1, norm_groups=8, latent_scale=latent_scale
    )
    settings = SamplingSettings(DDIM(), Leading(), Guidance(scale=GUIDANCE), num_steps=NUM_STEPS, image_size=32)
    return Pipeline(
        denoiser,
        conditioner=conditioner or randomized(CLIPText(CLIP)),
        autoencoder=randomized(autoencoder),
        settings=settings,
    )


def sdxl_conditioner() -> Combined:
    """The three encoders of SDXL, small."""
    clip = randomized(CLIPText(CLIP, layer=1, final_norm=False, padding="end", null="zeros"))
    big = randomized(OpenCLIPText(16, 2, 2, layer="penultimate", final_norm=False, pooled=True, null="zeros"))
    return Combined([clip, big, SizeCrop(dim=SIZE_DIM)])


def parts_for_diffusers(pipeline: Pipeline, **unet_options: Any) -> dict[str, Any]:
    """vae, unet, scheduler and tokenizer of diffusers with this model's weights."""
    name, config, state = unet_to_diffusers(pipeline.denoiser.network, sample_size=16, **unet_options)
    unet = getattr(diffusers, name)(**{key: value for key, value in config.items() if key[0] != "_"})
    unet.load_state_dict(state)
    name, config, state = autoencoder_to_diffusers(pipeline.autoencoder, sample_size=32)
    vae = getattr(diffusers, name)(**{key: value for key, value in config.items() if key[0] != "_"})
    vae.load_state_dict(state)
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return {"vae": vae.eval(), "unet": unet.eval(), "scheduler": scheduler, "tokenizer": tokenizer()}


def diffusers_pipeline(kind: str, pipeline: Pipeline) -> Any:
    """A StableDiffusion...Pipeline with the same weights, and a CLIP text encoder."""
    conditioner: Any = pipeline.conditioner
    options: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if kind == "StableDiffusionUpscalePipeline":
        low = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=1e-4, beta_end=0.02)
        options = {"low_res_scheduler": low}
    elif kind == "StableDiffusionDepth2ImgPipeline":
        options = {"depth_estimator": None, "feature_extractor": None}
    parts = parts_for_diffusers(pipeline)
    return quiet(getattr(diffusers, kind)(text_encoder=conditioner.transformer, **parts, **options))


def diffusers_sdxl(pipeline: Pipeline) -> Any:
    """A StableDiffusionXLPipeline with the same weights; text encoders it has none."""
    parts = parts_for_diffusers(pipeline, size_embed_dim=SIZE_DIM)
    encoders = {"text_encoder": None, "text_encoder_2": None, "tokenizer_2": tokenizer("!")}
    return quiet(diffusers.StableDiffusionXLPipeline(**parts, **encoders, add_watermarker=False))


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's tokenizer of transformers, from the vocabulary inside open_clip."""
    pairs = open_clip.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): i for token, i in pairs.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=list(pairs.bpe_ranks), pad_token=pad_token, model_max_length=77)

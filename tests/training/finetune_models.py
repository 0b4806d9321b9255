"""A pretrained model of a few thousand parameters besides its vocabulary, and its fine-tuning."""

from functools import partial
from typing import Any

import torch
from tiny_models import fill, tiny_autoencoder

from ldm.conditioners import CLIPText, Combined, OpenCLIPText
from ldm.diffusion import Guidance
from ldm.generation import SamplingSettings
from ldm.interop import FAMILIES, Origin, PretrainedModel
from ldm.interop.model import build_denoiser
from ldm.networks import UNet
from ldm.samplers import Euler, Trailing
from ldm.training.finetune import Finetuning
from ldm.training.finetune_adapters import LoRA
from ldm.training.optim import constant

CLIP = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "projection_dim": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def tiny_pretrained() -> PretrainedModel:
    """Stable Diffusion 1 in small; the same numbers every time."""
    network = UNet(
        4,
        4,
        model_channels=8,
        channel_mult=[1, 2],
        num_res_blocks=1,
        attention_resolutions=[2],
        num_heads=2,
        context_dim=8,
        norm_groups=4,
    )
    conditioner = CLIPText(CLIP)
    fill(network)
    fill(conditioner)
    family = FAMILIES["sd1"].with_prediction("epsilon")
    return PretrainedModel(
        build_denoiser(network, family), conditioner, tiny_autoencoder(), family, Origin("ldm", "the test")
    )


def tiny_sdxl() -> PretrainedModel:
    """SDXL in small: two text encoders, one with fused attention, whose pooled output is the vector."""
    network = UNet(
        4,
        4,
        model_channels=8,
        channel_mult=[1, 2],
        num_res_blocks=1,
        attention_resolutions=[2],
        num_head_channels=8,
        use_linear_projection=True,
        context_dim=16,
        vector_dim=8,
        norm_groups=4,
    )
    second = OpenCLIPText(8, 2, 2, final_norm=False, pooled=True, null="zeros")
    conditioner = Combined([CLIPText(CLIP, layer=1, final_norm=False, null="zeros"), second])
    fill(network)
    fill(conditioner)
    family = FAMILIES["sdxl"].with_prediction("epsilon")
    return PretrainedModel(
        build_denoiser(network, family), conditioner, tiny_autoencoder(), family, Origin("ldm", "the test")
    )


def finetuning(**options: Any) -> Finetuning:
    """A LoRA of rank 2 on the attention of the network; options replace arguments."""
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "pretrained": tiny_pretrained(),
        "adapter": LoRA(rank=2, layers="attention"),
        "optimizer": partial(torch.optim.AdamW, lr=1e-2),
        "lr_schedule": constant,
        "sampling": SamplingSettings(Euler(), Trailing(), Guidance(scale=2.0), num_steps=2, image_size=16),
        "ema_decay": 0.5,
        "seed": 7,
    }
    return Finetuning(**(defaults | options))

"""Small models of every published family, as CompVis and Stability files hold them, built from our own modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.autoencoders import KLAutoencoder, VQAutoencoder
from ldm.conditioners import ClassLabel, CLIPText, OpenCLIPText
from ldm.networks import UNet

WIDTH = 64
CLIP = {
    "vocab_size": 99,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 1,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": WIDTH,
}
SMALL: dict[str, Any] = {"model_channels": 64, "channel_mult": [1, 2], "num_res_blocks": 1}


@dataclass(frozen=True)
class Tiny:
    """A family's structure at tiny width.

    Args:
        network: arguments of `UNet`, with the heads of the family.
        text: kind of conditioner.
        quantized: whether the first stage is a VQ autoencoder.
    """

    network: dict[str, Any]
    text: str | None
    latent_channels: int = 4
    quantized: bool = False


def _text_to_image(extra: int = 0, **more: Any) -> dict[str, Any]:
    return {
        **SMALL,
        "in_channels": 4 + extra,
        "out_channels": 4,
        "attention_resolutions": [1, 2],
        "context_dim": WIDTH,
        **more,
    }


def _latent_diffusion(extra: int = 0, **more: Any) -> dict[str, Any]:
    return {**SMALL, "in_channels": 3 + extra, "out_channels": 3, "attention_resolutions": [2], **more}


def _second(extra: int = 0, **more: Any) -> dict[str, Any]:
    return _text_to_image(extra, use_linear_projection=True, **{"num_head_channels": 64, **more})


TINY = {
    "sd1": Tiny(_text_to_image(num_heads=8), "clip"),
    "sd1_inpainting": Tiny(_text_to_image(5, num_heads=8), "clip"),
    "sd2": Tiny(_second(), "open_clip"),
    "sd2_inpainting": Tiny(_second(5), "open_clip"),
    "sd2_depth": Tiny(_second(1), "open_clip"),
    "x4_upscaler": Tiny(
        _second(
            3, num_head_channels=None, num_heads=8, num_classes=20, context_dim=96, disable_self_attention=[True, False]
        ),
        "open_clip",
    ),
    "sdxl": Tiny(
        _second(
            channel_mult=[1, 1, 2],
            context_dim=2 * WIDTH,
            attention_resolutions=[2, 4],
            transformer_depth=[1, 1, 2],
            vector_dim=WIDTH + 6 * 8,
        ),
        "sdxl",
    ),
    "sdxl_refiner": Tiny(_second(attention_resolutions=[2], transformer_depth=2, vector_dim=WIDTH + 5 * 8), "refiner"),
    "ldm_text_to_image": Tiny(_text_to_image(num_heads=8), "bert"),
    "ldm_text_to_image_cc": Tiny(_latent_diffusion(num_head_channels=32, context_dim=WIDTH), "bert", 3, True),
    "ldm_layout": Tiny(
        _latent_diffusion(num_head_channels=32, context_dim=WIDTH, transformer_depth=3), "bert", 3, True
    ),
    "ldm_class": Tiny(_latent_diffusion(num_heads=1, context_dim=WIDTH), "class", 3, True),
    "ldm_unconditional": Tiny(_latent_diffusion(num_head_channels=32), None, 3, True),
    "ldm_churches": Tiny(
        _text_to_image(num_heads=8, context_dim=None, use_scale_shift_norm=True, resblock_updown=True), None
    ),
    "ldm_super_resolution": Tiny(_latent_diffusion(3, num_head_channels=32), None, 3, True),
    "ldm_inpainting": Tiny(
        _latent_diffusion(4, num_heads=8, attention_resolutions=[1, 2], resblock_updown=True), None, 3, True
    ),
}


def tiny_state(name: str, *, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a file of a family, all different from zero."""
    tiny = TINY[name]
    with torch.device("meta"):
        state = {f"model.diffusion_model.{key}": value for key, value in UNet(**tiny.network).state_dict().items()}
        state |= _first_stage(tiny)
        state |= _text(tiny.text, tiny.network.get("context_dim"))
    if name == "ldm_churches":
        state["scale_factor"] = torch.empty((), device="meta")
    if name == "sd2_depth":
        state["depth_model.model.scratch.weight"] = torch.empty(3, 2, device="meta")
    generator = torch.Generator().manual_seed(seed)
    return {
        key: (torch.rand(value.shape, generator=generator) + 0.1 if value.dim() == 0 else _normal(value, generator))
        for key, value in state.items()
    }


def _normal(value: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(value.shape, generator=generator) * 0.05


def _first_stage(tiny: Tiny) -> dict[str, Tensor]:
    shared: dict[str, Any] = {"base_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1}
    first_stage: nn.Module
    if tiny.quantized:
        first_stage = VQAutoencoder(3, tiny.latent_channels, num_codes=16, **shared)
    else:
        first_stage = KLAutoencoder(3, tiny.latent_channels, **shared)
    own = first_stage.state_dict()
    return {f"first_stage_model.{key}": value for key, value in own.items() if not key.startswith("latent_")}


def _text(kind: str | None, width: int | None) -> dict[str, Tensor]:
    def under(prefix: str, module: nn.Module) -> dict[str, Tensor]:
        return {f"{prefix}{key}": value for key, value in module.state_dict().items()}

    if kind is None:
        return {}
    assert width is not None
    if kind == "clip":
        return under("cond_stage_model.", CLIPText(CLIP))
    if kind == "open_clip":
        return under("cond_stage_model.", OpenCLIPText(width, 3, max(width // 64, 1), vocabulary_size=99))
    if kind == "class":
        return under("cond_stage_model.", ClassLabel(10, width=width))
    if kind == "bert":
        return {f"cond_stage_model.{key}": torch.empty(shape, device="meta") for key, shape in BERT.items()}
    pooled = OpenCLIPText(WIDTH, 3, 1, vocabulary_size=99, pooled=True, final_norm=False)
    if kind == "refiner":
        return under("conditioner.embedders.0.", pooled)
    return under("conditioner.embedders.0.", CLIPText(CLIP)) | under("conditioner.embedders.1.", pooled)


_ATTENTION = {
    "0.weight": (WIDTH,),
    "0.bias": (WIDTH,),
    "1.to_q.weight": (512, WIDTH),
    "1.to_k.weight": (512, WIDTH),
    "1.to_v.weight": (512, WIDTH),
    "1.to_out.weight": (WIDTH, 512),
    "1.to_out.bias": (WIDTH,),
}
_FEED_FORWARD = {
    "0.weight": (WIDTH,),
    "0.bias": (WIDTH,),
    "1.net.0.0.weight": (4 * WIDTH, WIDTH),
    "1.net.0.0.bias": (4 * WIDTH,),
    "1.net.2.weight": (WIDTH, 4 * WIDTH),
    "1.net.2.bias": (WIDTH,),
}
BERT = {
    "transformer.token_emb.weight": (50, WIDTH),
    "transformer.pos_emb.emb.weight": (77, WIDTH),
    **{
        f"transformer.attn_layers.layers.{2 * layer + sublayer}.{name}": shape
        for layer in range(2)
        for sublayer, names in enumerate((_ATTENTION, _FEED_FORWARD))
        for name, shape in names.items()
    },
    "transformer.norm.weight": (WIDTH,),
    "transformer.norm.bias": (WIDTH,),
    "transformer.to_logits.weight": (50, WIDTH),
    "transformer.to_logits.bias": (50,),
}

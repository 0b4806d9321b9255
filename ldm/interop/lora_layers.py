"""Which layers of a model a LoRA can change, and what kohya and diffusers call them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ldm.conditioners import Conditioner, OpenCLIPText
from ldm.conditioners.text_encoder import TextEncoder
from ldm.diffusion import Denoiser
from ldm.interop.unet_keys import module_names, renamed
from ldm.networks import UNet

# open_clip's names of a block's layers, and those of transformers.
OPEN_CLIP = {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
FUSED = ("q_proj", "k_proj", "v_proj")
MODELS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Layer:
    """One layer of a model that a LoRA can change.

    Attributes:
        module: its name in `Parts`; of fused attention, that of the attention.
        diffusers: its name there, beginning with the model's: unet, text_encoder or text_encoder_2.
        compvis: its name in CompVis's code, which kohya follows for SDXL; None where that has no other name.
        weight, part: of fused attention, the parameter, and which third of it.
    """

    module: str
    diffusers: str
    compvis: str | None = None
    weight: str | None = None
    part: int = 0

    @property
    def names(self) -> list[str]:
        """kohya's names of it."""
        model, _, name = self.diffusers.partition(".")
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[model]
        return [prefix + own.replace(".", "_") for own in (name, self.compvis) if own]


class Parts(nn.Module):
    """The network and the conditioner of a model under one roof, so that a LoRA has one place to go to."""

    def __init__(self, denoiser: Denoiser, conditioner: Conditioner) -> None:
        super().__init__()
        if not isinstance(denoiser.network, UNet):
            raise ValueError(f"got a {type(denoiser.network).__name__}, expected a UNet, which LoRA files are for")
        self.network, self.conditioner = denoiser.network, conditioner

    def layers(self) -> list[Layer]:
        """Every layer that a LoRA can change."""
        found = list(_unet_layers(self.network))
        for model, (name, encoder) in zip(MODELS, text_encoders(self.conditioner), strict=False):
            find = _open_clip_layers if isinstance(encoder, OpenCLIPText) else _clip_layers
            found += find(encoder, name, model)
        return found


def text_encoders(conditioner: Conditioner) -> list[tuple[str, TextEncoder]]:
    """The CLIP text encoders of a conditioner, in order, with their names in `Parts`."""
    named = conditioner.named_modules(prefix="conditioner")
    return [(name, module) for name, module in named if isinstance(module, TextEncoder)]


def changeable(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Linear layers, convolutions and fused attentions under a module, by name, whether LoRA changes them or not."""
    from peft.tuners.lora import LoraLayer

    for name, child in root.named_children():
        if isinstance(child, nn.Linear | nn.Conv2d | nn.MultiheadAttention | LoraLayer):
            yield f"{prefix}{name}", child
        else:
            yield from changeable(child, f"{prefix}{name}.")


def _unet_layers(network: UNet) -> Iterator[Layer]:
    names = module_names(network.arguments, vector_place="add_embedding")
    for name, _ in changeable(network):
        theirs = renamed(f"{name}.weight", names)
        assert theirs is not None, f"a layer that diffusers has no name for: {name}"
        yield Layer(f"network.{name}", f"unet.{theirs.removesuffix('.weight')}", compvis=name)


def _clip_layers(encoder: TextEncoder, place: str, model: str) -> Iterator[Layer]:
    """Of transformers' CLIP, whose inner model is called text_model in files, and in the class or not by version."""
    assert isinstance(encoder.transformer, nn.Module)
    for name, _ in changeable(encoder.transformer):
        theirs = name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"
        yield Layer(f"{place}.transformer.{name}", f"{model}.{theirs}")


def _open_clip_layers(encoder: TextEncoder, place: str, model: str) -> Iterator[Layer]:
    assert isinstance(encoder.model, nn.Module)
    blocks = encoder.model.get_submodule("transformer.resblocks")
    for index, block in blocks.named_children():
        ours = f"{place}.model.transformer.resblocks.{index}"
        theirs = f"{model}.text_model.encoder.layers.{index}"
        for part, name in enumerate(FUSED):
            yield Layer(f"{ours}.attn", f"{theirs}.self_attn.{name}", weight="in_proj_weight", part=part)
        # Attention reads this layer's weight and never calls it.
        yield Layer(f"{ours}.attn.out_proj", f"{theirs}.self_attn.out_proj", weight="weight")
        for name in ("mlp.c_fc", "mlp.c_proj"):
            assert isinstance(block.get_submodule(name), nn.Module)
            yield Layer(f"{ours}.{name}", f"{theirs}.{OPEN_CLIP[name]}")

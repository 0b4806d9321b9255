"""Small models with the structure of Stable Diffusion 1 and of SDXL, and LoRAs for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.conditioners import CLIPText, Combined, OpenCLIPText
from ldm.diffusion import Conditioning, Denoiser, parameterizations, schedules, times, weightings
from ldm.interop.lora import add_adapter, weight_shape
from ldm.interop.lora_files import LowRank
from ldm.interop.lora_layers import Parts
from ldm.networks import UNet

CLIP = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "projection_dim": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 49408,
}
SMALL = {"model_channels": 16, "num_res_blocks": 1, "norm_groups": 8}


def shake(module: nn.Module, seed: int = 0) -> None:
    """Moves every parameter, so that layers that start at zero take part."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def denoiser(network: UNet) -> Denoiser:
    shake(network)
    return Denoiser(
        network,
        schedule=schedules.RectifiedFlow(),
        parameterization=parameterizations.Velocity(),
        weighting=weightings.Unit(),
        times=times.Uniform(),
    )


def sd1() -> tuple[Denoiser, CLIPText]:
    """Convolutions into the transformers, and one CLIP."""
    torch.manual_seed(0)
    network = UNet(4, 4, channel_mult=[1, 2], attention_resolutions=[1], num_heads=2, context_dim=16, **SMALL)
    encoder = CLIPText(CLIP)
    shake(encoder)
    return denoiser(network), encoder


def sdxl() -> tuple[Denoiser, Combined]:
    """Linear layers into the transformers, a vector condition, and CLIP beside OpenCLIP."""
    torch.manual_seed(0)
    network = UNet(
        4,
        4,
        channel_mult=[1, 2, 2],
        attention_resolutions=[2, 4],
        num_head_channels=8,
        transformer_depth=[1, 1, 2],
        use_linear_projection=True,
        context_dim=32,
        vector_dim=16 + 6 * 8,
        **SMALL,
    )
    first = CLIPText(CLIP, layer=1, final_norm=False, null="zeros")
    second = OpenCLIPText(16, 2, 2, final_norm=False, pooled=True, null="zeros")
    conditioner = Combined([first, second])
    shake(conditioner)
    return denoiser(network), conditioner


def random_lora(parts: Parts, *, rank: int = 3, alpha: float = 2.0, seed: int = 1, only: str = "") -> None:
    """Adds a LoRA named "made" with random numbers on every layer whose name in diffusers contains `only`."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for layer in parts.layers():
        if only in layer.diffusers:
            out, *inside = weight_shape(parts, layer)
            down = 0.2 * torch.randn(rank, *inside, generator=generator)
            up = 0.2 * torch.randn(out, rank, *[1] * (len(inside) - 1), generator=generator)
            layers[layer] = LowRank(down, up, alpha)
    add_adapter(parts, layers, "made")


def inputs(network: UNet) -> tuple[Tensor, Tensor, Conditioning]:
    """x_t (2, 4, 8, 8), times, and conditions of the network's widths."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 5, network.arguments["context_dim"], generator=generator)
    width = network.arguments["vector_dim"]
    vector = None if width is None else torch.randn(2, width, generator=generator)
    return x, torch.tensor([3.0, 700.0]), Conditioning(context=context, vector=vector)


def ids() -> Tensor:
    """Token ids (2, 77) with an end."""
    made = torch.randint(0, 49000, (2, 77), generator=torch.Generator().manual_seed(3))
    made[:, 0], made[:, 20:] = 49406, 49407
    return made

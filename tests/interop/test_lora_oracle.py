"""LoRA files against diffusers: what is written here acts there as it does here, and the other way round."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin as XLLoader
from lora_models import ids, inputs, random_lora, sd1, sdxl
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from ldm.conditioners import Conditioner
from ldm.diffusion import Denoiser
from ldm.interop.lora import apply_lora, set_scale, write_lora
from ldm.interop.lora_layers import Parts
from ldm.interop.text_encoders import open_clip_to_transformers
from ldm.interop.unet import unet_to_diffusers

Model = tuple[Denoiser, Conditioner]
MODELS: dict[str, Callable[[], Model]] = {"sd1": sd1, "sdxl": sdxl}


@pytest.fixture(autouse=True)
def warnings_of_diffusers(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """diffusers only warns of keys that it misses or cannot place: here that fails."""
    diffusers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield
    diffusers.utils.logging.disable_propagation()
    assert not [record.getMessage() for record in caplog.records if "key" in record.getMessage()]


def their_unet(denoiser: Denoiser) -> UNet2DConditionModel:
    width = denoiser.network.arguments["vector_dim"]
    _, config, state = unet_to_diffusers(denoiser.network, size_embed_dim=None if width is None else 8)
    unet = UNet2DConditionModel.from_config(config).eval()
    unet.load_state_dict(state)
    # It embeds sizes itself; here the whole vector is given.
    unet.get_aug_embed = lambda added_cond_kwargs, **_: (
        unet.add_embedding(added_cond_kwargs["vector"]) if added_cond_kwargs else None
    )
    return unet


@torch.no_grad()
def ours(denoiser: Denoiser) -> Tensor:
    return denoiser.network(*inputs(denoiser.network))


@torch.no_grad()
def theirs(unet: UNet2DConditionModel, denoiser: Denoiser) -> Tensor:
    x, t, cond = inputs(denoiser.network)
    added = None if cond.vector is None else {"vector": cond.vector}
    return unet(x, t, cond.context, added_cond_kwargs=added).sample


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def load_there(path: Path, unet: UNet2DConditionModel, encoders: dict[str, nn.Module]) -> None:
    """As `pipe.load_lora_weights` does."""
    loader = XLLoader if len(encoders) > 1 else Loader
    state, alphas, *_ = loader.lora_state_dict(str(path), unet_config=unet.config)
    loader.load_lora_into_unet(state, network_alphas=alphas, unet=unet, adapter_name="made")
    for prefix, encoder in encoders.items():
        loader.load_lora_into_text_encoder(
            state, network_alphas=alphas, text_encoder=encoder, prefix=prefix, adapter_name="made"
        )


def like_module(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors under a module's own names, whether or not its version of transformers says `text_model.`."""
    wanted = set(names)
    return {
        (f"text_model.{name}" if f"text_model.{name}" in wanted else name): tensor for name, tensor in state.items()
    }


def their_encoders(conditioner: Conditioner) -> dict[str, nn.Module]:
    if not hasattr(conditioner, "conditioners"):
        return {"text_encoder": copy.deepcopy(conditioner.transformer)}
    first, second = conditioner.conditioners
    config = {"hidden_size": 16, "intermediate_size": 64, "projection_dim": 16, "hidden_act": "gelu"}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 49408, "eos_token_id": 49407}
    twin = CLIPTextModelWithProjection(CLIPTextConfig(**config, **sizes))
    state = {name: value for name, value in second.model.state_dict().items() if name != "logit_scale"}
    twin.load_state_dict(like_module(open_clip_to_transformers(state), twin.state_dict()), strict=True)
    return {"text_encoder": copy.deepcopy(first.transformer), "text_encoder_2": twin.eval()}


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize("family", MODELS)
def test_a_written_lora_acts_in_diffusers_as_here(family: str, format: Any, tmp_path: Path) -> None:
    denoiser, conditioner = MODELS[family]()
    unet, encoders = their_unet(denoiser), their_encoders(conditioner)
    random_lora(Parts(denoiser, conditioner))
    write_lora(denoiser, conditioner, tmp_path / "lora.safetensors", format=format)
    load_there(tmp_path / "lora.safetensors", unet, encoders)
    for scale in (0.0, 0.5, 1.0):
        set_scale(denoiser, conditioner, "made", scale)
        unet.set_adapters("made", scale)
        assert_close(ours(denoiser), theirs(unet, denoiser))
    assert_encoders_close(conditioner, encoders)


@torch.no_grad()
def assert_encoders_close(conditioner: Conditioner, encoders: dict[str, nn.Module]) -> None:
    if len(encoders) == 1:
        context = encoders["text_encoder"](ids()).last_hidden_state
        assert_close(conditioner.encode_ids(ids()).context, context)
        return
    first, second = conditioner.conditioners
    assert_close(
        first.encode_ids(ids()).context, encoders["text_encoder"](ids(), output_hidden_states=True).hidden_states[1]
    )
    expected = encoders["text_encoder_2"](ids(), output_hidden_states=True)
    assert_close(second.encode_ids(ids()).context, expected.hidden_states[-2])
    assert_close(second.encode_ids(ids()).vector, expected.text_embeds)


def test_a_lora_of_diffusers_with_stated_alphas_acts_here_as_there(tmp_path: Path) -> None:
    denoiser, conditioner = sd1()
    unet = their_unet(denoiser)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        rank_pattern={"mid_block.attentions.0.proj_in": 2},
        alpha_pattern={"to_v": 3},
        target_modules=["to_q", "to_v", "to_out.0", "ff.net.0.proj", "proj_in", "conv1"],
        init_lora_weights=False,
    )
    unet.add_adapter(config)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=config.to_dict(),
    )
    before = ours(denoiser)
    apply_lora(denoiser, conditioner, tmp_path)
    assert (ours(denoiser) - before).abs().max() > 0.01
    assert_close(ours(denoiser), theirs(unet, denoiser))

"""Folders of diffusers: theirs compute the same here, and ours load there with no key missing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from tiny_pretrained import tiny_state
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ldm.conditioners import CLIPText, OpenCLIPText
from ldm.diffusion import Conditioning
from ldm.interop import open_model, write_diffusers
from ldm.interop.text_encoders import clip_vocabulary

# Without "!": tokenizers of transformers that pad with it take it for padding in the text too, open_clip does not.
PROMPTS = ["a red seven, on blue; café", ""]
ENCODER = {
    "vocab_size": 49408,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "projection_dim": 32,
}
ENDS = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}


def assert_near(found: Any, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's tokenizer in the files of transformers."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokens, merges = clip_vocabulary()
    (folder / "vocab.json").write_text(json.dumps(tokens))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    return folder


def tokenizer(vocabulary: Path, *, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(vocabulary, pad_token=pad, model_max_length=77)


def text_encoder(architecture: Any = CLIPTextModel, **settings: Any) -> Any:
    return architecture(CLIPTextConfig(**{**ENCODER, **ENDS, "num_hidden_layers": 3, **settings})).eval()


def unet(**settings: Any) -> UNet2DConditionModel:
    shared: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "sample_size": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": (2, 4),
    }
    return UNet2DConditionModel(**{**shared, **settings}).eval()


def vae(**settings: Any) -> AutoencoderKL:
    widths = {"block_out_channels": [32, 64], "latent_channels": 4, "sample_size": 32}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return AutoencoderKL(**widths, **blocks, **settings).eval()


def scheduler(architecture: Any = PNDMScheduler, **settings: Any) -> Any:
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    shared = {"prediction_type": "epsilon", "steps_offset": 1}
    return architecture(**{**betas, **shared, **settings})


def stable_diffusion(vocabulary: Path, *, second: bool = False, **more: Any) -> StableDiffusionPipeline:
    """SD 1, or SD 2 with its OpenCLIP encoder and linear projections."""
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(hidden_act="gelu" if second else "quick_gelu"),
        tokenizer=tokenizer(vocabulary, pad="!" if second else "<|endoftext|>"),
        unet=unet(use_linear_projection=second),
        scheduler=more.pop("scheduler", None) or scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(vocabulary: Path) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025),
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, hidden_act="gelu"),
        tokenizer=tokenizer(vocabulary),
        tokenizer_2=tokenizer(vocabulary, pad="!"),
        unet=unet(
            cross_attention_dim=64,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 6 * 8,
        ),
        scheduler=scheduler(EulerDiscreteScheduler),
    )


@torch.no_grad()
def test_a_stable_diffusion_pipeline_of_diffusers_computes_the_same_here(tmp_path: Path, vocabulary: Path) -> None:
    theirs = stable_diffusion(vocabulary)
    theirs.save_pretrained(tmp_path / "sd")
    ours = open_model(tmp_path / "sd")
    assert (ours.family.name, ours.origin.prediction) == ("sd1", "scheduler/scheduler_config.json")
    same_parts(theirs, ours)


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_stable_diffusion_2_pipeline_computes_the_same_here(
    tmp_path: Path, vocabulary: Path, prediction: str
) -> None:
    theirs = stable_diffusion(vocabulary, second=True, scheduler=scheduler(prediction_type=prediction))
    theirs.save_pretrained(tmp_path / "sd2")
    ours = open_model(tmp_path / "sd2")
    assert (ours.family.name, ours.family.prediction) == ("sd2", prediction.removesuffix("_prediction"))
    assert ours.family.image_size == (768 if prediction == "v_prediction" else 512)
    same_parts(theirs, ours)


def same_parts(theirs: StableDiffusionPipeline, ours: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([3, 700])
    cond, uncond = theirs.encode_prompt(PROMPTS, "cpu", 1, True, negative_prompt=["", "blurry"])
    found = ours.conditioner.prompt_pair(PROMPTS, ["", "blurry"], image_size=(32, 32))
    assert_near(found[0].context, cond)
    assert_near(found[1].context, uncond)
    assert_near(ours.network(x, t, Conditioning(context=cond)), theirs.unet(x, t, cond).sample)
    images = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    assert_near(ours.autoencoder.encode(images), theirs.vae.encode(images).latent_dist.parameters)
    assert_near(ours.autoencoder.decode(x), theirs.vae.decode(x / theirs.vae.config.scaling_factor).sample)
    torch.testing.assert_close(ours.denoiser.schedule.alphas_cumprod.float(), theirs.scheduler.alphas_cumprod)


@torch.no_grad()
def test_a_stable_diffusion_xl_pipeline_computes_the_same_here(tmp_path: Path, vocabulary: Path) -> None:
    theirs = stable_diffusion_xl(vocabulary)
    theirs.save_pretrained(tmp_path / "xl")
    ours = open_model(tmp_path / "xl")
    assert ours.family.name == "sdxl"
    context, none, pooled, nothing = theirs.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=True)
    cond, uncond = ours.conditioner.prompt_pair(PROMPTS, ["", ""], image_size=(48, 40))
    assert_near(cond.context, context)
    assert (uncond.context == none).all()
    assert (uncond.vector[:, : pooled.shape[1]] == nothing).all()
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([3, 700])
    sizes = torch.tensor([[48.0, 40.0, 0.0, 0.0, 48.0, 40.0]] * 2)
    expected = theirs.unet(x, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
    assert_near(ours.network(x, t, cond), expected)


def test_without_a_tokenizer_the_geometry_of_the_encoder_tells_its_padding(tmp_path: Path, vocabulary: Path) -> None:
    for name, pipeline in (("sd", stable_diffusion(vocabulary)), ("xl", stable_diffusion_xl(vocabulary))):
        pipeline.save_pretrained(tmp_path / name)
    stable_diffusion(vocabulary, second=True).save_pretrained(tmp_path / "sd2")
    for place in ("sd/tokenizer", "sd2/tokenizer", "xl/tokenizer_2"):
        shutil.rmtree(tmp_path / place)
    first, second, both = (open_model(tmp_path / name).conditioner for name in ("sd", "sd2", "xl"))
    assert (type(first), first.tokenizer.padding) == (CLIPText, "end")
    assert (type(second), second.tokenizer.padding) == (OpenCLIPText, "zero")
    assert [part.tokenizer.padding for part in both.conditioners[:2]] == ["end", "zero"]  # type: ignore[index, union-attr]


def test_an_upscaler_with_another_text_encoder_gets_its_pipeline_and_another_sampler_is_told(
    tmp_path: Path, vocabulary: Path
) -> None:
    theirs = stable_diffusion(vocabulary)
    theirs.register_modules(unet=unet(in_channels=7, num_class_embeds=20, use_linear_projection=True))
    theirs.save_pretrained(tmp_path / "x4")
    model = open_model(tmp_path / "x4")
    assert model.family.name == "custom"
    assert model.origin.left_out == ("the sampler PNDMScheduler: a folder written from this names DDIMScheduler",)
    write_diffusers(model, tmp_path / "again")
    index = json.loads((tmp_path / "again/model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionUpscalePipeline"
    assert open_model(tmp_path / "again").origin.left_out == ("low_res_scheduler",)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "FlowMatch"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "beta_schedule": "linear"}, "FlowMatch"),
        ({"_class_name": "EDMEulerScheduler", "beta_start": 0.1, "sigma_min": 0.002}, "EDM"),
        ({"_class_name": "ScoreSdeVpScheduler", "beta_min": 0.1, "beta_max": 20}, "ScoreSdeVp"),
    ],
)
def test_a_scheduler_without_betas_is_refused(
    tmp_path: Path, vocabulary: Path, settings: dict[str, Any], named: str
) -> None:
    stable_diffusion(vocabulary).save_pretrained(tmp_path / "sd")
    (tmp_path / "sd/scheduler/scheduler_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"^got .*{named}.*, expected a scheduler with betas.*; ldm"):
        open_model(tmp_path / "sd")


def test_parts_that_a_folder_lacks_come_from_the_base(tmp_path: Path, vocabulary: Path) -> None:
    stable_diffusion(vocabulary).save_pretrained(tmp_path / "whole")
    stable_diffusion(vocabulary).save_pretrained(tmp_path / "part")
    base = open_model(tmp_path / "whole")
    with pytest.raises(ValueError, match="holds all its parts"):
        open_model(tmp_path / "part", base=tmp_path / "whole")
    index = json.loads((tmp_path / "part/model_index.json").read_text())
    (tmp_path / "part/model_index.json").write_text(json.dumps({**index, "vae": [None, None]}))
    with pytest.raises(ValueError, match=r"holds no autoencoder, expected .*base=MODEL"):
        open_model(tmp_path / "part")
    model = open_model(tmp_path / "part", base=tmp_path / "whole")
    assert same_weights(model.autoencoder, base.autoencoder)
    assert not same_weights(model.conditioner, base.conditioner)
    assert model.family.latent_scale == base.family.latent_scale
    nothing = {"vae": [None, None], "text_encoder": [None, None]}
    (tmp_path / "part/model_index.json").write_text(json.dumps({**index, **nothing}))
    with pytest.raises(ValueError, match="holds no text encoder and no autoencoder"):
        open_model(tmp_path / "part", family="sd1")
    model = open_model(tmp_path / "part", family="sd1", base=tmp_path / "whole")
    assert same_weights(model.autoencoder, base.autoencoder)
    assert same_weights(model.conditioner, base.conditioner)
    assert not same_weights(model.network, base.network)


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(first, second) for first, second in pairs)


@pytest.mark.parametrize(
    ("name", "pipeline"),
    [
        ("sd1", "StableDiffusionPipeline"),
        ("sd1_inpainting", "StableDiffusionInpaintPipeline"),
        ("sd2", "StableDiffusionPipeline"),
        ("x4_upscaler", "StableDiffusionUpscalePipeline"),
        ("sdxl", "StableDiffusionXLPipeline"),
        ("sdxl_refiner", "StableDiffusionXLImg2ImgPipeline"),
        ("ldm_unconditional", "LDMPipeline"),
        ("ldm_super_resolution", "LDMSuperResolutionPipeline"),
    ],
)
def test_what_is_written_loads_in_the_pipeline_of_its_family(tmp_path: Path, name: str, pipeline: str) -> None:
    import diffusers

    save_file(tiny_state(name), tmp_path / "model.safetensors")
    model = open_model(tmp_path / "model.safetensors", prediction="epsilon" if name == "sd2" else None)
    write_diffusers(model, tmp_path / "folder")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    assert type(loaded).__name__ == pipeline
    report = type(loaded.unet).from_pretrained(tmp_path / "folder" / "unet", output_loading_info=True)[1]
    assert not any(report.values()), report
    if encoder := getattr(loaded, "text_encoder", None):
        found = type(encoder).from_pretrained(tmp_path / "folder" / "text_encoder", output_loading_info=True)[1]
        assert not any(found.values()), found


def test_a_text_encoder_is_written_with_its_gelu(tmp_path: Path) -> None:
    save_file(tiny_state("sd2"), tmp_path / "model.safetensors")
    model = open_model(tmp_path / "model.safetensors", prediction="v")
    for name, quick in (("gelu", False), ("quick_gelu", True)):
        encoder = OpenCLIPText(64, 3, 1, vocabulary_size=99, quick_gelu=quick)
        write_diffusers(replace(model, conditioner=encoder), tmp_path / name)
        assert json.loads((tmp_path / name / "text_encoder" / "config.json").read_text())["hidden_act"] == name


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_what_is_written_computes_the_same_in_diffusers(tmp_path: Path, name: str) -> None:
    state = tiny_state(name)
    wide = (
        "transformer.text_model.embeddings.token_embedding.weight" if name == "sd1" else "model.token_embedding.weight"
    )
    state[f"cond_stage_model.{wide}"] = torch.randn(49408, 64)
    save_file(state, tmp_path / "model.safetensors")
    ours = open_model(tmp_path / "model.safetensors", prediction="epsilon")
    write_diffusers(ours, tmp_path / "folder")
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    same_parts(theirs, ours)

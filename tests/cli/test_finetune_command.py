"""Fine-tuning as a user types it: pictures in a folder, a pretrained file, and then pictures of the new model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_helpers import only, read_json
from PIL import Image

from ldm.autoencoders import KLAutoencoder
from ldm.cli.load import load
from ldm.conditioners import CLIPText, Combined, Conditioner, OpenCLIPText, SizeCrop
from ldm.generation import Pipeline
from ldm.interop import FAMILIES, Origin, PretrainedModel, open_model, write_ldm
from ldm.interop.lora import apply_lora
from ldm.interop.model import build_denoiser
from ldm.networks import UNet

Run = Callable[..., int]
FAST = [
    "trainer.accelerator=cpu",
    "trainer.precision=32",
    "trainer.max_steps=3",
    "data.resolution=16",
    "model.sampling.num_steps=2",
    "callback.sample_grid.num_images=1",
    "lr_schedule.num_warmup_steps=0",
]
CLIP = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}


def write_model(path: Path, conditioner: Conditioner, *, family: str, **network: Any) -> Path:
    """A small model of a family with random weights."""
    torch.manual_seed(0)
    geometry = {"model_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4}
    unet = UNet(4, 4, attention_resolutions=[2], num_heads=2, **geometry, **network)
    for parameter in unet.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    autoencoder = KLAutoencoder(base_channels=8, channel_mult=[1, 2], num_res_blocks=1, norm_groups=4)
    known = FAMILIES[family].with_prediction("epsilon")
    origin = Origin("ldm", "the test")
    return write_ldm(PretrainedModel(build_denoiser(unet, known), conditioner, autoencoder, known, origin), path)


@pytest.fixture
def checkpoint(folder: Path) -> Path:
    """A model of Stable Diffusion 1's family."""
    return write_model(folder / "model.safetensors", CLIPText(CLIP), family="sd1", context_dim=8)


@pytest.fixture
def photos(folder: Path) -> Path:
    random = np.random.default_rng(0)
    for name in ("photos", "class"):
        (folder / name).mkdir()
        for i in range(3):
            pixels = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder / "photos"


def shard(ldm: Run, photos: Path, *more: str) -> None:
    caption = "dataset.caption=a photo of my-word"
    assert ldm("shard", "dataset=folder", f"dataset.images={photos}", caption, "dataset.resolution=16", *more) == 0


def test_a_lora_is_trained_resumed_written_and_sampled(
    ldm: Run, folder: Path, photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard(ldm, photos)
    arguments = ["train", "experiment=finetune/lora", f"checkpoint={checkpoint.name}", "model.adapter.rank=2", *FAST]
    assert ldm(*arguments) == 0
    run = only(folder / "runs" / "finetune_lora", "*")
    assert read_json(run / "result.json")["summary"] == {"weights": "weights.safetensors", "lora": "lora.safetensors"}
    assert ldm(*arguments, "trainer.max_steps=4", f"resume={run}", "run_id=longer") == 0
    assert only(folder / "runs/finetune_lora/longer/checkpoints", "*.ckpt").name == "step=000000004.ckpt"
    monkeypatch.chdir("/")
    images = load(run, device="cpu").images(["a photo"], seeds=[0])
    model = open_model(checkpoint)
    apply_lora(model.denoiser, model.conditioner, run / "lora.safetensors")
    settings = load(run, device="cpu").settings
    other = Pipeline(model.denoiser, conditioner=model.conditioner, autoencoder=model.autoencoder, settings=settings)
    torch.testing.assert_close(images, other.images(["a photo"], seeds=[0]), rtol=1e-4, atol=1e-4)


def test_a_lora_is_merged_into_a_model_that_other_tools_read(
    ldm: Run, folder: Path, photos: Path, checkpoint: Path
) -> None:
    shard(ldm, photos)
    assert ldm("train", "experiment=finetune/lora", f"checkpoint={checkpoint}", "model.adapter.rank=2", *FAST) == 0
    run = only(folder / "runs" / "finetune_lora", "*")
    assert ldm("convert", f"source={run}", "out=run", "format=diffusers") == 0
    adapter = run / "lora.safetensors"
    assert ldm("convert", f"source={checkpoint}", f"lora={adapter}", "out=merged", "format=diffusers") == 0
    assert ldm("convert", f"source={checkpoint}", f"lora=[[{adapter},0.0]]", "out=plain", "format=diffusers") == 0
    of_run, merged, plain, base = (
        open_model(path).network.state_dict()
        for path in (folder / "run", folder / "merged", folder / "plain", checkpoint)
    )
    assert base.keys() == of_run.keys()
    torch.testing.assert_close(merged, of_run, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plain, base, rtol=0, atol=0)
    assert any(not torch.equal(merged[name], base[name]) for name in base)


def test_dreambooth_trains_on_pictures_and_class_pictures(
    ldm: Run, folder: Path, photos: Path, checkpoint: Path
) -> None:
    shard(ldm, photos, f"dataset.class_images={folder / 'class'}", "dataset.class_caption=a photo")
    assert ldm("train", "experiment=finetune/dreambooth", f"checkpoint={checkpoint}", *FAST) == 0
    run = only(folder / "runs" / "finetune_dreambooth", "*")
    assert (run / "lora.safetensors").is_file()


def test_a_new_word_is_learned_and_sampled(
    ldm: Run, folder: Path, photos: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard(ldm, photos)
    assert ldm("train", "experiment=finetune/textual_inversion", f"checkpoint={checkpoint}", *FAST) == 0
    assert 'prompt="a photo of my-word"' in capsys.readouterr().out
    run = only(folder / "runs" / "finetune_textual_inversion", "*")
    assert (run / "learned_embeds.safetensors").is_file()
    with_word, without = (
        load(run, device="cpu").images([prompt], seeds=[0]) for prompt in ("a photo of my-word", "a photo of")
    )
    assert not torch.equal(with_word, without)

    sample = ["sample", f"checkpoint={checkpoint}", "image_size=16", "steps=2", "device=cpu", "prompt=my-word"]
    assert ldm(*sample, f"embedding={run / 'learned_embeds.safetensors'}", "out=with") == 0
    assert ldm(*sample, "out=without") == 0
    pixels = [np.asarray(Image.open(only(folder / name, "0*.png"))) for name in ("with", "without")]
    assert not np.array_equal(*pixels)
    capsys.readouterr()
    assert ldm("convert", f"source={run}", "out=converted") == 2
    assert "got a model that was taught my-word" in capsys.readouterr().err


def test_sdxl_is_told_the_sizes_of_pictures(
    ldm: Run, folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = OpenCLIPText(8, 1, 1, final_norm=False, pooled=True, null="zeros")
    conditioner = Combined([CLIPText(CLIP, final_norm=False, null="zeros"), second, SizeCrop(dim=8)])
    checkpoint = write_model(
        folder / "sdxl.safetensors", conditioner, family="sdxl", context_dim=16, vector_dim=8 + 6 * 8
    )
    shard(ldm, photos)
    arguments = ["experiment=finetune/lora", f"checkpoint={checkpoint}", "model.adapter.rank=2", *FAST]
    capsys.readouterr()
    assert ldm("train", *arguments) == 2
    remedy = "data.columns=[original_height,original_width,crop_top,crop_left,target_height,target_width]"
    error = capsys.readouterr().err
    assert error.startswith("error: got data.columns=[], expected original_height") and f"set {remedy}" in error
    assert error.count("\n") == 1 and not (folder / "runs/finetune_lora").exists()
    assert ldm("train", *arguments, remedy) == 0
    assert (only(folder / "runs/finetune_lora", "*") / "lora.safetensors").is_file()
    shards = only(folder / "runs/folder", "*").relative_to(folder)
    assert f"data: {shards}/train, 3 samples" in capsys.readouterr().out


def test_fine_tuning_without_a_model_to_start_from_says_so(
    ldm: Run, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard(ldm, photos)
    assert ldm("train", "experiment=finetune/lora", *FAST) == 2
    assert "checkpoint: got none, expected a file or folder to start from" in capsys.readouterr().err

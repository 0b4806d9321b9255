"""Fine-tuning as a user types it: pictures in a folder, a pretrained file, and then pictures of the new model."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_helpers import only, read_json
from PIL import Image

from ldm.autoencoders import KLAutoencoder
from ldm.cli.load import load
from ldm.conditioners import CLIPText
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


@pytest.fixture
def checkpoint(folder: Path) -> Path:
    """A model of Stable Diffusion 1's family with random weights."""
    torch.manual_seed(0)
    geometry = {"model_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4}
    network = UNet(4, 4, attention_resolutions=[2], num_heads=2, context_dim=8, **geometry)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    autoencoder = KLAutoencoder(base_channels=8, channel_mult=[1, 2], num_res_blocks=1, norm_groups=4)
    family = FAMILIES["sd1"].with_prediction("epsilon")
    origin = Origin("ldm", "the test")
    model = PretrainedModel(build_denoiser(network, family), CLIPText(CLIP), autoencoder, family, origin)
    return write_ldm(model, folder / "model.safetensors")


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


def test_dreambooth_trains_on_pictures_and_class_pictures(
    ldm: Run, folder: Path, photos: Path, checkpoint: Path
) -> None:
    shard(ldm, photos, f"dataset.class_images={folder / 'class'}", "dataset.class_caption=a photo")
    assert ldm("train", "experiment=finetune/dreambooth", f"checkpoint={checkpoint}", *FAST) == 0
    run = only(folder / "runs" / "finetune_dreambooth", "*")
    assert (run / "lora.safetensors").is_file()


def test_a_new_word_is_learned_and_sampled(ldm: Run, folder: Path, photos: Path, checkpoint: Path) -> None:
    shard(ldm, photos)
    assert ldm("train", "experiment=finetune/textual_inversion", f"checkpoint={checkpoint}", *FAST) == 0
    run = only(folder / "runs" / "finetune_textual_inversion", "*")
    assert (run / "learned_embeds.safetensors").is_file()
    with_word, without = (
        load(run, device="cpu").images([prompt], seeds=[0]) for prompt in ("a photo of my-word", "a photo of")
    )
    assert not torch.equal(with_word, without)


def test_fine_tuning_without_a_model_to_start_from_says_so(
    ldm: Run, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard(ldm, photos)
    assert ldm("train", "experiment=finetune/lora", *FAST) == 2
    assert "checkpoint: got none, expected a file or folder to start from" in capsys.readouterr().err

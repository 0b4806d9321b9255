"""Training on stored latents and text embeddings is training on pictures and captions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tiny_models import tiny_conditioner
from torch.testing import assert_close

from ldm.conditioners import Combined, PrecomputedText, SizeCrop
from ldm.data import ShardDataModule
from ldm.generation.encode import Settings, encode_dataset
from ldm.training import LatentDiffusionModule
from ldm.training.frozen import freeze
from ldm.training.precomputed import keep_text_files, use_text_files

MakeModule = Callable[..., LatentDiffusionModule]
Make = Callable[..., Any]


@pytest.fixture
def encoded(make_latent_diffusion: MakeModule, make_data: Make, tmp_path: Path) -> Path:
    """The colours through the tiny autoencoder and the tiny text encoder, in float32, mirrored pictures too."""
    settings = Settings(batch_size=5, text_dtype="float32")
    autoencoder = make_latent_diffusion().autoencoder
    encode_dataset(
        autoencoder, make_data(), tmp_path / "e", text=tiny_conditioner().eval(), flips=True, settings=settings
    )
    return tmp_path / "e"


def data_of(folder: Path, **options: Any) -> ShardDataModule:
    return ShardDataModule(folder / "train", folder / "validation", **({"batch_size": 6, "seed": 3} | options))


def trained(module: LatentDiffusionModule, data: pl.LightningDataModule, trainer: pl.Trainer) -> dict[str, Any]:
    trainer.fit(module, data)
    return dict(module.trained.denoiser.state_dict())


def test_training_on_what_was_encoded_equals_training_on_the_pictures(
    encoded: Path, make_latent_diffusion: MakeModule, make_data: Make, make_trainer: Make
) -> None:
    slow = make_latent_diffusion(conditioner=freeze(tiny_conditioner()), condition_dropout=0.5)
    stored = PrecomputedText(encoded / "text.safetensors", encoder=tiny_conditioner)
    fast = make_latent_diffusion(conditioner=stored, condition_dropout=0.5)
    on_pictures = trained(slow, make_data(flip=True), make_trainer(max_steps=8))
    on_shards = trained(fast, data_of(encoded, flip=True), make_trainer(max_steps=8))
    assert_close(on_shards, on_pictures, rtol=1e-4, atol=1e-5)
    start = make_latent_diffusion().trained.denoiser.state_dict()
    assert any(not torch.equal(start[name], on_shards[name]) for name in start)
    images = [module.sample(["red", "blue"], seeds=[0, 1]) for module in (slow, fast)]
    for ours, theirs in zip(*images, strict=True):
        difference = torch.tensor(list(ours.getdata())) - torch.tensor(list(theirs.getdata()))
        assert difference.abs().max() <= 1


def test_shards_without_text_or_with_that_of_another_encoder_are_refused(
    encoded: Path, make_latent_diffusion: MakeModule, make_data: Make, make_trainer: Make, tmp_path: Path
) -> None:
    stored = PrecomputedText(encoded / "text.safetensors")
    module = make_latent_diffusion(conditioner=stored)
    encode_dataset(module.autoencoder, make_data(), tmp_path / "plain")
    with pytest.raises(ValueError, match=r"shards without text embeddings, .* ldm data encode conditioner="):
        make_trainer(max_steps=1).fit(module, data_of(tmp_path / "plain"))
    other = tiny_conditioner()
    other.position_embedding.data.add_(1)
    encode_dataset(module.autoencoder, make_data(), tmp_path / "other", text=other.eval())
    with pytest.raises(ValueError, match=r"conditioner\.path: got the null condition of the text encoder"):
        make_trainer(max_steps=1).fit(module, data_of(tmp_path / "other"))


def test_a_run_keeps_the_null_conditions_that_its_model_reads(encoded: Path, tmp_path: Path) -> None:
    node = {"_target_": "ldm.conditioners.PrecomputedText", "path": str(encoded / "text.safetensors")}
    config: dict[str, Any] = {"conditioner": {"conditioners": [dict(node), {"_target_": "SizeCrop"}, dict(node)]}}
    run = tmp_path / "run"
    run.mkdir()
    keep_text_files(config, run)
    use_text_files(config, run)
    paths = [part["path"] for part in config["conditioner"]["conditioners"] if "path" in part]
    assert paths == [str(run / "text.safetensors"), str(run / "text-2.safetensors")]
    parts = [PrecomputedText(path) for path in paths]
    assert Combined([*parts, SizeCrop()]).null(1).vector is not None
    use_text_files(config, None)
    assert paths[0] == config["conditioner"]["conditioners"][0]["path"]

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from tiny_models import Losses, autoencoder_module, latent_diffusion_module, quiet_trainer, write_colours

from ldm.data import ShardDataModule
from ldm.training import AutoencoderModule, LatentDiffusionModule


@pytest.fixture
def make_latent_diffusion() -> Callable[..., LatentDiffusionModule]:
    return latent_diffusion_module


@pytest.fixture
def make_autoencoder_module() -> Callable[..., AutoencoderModule]:
    return autoencoder_module


@pytest.fixture
def make_trainer() -> Callable[..., pl.Trainer]:
    return quiet_trainer


@pytest.fixture
def losses() -> Losses:
    return Losses()


@pytest.fixture
def make_data(tmp_path: Path) -> Callable[..., ShardDataModule]:
    """Builds the data module of the colours; options replace its arguments."""
    write_colours(tmp_path / "colours")

    def make(folder: Path = tmp_path / "colours", **options: Any) -> ShardDataModule:
        return ShardDataModule(folder, folder, **({"batch_size": 6, "resolution": 16, "seed": 3} | options))

    return make

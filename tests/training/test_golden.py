"""Losses of seeded tiny runs, so that a refactor which changes the mathematics shows.

Weights are filled by name and noise is drawn by position, so that neither the order in which modules are built nor the
number of workers moves these numbers. Whoever changes them on purpose says so in the change log.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from ldm.training import AutoencoderModule, LatentDiffusionModule
from ldm.training.callbacks import SampleGrid
from ldm.training.checkpoints import Checkpoints

LATENT_DIFFUSION = {"train/loss": [2.240125, 2.164182, 2.096082, 2.194193, 2.260331]}
AUTOENCODER = {
    "train/loss": [739.66577, 617.10632, 577.56889, 554.20819, 577.65533],
    "train/kl": [69.550613, 48.429215, 42.069164, 65.224342, 69.096108],
    "train/generator": [-0.0558239, 0.1344001, 0.0633209],
    "train/discriminator": [1.1080238, 0.9430033, 1.0423145],
}


def test_five_losses_of_latent_diffusion_are_the_recorded_ones(
    make_latent_diffusion: Callable[..., LatentDiffusionModule],
    make_data: Callable[..., Any],
    make_trainer: Callable[..., pl.Trainer],
    losses: Any,
) -> None:
    make_trainer(max_steps=5, callbacks=[losses]).fit(make_latent_diffusion(), make_data())
    for name, expected in LATENT_DIFFUSION.items():
        assert [row[name] for row in losses.rows] == pytest.approx(expected, rel=1e-4)


def test_pictures_and_saves_on_the_way_leave_the_losses(
    make_latent_diffusion: Callable[..., LatentDiffusionModule],
    make_data: Callable[..., Any],
    make_trainer: Callable[..., pl.Trainer],
    losses: Any,
    tmp_path: Path,
) -> None:
    """So neither is part of a run's name."""
    often = [SampleGrid(tmp_path / "samples", every_n_steps=2), Checkpoints(tmp_path / "saved", every_n_steps=1)]
    trainer = make_trainer(max_steps=5, callbacks=[losses, *often], enable_checkpointing=True)
    trainer.fit(make_latent_diffusion(), make_data())
    assert len(list((tmp_path / "samples").glob("step=*.png"))) == 3
    assert [row["train/loss"] for row in losses.rows] == pytest.approx(LATENT_DIFFUSION["train/loss"], rel=1e-4)


def test_five_losses_of_the_autoencoder_are_the_recorded_ones(
    make_autoencoder_module: Callable[..., AutoencoderModule],
    make_data: Callable[..., Any],
    make_trainer: Callable[..., pl.Trainer],
    losses: Any,
) -> None:
    """The adversary takes part in the last three steps."""
    make_trainer(max_steps=5, callbacks=[losses]).fit(make_autoencoder_module(), make_data())
    for name, expected in AUTOENCODER.items():
        found = [row[name] for row in losses.rows if name in row]
        assert found == pytest.approx(expected, rel=1e-4)

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from ldm.training.fit import fit


@pytest.mark.parametrize("module", ["make_latent_diffusion", "make_autoencoder_module"])
def test_training_warns_of_nothing(
    module: str, make_data: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], request: Any, tmp_path: Path
) -> None:
    """A newcomer's first run shows no warning that nobody acts on, nor one that somebody should have acted on."""

    def trainer(**options: Any) -> pl.Trainer:
        every_2_steps = {"val_check_interval": 2, "check_val_every_n_epoch": None}
        return make_trainer(max_steps=3, enable_checkpointing=True, **every_2_steps, **options)

    model = request.getfixturevalue(module)()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert fit(trainer, model, data=make_data(), config={}, callbacks=[], loggers=[], checkpoint=None)
    assert not [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]

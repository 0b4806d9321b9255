"""What is no longer as it was when a run goes on is said in one line."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from ldm.training.callbacks.what_changed import KEY, WhatChanged, consequence


@pytest.fixture
def resume(
    make_trainer: Callable[..., pl.Trainer], make_latent_diffusion: Callable[..., Any], make_data: Any, tmp_path: Path
) -> Callable[..., list[str]]:
    """Trains a step, then goes on with other options; returns what was warned of."""

    def run(change: Callable[[dict[str, Any]], None] = lambda noted: None, **options: Any) -> list[str]:
        first = make_trainer(max_steps=1, limit_val_batches=0, callbacks=[WhatChanged()])
        first.fit(make_latent_diffusion(), make_data())
        first.save_checkpoint(tmp_path / "a.ckpt")
        callback = WhatChanged()
        noted = callback.on_load_checkpoint

        def load(trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
            change(checkpoint[KEY])
            noted(trainer, module, checkpoint)

        callback.on_load_checkpoint = load  # type: ignore[method-assign]
        data = make_data(**options.pop("data", {}))
        again = make_trainer(max_steps=2, limit_val_batches=0, callbacks=[callback], **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            again.fit(make_latent_diffusion(), data, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
        return [str(one.message) for one in caught if "resume: changed" in str(one.message)]

    return run


def test_nothing_is_said_where_nothing_changed(resume: Callable[..., list[str]]) -> None:
    assert resume() == []


def test_another_number_of_processes_means_other_last_bits(resume: Callable[..., list[str]]) -> None:
    (line,) = resume(lambda noted: noted.update(processes=2))
    assert line.startswith("resume: changed since the checkpoint: processes 2 -> 1; samples and noise are the same")


def test_another_batch_means_another_run(resume: Callable[..., list[str]]) -> None:
    (line,) = resume(data={"batch_size": 12})
    assert "global batch 6 -> 12; from here on it is another run" in line
    assert "another run" not in consequence(["torch"])

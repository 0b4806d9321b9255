"""What is no longer as it was when a run goes on is said in one line."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from ldm.training.callbacks.what_changed import KEY, WhatChanged, consequence
from ldm.training.optim import constant, cosine


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


SCHEDULES = {"constant": constant, "cosine": partial(cosine, num_steps=8)}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_that_goes_on_takes_its_own_learning_rate_and_weight_decay(
    schedule: str,
    make_trainer: Callable[..., pl.Trainer],
    make_latent_diffusion: Callable[..., Any],
    make_data: Any,
    tmp_path: Path,
) -> None:
    """PyTorch would go on with those of the checkpoint, whatever is set."""

    def module(**settings: Any) -> Any:
        return make_latent_diffusion(
            optimizer=partial(torch.optim.AdamW, **settings), lr_schedule=SCHEDULES[schedule], ema_decay=0.0
        )

    first = make_trainer(max_steps=2, limit_val_batches=0)
    first.fit(module(lr=1e-3, weight_decay=0.0), make_data())
    first.save_checkpoint(tmp_path / "a.ckpt")
    options: dict[str, Any] = {"ckpt_path": tmp_path / "a.ckpt", "weights_only": True}
    rates = []
    for lr in (1e-3, 5e-4):
        model = module(lr=lr, weight_decay=0.1, betas=[0.9, 0.999])
        again = make_trainer(max_steps=3, limit_val_batches=0, callbacks=[WhatChanged()])
        with pytest.warns(
            UserWarning, match="resume: changed since the checkpoint: .*weight_decay of AdamW 0.0 -> 0.1"
        ):
            again.fit(model, make_data(), **options)
        (group,) = again.optimizers[0].param_groups
        assert (group["initial_lr"], group["weight_decay"]) == (lr, 0.1)
        rates.append(group["lr"])
    assert rates[1] == pytest.approx(rates[0] / 2)


def test_the_first_step_that_goes_on_has_the_learning_rate_that_is_set(
    make_trainer: Callable[..., pl.Trainer],
    make_latent_diffusion: Callable[..., Any],
    make_data: Any,
    tmp_path: Path,
) -> None:
    first = make_trainer(max_steps=1, limit_val_batches=0)
    first.fit(make_latent_diffusion(), make_data())
    first.save_checkpoint(tmp_path / "a.ckpt")
    model = make_latent_diffusion(optimizer=partial(torch.optim.AdamW, lr=0.0))
    before = [parameter.detach().clone() for parameter in first.lightning_module.trained.parameters()]
    again = make_trainer(max_steps=2, limit_val_batches=0, callbacks=[WhatChanged()])
    with pytest.warns(UserWarning, match=r"lr of AdamW 0.001 -> 0.0; from here on it is another run"):
        again.fit(model, make_data(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert all(torch.equal(*pair) for pair in zip(before, model.trained.parameters(), strict=True))

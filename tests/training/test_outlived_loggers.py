"""A logger that fails is warned about once and switched off; training, and the other loggers, go on."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from PIL.Image import Image, new
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from tiny_models import latent_diffusion_module, quiet_trainer

from ldm.training.callbacks.pictures import keep_picture
from ldm.training.fit import SetupError, fit
from ldm.training.loggers import MetricsCSV, outlive


class Breaks(Logger):
    """Fails from a step on, or while it connects."""

    name, version = "breaks", "0"

    def __init__(self, *, at: int | None = None, connects: bool = True) -> None:
        super().__init__()
        self.at, self.connects = at, connects
        self.steps: list[int] = []

    @property
    def experiment(self) -> object:
        if not self.connects:
            raise ConnectionError("no route to host")
        return object()

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.steps.append(step)
        if self.at is not None and step >= self.at:
            raise OSError(28, "No space left on device")


@pytest.fixture
def train(make_data: Callable[..., Any], tmp_path: Path) -> Callable[..., list[str]]:
    """Trains six steps, logging each, and returns what was warned of."""

    def run(*loggers: Logger, checkpoint: Path | None = None, max_steps: int = 6) -> list[str]:
        def trainer(**options: Any) -> pl.Trainer:
            every_step = {"log_every_n_steps": 1, "limit_val_batches": 0, "enable_checkpointing": True}
            return quiet_trainer(max_steps=max_steps, **every_step, **options)

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert fit(
                trainer,
                latent_diffusion_module(),
                data=make_data(),
                config={},
                callbacks=[],
                loggers=loggers,
                checkpoint=checkpoint,
            )
        return [str(warning.message) for warning in caught if "logs no more" in str(warning.message)]

    return run


def rows(folder: Path) -> int:
    return len((folder / "metrics.csv").read_text().splitlines()) - 1


def test_a_full_disk_silences_one_logger_with_one_warning(train: Callable[..., list[str]], tmp_path: Path) -> None:
    broken = Breaks(at=2)
    assert train(broken, MetricsCSV(tmp_path)) == [
        "Breaks: OSError: [Errno 28] No space left on device; it logs no more, training goes on"
    ]
    assert broken.steps == [0, 1, 2]
    assert rows(tmp_path) == 6


def test_metrics_that_cannot_be_written_stop_nothing(train: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").mkdir()
    (warning,) = train(MetricsCSV(tmp_path))
    assert warning.startswith("MetricsCSV: ")


def test_a_service_that_is_down_when_a_run_goes_on_is_left_out(
    train: Callable[..., list[str]], tmp_path: Path, make_trainer: Callable[..., pl.Trainer], make_data: Any
) -> None:
    started = make_trainer(max_steps=2)
    started.fit(latent_diffusion_module(), make_data())
    started.save_checkpoint(tmp_path / "start.ckpt")
    warning = "Breaks: ConnectionError: no route to host; it logs no more, training goes on"
    assert train(Breaks(connects=False), MetricsCSV(tmp_path), checkpoint=tmp_path / "start.ckpt") == [warning]
    assert rows(tmp_path) == 4


def test_a_service_that_is_down_at_a_runs_first_start_is_said(train: Callable[..., list[str]]) -> None:
    with pytest.raises(SetupError, match="no route to host"):
        train(Breaks(connects=False))


def test_a_logger_stays_of_its_kind(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    outlive([logger], begun=lambda: True)
    assert isinstance(logger, TensorBoardLogger)
    logger.log_metrics({"loss": 0.5}, step=0)
    logger.finalize("success")
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_a_picture_that_a_logger_refuses_is_still_a_file(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path / "board")
    outlive([logger], begun=lambda: True)
    logger.experiment.add_image = lambda *_, **__: 1 / 0
    trainer = quiet_trainer(logger=[logger])
    picture: Image = new("RGB", (8, 8))
    with pytest.warns(UserWarning, match="ZeroDivisionError.*it logs no more"):
        keep_picture(picture, tmp_path / "picture.png", trainer=trainer, name="samples")
    keep_picture(picture, tmp_path / "picture.png", trainer=trainer, name="samples")
    assert (tmp_path / "picture.png").is_file()
    logger.log_metrics({"loss": torch.tensor(1.0)}, step=1)


def test_steps_that_are_trained_again_replace_their_rows(tmp_path: Path) -> None:
    """As after going back to a checkpoint."""
    logger = MetricsCSV(tmp_path)
    for step in (0, 1, 2, 3, 2, 3, 4):
        logger.log_metrics({"loss": float(step)}, step=step)
    assert (tmp_path / "metrics.csv").read_text().split() == ["step,loss", "0,0.0", "1,1.0", "2,2.0", "3,3.0", "4,4.0"]

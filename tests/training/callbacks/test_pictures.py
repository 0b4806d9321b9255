import os

import pytest
from PIL import Image
from pytorch_lightning.loggers import WandbLogger

from ldm.training.callbacks import SampleGrid


@pytest.mark.slow
def test_wandb_gets_the_pictures_offline(tiny, data, fit, tmp_path, monkeypatch) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, os.fspath(tmp_path))
    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    fit(tiny, data, [SampleGrid(tmp_path, every_n_steps=6, prompts=["a"])], logger=logger)
    logger.experiment.finish()
    pictures = {path.name.split("_")[0]: path for path in tmp_path.rglob("wandb/*/files/media/images/*.png")}
    assert sorted(pictures) == ["samples", "trajectory"]
    assert Image.open(pictures["samples"]).size == Image.open(tmp_path / "step=000006.png").size

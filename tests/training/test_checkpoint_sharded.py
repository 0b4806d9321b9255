"""FSDP on GPUs goes on from its own checkpoints; test_fsdp2.py has what runs on CPUs."""

from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_models import latent_diffusion_module, quiet_trainer

from ldm.training.checkpoint_files import is_valid
from ldm.training.checkpoint_folders import find
from ldm.training.checkpoint_io import AtomicCheckpointIO
from ldm.training.checkpoints import Checkpoints
from ldm.training.strategies import fsdp


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FSDP runs on GPUs alone")
@pytest.mark.parametrize("state_dict_type", ["full", "sharded"])
def test_fsdp_goes_on_from_its_own_checkpoint(state_dict_type: str, tmp_path: Path, make_data: partial) -> None:
    def fit(folder: Path, max_steps: int, checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
        module = latent_diffusion_module()
        trainer = quiet_trainer(
            max_steps=max_steps,
            accelerator="gpu",
            devices=1,
            strategy=fsdp(state_dict_type=state_dict_type),
            plugins=[AtomicCheckpointIO()],
            callbacks=[Checkpoints(folder, every_n_steps=2)],
        )
        trainer.fit(module, make_data(), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        return {name: value.detach().cpu().clone() for name, value in module.trained.state_dict().items()}

    straight = fit(tmp_path / "straight", 4)
    resumed = fit(tmp_path / "resumed", 4, tmp_path / "straight" / "step=000000002.ckpt")
    for name, value in straight.items():
        torch.testing.assert_close(resumed[name], value)
    assert all(is_valid(place) for place in find(tmp_path / "straight"))

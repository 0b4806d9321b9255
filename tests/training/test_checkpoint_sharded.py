"""Sharded strategies on GPUs go on from their own checkpoints; test_fsdp2.py has what runs on CPUs."""

import errno
from collections.abc import Callable
from functools import partial
from pathlib import Path
from traceback import StackSummary
from typing import Any

import pytest
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy, Strategy
from tiny_models import latent_diffusion_module, quiet_trainer
from torch.distributed.checkpoint import CheckpointException

from ldm.networks import DiT
from ldm.training.checkpoint_files import StorageError, is_valid
from ldm.training.checkpoint_folders import find
from ldm.training.checkpoint_io import AtomicCheckpointIO
from ldm.training.checkpoint_sharded import SealsShards
from ldm.training.checkpoints import Checkpoints
from ldm.training.strategies import check_wrapped, deepspeed, fsdp, fsdp2

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "fsdp full": partial(fsdp, state_dict_type="full"),
    "fsdp sharded": partial(fsdp, state_dict_type="sharded"),
    "fsdp2 full": partial(fsdp2, state_dict_type="full"),
    "fsdp2 sharded": partial(fsdp2, state_dict_type="sharded"),
    "deepspeed": deepspeed,
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="these run on GPUs")
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_goes_on_from_its_own_checkpoint(name: str, tmp_path: Path, make_data: partial) -> None:
    if name == "deepspeed":
        pytest.importorskip("deepspeed")

    def fit(folder: Path, max_steps: int, checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
        module = latent_diffusion_module()
        trainer = quiet_trainer(
            max_steps=max_steps,
            accelerator="gpu",
            devices=1,
            strategy=STRATEGIES[name](),
            enable_checkpointing=True,
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


class FullDisk(SingleDeviceStrategy):
    """Saves nothing."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def save_checkpoint(self, *_: Any, **__: Any) -> None:
        raise self.error


class ShardsOnAFullDisk(SealsShards, FullDisk):
    saves_shards = True


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [FULL, CheckpointException("save", {1: (FULL, StackSummary())})], ids=["own", "all"])
def test_a_disk_that_takes_no_shard_is_one_line(error: BaseException, tmp_path: Path) -> None:
    """Also where torch gathers the errors of all ranks, in an exception that nobody else catches."""
    place, line = (
        tmp_path / "step=2.ckpt",
        r"step=2\.ckpt: could not be saved to .* \(No space left on device; it needs",
    )
    with pytest.raises(StorageError, match=rf"{line} 40 bytes\)"):
        ShardsOnAFullDisk(error).save_checkpoint({"global_step": 2, "state_dict": {"w": torch.zeros(10)}}, place)
    assert find(tmp_path) == []


def test_a_stage_that_the_average_cannot_follow_is_refused() -> None:
    with pytest.raises(ValueError, match="got 3, expected 1 or 2; set strategy=fsdp2"):
        deepspeed(stage=3)


def test_what_fsdp_does_not_know_to_wrap_is_sent_to_fsdp2() -> None:
    module = latent_diffusion_module()
    check_wrapped(module.trained)
    module.trained.denoiser.network = DiT(4, 4, patch_size=2, width=8, depth=1, num_heads=1)
    with pytest.raises(
        ValueError, match=r"^got strategy=fsdp with \d+ trained parameters \(denoiser\.network\..*fsdp2$"
    ):
        check_wrapped(module.trained)
    check_wrapped(module.trained.requires_grad_(False))


def test_a_missing_deepspeed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.training.strategies.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ldm\[deepspeed\]'"):
        deepspeed()

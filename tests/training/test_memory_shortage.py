"""Running out of memory is told from other errors; a step of other pieces is the same step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tiny_models import latent_diffusion_module

from ldm.training.checkpoint_io import AtomicCheckpointIO
from ldm.training.checkpoints import Checkpoints
from ldm.training.fit import fit
from ldm.training.memory import OutOfMemory, is_out_of_memory


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
            True,
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_that_say_so_are_known(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


class Samples(pl.Callback):
    """Notes the samples of each step; at one step memory runs out."""

    def __init__(self, *, fail_at: int | None = None) -> None:
        self.steps: dict[int, list[int]] = {}
        self.fail_at = fail_at

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.fail_at:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.steps.setdefault(trainer.global_step, []).extend(batch["position"].tolist())


@pytest.fixture
def train(make_data: Callable[..., Any], tmp_path: Path) -> Callable[..., Samples]:
    def run(*, batch_size: int, accumulate: int, resume: int | None = None, fail_at: int | None = None) -> Samples:
        samples = Samples(fail_at=fail_at)

        def trainer(*, callbacks: list[pl.Callback], logger: list[Any]) -> pl.Trainer:
            return pl.Trainer(
                accelerator="cpu",
                max_steps=9,
                max_epochs=-1,
                callbacks=callbacks,
                logger=logger,
                plugins=[AtomicCheckpointIO()],
                use_distributed_sampler=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                limit_val_batches=0,
                default_root_dir=tmp_path,
                accumulate_grad_batches=accumulate,
            )

        checkpoints = Checkpoints(tmp_path / "checkpoints", every_n_steps=1, keep=9)
        checkpoint = None if resume is None else tmp_path / "checkpoints" / f"step={resume:09d}.ckpt"
        data, model = make_data(batch_size=batch_size), latent_diffusion_module()
        callbacks = [samples, checkpoints]
        fit(trainer, model, data=data, config={}, callbacks=callbacks, loggers=[], checkpoint=checkpoint)
        return samples

    return run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("batch_size", "accumulate"), [(3, 2), (2, 3), (6, 1)])
def test_a_run_that_goes_on_in_other_pieces_has_the_same_samples_in_each_step(
    batch_size: int, accumulate: int, train: Callable[..., Samples]
) -> None:
    """From the middle of an epoch of four steps, at an odd step."""
    whole = train(batch_size=6, accumulate=1).steps
    pieces = train(batch_size=batch_size, accumulate=accumulate, resume=5).steps
    assert pieces == {step: whole[step] for step in range(5, 9)}
    assert all(len(positions) == 6 for positions in pieces.values())


@pytest.mark.filterwarnings("ignore")
def test_fit_says_at_which_step_memory_ran_out(train: Callable[..., Samples]) -> None:
    with pytest.raises(OutOfMemory, match=r"^out of memory at step 4: CUDA out of memory\.$"):
        train(batch_size=6, accumulate=1, fail_at=4)

"""The callback that tracks power-function averages: what it follows, writes, keeps, and how a run goes on with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file
from tiny_models import autoencoder_module, latent_diffusion_module
from torch import Tensor
from torch.testing import assert_close

from ldm.training import LatentDiffusionModule
from ldm.training.callbacks import PostHocEMA
from ldm.training.checkpoint_io import AtomicCheckpointIO
from ldm.training.checkpoints import Checkpoints
from ldm.training.frozen import freeze
from ldm.training.post_hoc_ema import find_snapshots, gamma_of, reconstruct

MakeTrainer = Callable[..., pl.Trainer]
MakeData = Callable[..., Any]


class Recorded(pl.Callback):
    """Keeps the parameters after each optimizer step, in float64."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.steps[trainer.global_step] = {n: p.detach().double() for n, p in pl_module.trained.named_parameters()}


def weighted(path: Recorded, sigma_rel: float, step: int) -> dict[str, Tensor]:
    """The explicit average of all parameters up to a step."""
    ends = (torch.arange(step + 1, dtype=torch.float64) / step) ** (gamma_of(sigma_rel) + 1)
    names = path.steps[1]
    return {n: sum(w * path.steps[k][n] for k, w in enumerate(ends.diff(), 1)).float() for n in names}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def train(make_trainer: MakeTrainer, make_data: MakeData) -> Callable[..., pl.Trainer]:
    """Trains a module, from a checkpoint if one is given."""

    def run(
        module: pl.LightningModule, *callbacks: pl.Callback, checkpoint: Path | None = None, **options: Any
    ) -> pl.Trainer:
        saves = any(isinstance(callback, Checkpoints) for callback in callbacks)
        trainer = make_trainer(
            callbacks=list(callbacks),
            enable_checkpointing=saves,
            plugins=[AtomicCheckpointIO()],
            limit_val_batches=0,
            **options,
        )
        trainer.fit(module, make_data(), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        return trainer

    return run


def test_averages_are_those_of_the_parameters_after_each_step(train: Callable[..., Any], tmp_path: Path) -> None:
    path, callback = Recorded(), PostHocEMA(tmp_path / "s", sigma_rels=[0.05, 0.2], every_n_steps=4, dtype="float32")
    train(latent_diffusion_module(), path, callback, max_steps=10)
    for average in callback.averages:
        expected = weighted(path, average.sigma_rel, 10)
        assert_close(dict(average.module.named_parameters()), expected, rtol=0, atol=1e-6)
    written = {name.removesuffix(".safetensors") for name in contents(tmp_path / "s")}
    assert written == {f"step={step:09d}-sigma_rel={width}" for step in (4, 8, 10) for width in (0.05, 0.2)}
    middle = load_file(tmp_path / "s/step=000000008-sigma_rel=0.2.safetensors")
    assert_close({n: middle[n] for n in path.steps[1]}, weighted(path, 0.2, 8), rtol=0, atol=1e-6)


def test_accumulated_batches_are_one_step(train: Callable[..., Any], tmp_path: Path) -> None:
    path, callback = Recorded(), PostHocEMA(tmp_path, sigma_rels=[0.1], every_n_steps=100)
    train(latent_diffusion_module(), path, callback, max_steps=4, accumulate_grad_batches=3)
    expected = weighted(path, 0.1, 4)
    assert_close(dict(callback.averages[0].module.named_parameters()), expected, rtol=0, atol=1e-6)


def test_what_is_frozen_is_shared_and_in_no_snapshot(train: Callable[..., Any], tmp_path: Path) -> None:
    module = latent_diffusion_module()
    module.trained.conditioner = freeze(module.trained.conditioner)
    module.ema.module.conditioner = freeze(module.ema.module.conditioner)
    callback = PostHocEMA(tmp_path, every_n_steps=2)
    trainer = train(module, callback, max_steps=2)
    for average in callback.averages:
        pairs = zip(average.module.conditioner.parameters(), module.trained.conditioner.parameters(), strict=True)
        assert all(a is b for a, b in pairs)
    saved = callback.state_dict()["averages"][0]["parameters"]
    assert set(saved) == {name for name, p in module.trained.named_parameters() if p.requires_grad}
    state = reconstruct(find_snapshots(tmp_path), sigma_rel=0.1).state
    assert state and not [name for name in state if name.startswith("conditioner.")]
    assert trainer.global_step == 2


@pytest.mark.parametrize(("keep", "num_steps"), [(None, 5), (3, 3)])
def test_a_run_that_goes_on_has_the_same_bits(
    keep: int | None, num_steps: int, train: Callable[..., Any], tmp_path: Path
) -> None:
    def callback(folder: str) -> PostHocEMA:
        return PostHocEMA(tmp_path / folder, sigma_rels=[0.05, 0.15], every_n_steps=3, keep=keep)

    whole, resumed = callback("whole"), callback("resumed")
    train(latent_diffusion_module(), whole, max_steps=13)
    begun = Checkpoints(tmp_path / "checkpoints", every_n_steps=5, keep=9)
    # Goes past the checkpoint, as a killed run does: what it wrote after it must go.
    train(latent_diffusion_module(), callback("resumed"), begun, max_steps=8)
    train(latent_diffusion_module(), resumed, max_steps=13, checkpoint=tmp_path / "checkpoints/step=000000005.ckpt")
    for one, other in zip(whole.averages, resumed.averages, strict=True):
        assert_close(dict(one.module.state_dict()), dict(other.module.state_dict()), rtol=0, atol=0)
    assert contents(tmp_path / "whole") == contents(tmp_path / "resumed")
    assert len(contents(tmp_path / "whole")) == 2 * num_steps


def test_training_is_the_same_with_it_and_without(train: Callable[..., Any], tmp_path: Path) -> None:
    plain, tracked = latent_diffusion_module(), latent_diffusion_module()
    train(plain, max_steps=3)
    train(tracked, PostHocEMA(tmp_path, every_n_steps=1), max_steps=3)
    assert_close(dict(tracked.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)


def test_a_checkpoint_without_averages_is_told_and_stands_for_all_before_it(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    path, callback = Recorded(), PostHocEMA(tmp_path / "s", sigma_rels=[0.2], every_n_steps=100)
    train(latent_diffusion_module(), path, Checkpoints(tmp_path, every_n_steps=4), max_steps=4)
    with pytest.warns(UserWarning, match="a checkpoint of step 4 without averages"):
        train(latent_diffusion_module(), path, callback, max_steps=6, checkpoint=tmp_path / "step=000000004.ckpt")
    path.steps |= dict.fromkeys(range(1, 4), path.steps[4])
    expected = weighted(path, 0.2, 6)
    assert_close(dict(callback.averages[0].module.named_parameters()), expected, rtol=0, atol=1e-6)


def test_other_lengths_than_the_checkpoints_are_refused(train: Callable[..., Any], tmp_path: Path) -> None:
    first = PostHocEMA(tmp_path / "s", sigma_rels=[0.05, 0.1])
    train(latent_diffusion_module(), first, Checkpoints(tmp_path), max_steps=2)
    other = PostHocEMA(tmp_path / "s", sigma_rels=[0.05, 0.2])
    with pytest.raises(
        ValueError, match=r"^sigma_rels: got \[0.05, 0.2\], expected \[0.05, 0.1\] as in the checkpoint"
    ):
        train(latent_diffusion_module(), other, max_steps=3, checkpoint=tmp_path / "step=000000002.ckpt")


def test_a_module_that_is_not_sampled_from_is_refused(train: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got post_hoc_ema with AutoencoderModule, expected a module that is sampled"):
        train(autoencoder_module(), PostHocEMA(tmp_path), max_steps=1)


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ({"sigma_rels": []}, r"sigma_rels: got \[\], expected different numbers"),
        ({"sigma_rels": [0.1, 0.1]}, r"sigma_rels: got \[0.1, 0.1\], expected different numbers"),
        ({"sigma_rels": [0.3]}, "got sigma_rel=0.3, expected more than 0"),
        ({"every_n_steps": 0}, "got every_n_steps=0, expected at least 1"),
        ({"dtype": "int8"}, "dtype: got int8, expected one of float32, float16, bfloat16"),
        ({"keep": 1}, "keep: got 1, expected at least 2, or null for all"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=line):
        PostHocEMA(tmp_path, **setting)


def test_what_is_made_samples(train: Callable[..., Any], tmp_path: Path) -> None:
    module: LatentDiffusionModule = latent_diffusion_module()
    train(module, PostHocEMA(tmp_path, every_n_steps=2), max_steps=6)
    made = reconstruct(find_snapshots(tmp_path), sigma_rel=0.15)
    fresh = latent_diffusion_module()
    fresh.ema.module.load_state_dict(made.state)
    assert fresh.eval().sample(["red"], seeds=[0])[0].size == (16, 16)

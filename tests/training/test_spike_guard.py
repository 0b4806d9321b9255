"""Bad steps are left out, recorded, replayed alike and answered; clean runs are untouched."""

import json
import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tiny_models import autoencoder_module, fill, latent_diffusion_module
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.networks import PatchDiscriminator
from ldm.training.callbacks import SpikeGuard
from ldm.training.callbacks.spike_guard import Diverged, RolledBack
from ldm.training.checkpoint_io import AtomicCheckpointIO
from ldm.training.checkpoints import Checkpoints
from ldm.training.fit import fit

NAN, INF = math.nan, math.inf
fused = partial(torch.optim.AdamW, lr=1e-3, fused=True)
MODULES: dict[str, Callable[[], pl.LightningModule]] = {
    "latent diffusion": partial(latent_diffusion_module, optimizer=fused),
    "latent diffusion, not fused": latent_diffusion_module,
    "autoencoder": partial(autoencoder_module, optimizer=fused, discriminator_optimizer=fused),
    "autoencoder, not fused": autoencoder_module,
}
every_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


def spoil(model: Any, factors: dict[int, float]) -> Any:
    """Multiplies the loss of some steps."""
    clean = model.loss

    def loss(*args: Any) -> Tensor:
        return clean(*args) * factors.get(model.trainer.global_step, 1.0)

    model.loss = loss
    return model


def state(model: Any) -> dict[str, Any]:
    """Weights, moving average, buffers and the optimizers' moments."""
    moments = [optimizer.state_dict()["state"] for optimizer in model.trainer.optimizers]
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return {"weights": weights, "moments": moments}


def lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "skipped.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def train(make_data: Callable[..., Any], tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Trains a module as `ldm train` does and returns it; checkpoints and the record go to `tmp_path`."""

    def run(
        model: Any, *, max_steps: int = 8, resume: int | None = None, folder: Path = tmp_path, **options: Any
    ) -> pl.LightningModule:
        extra = {name: options.pop(name) for name in ("precision", "accumulate_grad_batches") if name in options}
        plugins = [AtomicCheckpointIO(), *options.pop("plugins", [])]

        def trainer(*, callbacks: list[pl.Callback], logger: list[Any]) -> pl.Trainer:
            return pl.Trainer(
                accelerator="cpu",
                max_steps=max_steps,
                max_epochs=-1,
                callbacks=callbacks,
                logger=logger,
                plugins=plugins,
                use_distributed_sampler=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                limit_val_batches=0,
                default_root_dir=folder,
                **extra,
            )

        guard = options.pop("guard", None) or SpikeGuard(folder / "skipped.jsonl", **options)
        checkpoints = Checkpoints(folder / "checkpoints", every_n_steps=2, keep=9)
        ended = fit(
            trainer,
            model,
            data=make_data(),
            config={},
            callbacks=[guard, checkpoints],
            loggers=[],
            checkpoint=None if resume is None else folder / "checkpoints" / f"step={resume:09d}.ckpt",
        )
        assert ended
        return model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield run


@every_module
def test_a_clean_run_is_the_same_bit_for_bit_and_leaves_no_record(
    make: Callable[[], Any], train: Callable[..., Any], tmp_path: Path
) -> None:
    watched = train(make(), folder=tmp_path / "watched")
    plain = train(make(), guard=pl.Callback())
    assert_close(state(watched), state(plain), rtol=0, atol=0)
    assert not (tmp_path / "watched" / "skipped.jsonl").exists()


@pytest.mark.parametrize(
    ("make", "factor"), list(zip(MODULES.values(), [NAN, INF, INF, NAN], strict=True)), ids=MODULES
)
def test_a_loss_that_is_not_finite_changes_nothing_and_is_recorded(
    make: Callable[[], Any], factor: float, train: Callable[..., Any], tmp_path: Path
) -> None:
    before = state(train(make(), max_steps=5, folder=tmp_path / "before"))
    model = train(spoil(make(), {5: factor}), max_steps=6)
    found = state(model)
    assert_close(found["moments"], before["moments"], rtol=0, atol=0)
    kept = [name for name in found["weights"] if not name.startswith("ema.")]
    assert all(torch.equal(found["weights"][name], before["weights"][name]) for name in kept)
    assert all(value.isfinite().all() for value in found["weights"].values())
    (line,) = lines(tmp_path)
    assert (line["step"], line["reason"], line["positions"]) == (5, "not finite", [30, 36])
    assert line["values"][0] == str(abs(factor))


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_left_out(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    model = latent_diffusion_module(optimizer=fused)

    class Break(pl.Callback):
        def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.global_step == 3:
                next(p for p in pl_module.parameters() if p.grad is not None).grad.view(-1)[0] = NAN

    model.configure_callbacks = lambda: [Break()]
    assert all(value.isfinite().all() for value in state(train(model))["weights"].values())
    (line,) = lines(tmp_path)
    assert line["step"] == 3
    assert isinstance(line["values"][0], float)
    assert line["values"][1] == "nan"


@every_module
def test_a_loss_fifty_times_too_large_is_left_out(
    make: Callable[[], Any], train: Callable[..., Any], tmp_path: Path
) -> None:
    """In the autoencoder's case behind the step at which its adversary joins, which is no spike."""
    train(spoil(make(), {14: 50.0}), max_steps=18, num_warmup=8, window=20)
    assert [(line["step"], line["reason"]) for line in lines(tmp_path)] == [(14, "spike")]


def test_running_statistics_of_batch_norms_stay_as_they_were(train: Callable[..., Any], tmp_path: Path) -> None:
    """A picture that is not finite reaches them in the forward pass."""

    def make(broken: bool) -> Any:
        discriminator = PatchDiscriminator(base_channels=8, num_layers=1)
        fill(discriminator)
        model = autoencoder_module(discriminator=discriminator, adversarial_start=0)
        clean = model.adversarial_loss

        def adversarial_loss(images: Tensor, *args: Any) -> Tensor:
            return clean(images * (NAN if broken and model.num_steps == 4 else 1.0), *args)

        model.adversarial_loss = adversarial_loss
        return model

    before = train(make(broken=False), max_steps=4, folder=tmp_path / "before").discriminator.state_dict()
    assert "main.3.running_mean" in before
    after = train(make(broken=True), max_steps=5).discriminator.state_dict()
    assert_close(dict(after), dict(before), rtol=0, atol=0)


def test_accumulated_batches_are_left_out_together(train: Callable[..., Any], tmp_path: Path) -> None:
    model = latent_diffusion_module(optimizer=fused)
    clean, calls = model.loss, []

    def loss(*args: Any) -> Tensor:
        calls.append(1)
        return clean(*args) * (NAN if len(calls) == 8 else 1.0)

    model.loss = loss
    train(model, max_steps=4, accumulate_grad_batches=3)
    (line,) = lines(tmp_path)
    assert (line["step"], line["positions"]) == (2, [36, 54])
    assert all(value.isfinite().all() for value in state(model)["weights"].values())


@every_module
def test_a_run_with_a_step_left_out_that_is_killed_goes_on_bit_for_bit_although_the_fault_is_gone(
    make: Callable[[], Any], train: Callable[..., Any], tmp_path: Path
) -> None:
    """The record, not the batch, decides on the replay; the finite spike's numbers teach the statistics again."""
    settings = {"num_warmup": 4, "window": 20}
    faults = {6: 50.0, 7: NAN}
    whole = train(spoil(make(), faults), folder=tmp_path / "whole", max_steps=12, **settings)
    killed = tmp_path / "killed"
    train(spoil(make(), faults), folder=killed, max_steps=8, **settings)
    for step in (6, 8):
        (killed / "checkpoints" / f"step={step:09d}.ckpt").rename(killed / "checkpoints" / f"later-{step}")
    resumed = train(make(), folder=killed, max_steps=12, resume=4, **settings)
    assert_close(state(resumed), state(whole), rtol=0, atol=0)
    assert lines(killed) == lines(tmp_path / "whole")
    assert [line["step"] for line in lines(killed)] == [6, 7]


def test_a_checkpoint_carries_the_record_to_another_run_folder(train: Callable[..., Any], tmp_path: Path) -> None:
    train(spoil(latent_diffusion_module(), {3: NAN}), max_steps=4)
    (tmp_path / "skipped.jsonl").unlink()
    guard = SpikeGuard(tmp_path / "elsewhere.jsonl")
    train(latent_diffusion_module(), resume=4, max_steps=6, guard=guard)
    assert list(guard.record.skips) == [3]


def test_abort_ends_with_one_line_that_names_step_loss_and_norm_and_the_same_command_goes_on_without_the_batch(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(Diverged, match=r"diverged at step 5: loss nan, gradient norm nan \(not finite\)") as caught:
        train(spoil(latent_diffusion_module(), {5: NAN}), policy="abort", read_every=2)
    assert "\n" not in str(caught.value)
    model = train(spoil(latent_diffusion_module(), {5: NAN}), policy="abort", read_every=2, resume=4)
    assert model.trainer.global_step == 8


def test_skip_gives_up_after_so_many_bad_steps_in_a_row(train: Callable[..., Any], tmp_path: Path) -> None:
    apart = {2: NAN, 3: NAN, 5: NAN, 6: NAN}
    train(spoil(latent_diffusion_module(), apart), patience=3, read_every=1, folder=tmp_path / "apart")
    with pytest.raises(Diverged, match=r"step 4: .*bad step 3 in a row, all left out"):
        train(spoil(latent_diffusion_module(), apart | {4: NAN}), patience=3, read_every=1)
    with pytest.raises(Diverged, match="step 7"):
        train(spoil(latent_diffusion_module(), {5: NAN, 6: NAN, 7: NAN}), patience=3, folder=tmp_path / "last")


@every_module
def test_rollback_goes_back_jumps_over_and_ends_as_a_run_that_never_saw_those_batches(
    make: Callable[[], Any], train: Callable[..., Any], tmp_path: Path
) -> None:
    settings = {"policy": "rollback", "patience": 2, "read_every": 2}
    model = train(spoil(make(), {5: NAN, 6: NAN}), folder=tmp_path / "back", max_steps=10, **settings)
    found = lines(tmp_path / "back")
    assert [line.get("step") for line in found] == [5, 6, 4, None]
    assert found[-1] == {"event": "rollback", "at": 6, "to": 4}
    never = SpikeGuard(tmp_path / "never" / "skipped.jsonl")
    never.record.take_up(line for line in found if "step" in line)
    never.record.settled |= {4, 5, 6}
    expected = train(make(), folder=tmp_path / "never", max_steps=10, guard=never)
    assert_close(state(model), state(expected), rtol=0, atol=0)


def test_rollback_gives_up_after_so_many_times(train: Callable[..., Any], tmp_path: Path) -> None:
    settings = {"policy": "rollback", "patience": 1, "read_every": 1, "max_rollbacks": 2}
    with pytest.raises(Diverged, match=r"step 7: .* after going back 2 times"):
        train(spoil(latent_diffusion_module(), dict.fromkeys(range(5, 20), NAN)), max_steps=20, **settings)


def test_rollback_without_a_checkpoint_that_old_gives_up(train: Callable[..., Any]) -> None:
    with pytest.raises(Diverged, match="no checkpoint before step 0 to go back to"):
        train(spoil(latent_diffusion_module(), {1: NAN}), policy="rollback", patience=1, read_every=1)


def test_checkpoints_of_the_past_that_was_given_up_are_gone(train: Callable[..., Any], tmp_path: Path) -> None:
    seen: list[list[str]] = []
    settings = {"policy": "rollback", "patience": 3, "read_every": 3}
    guard = SpikeGuard(tmp_path / "skipped.jsonl", **settings)
    answer = guard._answer

    def watch(trainer: pl.Trainer) -> None:
        try:
            answer(trainer)
        except RolledBack:
            seen.append(sorted(path.name for path in (tmp_path / "checkpoints").glob("*.ckpt")))
            raise

    guard._answer = watch
    train(spoil(latent_diffusion_module(), dict.fromkeys((5, 6, 7), NAN)), guard=guard)
    assert seen == [["step=000000002.ckpt", "step=000000004.ckpt"]]


class Reads(TorchDispatchMode):
    """Counts how often the host asks for a tensor's value, which waits for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


class ReadsBetween(pl.Callback):
    """Counts the reads between a backward pass and the end of its batch."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_before_backward(self, *_: Any) -> None:
        self.mode = Reads()
        self.mode.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        self.mode.__exit__(None, None, None)
        self.counts.append(self.mode.count)


@pytest.mark.parametrize(("name", "expected"), [("latent diffusion", 0), ("latent diffusion, not fused", 1)])
def test_no_step_waits_for_the_device_unless_the_optimizer_is_not_fused(
    name: str, expected: int, make_data: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    counts = {}
    for guards in ([], [SpikeGuard(tmp_path / "skipped.jsonl", read_every=4)]):
        reads = ReadsBetween()
        make_trainer(max_steps=6, callbacks=[*guards, reads]).fit(MODULES[name](), make_data())
        counts[len(guards)] = reads.counts
    assert [found - plain for found, plain in zip(counts[1], counts[0], strict=True)] == [expected] * 6


def test_in_float16_an_overflow_is_the_loss_scales_affair_and_a_broken_loss_is_not(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    """A scale of 2**20 overflows in the gradients until it has fallen far enough."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, backoff_factor=2.0**-10)
    precision = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
    model = spoil(latent_diffusion_module(optimizer=fused), {6: NAN})
    train(model, max_steps=8, plugins=[precision])
    assert scaler.get_scale() < 2.0**20
    assert [line["step"] for line in lines(tmp_path)] == [6]
    assert all(value.isfinite().all() for value in state(model)["weights"].values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "ignore"}, "policy: got 'ignore', expected one of skip, rollback, abort"),
        ({"policy": "abort", "patience": 3}, "got patience=3 with policy=abort, expected 1"),
        ({"patience": 0}, "patience: got 0, expected at least 1"),
        ({"read_every": 0}, "read_every: got 0"),
        ({"factor": 0.5}, "factor=0.5"),
    ],
)
def test_a_wrong_setting_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        SpikeGuard(tmp_path / "skipped.jsonl", **settings)

import atexit
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.data import ShardDataModule
from ldm.training.fit import leave_group

WriteNoise = Callable[..., Path]
Seen = list[tuple[list[int], list[int], float]]
BATCH_SIZE = 4


class Recorder(pl.LightningModule):
    """A model of one number that remembers what it was shown: positions, indices and the sum of the left edges."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: Seen = []
        self.validated: list[int] = []

    def remember(self, batch: dict[str, Any]) -> None:
        self.seen.append((batch["position"].tolist(), batch["index"].tolist(), batch["image"][..., 0].sum().item()))

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        self.remember(batch)
        return self.weight**2

    def validation_step(self, batch: dict[str, Any]) -> None:
        self.validated += batch["index"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=0.1)


class TwoOptimizers(Recorder):
    """Steps two optimizers on each batch, so that Lightning's global_step runs at twice the speed of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: dict[str, Any]) -> None:
        self.remember(batch)
        for optimizer, weight in zip(self.optimizers(), (self.weight, self.other), strict=True):
            optimizer.zero_grad()
            self.manual_backward(weight**2)
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD([weight], lr=0.1) for weight in (self.weight, self.other)]


class SaveAfter(pl.Callback):
    def __init__(self, num_batches: int, path: Path) -> None:
        self.num_batches = num_batches
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, module: Recorder, *_: Any) -> None:
        if len(module.seen) == self.num_batches:
            trainer.save_checkpoint(self.path)


def make_trainer(**options: Any) -> pl.Trainer:
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    return pl.Trainer(**{"accelerator": "cpu", "max_epochs": -1, "num_sanity_val_steps": 0} | quiet | options)


def make_data(folder: Path, **options: Any) -> ShardDataModule:
    return ShardDataModule(folder, **{"batch_size": BATCH_SIZE, "resolution": 8, "flip": True, "seed": 3} | options)


def fit(
    folder: Path,
    *,
    module: type[Recorder] = Recorder,
    save: tuple[int, Path] | None = None,
    checkpoint: Path | None = None,
    data: dict[str, Any] | None = None,
    **options: Any,
) -> Recorder:
    model = module()
    trainer = make_trainer(callbacks=[SaveAfter(*save)] if save else [], **options)
    trainer.fit(model, datamodule=make_data(folder, **(data or {})), ckpt_path=checkpoint)
    return model


def resume(folder: Path, tmp_path: Path, *, after: int, data: dict[str, Any] | None = None, **options: Any) -> Seen:
    """Return what is seen after a run was saved at a batch and then, in a new trainer, taken up again."""
    checkpoint = tmp_path / "saved.ckpt"
    fit(folder, save=(after, checkpoint), data=data, **options)
    return fit(folder, checkpoint=checkpoint, data=data, **options).seen


class Interrupt(pl.Callback):
    """Stops training as Ctrl-C does, inside a batch, and saves what there is."""

    def __init__(self, after: int, path: Path) -> None:
        self.after = after
        self.path = path

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Recorder, *_: Any) -> None:
        if len(module.seen) == self.after + 1:
            raise KeyboardInterrupt

    def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


# 23 samples in batches of 4: Lightning's epochs end after 5, 10 and 15 batches, the data's inside a batch.
@pytest.mark.parametrize("after", [1, 4, 5, 6, 9, 10, 11, 15])
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(write_noise: WriteNoise, tmp_path: Path, after: int) -> None:
    folder = write_noise(23)
    whole = fit(folder, max_steps=17).seen
    assert [place for positions, _, _ in whole for place in positions] == list(range(17 * BATCH_SIZE))
    assert resume(folder, tmp_path, after=after, max_steps=17) == whole[after:]


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing_before_or_after_resuming(
    write_noise: WriteNoise, tmp_path: Path, num_workers: int
) -> None:
    folder = write_noise(23)
    whole = fit(folder, max_steps=9).seen
    data = {"num_workers": num_workers}
    assert fit(folder, max_steps=9, data=data).seen == whole
    for after in (3, 5):
        assert resume(folder, tmp_path, after=after, max_steps=9, data=data) == whole[after:]


@pytest.mark.parametrize("after", [2, 4, 6, 8])
def test_resuming_is_exact_with_accumulated_batches(write_noise: WriteNoise, tmp_path: Path, after: int) -> None:
    folder = write_noise(23)
    options = {"max_steps": 5, "accumulate_grad_batches": 2}
    whole = fit(folder, **options).seen
    assert len(whole) == 10
    assert resume(folder, tmp_path, after=after, **options) == whole[after:]


@pytest.mark.parametrize("after", [3, 5, 7])
def test_resuming_is_exact_with_two_optimizers(write_noise: WriteNoise, tmp_path: Path, after: int) -> None:
    folder = write_noise(23)
    options = {"max_steps": 18, "module": TwoOptimizers}
    whole = fit(folder, **options).seen
    assert len(whole) == 9
    assert resume(folder, tmp_path, after=after, **options) == whole[after:]


@pytest.mark.parametrize("after", [2, 3, 4, 7])
def test_resuming_is_exact_with_validation_and_short_epochs(
    write_noise: WriteNoise, tmp_path: Path, after: int
) -> None:
    folder = write_noise(23)
    options = {"max_steps": 9, "limit_train_batches": 3, "data": {"validation": folder}}
    whole = fit(folder, **options).seen
    assert resume(folder, tmp_path, after=after, **options) == whole[after:]


@pytest.mark.parametrize("after", [2, 4, 5])
def test_a_batch_that_was_interrupted_is_seen_again(write_noise: WriteNoise, tmp_path: Path, after: int) -> None:
    folder, checkpoint = write_noise(23), tmp_path / "saved.ckpt"
    whole = fit(folder, max_steps=12).seen
    trainer = make_trainer(callbacks=[Interrupt(after, checkpoint)], max_steps=12)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(Recorder(), datamodule=make_data(folder))
    assert fit(folder, checkpoint=checkpoint, max_steps=12).seen == whole[after:]


def test_resuming_warns_of_nothing(write_noise: WriteNoise, tmp_path: Path) -> None:
    folder = write_noise(23)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resume(folder, tmp_path, after=3, max_steps=9)
    assert not [str(warning.message) for warning in caught if "resum" in str(warning.message)]


def test_the_checkpoint_keeps_one_number_of_the_stream(write_noise: WriteNoise, tmp_path: Path) -> None:
    fit(write_noise(23), save=(7, tmp_path / "saved.ckpt"), max_steps=9)
    state = torch.load(tmp_path / "saved.ckpt", weights_only=True)["ShardDataModule"]
    assert state.pop("position") == 7 * BATCH_SIZE
    assert set(state) == {"fingerprint", "record"}  # which data it is a place in


def test_a_new_batch_size_goes_on_in_the_same_stream(write_noise: WriteNoise, tmp_path: Path) -> None:
    folder, checkpoint = write_noise(23), tmp_path / "saved.ckpt"
    fit(folder, save=(6, checkpoint), max_steps=6)
    later = fit(folder, checkpoint=checkpoint, max_steps=12, data={"batch_size": 2}).seen
    whole = fit(folder, max_steps=9).seen
    assert [i for _, indices, _ in later for i in indices] == [i for _, indices, _ in whole[6:] for i in indices]


@pytest.mark.parametrize("change", [{"seed": 4}, {"block_size": 1}])
def test_resuming_on_another_stream_is_refused(write_noise: WriteNoise, tmp_path: Path, change: dict[str, Any]) -> None:
    folder, checkpoint = write_noise(23), tmp_path / "saved.ckpt"
    fit(folder, save=(2, checkpoint), max_steps=2)
    with pytest.raises(ValueError, match=r"^resume: got other .* data.filter, data.seed or data.block_size"):
        fit(folder, checkpoint=checkpoint, max_steps=4, data=change)


def test_resuming_on_other_shards_is_refused(write_noise: WriteNoise, tmp_path: Path) -> None:
    checkpoint = tmp_path / "saved.ckpt"
    fit(write_noise(23), save=(2, checkpoint), max_steps=2)
    with pytest.raises(ValueError, match=r"^resume: got other training shards"):
        fit(write_noise(24, name="other"), checkpoint=checkpoint, max_steps=4)


def test_overfitting_sees_the_same_batches_in_every_epoch(write_noise: WriteNoise) -> None:
    seen = fit(write_noise(23), max_steps=6, overfit_batches=2, data={"flip": False}).seen
    assert seen[:2] == seen[2:4] == seen[4:]
    assert seen[0] != seen[1]


def test_training_mirrors_some_images(write_noise: WriteNoise) -> None:
    folder = write_noise(23)
    plain, mirrored = (fit(folder, max_steps=5, data={"flip": flip}).seen for flip in (False, True))
    assert [seen[:2] for seen in plain] == [seen[:2] for seen in mirrored]
    assert plain != mirrored


def test_validation_sees_each_sample_once_in_order(write_noise: WriteNoise) -> None:
    model = Recorder()
    make_trainer().validate(model, datamodule=make_data(write_noise(23), validation=write_noise(10, name="v")))
    assert model.validated == list(range(10))


def test_training_needs_no_validation(write_noise: WriteNoise) -> None:
    model = fit(write_noise(23), max_steps=6)
    assert len(model.seen) == 6
    assert model.validated == []


def test_a_single_pass_is_in_order_whole_and_not_augmented(write_noise: WriteNoise) -> None:
    data = make_data(write_noise(23), columns=["number"])
    batches = list(data.iterate_once("train", 10))
    assert torch.cat([batch["number"] for batch in batches]).tolist() == list(range(23))
    assert max(len(batch["caption"]) for batch in batches) <= 10
    plain = data.dataset("train").unaugmented()
    images = torch.stack([plain[i, i, 0]["image"] for i in range(23)])
    torch.testing.assert_close(torch.cat([batch["image"] for batch in batches]), images, rtol=0, atol=0)


def test_reading_leaves_the_global_random_state_alone(write_noise: WriteNoise) -> None:
    data = make_data(write_noise(23))
    state = torch.get_rng_state()
    assert len(list(data.iterate_once("train", 10))) == 3
    assert torch.equal(torch.get_rng_state(), state)


def test_missing_shards_are_refused_at_construction(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^shards: got .*nowhere.*, expected"):
        make_data(tmp_path / "nowhere")


def test_a_batch_of_nothing_is_refused_at_construction(write_noise: WriteNoise) -> None:
    with pytest.raises(ValueError, match=r"data\.batch_size: got 0"):
        make_data(write_noise(3), batch_size=0)


def test_an_unknown_split_is_refused(write_noise: WriteNoise) -> None:
    with pytest.raises(ValueError, match=r"split: got 'validation', expected one of \['train'\]"):
        next(make_data(write_noise(3)).iterate_once("validation", 2))


class WritesSeen(pl.Callback):
    """Leaves what each rank saw in a file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, module: Recorder) -> None:
        content = json.dumps({"seen": module.seen, "validated": module.validated})
        (self.folder / f"rank{trainer.global_rank}.json").write_text(content)
        # A process that exits with its group's threads still running may abort.
        atexit.register(leave_group)


def both_ranks(folder: Path) -> Iterator[dict[str, Any]]:
    for rank in (0, 1):
        yield json.loads((folder / f"rank{rank}.json").read_text())


@pytest.mark.slow
def test_two_ranks_go_on_with_the_batches_of_one(write_noise: WriteNoise, tmp_path: Path) -> None:
    folder, checkpoint = write_noise(23), tmp_path / "saved.ckpt"
    whole = fit(folder, max_steps=9, save=(4, checkpoint), data={"validation": folder})
    trainer = make_trainer(
        strategy="ddp_spawn", devices=2, max_steps=9, callbacks=[WritesSeen(tmp_path)], limit_val_batches=1.0
    )
    trainer.fit(Recorder(), datamodule=make_data(folder, validation=folder), ckpt_path=checkpoint)
    first, second = both_ranks(tmp_path)
    for name in (0, 1):
        together = [a[name] + b[name] for a, b in zip(first["seen"], second["seen"], strict=True)]
        assert together == [batch[name] for batch in whole.seen[4:]]
    passes = len(first["validated"]) // 12
    assert sorted(first["validated"] + second["validated"]) == sorted(list(range(23)) * passes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": -2}, "data.num_workers: got -2, expected 0 or more"),
        ({"batch_size": 0}, "data.batch_size: got 0, expected 1 or more"),
        ({"columns": ["caption"]}, r"data.columns: got \['caption'\], which hold no numbers"),
        ({"captions": "txt"}, "data.captions: got txt, expected a positive weight by column"),
        ({"captions": {"nope": 1}}, "data.captions: got nope, expected some of "),
    ],
)
def test_a_setting_that_cannot_be_is_said_at_the_start(
    write_noise: WriteNoise, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ShardDataModule(write_noise(7), **({"batch_size": 2, "resolution": 8} | options)).setup("fit")


def test_a_batch_of_more_samples_than_there_are_is_told(write_noise: WriteNoise) -> None:
    with pytest.warns(UserWarning, match="a batch holds samples more than once"):
        ShardDataModule(write_noise(7), batch_size=8, resolution=8).setup("fit")

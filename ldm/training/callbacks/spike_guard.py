"""Leaves out optimizer steps whose loss or gradient is not finite or stands far out, and answers a run of them."""

from __future__ import annotations

import os
import re
from functools import partial
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from ldm.training.callbacks.left_out import current_scale, leave_out, loss_scaler, take_back, unscaled_norm
from ldm.training.checkpoint_files import Place, is_valid
from ldm.training.checkpoint_folders import find, remove
from ldm.training.checkpoints import Checkpoints, join
from ldm.training.sharding import spreads_parameters
from ldm.training.skip_record import Skip, SkipRecord
from ldm.training.spikes import Spikes

# How many bad steps in a row each policy leaves out before it does more.
PATIENCE = {"skip": 10, "rollback": 3, "abort": 1}
# What a row of the log begins with; sums of them occur.
NOT_FINITE, SPIKE, KNOWN = 1, 2, 4


class Diverged(Exception):
    """Too many steps in a row were bad; says so in one line."""


class RolledBack(Exception):
    """Training is to go on from an earlier checkpoint.

    Args:
        checkpoint: that one.
    """

    def __init__(self, checkpoint: Place) -> None:
        super().__init__(f"back to {checkpoint}")
        self.checkpoint = checkpoint


class SpikeGuard(pl.Callback):
    """Judges loss and gradient norms before each optimizer step and leaves out a bad one, on all ranks alike.

    A bad step changes neither weights nor optimizer nor the running statistics of batch norms. Learning rate, step
    count and data go on, so that a step's number still names its batch. Every such step is recorded in `path` and in
    checkpoints, and is left out again when a resumed run comes to it, whatever its batch does then.

    The decision is taken and carried out on the device: fused optimizers take it as the `found_inf` that PyTorch's
    loss scaling uses, and the host reads what happened only every `read_every` steps and before each checkpoint. An
    optimizer that knows no `found_inf` (one that is not fused) makes the host wait for each decision. In several
    processes a step gathers one number a series from each, without waiting.

    In float16 training a gradient that is not finite is the loss scale's affair, until that has fallen to 1.

    One decision is made a batch, at its first optimizer step: a module with several optimizers does all its backward
    passes before that.

    Args:
        path: of the record, a line of JSON for each step left out.
        policy: what follows when `patience` steps in a row were bad: "skip" and "abort" end the run, "rollback" goes
            back to a checkpoint before them and jumps over their batches.
        patience: None is 10 for skip, 3 for rollback and 1 for abort.
        jump: with rollback, how many steps before the first bad one are jumped over too.
        max_rollbacks: how often a run goes back before it ends; the same command then has as many again.
        read_every: steps between two looks of the host.
        window, num_warmup, factor, num_deviations: what stands out: see `Spikes`.

    Raises:
        ValueError: a setting is out of range or would have no effect.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        policy: str = "skip",
        patience: int | None = None,
        jump: int = 1,
        max_rollbacks: int = 10,
        read_every: int = 20,
        window: int = 500,
        num_warmup: int = 200,
        factor: float = 5.0,
        num_deviations: float = 6.0,
    ) -> None:
        if policy not in PATIENCE:
            raise ValueError(f"policy: got {policy!r}, expected one of {', '.join(PATIENCE)}")
        if policy == "abort" and patience not in (None, 1):
            raise ValueError(f"got patience={patience} with policy=abort, expected 1; or choose policy=skip")
        self.patience = PATIENCE[policy] if patience is None else patience
        lowest = {"patience": 1, "jump": 0, "max_rollbacks": 1, "read_every": 1}
        found = {"patience": self.patience, "jump": jump, "max_rollbacks": max_rollbacks, "read_every": read_every}
        for name, least in lowest.items():
            if found[name] < least:
                raise ValueError(f"{name}: got {found[name]}, expected at least {least}")
        self.policy, self.jump, self.max_rollbacks, self.read_every = policy, jump, max_rollbacks, read_every
        self._make_spikes = partial(
            Spikes, window=window, num_warmup=num_warmup, factor=factor, num_deviations=num_deviations
        )
        self.spikes = self._make_spikes(1)
        self.record = SkipRecord(path)
        self._restored: dict[str, Any] = {}
        self._run: list[int] = []
        self._due: list[int] = []
        self._pending: list[tuple[int, tuple[int, int] | None]] = []
        self._writes = False
        self._num_warnings = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes up the record and the statistics, the same on all ranks."""
        lines = trainer.strategy.broadcast(self.record.read())
        if not self.record.lines:
            self.record.take_up(lines or self._restored.get("lines", []))
        self._writes = trainer.is_global_zero
        device, num_series = pl_module.device, 1 + len(trainer.optimizers)
        self.spikes = self._make_spikes(num_series, device=device)
        self._log = torch.zeros(self.read_every, 1 + num_series, device=device)
        self._pending, self._due, self._run = [], [], list(self._restored.get("run", []))
        if "spikes" in self._restored:
            self.spikes.load_state_dict(self._restored["spikes"])
        self._restored = {}
        self._running_statistics = [
            buffer
            for part in pl_module.modules()
            if isinstance(part, _BatchNorm) and part.training
            for buffer in part.buffers(recurse=False)
        ]
        self._loss: Tensor | None = None
        self._rejected: Tensor | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps what a bad batch must not change, at the first batch of a step."""
        if self._loss is None:
            self._before = [buffer.clone() for buffer in self._running_statistics]
            self._step, self._positions = trainer.global_step, _positions(trainer)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Adds up the step's loss."""
        loss = loss.detach().float().mean()
        self._loss = loss if self._loss is None else self._loss + loss

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Decides, at the first optimizer of a batch, and carries it out."""
        if self._rejected is None:
            self._rejected = self._decide(trainer)
            for buffer, before in zip(self._running_statistics, self._before, strict=True):
                buffer.copy_(torch.where(self._rejected, before, buffer))
        leave_out(optimizer, self._rejected, scaler=loss_scaler(trainer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Every `read_every` steps reads what happened.

        Raises:
            Diverged: too many bad steps in a row.
            RolledBack: the same, where the policy is to go back.
        """
        if self._rejected is None:
            return
        self._rejected, self._loss = None, None
        if len(self._pending) == self.read_every:
            self._read()
        self._answer(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reads the last steps, and answers them too.

        Raises:
            Diverged, RolledBack: see `on_train_batch_end`.
        """
        self._read()
        self._answer(trainer)
        take_back(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves optimizers as they came."""
        take_back(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The record, the statistics, and the bad steps in a row so far."""
        self._read()
        return {"lines": self.record.lines, "run": self._run, "spikes": self.spikes.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until training starts and its device is known."""
        self._restored = state_dict

    def _decide(self, trainer: pl.Trainer) -> Tensor:
        """Whether the step is to be left out, a boolean scalar on the device; the same on all ranks."""
        known = self.record.skips.get(self._step)
        if known is None:
            values = self._measure(trainer)
            finite = values.isfinite()
            if (scaler := loss_scaler(trainer)) is not None:
                finite[1:] |= current_scale(scaler) > 1
            code = NOT_FINITE * (~finite.all()).float() + SPIKE * self.spikes.judge(values).any().float()
        else:
            # As they were: a fault that is gone today must not teach the statistics other numbers.
            recorded = known.values or (torch.nan,) * (self._log.shape[1] - 1)
            values = torch.tensor(recorded, device=self._log.device)
            code = torch.full((), float(KNOWN), device=self._log.device)
        rejected = code > 0
        self.spikes.remember(values, rejected)
        self._log[len(self._pending)] = torch.cat([code[None], values])
        self._pending.append((self._step, self._positions))
        return rejected

    def _measure(self, trainer: pl.Trainer) -> Tensor:
        """The step's loss, the mean of all ranks', and each optimizer's gradient norm, before clipping."""
        assert self._loss is not None, "a step follows a backward pass"
        scaler = loss_scaler(trainer)
        loss = self._loss if scaler is None else self._loss / current_scale(scaler)
        norms = [unscaled_norm(optimizer, like=loss, scaler=scaler) for optimizer in trainer.optimizers]
        values = torch.stack([loss, *norms])
        if trainer.world_size == 1:
            return values
        # Not `strategy.reduce`, which waits for the device; and the same sum in the same order on every rank.
        rows = [torch.empty_like(values) for _ in range(trainer.world_size)]
        dist.all_gather(rows, values)
        table = torch.stack(rows)
        together = table[:, 1:].square().sum(0).sqrt() if spreads_parameters(trainer.strategy) else table[:, 1:].amax(0)
        return torch.cat([table[:, 0].mean()[None], together])

    def _read(self) -> None:
        """Brings what happened since the last time to the host."""
        rows = self._log[: len(self._pending)].tolist() if self._pending else []
        found = []
        for (step, positions), (code, *values) in zip(self._pending, rows, strict=True):
            if not code:
                self._run = []
            elif step not in self.record.settled:
                self._run.append(step)
                if len(self._run) >= self.patience:
                    self._due = list(self._run)
            if code and step not in self.record.skips:
                reason = "not finite" if int(code) & NOT_FINITE else "spike"
                found.append(Skip(step, reason, tuple(values), positions))
        self._pending = []
        try:
            self.record.add(found, write=self._writes)
        except OSError as error:
            rank_zero_warn(f"{self.record.path}: {error}; the checkpoints keep the record of left out steps alone")
        for skip in found:
            self._warn(skip)

    def _warn(self, skip: Skip) -> None:
        """Says the first, the tenth, the hundredth ... that was left out."""
        self._num_warnings += 1
        if str(self._num_warnings).strip("0") == "1":
            rank_zero_warn(f"step {skip.step} was left out: {skip.in_words}; number {self._num_warnings} of this run")

    def _answer(self, trainer: pl.Trainer) -> None:
        if not self._due:
            return
        first, last = self._due[0], self._due[-1]
        start = max(0, first - self.jump)
        reason = f"training diverged at step {last}: {self.record.skips[last].in_words}"
        if self.policy != "rollback":
            self._give_up(f"{reason}, bad step {len(self._due)} in a row, all left out ({self.record.path})", last)
        target = trainer.strategy.broadcast(_checkpoint_before(trainer, start))
        if target is None:
            self._give_up(f"{reason}, and there is no checkpoint before step {start} to go back to", last)
        step = _step_of(target)
        if len(self.record.rollbacks) >= self.max_rollbacks:
            self._give_up(f"{reason}, after going back {self.max_rollbacks} times", last)
        jumped = [Skip(number, "jumped over") for number in range(start, first)]
        self.record.add(jumped, write=self._writes)
        self.record.settle({"event": "rollback", "at": last, "to": step}, write=self._writes)
        if trainer.is_global_zero:
            # Of a past that is given up: a kill from now on must not resume there.
            for place in find(_folder(trainer)):
                if _step_of(place) > step:
                    remove(place, spare=0)
        rank_zero_warn(f"{reason}; going back to step {step} and leaving out steps {start} to {last}")
        trainer.strategy.barrier("rollback")
        raise RolledBack(target)

    def _give_up(self, line: str, step: int) -> NoReturn:
        self.record.settle({"event": "abort", "at": step}, write=self._writes)
        raise Diverged(f"{line}; try a lower learning rate, or give the same command to go on without these batches")


def _positions(trainer: pl.Trainer) -> tuple[int, int] | None:
    """The next step's places in the stream of samples, of data modules that count them."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    start = getattr(data, "position", None)
    return None if start is None else (start, start + data.batch_size * trainer.accumulate_grad_batches)


def _folder(trainer: pl.Trainer) -> Place:
    """Where this run's checkpoints are."""
    return next(callback.folder for callback in trainer.checkpoint_callbacks if isinstance(callback, Checkpoints))


def _checkpoint_before(trainer: pl.Trainer, step: int) -> Place | None:
    """The newest valid checkpoint of at most so many steps, on rank 0; None where there is none."""
    join(trainer)
    if not trainer.is_global_zero or not any(isinstance(one, Checkpoints) for one in trainer.checkpoint_callbacks):
        return None
    places = (place for place in find(_folder(trainer)) if _step_of(place) <= step)
    return next((place for place in places if is_valid(place)), None)


def _step_of(place: Place) -> int:
    """Optimizer steps of a checkpoint of ours, by its name; -1 for another."""
    named = re.search(r"step=(\d+)\.ckpt", str(place))
    return int(named[1]) if named else -1

"""FID, Inception Score and their like in the course of training."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
import torch
from PIL.Image import Image
from torchmetrics import Metric

from ldm.generation.evaluation.evaluate import Evaluation, Subject
from ldm.generation.evaluation.folder import clear
from ldm.generation.evaluation.prompts import caption_prompts
from ldm.generation.evaluation.protocol import describe_settings
from ldm.generation.evaluation.workers import RankWorkers
from ldm.generation.pipeline import SamplingSettings
from ldm.training.callbacks.cadence import Cadence, outside_training

# What `sampling` may change.
SETTINGS = frozenset({*(field.name for field in fields(SamplingSettings)), "negative_prompt"})


class SampleMetrics(pl.Callback):
    """At validation, samples, measures as `ldm evaluate` does, and logs each metric as `val/NAME`.

    The prompts are the captions of the validation samples, evenly spread over all of them, and image number i has seed
    `seed + i`: the same pictures at every validation and on any number of ranks, which share the work. What the module
    samples with is its moving average. A metric of several values logs the first as `val/NAME`, and the others as
    `val/NAME/PART`; `BestCheckpoint`, `StopEarly` and sweeps go by these names. `val/sampling_seconds` says what it
    cost.

    Args:
        metrics: by name, as `ldm.generation.evaluation.evaluate.Evaluation` takes them.
        num_images: sampled each time, over all ranks.
        every_n_steps: optimizer steps between two times; each waits for the next validation.
        batch_size: pictures sampled at a time, on each rank; a shard of samples.
        seed: of the first picture.
        reference: real images: a data module, a folder, zip, shards or .npz; None takes the run's own validation
            images.
        prompts: texts, or dicts with "prompt" and labels; None takes the captions of the validation samples.
        sampling: of the module's own settings what is to be different, e.g. num_steps, sampler, guidance.
        folder: where step=000200/evaluation.json goes, and in reference/ what is known of the real images; None
            writes nothing down.
        keep_images: whether samples and their features stay in that folder.
        feature_batch_size: images that a feature network sees at once.
        num_workers: processes that read images.
        bad_images: what becomes of real images that cannot be read: refuse, or skip, for which each is tried first.

    Raises:
        ValueError: no metric, a count below 1, or a setting of sampling that there is not.
    """

    def __init__(
        self,
        *,
        metrics: Mapping[str, Metric] | None = None,
        num_images: int = 1000,
        every_n_steps: int = 1000,
        batch_size: int = 64,
        seed: int = 0,
        reference: Any = None,
        prompts: Sequence[str | Mapping[str, Any]] | None = None,
        sampling: Mapping[str, Any] | None = None,
        folder: Path | str | None = None,
        keep_images: bool = False,
        feature_batch_size: int = 64,
        num_workers: int = 0,
        bad_images: str = "refuse",
    ) -> None:
        if not metrics:
            raise ValueError("got no metric for sampled images, expected some; choose callback=fid")
        if num_images < 1 or batch_size < 1:
            raise ValueError(f"got num_images={num_images} and batch_size={batch_size}, expected at least 1 of each")
        if keep_images and folder is None:
            raise ValueError("got keep_images without a folder, expected one to keep them in; set folder")
        if unknown := sorted(set(sampling or {}) - SETTINGS):
            raise ValueError(f"got sampling.{unknown[0]}, expected some of {', '.join(sorted(SETTINGS))}")
        self.cadence = Cadence(every_n_steps)
        self.metrics = dict(metrics)
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.reference, self.prompts = reference, prompts
        self.sampling = dict(sampling or {})
        self.folder = None if folder is None else Path(folder)
        self.keep_images, self.feature_batch_size, self.num_workers = keep_images, feature_batch_size, num_workers
        self.bad_images = bad_images
        self.measured_at: int | None = None
        self._evaluation: Evaluation | None = None
        self._scratch: TemporaryDirectory[str] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raises ValueError where the module cannot sample or there are no prompts to take."""
        if not hasattr(pl_module, "sample"):
            raise ValueError(
                f"got metrics of samples with {type(pl_module).__name__}, expected a module that samples prompts; "
                "leave out callback=fid and callback=inception_score"
            )
        if self.prompts is None and not hasattr(trainer.datamodule, "iterate_once"):  # type: ignore[attr-defined]
            raise ValueError("got metrics of samples without a data module, expected one with validation captions")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts from here, and checks now what could only fail after an hour."""
        self.cadence.start(trainer.global_step)
        self._prepared(trainer.datamodule).check(self.num_images)  # type: ignore[attr-defined]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Removes what was not to be kept."""
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch, self.folder = None, None

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Samples, measures and logs where it is due."""
        if trainer.sanity_checking or not self.cadence.due(trainer.global_step):
            return
        start = time.perf_counter()
        ranks = RankWorkers(trainer.global_rank, trainer.world_size, trainer.strategy.barrier)
        with outside_training(trainer):
            values = self.measure(
                trainer.datamodule,  # type: ignore[attr-defined]
                pl_module,
                self._place(trainer),
                ranks=ranks,
                step=trainer.global_step,
            )
        values["sampling_seconds"] = time.perf_counter() - start
        for name, value in values.items():
            pl_module.log(f"val/{name}", value, sync_dist=True)
        self.measured_at = trainer.global_step

    def gives(self, name: str) -> bool:
        """Whether a logged figure is one of this callback's."""
        return name.startswith("val/") and name.split("/")[1] in self.metrics

    def measure(self, data: Any, pl_module: Any, folder: Path, *, ranks: RankWorkers, step: int) -> dict[str, float]:
        """Each metric's values, the same on every rank; a folder that holds an evaluation already is made empty."""
        evaluation = self._prepared(data)
        if ranks.rank == 0:
            clear(folder)
            for name in ("plan.json", "evaluation.json"):
                (folder / name).unlink(missing_ok=True)
        ranks.barrier()

        def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
            pictures: list[Image] = pl_module.sample(prompts, seeds=seeds, **self.sampling)
            return pictures

        subject = Subject(folder, pl_module.device, self._about(pl_module, step), ranks)
        found = evaluation.of_samples(draw, subject)
        return self._logged(found)

    def _logged(self, found: Mapping[str, float]) -> dict[str, float]:
        """What is logged of the figures: of a metric's several parts the first by the metric's name alone."""
        values: dict[str, float] = {}
        for name in self.metrics:
            parts = {key: value for key, value in found.items() if key.partition("/")[0] == name}
            first, *others = parts
            values[name] = parts[first]
            values |= {key: parts[key] for key in others}
        return values

    def _about(self, pl_module: Any, step: int) -> dict[str, Any]:
        settings = getattr(pl_module, "sampling", None)
        described = describe_settings(_replaced(settings, self.sampling)) if settings is not None else {}
        decay = getattr(getattr(pl_module, "ema", None), "decay", None)
        return {
            **described,
            "negative_prompt": self.sampling.get("negative_prompt", ""),
            "checkpoint": {"path": None, "sha256": None, "step": step},
            "ema": decay,
        }

    def _prepared(self, data: Any) -> Evaluation:
        if self._evaluation is None:
            given = self.prompts
            prompts = caption_prompts(data) if given is None else [_as_prompt(prompt) for prompt in given]
            self._evaluation = Evaluation(
                metrics=self.metrics,
                prompts=prompts,
                prompts_source="validation captions" if given is None else "the callback's prompts",
                reference=data if self.reference is None else self.reference,
                num_samples=self.num_images,
                seed=self.seed,
                batch_size=self.batch_size,
                shard_size=self.batch_size,
                feature_batch_size=self.feature_batch_size,
                num_workers=self.num_workers,
                keep_images=self.keep_images,
                bad_images=self.bad_images,
            )
        return self._evaluation

    def _place(self, trainer: pl.Trainer) -> Path:
        """The folder of this step's evaluation; one that goes after training where none is to be kept."""
        if self.folder is None:
            if trainer.global_rank == 0:
                self._scratch = TemporaryDirectory(prefix="ldm-evaluation-")
            self.folder = Path(str(trainer.strategy.broadcast(self._scratch.name if self._scratch else None)))
        return self.folder / f"step={trainer.global_step:06d}"


def _as_prompt(prompt: str | Mapping[str, Any]) -> Mapping[str, Any]:
    return {"prompt": prompt} if isinstance(prompt, str) else prompt


def _replaced(settings: Any, changes: Mapping[str, Any]) -> Any:
    names = {field.name for field in fields(settings)}
    return replace(settings, **{name: value for name, value in changes.items() if name in names})

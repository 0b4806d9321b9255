"""Training of the latent-diffusion model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from PIL.Image import Image
from pytorch_lightning.strategies import FSDPStrategy
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ldm.autoencoders import Autoencoder, encode_safely
from ldm.conditioners import ClassIds, Conditioner
from ldm.data import ShardDataModule
from ldm.diffusion import Denoiser
from ldm.generation import Pipeline, SamplingSettings
from ldm.generation.encode import weights_sha256
from ldm.networks import UNet
from ldm.nn.weights import save_weights
from ldm.training.clipping import Clipped
from ldm.training.compilation import Compilation, use_float8
from ldm.training.ema import EMA
from ldm.training.frozen import drop_frozen, freeze, restore_frozen
from ldm.training.nonleaking import NonLeakingAugmentation
from ldm.training.precomputed import check_text, keep_text_files
from ldm.training.randomness import draw, normal, uniform
from ldm.training.sharding import check_steps_spread, shard, shard_whole, whole_state
from ldm.training.strategies import check_wrapped

VALIDATION_SEED = 2**31 - 1


class Trained(nn.Module):
    """What is trained, and what the moving average averages: the denoiser and the conditioner."""

    def __init__(self, denoiser: Denoiser, conditioner: Conditioner) -> None:
        super().__init__()
        self.denoiser, self.conditioner = denoiser, conditioner


class LatentDiffusionModule(Clipped):
    """Trains a denoiser, and the conditioner beside it, on the latents of a frozen autoencoder.

    Args:
        denoiser, conditioner: what is trained; their moving average validates and samples.
        autoencoder: frozen; unused by `training_step` where a batch holds moments already.
        optimizer: from parameters to an optimizer.
        lr_schedule: from the optimizer to a schedule, stepped once an optimizer step.
        condition_dropout: share of samples that lose all of their conditions, which guidance needs.
        ema_decay: of the moving average, by optimizer step.
        ema_offload, ema_every_n_steps: whether it is kept in the CPU's memory, and how often it is updated: see `EMA`.
        compile: what is compiled of the network that is trained; its moving average never is.
        float8: products of the network's linear layers in float8, on the "device" or "emulated": see `use_float8`.
        nonleaking: changes what is trained on, and tells the network how; validation and sampling know nothing of it.
        sampling: how `sample` samples, unless told otherwise.
        seed: of noise, times and dropout; with a sample's position in the stream it decides all three.

    Raises:
        ValueError: settings that do not fit each other: see the messages.

    Attributes:
        knows_null: whether the model can do without a condition before it is trained.
    """

    knows_null = False

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        conditioner: Conditioner,
        autoencoder: Autoencoder,
        optimizer: Callable[..., Optimizer],
        lr_schedule: Callable[[Optimizer], LRScheduler],
        sampling: SamplingSettings,
        condition_dropout: float = 0.1,
        ema_decay: float = 0.9999,
        ema_offload: bool = False,
        ema_every_n_steps: int = 1,
        compile: Compilation | None = None,
        float8: str | None = None,
        nonleaking: NonLeakingAugmentation | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= condition_dropout <= 1:
            raise ValueError(f"got condition_dropout={condition_dropout}, expected a share from 0 to 1")
        if condition_dropout == 0 and sampling.guidance.scale != 1 and not self.knows_null:
            raise ValueError(
                f"got guidance.scale={sampling.guidance.scale} with condition_dropout=0: the model never learns to "
                "do without a condition; set model.condition_dropout=0.1, or guidance.scale=1"
            )
        check_class_ids(denoiser.network, conditioner, condition_dropout=condition_dropout)
        self.trained = Trained(denoiser, conditioner)
        self.ema = EMA(self.trained, decay=ema_decay, offload=ema_offload, every_n_steps=ema_every_n_steps)
        if ema_offload:
            # DDP wants all parameters that it knows on one kind of device, trained or not.
            names = [*dict(self.ema.named_parameters()), *dict(self.ema.named_buffers())]
            self._ddp_params_and_buffers_to_ignore = [f"ema.{name}" for name in names]
        self.autoencoder = freeze(autoencoder)
        self.make_optimizer, self.make_lr_schedule = optimizer, lr_schedule
        self.condition_dropout, self.nonleaking, self.seed = condition_dropout, nonleaking, seed
        self.sampling, self.compilation, self.float8 = sampling, compile, float8
        self._is_configured = False
        self._during_validation = ExitStack()

    def configure_model(self) -> None:
        """Gives the trained network its faster form, and spreads it over the ranks of `strategy=fsdp2`."""
        if self._is_configured:
            return
        self._is_configured = True
        if isinstance(getattr(self._trainer, "strategy", None), FSDPStrategy):
            check_wrapped(self.trained)
        network = self.trained.denoiser.network
        if self.float8 is not None:
            use_float8(network, self.float8)
        if self._device_mesh is not None:
            self._spread(self._device_mesh["data_parallel"])
        if self.compilation is not None:
            self.compilation.apply(network)

    def _spread(self, mesh: Any) -> None:
        """Network and conditioner, and their moving averages alike."""
        if self.ema.offload:
            raise ValueError("got model.ema_offload=true with strategy=fsdp2, which spreads it; leave one out")
        for model in (self.trained, self.ema.module):
            shard(model.denoiser.network, mesh=mesh)
            if any(p.requires_grad for p in self.trained.conditioner.parameters()):
                shard_whole(model.conditioner, mesh=mesh, methods=("null", "prompt_pair"))

    def on_fit_start(self) -> None:
        """Refuses data that do not fit the model: moments of another autoencoder would train, and decode to noise."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, ShardDataModule):
            self._check_data(data)

    def _check_data(self, data: ShardDataModule) -> None:
        columns = self.trained.conditioner.columns
        if missing := [name for name in columns if name not in data.columns]:
            wanted = ",".join(dict.fromkeys([*data.columns, *columns]))
            raise ValueError(
                f"got data.columns={list(data.columns)}, expected {', '.join(missing)} too, which this model is told; "
                f"set data.columns=[{wanted}]"
            )
        unit = self.autoencoder.downsampling_factor * getattr(self.trained.denoiser.network, "downsampling_factor", 1)
        if data.resolution is not None and data.resolution % unit:
            raise ValueError(
                f"got data.resolution={data.resolution}, expected a multiple of {unit}, which the autoencoder and the "
                f"network divide by; set data.resolution={max(unit, round(data.resolution / unit) * unit)}"
            )
        for width, height in data.buckets.sizes if data.buckets is not None else ():
            if width % unit or height % unit:
                raise ValueError(
                    f"got data.buckets with {height} x {width}, expected multiples of {unit}, which the autoencoder "
                    "and the network divide by; choose other sizes, or another step"
                )
        found, own = data.dataset("train").encoder_sha256, weights_sha256(self.autoencoder)
        if found not in (None, own):
            raise ValueError(
                f"got latent shards of the autoencoder {found[:12]}, expected {own[:12]}, the one that decodes; "
                "encode the images with it: ldm data encode"
            )
        check_text(self.trained.conditioner, data.dataset("train"))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self.loss(batch, self.trained, self.seed, self.condition_dropout).mean()
        self.log("train/loss", loss, batch_size=len(batch["caption"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The loss of the moving average, with noise and times that are the same at every validation."""
        loss = self.loss({**batch, "position": batch["index"]}, self.ema.module, VALIDATION_SEED, 0.0).mean()
        self.log("val/loss", loss, sync_dist=True, batch_size=len(batch["caption"]))

    def on_validation_start(self) -> None:
        self._during_validation.enter_context(self.ema.on(self.device))

    def on_validation_end(self) -> None:
        self._during_validation.close()

    def loss(self, batch: dict[str, Any], model: Trained, seed: int, condition_dropout: float) -> Tensor:
        """The diffusion loss (B,) of a batch."""
        moments = self.moments(batch)
        random = draw(seed, batch["position"], (self.autoencoder.latent_channels, *moments.shape[2:]))
        x_0 = self.autoencoder.to_latents(moments, noise=random.posterior)
        denoiser, conditioner = model.denoiser, model.conditioner
        cond = conditioner(self.with_latents(batch, conditioner, seed))
        told = {name: getattr(cond, name) for name in conditioner.always_told}
        cond = cond.select(random.drop < condition_dropout, replace(conditioner.null(len(x_0)), **told))
        if self.nonleaking is not None and model is self.trained:
            if cond.context is not None or cond.concat is not None:
                raise ValueError(
                    "got model.nonleaking with a conditioner of a context or a picture, expected of classes or of "
                    "nothing: its labels take the context's place, and that picture would stay as it was; set "
                    "model.nonleaking=null"
                )
            # Of a stream of its own, so that nothing else changes with it.
            u = uniform(seed + 2**33, batch["position"], self.nonleaking.num_uniforms)
            x_0, labels = self.nonleaking(x_0, u)
            cond = replace(cond, context=labels[:, None])
        return denoiser.loss(x_0, random.eps, denoiser.times(random.u, denoiser.schedule), cond)

    @torch.no_grad()
    def with_latents(self, batch: dict[str, Any], conditioner: Conditioner, seed: int) -> dict[str, Any]:
        """The batch with the latents of the pictures that the conditioner wants to be encoded."""
        found = {}
        for name, picture in conditioner.pictures(batch).items():
            moments = encode_safely(self.autoencoder, picture)
            shape = (self.autoencoder.latent_channels, *moments.shape[2:])
            # Of another stream than the noise of the picture itself, which must not be known.
            noise = normal(seed + 2**32, batch["position"], shape)
            found[f"{name}_latents"] = self.autoencoder.to_latents(moments, noise=noise)
        return {**batch, **found}

    @torch.no_grad()
    def moments(self, batch: dict[str, Any]) -> Tensor:
        """The batch's moments (B, M, h, w): encoded now, unless the shards hold them."""
        return batch["moments"] if "moments" in batch else encode_safely(self.autoencoder, batch["image"])

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        num_updates = self.trainer.global_step
        super().optimizer_step(*args, **kwargs)
        # Networks with weights of fixed magnitude (Karras et al. 2024) bring them back before they are averaged.
        if renew := getattr(self.trained.denoiser.network, "after_optimizer_step", None):
            renew()
        self.ema.update(self.trained, num_updates=num_updates)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        make_optimizer = self.clippable(self.make_optimizer)
        optimizer = make_optimizer([p for p in self.trained.parameters() if p.requires_grad])
        check_steps_spread(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_lr_schedule(optimizer), "interval": "step"},
        }

    def train(self, mode: bool = True) -> LatentDiffusionModule:
        super().train(mode)
        for part in self.modules():
            if getattr(part, "is_frozen", False):
                part.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = drop_frozen(self, checkpoint["state_dict"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = restore_frozen(self, checkpoint["state_dict"])

    def pipeline(self) -> Pipeline:
        """The moving average as something to sample from."""
        model = self.ema.module
        return Pipeline(
            model.denoiser, conditioner=model.conditioner, autoencoder=self.autoencoder, settings=self.sampling
        )

    def sample(self, prompts: Sequence[str], *, seeds: Sequence[int], **settings: Any) -> list[Image]:
        """Images of the moving average; settings as in `Pipeline.sample`."""
        with self.ema.on(self.device):
            return self.pipeline().sample(prompts, seeds=seeds, **settings)

    def sample_trajectory(self, prompt: str, *, seed: int) -> list[tuple[Image, Image]]:
        """The steps of one picture, (x_t, believed x_0): see `Pipeline.trajectory`."""
        with self.ema.on(self.device):
            return self.pipeline().trajectory(prompt, seed=seed)

    def finish(self, folder: Path, *, data: pl.LightningDataModule, config: dict[str, Any]) -> dict[str, Any]:
        """Writes the moving average as weights to use, and beside it the autoencoder that belongs to it."""
        path = folder / "weights.safetensors"
        state = drop_frozen(self.ema.module, whole_state(self.ema.module))
        if self.global_rank:
            return {"weights": path.name}
        save_weights(path, state, target="ldm.training.LatentDiffusionModule", config=config)
        if source := (config.get("autoencoder") or {}).get("path"):
            shutil.copyfile(source, folder / "autoencoder.safetensors")
        keep_text_files(config.get("model"), folder)
        return {"weights": path.name}


def check_class_ids(network: nn.Module, conditioner: Conditioner, *, condition_dropout: float) -> None:
    """Raises ValueError for ids beyond a network's table of classes, which a GPU would end in without a word."""
    known = getattr(getattr(network, "accepted", None), "num_classes", None)
    for part in conditioner.modules():
        if known is None or not isinstance(part, ClassIds):
            continue
        if part.num_classes > known:
            raise ValueError(
                f"got conditioner.num_classes={part.num_classes} and network.num_classes={known}, expected a network "
                f"that knows as many; set network.num_classes={part.num_classes}"
            )
        # The others' tables have a row more, or none: in them the id after the last means "no class".
        if isinstance(network, UNet) and part.num_classes == known and condition_dropout:
            raise ValueError(
                f"got model.condition_dropout={condition_dropout} with {type(network).__name__} of network.num_classes="
                f'{known}, whose table has no row for "no class", expected one more than conditioner.num_classes; set '
                f"network.num_classes={known + 1}, or model.condition_dropout=0"
            )

"""What one training step of an experiment takes, part by part, as a function of the batch size."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ldm.cli import plan_parts as parts
from ldm.cli.errors import UserError, did_you_mean, user_mistakes
from ldm.cli.plan_count import Amount, Line, forward_amount, step_amounts
from ldm.cli.plan_told import Told

LATENT_DIFFUSION = "ldm.training.LatentDiffusionModule"
AUTOENCODER = "ldm.training.AutoencoderModule"
CLASSIFIER = "ldm.training.NoisyClassifierModule"
DTYPES = {"32": None, "32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
# Text encoders write their states as float16, moments as they come: see `ldm data encode`.
HALF, FLOAT = 2, 4


@dataclass(frozen=True)
class Work:
    """A training step, without the optimizer's part.

    Args:
        step: forward and backward pass of what is trained; `plain` is that without recomputation, in FLOPs a sample.
        forward: of what is trained, in FLOPs a sample.
        parts: other computations by name, such as "first stage" and "text encoder"; left out where precomputed.
        trained: elements of each trained parameter; `frozen` elements that stay on the device beside them.
        largest_block: most elements that one block of the network has.
        counts: parameters by part.
        sample_bytes: read for one sample; `reads` says of what.
        notes: what was assumed.
    """

    step: Line
    plain: float
    forward: float
    parts: dict[str, Line]
    trained: list[int]
    frozen: int
    averaged: bool
    largest_block: int
    counts: dict[str, int]
    sample_bytes: float
    reads: str
    jpeg_bytes: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def flops(self) -> dict[str, float]:
        """FLOPs a sample by part."""
        own = {"forward": self.forward, "backward": self.plain - self.forward}
        recomputed = self.step.each.total - self.plain
        again = {"recomputation": recomputed} if recomputed > 1e-6 * self.plain else {}
        return {**own, **again, **{name: line.each.total for name, line in self.parts.items()}}


def count_work(config: DictConfig) -> Work:
    """Counts an experiment's training step.

    Raises:
        UserError: this kind of training cannot be counted, or a setting is wrong.
    """
    # What the import of text encoders says there is about other packages.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    target = OmegaConf.select(config, "model._target_")
    if target == LATENT_DIFFUSION:
        return _latent_diffusion(config)
    if target == AUTOENCODER:
        return _autoencoder(config)
    if target == CLASSIFIER:
        return _classifier(config)
    raise UserError(
        f"model: got {target}, expected latent diffusion, an autoencoder or a noisy classifier, which are what can be "
        "planned; choose another experiment"
    )


def dtype_of(config: DictConfig) -> torch.dtype | None:
    """What products are computed in; None is float32.

    Raises:
        UserError: a precision that is not planned with.
    """
    precision = str(config.trainer.precision)
    if precision not in DTYPES:
        hint = did_you_mean(precision, list(DTYPES))
        raise UserError(f"trainer.precision: got {precision}, expected one of {', '.join(DTYPES)}{hint}")
    return DTYPES[precision]


def _latent_diffusion(config: DictConfig) -> Work:
    dtype, notes = dtype_of(config), list[str]()
    network = parts.build_on_meta(parts.plain(config, "model.denoiser.network"))
    first_stage = parts.build_first_stage(config)
    resolution, precomputed = _resolution(config, notes)
    told = Told(config, network, first_stage, resolution=resolution, dtype=dtype, notes=notes)
    shape = (first_stage.latent_channels, *(resolution // first_stage.downsampling_factor,) * 2)
    lines = network_lines(network, shape, lambda size: [told.conditioning(size)], dtype)
    others = {} if precomputed else _encoding(first_stage, resolution, dtype)
    if told.line is not None and told.line.each.total:
        others["trained text encoder" if told.trained else "text encoder"] = told.line
    frozen_text = 0 if told.precomputed else told.frozen
    moments = (first_stage.moment_channels, *shape[1:])
    size, reads = _sample_bytes(moments if precomputed else None, resolution, told)
    return Work(
        step=lines[0],
        plain=lines[1],
        forward=lines[2],
        parts=others,
        trained=parts.num_trained(network) + told.trained,
        frozen=sum(p.numel() for p in first_stage.parameters()) + frozen_text,
        averaged=True,
        largest_block=largest_block(network),
        counts={
            "network": sum(p.numel() for p in network.parameters()),
            "first stage": sum(p.numel() for p in first_stage.parameters()),
            "conditioner": told.frozen + sum(told.trained),
        },
        sample_bytes=size,
        reads=reads,
        jpeg_bytes=0.0 if precomputed else _jpeg_bytes(resolution),
        notes=notes,
    )


def _resolution(config: DictConfig, notes: list[str]) -> tuple[int, bool]:
    """(Pixels a side, whether the first stage's moments are read from shards)."""
    asked = config.get("latents", "auto")
    if asked not in ("auto", "precomputed", "encoded"):
        raise UserError(f"latents: got {asked}, expected auto, precomputed or encoded")
    given = OmegaConf.select(config, "data.resolution")
    size = given or OmegaConf.select(config, "model.sampling.image_size")
    if not isinstance(size, int):
        raise UserError("data.resolution: got none, expected pixels a side; set data.resolution=256")
    if asked == "auto":
        asked = "precomputed" if given is None else "encoded"
        reason = "data.resolution is null" if given is None else "data.resolution is given"
        notes.append(f"latents are {asked}, since {reason}; latents=precomputed or latents=encoded says otherwise")
    return size, asked == "precomputed"


def network_lines(
    network: Any,
    shape: Sequence[int],
    told: Callable[[int], Sequence[Any]],
    dtype: torch.dtype | None,
) -> tuple[Line, float, float]:
    """(A step, FLOPs a sample of one without recomputation, and of the forward pass alone).

    Args:
        network: what is trained, on the meta device.
        shape: (C, H, W) of a sample x.
        told: what the network takes behind x and times, by the batch size.
        dtype: of products; None is float32.
    """
    network.train()
    kept = [parameter for parameter in network.parameters() if parameter.requires_grad]

    def count(size: int) -> tuple[Amount, Amount]:
        # What network and conditioner do not agree on is a user's mistake.
        with user_mistakes():
            return count_built(size)

    def count_built(size: int) -> tuple[Amount, Amount]:
        x, t = torch.empty(size, *shape, device="meta"), torch.empty(size, device="meta")
        others = told(size)
        return step_amounts(lambda: network(x, t, *others).float().square().mean(), dtype=dtype, parameters=kept)

    amounts = {size: count(size) for size in (8, 16)}
    step = Line.through(lambda size: amounts[size][1])
    forward = Line.through(lambda size: amounts[size][0]).each.total
    plain = step.each.total
    if getattr(network, "checkpoint_blocks", False):
        network.checkpoint_blocks = False
        plain = count(1)[1].total
        network.checkpoint_blocks = True
    return step, plain, forward


def _encoding(first_stage: nn.Module, resolution: int, dtype: torch.dtype | None) -> dict[str, Line]:
    """The first stage's part of a step; none where pictures are the latents."""
    if not any(True for _ in first_stage.parameters()):
        return {}
    return {"first stage": encode_line(first_stage, resolution, dtype)}


def encode_line(first_stage: Any, resolution: int, dtype: torch.dtype | None) -> Line:
    def count(size: int) -> Amount:
        images = torch.empty(size, 3, resolution, resolution, device="meta")
        return forward_amount(lambda: first_stage.encode(images), dtype=dtype)

    return Line.through(count)


def largest_block(network: nn.Module) -> int:
    from ldm.training.sharding import blocks_of

    return max((sum(p.numel() for p in block.parameters()) for block in blocks_of(network)), default=0)


def _jpeg_bytes(resolution: int) -> float:
    """Of a picture of two bits a pixel, its sides 1.2 times the resolution: assumed."""
    return 2 / 8 * (1.2 * resolution) ** 2


def _picture_bytes(moments: Sequence[int] | None, resolution: int) -> tuple[float, str]:
    """Bytes read for a picture, a JPEG or its moments (C, h, w), and which of the two."""
    return (_jpeg_bytes(resolution), "JPEG") if moments is None else (float(FLOAT * math.prod(moments)), "moments")


def _sample_bytes(moments: Sequence[int] | None, resolution: int, told: Told) -> tuple[float, str]:
    """Bytes read for a sample: a JPEG, or moments; and embeddings."""
    size, reads = _picture_bytes(moments, resolution)
    if told.precomputed:
        text = sum(HALF * torch.Size(shape).numel() for name, (shape, _) in told.shapes.items() if name != "concat")
        return size + text, f"{reads} and text embeddings"
    return size, reads


def _classifier(config: DictConfig) -> Work:
    """The step of a classifier of noisy latents."""
    dtype, notes = dtype_of(config), list[str]()
    network = parts.build_on_meta(parts.plain(config, "model.classifier"))
    first_stage = parts.build_first_stage(config)
    resolution, precomputed = _resolution(config, notes)
    shape = (first_stage.latent_channels, *(resolution // first_stage.downsampling_factor,) * 2)
    step, plain, forward = network_lines(network, shape, lambda size: [], dtype)
    moments = (first_stage.moment_channels, *shape[1:]) if precomputed else None
    size, reads = _picture_bytes(moments, resolution)
    return Work(
        step=step,
        plain=plain,
        forward=forward,
        parts={} if precomputed else _encoding(first_stage, resolution, dtype),
        trained=parts.num_trained(network),
        frozen=parts.num_frozen(first_stage),
        averaged=False,
        largest_block=largest_block(network),
        counts={"classifier": sum(parts.num_trained(network)), "first stage": parts.num_frozen(first_stage)},
        sample_bytes=size,
        reads=reads,
        jpeg_bytes=0.0 if precomputed else _jpeg_bytes(resolution),
        notes=notes,
    )


def _autoencoder(config: DictConfig) -> Work:
    """The generator's and the discriminator's step, both active."""
    dtype, notes = dtype_of(config), ["the discriminator counts as active, which it is after adversarial_start"]
    module = parts.autoencoder_module(config)
    resolution = OmegaConf.select(config, "data.resolution")
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def count(size: int) -> tuple[Amount, Amount]:
        images = torch.empty(size, 3, resolution, resolution, device="meta", requires_grad=False)
        batch = {"image": images, "position": torch.empty(size, device="meta", dtype=torch.int64)}
        return step_amounts(lambda: module.loss(batch), dtype=dtype, parameters=trained)

    amounts = {size: count(size) for size in (8, 16)}
    step, forward = Line.through(lambda size: amounts[size][1]), Line.through(lambda size: amounts[size][0])
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in module.named_children()}
    return Work(
        step=step,
        plain=step.each.total,
        forward=forward.each.total,
        parts={},
        trained=[p.numel() for p in trained],
        frozen=parts.num_frozen(module),
        averaged=False,
        largest_block=0,
        counts={name: count for name, count in counts.items() if count},
        sample_bytes=_jpeg_bytes(resolution),
        reads="JPEG",
        jpeg_bytes=_jpeg_bytes(resolution),
        notes=notes,
    )

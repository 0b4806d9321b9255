"""What one training step of an experiment takes, part by part, as a function of the batch size."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm.cli import plan_parts as parts
from ldm.cli.errors import UserError, did_you_mean, user_mistakes
from ldm.cli.plan_count import Amount, Line, forward_amount, step_amounts
from ldm.diffusion.conditioning import Conditioning

LATENT_DIFFUSION = "ldm.training.LatentDiffusionModule"
AUTOENCODER = "ldm.training.AutoencoderModule"
DTYPES = {"32": None, "32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
# Elements of a conditioner that is run where shapes alone do not do.
SMALL = 10**8
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
    raise UserError(
        f"model: got {target}, expected latent diffusion or an autoencoder, which are what can be planned; choose "
        "another experiment"
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
    told = _Told(config, network, first_stage, resolution=resolution, dtype=dtype, notes=notes)
    shape = (first_stage.latent_channels, *(resolution // first_stage.downsampling_factor,) * 2)
    lines = network_lines(network, shape, told.conditioning, dtype)
    others: dict[str, Line] = {}
    if not precomputed:
        others["first stage"] = encode_line(first_stage, resolution, dtype)
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


class _Told:
    """What the network is told: the parts' shapes, and what it takes to make them."""

    def __init__(
        self,
        config: DictConfig,
        network: nn.Module,
        first_stage: nn.Module,
        *,
        resolution: int,
        dtype: torch.dtype | None,
        notes: list[str],
    ) -> None:
        self.line: Line | None = None
        self.trained: list[int] = []
        self.frozen = 0
        self.network, self.latents = network, int(getattr(first_stage, "latent_channels", 4))
        self.side = resolution // int(getattr(first_stage, "downsampling_factor", 8))
        node = parts.plain(config, "model.conditioner")
        self.precomputed = _is_precomputed(config, node)
        self.shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for mode in (FakeTensorMode(allow_non_fake_inputs=True), nullcontext()):
            try:
                with warnings.catch_warnings(), mode:
                    # About tensors that hold nothing, which these are.
                    warnings.simplefilter("ignore")
                    self._read(node, resolution, dtype, real=not isinstance(mode, FakeTensorMode))
                break
            except UserError:
                raise
            except Exception as error:
                # Values decide something, which shapes alone cannot: small conditioners are run, of others the
                # network's own arguments say what it is told.
                self.shapes, self.line, reason = {}, None, type(error).__name__
            if sum(self.trained) + self.frozen > SMALL:
                break
        if not self.shapes and self._by_arguments():
            notes.append(f"the conditioner is not counted ({reason}); its shapes are the network's")
        if self.precomputed:
            self.line = None

    def conditioning(self, size: int) -> Conditioning:
        """For a batch of this size, on the meta device."""
        shapes = self.shapes or self._by_arguments()
        return Conditioning(
            **{name: torch.empty((size, *shape), dtype=kind, device="meta") for name, (shape, kind) in shapes.items()}
        )

    def _read(self, node: Any, resolution: int, dtype: torch.dtype | None, *, real: bool) -> None:
        conditioner = parts.built_fake(_encoders(node))
        self.trained, self.frozen = parts.num_trained(conditioner), parts.num_frozen(conditioner)
        self._keep(self._ask(conditioner, 2, resolution), always_told=conditioner.always_told)
        if self.trained or self.frozen:
            sizes = (1, 2) if real else (8, 16)
            self.line = Line.through(lambda size: self._count(conditioner, size, resolution, dtype), sizes=sizes)

    def _count(self, conditioner: Any, size: int, resolution: int, dtype: torch.dtype | None) -> Amount:
        if not self.trained:
            return forward_amount(lambda: self._ask(conditioner, size, resolution), dtype=dtype)
        kept = [parameter for parameter in conditioner.parameters() if parameter.requires_grad]
        return step_amounts(lambda: _sum(self._ask(conditioner, size, resolution)), dtype=dtype, parameters=kept)[1]

    def _ask(self, conditioner: Any, size: int, resolution: int) -> Conditioning:
        batch = parts.batch_of(size, resolution=resolution, columns=conditioner.columns, tensor=torch.zeros)
        for name in conditioner.pictures(batch):
            batch[f"{name}_latents"] = torch.zeros(size, self.latents, self.side, self.side)
        try:
            cond: Conditioning = conditioner(batch)
        except Exception:
            # Labels are checked by their values; what stands for "no class" has the same shapes.
            cond = conditioner.null(size)
        return cond

    def _keep(self, cond: Conditioning, *, always_told: Sequence[str]) -> None:
        self.shapes = {name: (tuple(part.shape[1:]), part.dtype) for name, part in cond.parts().items()}
        # No null condition has these, whose values may have been looked at in vain.
        told = {name: shape for name, shape in self._by_arguments().items() if name in always_told}
        self.shapes = {**told, **self.shapes}

    def _by_arguments(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        arguments: dict[str, Any] = getattr(self.network, "arguments", {})
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if width := arguments.get("context_dim"):
            found["context"] = ((77, width), torch.float32)
        if arguments.get("num_classes"):
            found["vector"] = ((), torch.int64)
        elif width := arguments.get("vector_dim"):
            found["vector"] = ((width,), torch.float32)
        if extra := arguments.get("in_channels", self.latents) - self.latents:
            found["concat"] = ((extra, self.side, self.side), torch.float32)
        return found


def _is_precomputed(config: DictConfig, node: Any) -> bool:
    asked = config.get("text", "auto")
    if asked not in ("auto", "precomputed", "encoded"):
        raise UserError(f"text: got {asked}, expected auto, precomputed or encoded")
    return asked == "precomputed" or (asked == "auto" and "PrecomputedText" in str(node))


def _encoders(node: Any) -> Any:
    """A conditioner's node with the text encoder itself where its embeddings are read."""
    if isinstance(node, list):
        return [_encoders(item) for item in node]
    if not isinstance(node, dict):
        return node
    if str(node.get("_target_")).endswith("PrecomputedText"):
        encoder = node["encoder"]
        several = encoder if isinstance(encoder, list) else [encoder]
        whole = [{key: value for key, value in one.items() if key != "_partial_"} for one in several]
        return whole[0] if len(whole) == 1 else {"_target_": "ldm.conditioners.Combined", "conditioners": whole}
    return {key: _encoders(value) for key, value in node.items()}


def _sum(cond: Conditioning) -> Tensor:
    floats = [part.float().sum() for part in cond.parts().values() if part.is_floating_point() and part.requires_grad]
    return torch.stack(floats).sum()


def network_lines(
    network: Any,
    shape: Sequence[int],
    conditioning: Callable[[int], Conditioning],
    dtype: torch.dtype | None,
) -> tuple[Line, float, float]:
    """(A step, FLOPs a sample of one without recomputation, and of the forward pass alone)."""
    network.train()
    kept = [parameter for parameter in network.parameters() if parameter.requires_grad]

    def count(size: int) -> tuple[Amount, Amount]:
        # What network and conditioner do not agree on is a user's mistake.
        with user_mistakes():
            return count_built(size)

    def count_built(size: int) -> tuple[Amount, Amount]:
        x, t = torch.empty(size, *shape, device="meta"), torch.empty(size, device="meta")
        cond = conditioning(size)
        return step_amounts(lambda: network(x, t, cond).float().square().mean(), dtype=dtype, parameters=kept)

    amounts = {size: count(size) for size in (8, 16)}
    step = Line.through(lambda size: amounts[size][1])
    forward = Line.through(lambda size: amounts[size][0]).each.total
    plain = step.each.total
    if getattr(network, "checkpoint_blocks", False):
        network.checkpoint_blocks = False
        plain = count(1)[1].total
        network.checkpoint_blocks = True
    return step, plain, forward


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


def _sample_bytes(moments: Sequence[int] | None, resolution: int, told: _Told) -> tuple[float, str]:
    """Bytes read for a sample: a JPEG, or moments; and embeddings."""
    if moments is None:
        size, reads = _jpeg_bytes(resolution), "JPEG"
    else:
        numel = 1
        for length in moments:
            numel *= length
        size, reads = float(FLOAT * numel), "moments"
    if told.precomputed:
        text = sum(HALF * torch.Size(shape).numel() for name, (shape, _) in told.shapes.items() if name != "concat")
        return size + text, f"{reads} and text embeddings"
    return size, reads


def _autoencoder(config: DictConfig) -> Work:
    """The generator's and the discriminator's step, both active."""
    dtype, notes = dtype_of(config), ["the discriminator counts as active, which it is after adversarial_start"]
    module = _autoencoder_module(config)
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


def _autoencoder_module(config: DictConfig) -> Any:
    node = parts.plain(config, "model")
    module = parts.build_on_meta({key: value for key, value in node.items() if key != "perceptual"})
    autoencoder = module.autoencoder
    object.__setattr__(autoencoder, "check_images", lambda images: None)

    def sampled(images: Tensor, positions: Tensor) -> Any:
        noise = torch.empty(len(images), *autoencoder.latent_shape(images), device="meta")
        return autoencoder(images, noise=noise)

    nothing = lambda *_, **__: None  # noqa: E731
    for name, function in {"reconstruct_sampled": sampled, "log": nothing, "log_dict": nothing}.items():
        object.__setattr__(module, name, function)
    module.num_steps = module.adversarial_start
    return module

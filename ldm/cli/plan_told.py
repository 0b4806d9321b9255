"""What a network is told in training, and what it takes to make that: shapes alone where these do."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm.cli import plan_parts as parts
from ldm.cli.errors import UserError
from ldm.cli.plan_count import Amount, Line, forward_amount, step_amounts
from ldm.diffusion.conditioning import Conditioning

# Elements of a conditioner that is run where shapes alone do not do.
SMALL = 10**8


class Told:
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

"""Training of the digits judge on the real training scans."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ldm.networks.digit_classifier import DigitClassifier, DigitPrediction
from ldm.nn.weights import save_weights
from ldm.training.clipping import Clipped
from ldm.training.randomness import generator_for

if TYPE_CHECKING:
    from ldm.data import ShardDataModule

READINGS = ("digit", "ink", "paper")


class DigitClassifierModule(Clipped):
    """Trains a `DigitClassifier` on batches of "image", "digit", "ink" and "paper".

    Training shards hold no never-seen combination of digit and colours. To judge those as fairly as the others, every
    training image is taken apart into its ink map with the true colours, moved a little, and painted anew in ink and
    paper drawn from all pairs; none of that reaches the generative model.

    Args:
        classifier: the network to train.
        optimizer: from parameters to an optimizer.
        lr_schedule: from the optimizer to a schedule, stepped once an optimizer step.
        rotation: largest turn of the ink map, degrees.
        shift: largest move, as a share of the image's side.
        scale: largest change of size, natural logarithm.
        noise: standard deviation added to painted images in [-1, 1], so that faint artefacts decide nothing.
        seed: of all of these; with a sample's position in the stream it decides them.
    """

    def __init__(
        self,
        classifier: DigitClassifier,
        *,
        optimizer: Callable[..., Optimizer],
        lr_schedule: Callable[[Optimizer], LRScheduler],
        rotation: float = 10.0,
        shift: float = 0.08,
        scale: float = 0.1,
        noise: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.make_optimizer, self.make_lr_schedule = optimizer, lr_schedule
        self.rotation, self.shift, self.scale, self.noise = rotation, shift, scale, noise
        self.seed = seed

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Cross entropies of digit, ink and paper on repainted images."""
        images, ink, paper = self.repaint(batch)
        losses = cross_entropies(self.classifier(images, ink=ink, paper=paper), batch["digit"], ink, paper)
        loss = torch.stack(list(losses.values())).sum()
        self.log("train/loss", loss)
        self.log_dict({f"train/{name}_loss": value for name, value in losses.items()})
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Accuracies on untouched images with predicted colours, as the judge is used later."""
        hits = correct(self.classifier(batch["image"]), batch)
        logged = {f"val/{name}_accuracy": hit.float().mean() for name, hit in hits.items()}
        self.log_dict(logged, batch_size=len(batch["image"]), sync_dist=True, on_epoch=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over the classifier, and its learning rate by step."""
        optimizer = self.clippable(self.make_optimizer)(list(self.classifier.parameters()))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_lr_schedule(optimizer), "interval": "step"},
        }

    def repaint(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Moved and repainted images (B, 3, H, W) in [-1, 1] with their new ink (B,) and paper (B,)."""
        ink_map = self.classifier.ink_map(batch["image"], batch["ink"], batch["paper"])
        uniform, eps = _draw(self.seed, batch["position"], batch["image"].shape[1:])
        moved = move(ink_map, uniform[:4] * 2 - 1, rotation=self.rotation, shift=self.shift, scale=self.scale)
        ink, paper = pick_colours(uniform[4], uniform[5], num_colours=len(self.classifier.palette))
        images = self.classifier.paint(moved, ink, paper)
        return (images + self.noise * eps).clamp(-1, 1), ink, paper

    @torch.no_grad()
    def validate(self, data: ShardDataModule) -> dict[str, float]:
        """Shares of all validation images, whichever rank reads them, whose digit, ink and paper are named right."""
        self.classifier.eval()
        totals = torch.zeros(1 + len(READINGS), dtype=torch.float64, device=self.device)
        for batch in data.iterate_once("validation", 256):
            hits = correct(self.classifier(batch["image"].to(self.device)), batch)
            counts = [float(len(batch["image"])), *(hit.sum().item() for hit in hits.values())]
            totals += torch.tensor(counts, dtype=torch.float64, device=self.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(totals)
        count, *right = totals.tolist()
        return {f"{name}_accuracy": value / count for name, value in zip(READINGS, right, strict=True)}

    def finish(self, folder: Path, *, data: ShardDataModule, config: Mapping[str, Any]) -> dict[str, Any]:
        """Writes `classifier.safetensors` into the run folder and returns its name and the validation accuracies."""
        path = Path(folder) / "classifier.safetensors"
        arguments = {key: value for key, value in config["model"]["classifier"].items() if key != "_target_"}
        if self.global_rank == 0:
            save_weights(path, self.classifier.state_dict(), target="ldm.networks.DigitClassifier", config=arguments)
        self.to(self.trainer.strategy.root_device)
        return {"classifier": path.name, **self.validate(data)}


def cross_entropies(prediction: DigitPrediction, digit: Tensor, ink: Tensor, paper: Tensor) -> dict[str, Tensor]:
    """Mean cross entropy of each of the three readings, from true classes (B,)."""
    return {
        "digit": F.cross_entropy(prediction.digit, digit),
        "ink": F.cross_entropy(prediction.ink, ink),
        "paper": F.cross_entropy(prediction.paper, paper),
    }


def correct(prediction: DigitPrediction, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Which of the B images have their digit, ink and paper named right: three masks (B,)."""
    device = prediction.digit.device
    return {name: getattr(prediction, name).argmax(dim=1) == batch[name].to(device) for name in READINGS}


def pick_colours(first: Tensor, second: Tensor, *, num_colours: int) -> tuple[Tensor, Tensor]:
    """Ink (B,) and paper (B,), never equal and every pair as likely, from two uniform draws (B,) in [0, 1)."""
    ink = (first * num_colours).long()
    offset = 1 + (second * (num_colours - 1)).long()
    return ink, (ink + offset) % num_colours


def move(maps: Tensor, draws: Tensor, *, rotation: float, shift: float, scale: float) -> Tensor:
    """Turns (degrees), scales (natural logarithm) and shifts (share of the side) each map (B, 1, H, W).

    `draws` (4, B) in [-1, 1] says how much of the largest turn, scale, shift right and shift down each map gets.
    """
    angle, log_scale, right, down = draws.unbind()
    angle, size = angle * math.radians(rotation), torch.exp(log_scale * scale)
    # affine_grid's coordinates span -1..1, so a share of the side counts twice.
    first = [size * angle.cos(), -size * angle.sin(), 2 * shift * right]
    second = [size * angle.sin(), size * angle.cos(), 2 * shift * down]
    matrix = rearrange(torch.stack(first + second), "(row column) b -> b row column", row=2)
    grid = F.affine_grid(matrix, list(maps.shape), align_corners=False)
    return F.grid_sample(maps, grid, align_corners=False)


def _draw(seed: int, positions: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Uniform numbers (6, B) in [0, 1) and standard normal ones (B, *shape), both by position in the stream."""
    uniform, eps = [], []
    for position in positions.tolist():
        generator = generator_for(seed, position)
        uniform.append(torch.rand(6, generator=generator))
        eps.append(torch.randn(tuple(shape), generator=generator))
    return torch.stack(uniform, dim=1).to(positions.device), torch.stack(eps).to(positions.device)

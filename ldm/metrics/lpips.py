"""LPIPS: distance between images in the activations of a classifier, weighted to agree with people."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.metrics.weights import find_weights, load_strictly, read_weights, sha256_of, torch_hub_file


class Backbone(NamedTuple):
    """A torchvision network whose activations are compared."""

    constructor: str
    file: str
    # Where each compared activation ends in `features`.
    ends: tuple[int, ...]
    widths: tuple[int, ...]


BACKBONES = {
    "vgg": Backbone("vgg16", "vgg16-397923af.pth", (4, 9, 16, 23, 30), (64, 128, 256, 512, 512)),
    "alex": Backbone("alexnet", "alexnet-owt-7be5be79.pth", (2, 5, 8, 10, 12), (64, 192, 384, 256, 256)),
}
# What the authors' scaling of images in [-1, 1] amounts to.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
    """sum_l mean_hw sum_c w_lc (f_lc(x) - f_lc(y))^2 with f_l the l-th activation, normalised over its channels.

    It can be differentiated, so it also serves as a loss.

    Args:
        weights_path: the backbone's ImageNet weights as torchvision has them. None looks in torch.hub's cache; nothing
            is ever downloaded.
        backbone: "vgg" or "alex"; published reconstruction figures use either, so the name goes with the value.
        heads_path: the weights w of LPIPS version 0.1. None takes those that come with torchmetrics.

    Raises:
        FileNotFoundError: no weights; the message names file, source and option.
        ValueError: another backbone.

    Source: Zhang et al. 2018, eq. 1.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self, weights_path: Path | str | None = None, *, backbone: str = "vgg", heads_path: Path | str | None = None
    ) -> None:
        super().__init__()
        from torchvision import models  # type: ignore[import-untyped]

        if backbone not in BACKBONES:
            raise ValueError(f"got backbone={backbone!r}, expected one of {', '.join(BACKBONES)}")
        kind = BACKBONES[backbone]
        path = _backbone_weights(kind, weights_path)
        heads = _heads_file(backbone, heads_path)
        with torch.device("meta"):
            network: Any = models.get_model(kind.constructor, weights=None).features
        state = {name.removeprefix("features."): v for name, v in read_weights(path).items() if "features." in name}
        load_strictly(network, state, path, option="weights_path")
        # In place, a ReLU would overwrite the activation before it.
        layers = [nn.ReLU() if isinstance(layer, nn.ReLU) else layer for layer in network]
        self.stages = nn.ModuleList(
            nn.Sequential(*layers[start:end]) for start, end in zip((0, *kind.ends), kind.ends, strict=False)
        )
        for level, head in enumerate(read_heads(heads, len(kind.ends))):
            self.register_buffer(f"head{level}", head)
        for name, values in (("shift", SHIFT), ("scale", SCALE)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()
        self.backbone, self.weights = backbone, path.name
        self.sha256, self.heads_sha256 = sha256_of(path), sha256_of(heads)

    def describe(self) -> dict[str, Any]:
        """What goes into the protocol."""
        names = ("weights", "sha256", "heads_sha256")
        return {"network": f"LPIPS {self.backbone}", **{name: getattr(self, name) for name in names}}

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Distances (B,) between images and others (B, 3, H, W) in [-1, 1]."""
        return self.between(self.embed(images), self.embed(others))

    def embed(self, images: Tensor) -> list[Tensor]:
        """Normalised activations, each (B, C_l, H_l, W_l), of images (B, 3, H, W) in [-1, 1]."""
        x = (images.to(self.shift.dtype) - self.shift) / self.scale
        activations = []
        for stage in self.stages:
            x = stage(x)
            # Squares of activations above 256 are beyond float16, in which autocast leaves them.
            exact = x.to(torch.promote_types(x.dtype, torch.float32))
            activations.append(exact / torch.sqrt(exact.square().sum(dim=1, keepdim=True) + 1e-8))
        return activations

    def between(self, activations: list[Tensor], others: list[Tensor]) -> Tensor:
        """Distances (B,) from the activations of B images and B others."""
        total = activations[0].new_zeros(len(activations[0]))
        for level, (x, y) in enumerate(zip(activations, others, strict=True)):
            head = getattr(self, f"head{level}")
            total = total + ((x - y).square() * head).sum(dim=1).mean((1, 2))
        return total


def _backbone_weights(kind: Backbone, weights_path: Path | str | None) -> Path:
    return find_weights(
        weights_path,
        cached=[torch_hub_file(kind.file)],
        what=f"torchvision {kind.constructor}",
        source=f"https://download.pytorch.org/models/{kind.file}",
        option="weights_path",
    )


def _heads_file(backbone: str, heads_path: Path | str | None) -> Path:
    bundled = Path(str(files("torchmetrics.functional.image"))) / "lpips_models" / f"{backbone}.pth"
    source = f"weights/v0.1/{backbone}.pth (github.com/richzhang/PerceptualSimilarity)"
    return find_weights(heads_path, cached=[bundled], what="LPIPS head", source=source, option="heads_path")


def read_heads(path: Path, num_levels: int) -> list[Tensor]:
    """The weights (C_l, 1, 1) of each level from the authors' file."""
    state = read_weights(path)
    return [state[f"lin{level}.model.1.weight"][0] for level in range(num_levels)]

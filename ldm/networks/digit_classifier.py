"""The judge of the digits experiments: reads digit, ink and paper off a rendered scan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from ldm.nn.weights import read_weights

IMAGE_SIZE = 32


@dataclass(frozen=True)
class DigitPrediction:
    """What the classifier reads off B images: logits of digit (B, 10), ink (B, 6) and paper (B, 6), features (B, D)."""

    digit: Tensor
    ink: Tensor
    paper: Tensor
    features: Tensor


class DigitClassifier(nn.Module):
    """Names digit, ink and paper of 32x32 images and gives digit features that carry shape, not colour.

    Colours are read from the RGB image; the digit is read from the ink map, in which every pixel is its place on the
    straight line from paper to ink. A red seven and a blue seven have the same map, hence the same features.

    Args:
        palette: RGB triples (0..255), one a colour class; all different.
        width: channels of the first convolution; the others follow it.
        feature_dim: size D of the features.

    Raises:
        ValueError: a palette of fewer than two colours, with equal colours, or outside 0..255.
    """

    def __init__(
        self,
        palette: Sequence[Sequence[int]],
        *,
        width: int = 32,
        feature_dim: int = 64,
        num_digits: int = 10,
    ) -> None:
        super().__init__()
        self.num_features = feature_dim
        self.register_buffer("palette", palette_tensor(palette), persistent=False)
        self.palette: Tensor
        self.colour_net = nn.Sequential(
            *_convolution(3, width // 2, kernel=5, stride=2),
            *_convolution(width // 2, width, kernel=3, stride=2),
            nn.Flatten(),
            nn.Linear(width * (IMAGE_SIZE // 4) ** 2, 2 * len(palette)),
        )
        self.shape_net = nn.Sequential(
            # The scans are 8x8: 16x16 keeps all that a generated shape can differ in, at a quarter of the cost.
            nn.AvgPool2d(2),
            *_convolution(1, width, kernel=5, stride=2),
            *_convolution(width, 2 * width, kernel=3, stride=1),
            *_convolution(2 * width, 2 * width, kernel=3, stride=2),
            nn.Flatten(),
            nn.Linear(2 * width * (IMAGE_SIZE // 8) ** 2, feature_dim),
        )
        self.digit_head = nn.Sequential(nn.SiLU(), nn.Linear(feature_dim, num_digits))

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Rebuilds an exported classifier in evaluation mode.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file holds another module's weights.
        """
        state, target, config = read_weights(path)
        if not target.endswith("." + cls.__name__):
            raise ValueError(f"got {path} with weights of {target}, expected a {cls.__name__}; name a classifier file")
        classifier = cls(**config)
        classifier.load_state_dict(state)
        return classifier.eval().requires_grad_(False)

    def forward(self, images: Tensor, *, ink: Tensor | None = None, paper: Tensor | None = None) -> DigitPrediction:
        """Reads images (B, 3, 32, 32) in [-1, 1].

        `ink` and `paper` (B,) are the true colours where they are known (training); otherwise those predicted here.

        Raises:
            ValueError: images of another shape.
        """
        if tuple(images.shape[1:]) != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"got images of shape {tuple(images.shape)}, expected (B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}); "
                f"this classifier reads the digits data only"
            )
        ink_logits, paper_logits = self.colour_net(images).chunk(2, dim=1)
        if ink is None or paper is None:
            ink, paper = most_likely_colours(ink_logits, paper_logits)
        features = self.shape_net(self.ink_map(images, ink, paper))
        return DigitPrediction(self.digit_head(features), ink_logits, paper_logits, features)

    def ink_map(self, images: Tensor, ink: Tensor, paper: Tensor) -> Tensor:
        """Each pixel's place on the line from paper (0) to ink (1), clipped: (B, 1, H, W) from colour classes (B,)."""
        origin = rearrange(self.palette[paper], "b c -> b c 1 1")
        line = rearrange(self.palette[ink], "b c -> b c 1 1") - origin
        projection = reduce((images - origin) * line, "b c h w -> b 1 h w", "sum")
        length = reduce(line.square(), "b c 1 1 -> b 1 1 1", "sum")
        # Equal ink and paper leave nothing to read: the map is then 0, not a division by zero.
        return (projection / length.clamp_min(torch.finfo(length.dtype).tiny)).clamp(0, 1)

    def paint(self, ink_map: Tensor, ink: Tensor, paper: Tensor) -> Tensor:
        """The rendering that `ink_map` inverts: (B, 3, H, W) in [-1, 1] from a map (B, 1, H, W) in [0, 1]."""
        ink_colour = rearrange(self.palette[ink], "b c -> b c 1 1")
        paper_colour = rearrange(self.palette[paper], "b c -> b c 1 1")
        return paper_colour + ink_map * (ink_colour - paper_colour)


def palette_tensor(palette: Sequence[Sequence[int]]) -> Tensor:
    """RGB triples 0..255 as a tensor (K, 3) in [-1, 1]; raises ValueError unless two or more, all different."""
    colours = {tuple(colour) for colour in palette}
    if len(palette) < 2 or len(colours) < len(palette):
        raise ValueError(
            f"got a palette of {len(palette)} with {len(colours)} different, expected 2 or more, none equal"
        )
    if any(len(colour) != 3 or min(colour) < 0 or max(colour) > 255 for colour in colours):
        raise ValueError(f"got the palette {list(palette)}, expected RGB triples of 0..255")
    return torch.tensor([list(colour) for colour in palette], dtype=torch.float32) / 127.5 - 1


def most_likely_colours(ink_logits: Tensor, paper_logits: Tensor) -> tuple[Tensor, Tensor]:
    """The best pair of *different* colours: (ink (B,), paper (B,)) from logits (B, K) each."""
    num_colours = ink_logits.shape[1]
    joint = rearrange(ink_logits, "b i -> b i 1") + rearrange(paper_logits, "b p -> b 1 p")
    same = torch.eye(num_colours, dtype=torch.bool, device=joint.device)
    best = rearrange(joint.masked_fill(same, -torch.inf), "b i p -> b (i p)").argmax(dim=1)
    return best // num_colours, best % num_colours


def _convolution(in_channels: int, out_channels: int, *, kernel: int, stride: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False)
    return convolution, nn.BatchNorm2d(out_channels), nn.SiLU()

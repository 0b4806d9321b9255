"""The patch discriminator that trains autoencoders adversarially."""

import functools
from collections.abc import Callable

from torch import Tensor, nn

from ldm.nn import GroupNorm32


class PatchDiscriminator(nn.Module):
    """Convolutional classifier of overlapping patches: images (B, C, H, W) to logits (B, 1, h, w), real is high.

    Each of num_layers convolutions halves the resolution. norm is "batch" (the published one), "group" or "none".
    Weights start as normal(0, 0.02). Raises ValueError for an unknown norm or fewer than one layer.
    Source: Isola et al. 2017, the 70x70 PatchGAN at num_layers = 3.
    """

    def __init__(
        self, in_channels: int = 3, base_channels: int = 64, *, num_layers: int = 3, norm: str = "batch"
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"got num_layers {num_layers}, expected at least 1; give the discriminator a layer")
        make_norm = _norm_factory(norm)
        # A batch norm has its own offset, so the published convolutions before it have none.
        conv = functools.partial(nn.Conv2d, kernel_size=4, padding=1, bias=norm != "batch")
        layers: list[nn.Module] = [nn.Conv2d(in_channels, base_channels, 4, stride=2, padding=1), _activation()]
        width = base_channels
        for layer in range(1, num_layers + 1):
            next_width = base_channels * min(2**layer, 8)
            stride = 2 if layer < num_layers else 1
            layers += [conv(width, next_width, stride=stride), make_norm(next_width), _activation()]
            width = next_width
        layers.append(nn.Conv2d(width, 1, 4, padding=1))
        self.main = nn.Sequential(*layers)
        self.apply(_initialize)

    def forward(self, images: Tensor) -> Tensor:
        """Give one logit a patch."""
        return self.main(images)


def _activation() -> nn.LeakyReLU:
    return nn.LeakyReLU(0.2, inplace=True)


def _norm_factory(norm: str) -> Callable[[int], nn.Module]:
    if norm == "batch":
        return nn.BatchNorm2d
    if norm == "group":
        return GroupNorm32
    if norm == "none":
        return nn.Identity
    raise ValueError(f"got norm {norm!r}, expected 'batch', 'group' or 'none'; choose one of them")


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)

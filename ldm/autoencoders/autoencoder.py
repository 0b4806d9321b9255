"""What every autoencoder shares: the way from images to latents and back, and the scale of its latents."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from ldm.nn.weights import read_weights

Kind = TypeVar("Kind", bound="Autoencoder")

IMAGE_TOLERANCE = 1e-3

Scale = float | Sequence[float]
"""One number for all channels of latents, or one for each."""


class Autoencoder(nn.Module, ABC):
    """Between images (B, 3, H, W) in [-1, 1] and the latents (B, C, h, w) that diffusion works on.

    `encode` gives *moments* (B, M, h, w): all that the encoder says of an image, unscaled, and what latent shards
    keep. `to_latents` makes latents of them, `decode` makes images of latents. The buffers `latent_scale` and
    `latent_shift` are the autoencoder's own: latents = (value - shift) * scale. They are scalars or, where C numbers
    were given, of shape (C, 1, 1). Raises ValueError for a scale that is not positive.

    Args:
        latent_channels: C.
        moment_channels: M.
        downsampling_factor: H / h.
    """

    regularization: ClassVar[Literal["kl", "quantization"]]
    """What `forward` gives besides reconstructions."""
    loss_unit: ClassVar[Literal["image", "value"]]
    """Whether that is a sum over an image or a mean over values; the error that it stands beside is taken alike."""

    latent_scale: Tensor
    latent_shift: Tensor

    def __init__(
        self,
        *,
        latent_channels: int,
        moment_channels: int,
        downsampling_factor: int,
        latent_scale: Scale = 1.0,
        latent_shift: Scale = 0.0,
    ) -> None:
        super().__init__()
        self.latent_channels, self.moment_channels = latent_channels, moment_channels
        self.downsampling_factor = downsampling_factor
        self.register_buffer("latent_scale", torch.ones(()))
        self.register_buffer("latent_shift", torch.zeros(()))
        self.set_latent_scale(latent_scale, latent_shift)

    @classmethod
    def load(cls, path: Path | str, *, latent_scale: Scale | None = None, latent_shift: Scale | None = None) -> Self:
        """Rebuild the autoencoder in a self-describing weights file, in eval mode; any kind of it, if of this class.

        The latents' scale and shift are the file's, where none are given: latent diffusion's own models on
        vector-quantised latents take these as they are, 1 and 0; EDM2 has one number for each channel.

        Raises FileNotFoundError without the file and ValueError when it holds something else.
        """
        state_dict, target, config = read_weights(path)
        kinds = {f"ldm.autoencoders.{kind.__name__}": kind for kind in _kinds(cls)}
        if target not in kinds:
            raise ValueError(
                f"got weights of {target} in {path}, expected {' or '.join(kinds)}; give an autoencoder's file"
            )
        autoencoder = kinds[target](**config)
        autoencoder.load_state_dict(state_dict)
        if latent_scale is not None or latent_shift is not None:
            scale, shift = (
                buffer.flatten().tolist() for buffer in (autoencoder.latent_scale, autoencoder.latent_shift)
            )
            autoencoder.set_latent_scale(
                scale if latent_scale is None else latent_scale, shift if latent_shift is None else latent_shift
            )
        return autoencoder.eval()

    def set_latent_scale(self, scale: Scale, shift: Scale = 0.0) -> None:
        """Set the scale and shift between the encoder's values and latents: one number, or one for each channel."""
        scales, shifts = _numbers(scale), _numbers(shift)
        if wrong := {len(scales), len(shifts)} - {1, self.latent_channels}:
            raise ValueError(
                f"got a latent scale or shift of {wrong.pop()} numbers, expected one, or one for each of "
                f"{self.latent_channels} channels"
            )
        if not (all(map(math.isfinite, [*scales, *shifts])) and min(scales) > 0):
            raise ValueError(
                f"got a latent scale of {scale} and shift of {shift}, expected a positive and a finite number; "
                "measure them on latents that are finite and not constant"
            )
        self._set_buffer("latent_scale", scales)
        self._set_buffer("latent_shift", shifts)

    def _set_buffer(self, name: str, numbers: list[float]) -> None:
        """One number in place, as long as the buffer holds one; another shape makes another buffer."""
        old: Tensor = getattr(self, name)
        if len(numbers) == 1 and not old.dim():
            old.fill_(numbers[0])
        else:
            setattr(
                self, name, old.new_tensor(numbers).view(-1, 1, 1) if len(numbers) > 1 else old.new_tensor(numbers[0])
            )

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to unscaled moments (B, M, h, w)."""

    @abstractmethod
    def to_latents(self, moments: Tensor, *, noise: Tensor | None) -> Tensor:
        """Scaled latents (B, C, h, w) of moments: sampled by standard normal noise (B, C, h, w), the mean for None."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Map scaled latents (B, C, h, w) to images (B, 3, H, W), about in [-1, 1]."""

    @abstractmethod
    def mean_and_std(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, C, h, w) of the unscaled latents that moments stand for."""

    @abstractmethod
    def forward(self, images: Tensor, *, noise: Tensor) -> tuple[Tensor, Tensor]:
        """What training needs: (reconstructions (B, 3, H, W) through sampled latents, the regularisation loss).

        Args:
            images: (B, 3, H, W) in [-1, 1].
            noise: standard normal, (B, *latent_shape(images)).
        """

    def latent_shape(self, images: Tensor) -> tuple[int, int, int]:
        """(C, h, w) of the latents of images (B, 3, H, W)."""
        height, width = (size // self.downsampling_factor for size in images.shape[-2:])
        return (self.latent_channels, height, width)

    def scaled(self, values: Tensor) -> Tensor:
        """Latents (B, C, h, w) of values in the encoder's units."""
        return (values - self.latent_shift) * self.latent_scale

    def from_latents(self, latents: Tensor) -> Tensor:
        """Undo the scale: latents (B, C, h, w) as `to_latents` gives them, back to the encoder's units."""
        return latents / self.latent_scale + self.latent_shift

    def check_images(self, images: Tensor) -> None:
        """Raise ValueError unless images (B, C, H, W) lie in [-1, 1] and divide into latents."""
        height, width = images.shape[-2:]
        factor = self.downsampling_factor
        if height % factor or width % factor:
            raise ValueError(f"got images of {height}x{width}, expected multiples of {factor}; crop or resize them")
        # One reduction and one transfer; NaN fails the comparison too.
        extent = images.detach().abs().amax().item()
        if not extent <= 1.0 + IMAGE_TOLERANCE:
            raise ValueError(
                f"got images with values up to {extent:g} in size, expected [-1, 1]; scale 0..255 by x / 127.5 - 1"
            )


def _numbers(value: Scale) -> list[float]:
    return [float(number) for number in value] if isinstance(value, Sequence) else [float(value)]


def _kinds(cls: type[Kind]) -> Iterator[type[Kind]]:
    """The class and all that inherit from it, the abstract ones left out."""
    if not cls.__abstractmethods__:
        yield cls
    for kind in cls.__subclasses__():
        yield from _kinds(kind)

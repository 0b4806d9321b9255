"""What the networks share in taking conditions: the check of what they were built for, extra channels, class ids."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.conditioning import Conditioning


@dataclass(frozen=True)
class AcceptedConditions:
    """The parts of a Conditioning that a network needs and takes.

    Args:
        context_dim: width of the context, which is needed then; None when the network takes no context.
        num_classes: the vector is class ids.
        vector_dim: the vector is real, and this wide.

    Raises:
        ValueError: num_classes and vector_dim together.
    """

    context_dim: int | None
    num_classes: int | None
    vector_dim: int | None

    def __post_init__(self) -> None:
        if self.num_classes is not None and self.vector_dim is not None:
            raise ValueError(
                f"got num_classes {self.num_classes} and vector_dim {self.vector_dim}, expected at most one; "
                "set the other to null"
            )

    def check(self, cond: Conditioning) -> None:
        """Raises ValueError when cond lacks a part that the network needs, or holds one that it has no use for."""
        self._check_context(cond.context, cond.mask)
        if self.num_classes is None and self.vector_dim is None:
            if cond.vector is not None:
                raise ValueError(
                    "got a vector condition, expected none; set num_classes (for ids) or vector_dim (for vectors)"
                )
        elif cond.vector is None:
            raise ValueError("got no vector condition, expected one; use a conditioner that gives class ids or vectors")
        else:
            self._check_vector(cond.vector)

    def _check_context(self, context: Tensor | None, mask: Tensor | None) -> None:
        if self.context_dim is None:
            if context is not None or mask is not None:
                raise ValueError(
                    "got a context or mask for a network without context_dim, expected neither; set context_dim to "
                    "the conditioner's width"
                )
            return
        if context is None:
            raise ValueError(
                f"got no context, expected one of width {self.context_dim}; use a conditioner that gives context, or "
                "set context_dim to null"
            )
        if context.shape[-1] != self.context_dim:
            raise ValueError(
                f"got a context of width {context.shape[-1]}, expected context_dim {self.context_dim}; make network "
                "and conditioner agree"
            )

    def _check_vector(self, vector: Tensor) -> None:
        if self.num_classes is not None:
            if vector.dtype != torch.int64 or vector.ndim != 1:
                raise ValueError(
                    f"got a vector condition {vector.dtype} of shape {tuple(vector.shape)}, expected class ids int64 "
                    "(B,); give ids, or set vector_dim instead of num_classes"
                )
        elif vector.ndim != 2 or vector.shape[1] != self.vector_dim:
            raise ValueError(
                f"got a vector condition of shape {tuple(vector.shape)}, expected (B, {self.vector_dim}); make "
                "vector_dim and the conditioner agree"
            )


def with_extra_channels(x: Tensor, cond: Conditioning, *, in_channels: int, multiple_of: int) -> Tensor:
    """Join x (B, C, H, W) and cond.concat (B, C', H, W) on channels.

    Raises:
        ValueError: H or W is no multiple of `multiple_of`, the sizes differ, or C + C' is not in_channels.
    """
    height, width = x.shape[-2:]
    if height % multiple_of or width % multiple_of:
        raise ValueError(
            f"got an input of {height}x{width}, expected multiples of {multiple_of}; "
            "change the image size, or the network's number of levels or patch size"
        )
    if cond.concat is not None:
        if cond.concat.shape[-2:] != x.shape[-2:]:
            raise ValueError(
                f"got a concat of {tuple(cond.concat.shape[-2:])} for an input of {height}x{width}, expected the "
                "same size; resize the concatenated condition"
            )
        x = torch.cat([x, cond.concat], dim=1)
    if x.shape[1] != in_channels:
        raise ValueError(
            f"got {x.shape[1]} channels (input and concat together), expected in_channels {in_channels}; "
            "set the network's in_channels, or the channels of latents and condition"
        )
    return x


def class_vectors(ids: Tensor, num_classes: int) -> Tensor:
    """Class ids (B,) in [0, num_classes] as float32 vectors (B, num_classes) of unit magnitude (mean square 1).

    A class is a one-hot vector times sqrt(num_classes); the id num_classes means "no class" and gives zeros.
    Source: Karras et al. 2022, 2024.
    """
    one_hot = F.one_hot(ids, num_classes + 1)[:, :num_classes]
    return one_hot.float() * num_classes**0.5

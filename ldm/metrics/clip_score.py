"""CLIP score: how well images fit their prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from ldm.metrics.features import as_seen, describe_network


class CLIPScore(Metric):
    """100 times the mean cosine between the embeddings of images and of their prompts.

    Values differ with the model, so one goes with its `describe()`. Papers on text to image report the mean cosine
    (some without the 100), with ViT-L/14 or ViT-g/14; Hessel et al. multiply by 2.5 instead and clamp each at 0.

    Args:
        clip: `OpenCLIPFeatures`, `TransformersCLIPFeatures`, or any module with `embed_images(images (B, 3, H, W) in
            [-1, 1])` and `embed_texts(texts)`, both to embeddings (B, D) of length 1.

    Raises:
        ValueError: another module; in `update`, another number of prompts than of images.

    Source: Hessel et al. 2021.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    network_name = "clip"
    uses_real = False

    total: Tensor
    count: Tensor

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        if not (hasattr(clip, "embed_images") and hasattr(clip, "embed_texts")):
            raise ValueError(
                f"got {type(clip).__name__} for the CLIP score, expected a module with embed_images and embed_texts, "
                "e.g. ldm.metrics.OpenCLIPFeatures"
            )
        self.clip: Any = clip.eval()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Adds images (B, 3, H, W) in [-1, 1] with the B prompts that they were made from."""
        if len(images) != len(prompts):
            raise ValueError(f"got {len(images)} images with {len(prompts)} prompts, expected one each")
        self.see(self.clip.embed_images(as_seen(images)), {"prompt": prompts}, real=False)

    def see(self, features: Tensor, batch: Mapping[str, Any], *, real: bool) -> Tensor:
        """Adds generated images by their embeddings (B, D) and batch["prompt"], their B prompts.

        Returns:
            100 times the cosine of each image (B,), float64.
        """
        rows = {text: row for row, text in enumerate(dict.fromkeys(batch["prompt"]))}
        embedded = self.clip.embed_texts(list(rows)).to(features.device).double()
        cosines = (features.double() * embedded[[rows[text] for text in batch["prompt"]]]).sum(dim=1)
        self.total += cosines.sum()
        self.count += len(features)
        return 100 * cosines

    def describe(self) -> dict[str, Any]:
        """What goes into the protocol."""
        return {"clip": describe_network(self.clip)}

    def compute(self) -> Tensor:
        """The score, a float64 scalar from -100 to 100; NaN without images."""
        return 100 * self.total / self.count
